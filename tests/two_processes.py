"""Two processes split the layers of a model by torch's own tensor parallelism; each prints how far its logits are from those of one.

    two_processes.py MEETING         two forks of this process meet at that file
    two_processes.py MEETING RANK    one of the two

Run by test_gpt.py.
"""
import os, sys

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llm_from_scratch.gpt import GPT, GPTConfig


def main(meeting, rank):
    torch.set_num_threads(3)                            # one vector's product would be shared out to all
    dist.init_process_group('gloo', init_method=f'file://{meeting}', rank=rank, world_size=2)
    config = GPTConfig(32, 16, 32, 2, 4, positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=True, d_ff=4096)
    model, ids = GPT(config, generator=torch.Generator().manual_seed(0)), torch.arange(24).view(2, 12)
    expected = model(ids)
    expected.square().mean().backward()
    slopes = [block.feed_forward.up.weight.grad for block in model.blocks]
    model.zero_grad()
    mesh = init_device_mesh('cpu', (2,))
    plan = {f'attention.{name}': ColwiseParallel() for name in ('query', 'key', 'value')} | {f'feed_forward.{name}': ColwiseParallel() for name in ('gate', 'up')}
    plan |= {name: RowwiseParallel() for name in ('attention.output', 'feed_forward.down')}
    for block in model.blocks: parallelize_module(block, mesh, plan)
    logits = model(ids)
    logits.square().mean().backward()
    grads = [block.feed_forward.up.weight.grad.full_tensor() for block in model.blocks]
    with torch.no_grad(): one = model(ids[:1, :1])                                 # a single vector, as when it writes
    share = model.blocks[0].feed_forward.up.weight.to_local().shape[0] / config.ff_width
    worst = max((logits - expected).abs().max(), (one - expected[:1, :1]).abs().max(), *((a - b).abs().max() for a, b in zip(grads, slopes)))
    sys.stdout.write(f'{rank} {share} {float(worst)}\n')
    sys.stdout.flush()
    dist.destroy_process_group()


def fork(meeting):
    "Both as forks of this process, which has imported what they need; the worst of their exit statuses."
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1]: continue
        status = 1
        try: main(meeting, rank); status = 0
        except BaseException as e: print(f'rank {rank} failed: {e!r}', file=sys.stderr, flush=True)
        finally: os._exit(status)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == '__main__': sys.exit(fork(sys.argv[1]) if len(sys.argv) == 2 else main(sys.argv[1], int(sys.argv[2])))
