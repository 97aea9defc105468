"Run by test_gpt.py in two processes: a model whose layers are split over both, by torch's own tensor parallelism, prints how far its logits are from those of one."
import sys

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llm_from_scratch.gpt import GPT, GPTConfig

torch.set_num_threads(3)                            # one vector's product would be shared out to all
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=int(sys.argv[1]), world_size=2)
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
print(f'{share} {float(worst)}')
dist.destroy_process_group()
