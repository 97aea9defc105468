"""Two processes train one model, stop, resume, and write down what they saw.

    together.py FOLDER               started as it is: two forks of this process meet
    torchrun ... together.py FOLDER  each process that torchrun starts

Started by test_distributed.py, which compares them with one process.
"""
import os, socket, sys
from pathlib import Path

import torch
from test_distributed import KILLED, sharded, split_layers, together

from llm_from_scratch.distributed import join_processes
from llm_from_scratch.training import ProcessGroup


def meet(folder):
    with join_processes('cpu') as world:
        together(world, folder)
        sharded(world, folder, f'{folder}/one')
        split_layers(world, folder)


def fork(folder, size=2):
    "The processes as forks of this one, which has trained before: the parts of torch that are imported late are there."
    Path(f'{folder}/warm').mkdir()
    together(ProcessGroup(), f'{folder}/warm')
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
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return KILLED if min(codes) < 0 else max(codes)


if __name__ == '__main__':
    torch.set_num_threads(1)
    sys.exit(meet(sys.argv[1]) if 'WORLD_SIZE' in os.environ else fork(sys.argv[1]))
