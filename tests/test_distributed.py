"Two processes against one: the same run, one all-reduce a step, a stop that all hear of, a resumed run bit for bit."
import json, os, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_training import same_model

from llm_from_scratch import training
from llm_from_scratch.distributed import DataParallel, join_processes
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.training import Callback, ProcessGroup, TrainConfig, Trainer, load_checkpoint, loader_for

INPUTS = ['imports:tests/together.py']
ROOT = Path(training.__file__).parent.parent
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc-per-node=2', '--master-addr=127.0.0.1', '--master-port=0', '--rdzv-backend=c10d', '--rdzv-endpoint=127.0.0.1:0']


class StopAt(Callback):
    "Asks for a stop after a step, on one rank alone; rank 0 may be asked by a signal."
    def __init__(self, rank, step=3, sent=False): self.rank, self.at, self.sent = rank, step, sent

    def step(self, trainer, record):
        if (trainer.world.rank, trainer.step) != (self.rank, self.at): return
        if self.sent: signal.raise_signal(signal.SIGTERM)
        else: trainer.stop('interrupted', 'I have seen enough')


def together(world, folder):
    "What each of several processes does: train, go on from the middle, end early; how often they met is counted."
    calls, all_reduce, save = [], dist.all_reduce, training.save_checkpoint
    dist.all_reduce = lambda *args, **options: calls.append(args) or all_reduce(*args, **options)
    def fresh(dropout, home=None, callbacks=(), eval_every=4, **settings):
        config = TrainConfig(**{'steps': 8, 'batch_size': 5, 'micro_batch_size': 1, 'lr': .01, 'precision': 'float32', 'save_every': 4, 'eval_every': eval_every, 'eval_batches': 2, **settings})
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=19, context_length=6, d_model=8, n_layers=1, n_heads=2, dropout=dropout))
        ids = np.random.default_rng(0).integers(0, 19, 299)
        held_out = loader_for(config, ids[:80], 6, world, shuffle=False) if eval_every else None
        return Trainer(model, config, loader_for(config, ids, 6, world), held_out, home, world=world, callbacks=callbacks)
    plain = fresh(0).fit()
    random = fresh(.3, f'{folder}/dropout'); random.fit()
    again = fresh(.3, f'{folder}/dropout')
    again.resume(step=4); again.fit()
    calls.clear()
    counted = fresh(0, eval_every=None); counted.fit()
    found = {'loss': plain.column('loss')[1], 'validation': plain.column('validation')[1], 'same': same_model(again, random), 'calls': len(calls),
             'losses': [r['loss'] for r in again.history] == [r['loss'] for r in random.history], 'seconds': plain.seconds,
             'ended': [[ended.reason, ended.step] for ended in (fresh(0, callbacks=[StopAt(world.size - 1)]).fit(), fresh(0, callbacks=[StopAt(0, sent=True)]).fit())]}
    if world.is_main: training.save_checkpoint = full_disk
    ended = fresh(0, f'{folder}/full', save_every=2).fit()
    found['full'] = [ended.reason, ended.step]
    training.save_checkpoint, dist.all_reduce = save, all_reduce
    Path(f'{folder}/rank{world.rank}.json').write_text(json.dumps(found))


def full_disk(*args): raise OSError(28, 'No space left on device')


@pytest.fixture(scope='module', params=[pytest.param([], id='forked', marks=pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork; torchrun is tried with the slow tests')),
                                        pytest.param(TORCHRUN, id='torchrun', marks=pytest.mark.slow)])
def found(request, tmp_path_factory, one_thread):
    "What one process has found, then each of two."
    folder = tmp_path_factory.mktemp('together')
    env = {k: v for k, v in os.environ.items() if k not in ('WORLD_SIZE', 'RANK')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *request.param, Path(__file__).with_name('together.py'), folder], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder/'one').mkdir()
    together(ProcessGroup(), folder/'one')
    return folder, *(json.loads((folder/name).read_text()) for name in ('one/rank0.json', 'rank0.json', 'rank1.json'))


def test_two_processes_learn_what_one_does(found):
    folder, one, *two = found
    for each in two:
        np.testing.assert_allclose(each['loss'], one['loss'], atol=1e-5)
        np.testing.assert_allclose(each['validation'], one['validation'], atol=1e-5)
        assert each['same'] and each['losses']
    assert two[0]['seconds'] == two[1]['seconds'] > 0                    # one clock holds for both
    assert len(load_checkpoint(folder/'dropout').state['parts']['generators']['ranks']) == 2


def test_the_processes_meet_once_a_step(found):
    _, one, *two = found
    assert one['calls'] == 0 and [each['calls'] for each in two] == [8 + 1] * 2     # and once to count the targets of the first step


def test_a_stop_that_one_process_asks_for_reaches_all_with_the_next_step(found):
    _, one, *two = found
    assert one['ended'] == [['interrupted', 3]] * 2 and one['full'] == ['save error', 2]
    for each in two: assert each['ended'] == [['interrupted', 4]] * 2 and each['full'] == ['save error', 3]


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with join_processes('cpu') as world: assert world == ProcessGroup() and not isinstance(world, DataParallel)
