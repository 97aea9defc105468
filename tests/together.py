"""Two processes train one model, stop, resume, and write down what they saw.

    together.py FOLDER               started as it is: two forks of this process meet
    torchrun ... together.py FOLDER  each process that torchrun starts

Started by test_training.py, which compares them with one process.
"""
import json, os, socket, sys
from pathlib import Path

import numpy as np
import torch

from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.training import TrainConfig, Trainer, World, join_world, loader_for


def same_model(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


def together(world, folder):
    "What each of several processes does: train, then go on from the middle in another folder."
    def fresh(dropout, folder=None):
        config = TrainConfig(steps=8, batch_size=5, micro_batch_size=1, lr=.01, precision='float32', save_every=4, eval_every=4, eval_batches=2)
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=19, context_length=6, d_model=8, n_layers=1, n_heads=2, dropout=dropout))
        ids = np.random.default_rng(0).integers(0, 19, 299)
        return Trainer(model, config, loader_for(config, ids, 6, world), loader_for(config, ids[:80], 6, world, shuffle=False), folder, world=world)
    plain = fresh(0).fit()
    random = fresh(.3, f'{folder}/dropout'); random.fit()
    again = fresh(.3, f'{folder}/dropout')
    again.resume(step=4); again.fit()
    stopped = fresh(0)
    if world.rank == world.size - 1: stopped.listeners, stopped.log = [], lambda r: stopped.history.append(r) or (r['step'] == 3 and stopped.stop('interrupted'))
    ended = stopped.fit()
    found = {'loss': plain.column('loss')[1], 'validation': plain.column('validation')[1], 'same': same_model(again, random), 'ended': [ended.reason, ended.step],
             'losses': [r['loss'] for r in again.history] == [r['loss'] for r in random.history], 'world': world.size}
    Path(f'{folder}/rank{world.rank}.json').write_text(json.dumps(found))


def meet(folder):
    with join_world('cpu') as world: together(world, folder)


def fork(folder, size=2):
    "The processes as forks of this one, which has trained before: the parts of torch that are imported late are there."
    Path(f'{folder}/warm').mkdir()
    together(World(), f'{folder}/warm')
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(size))
    children = []
    for rank in map(str, range(size)):
        children.append(os.fork())
        if children[-1]: continue
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
        status = 1
        try: meet(folder); status = 0
        except BaseException as e: print(f'rank {rank} failed: {e!r}', file=sys.stderr, flush=True)
        finally: os._exit(status)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == '__main__':
    torch.set_num_threads(1)
    sys.exit(meet(sys.argv[1]) if 'WORLD_SIZE' in os.environ else fork(sys.argv[1]))
