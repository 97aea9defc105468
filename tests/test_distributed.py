"Two processes against one: the same run, one all-reduce a step, a stop that all hear of, a resumed run bit for bit."
import json, os, signal, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_training import same_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llm_from_scratch import training
from llm_from_scratch.distributed import DataParallel, join_processes, read_environment
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.optim import clip_grad_norm
from llm_from_scratch.training import OPTIMIZERS, Callback, ProcessGroup, TrainConfig, Trainer, gathered, load, load_checkpoint, loader_for, save, write_tensors

INPUTS = ['imports:tests/together.py']
ROOT = Path(training.__file__).parent.parent
KILLED = 75                         # exit status: a signal ended one of the processes, as when memory of torch's own is damaged
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


IDS = torch.randint(19, (4, 6), generator=torch.Generator().manual_seed(1))


def in_parts(world, seed=0):
    "A model, spread over the processes where there are several."
    model = GPT(GPTConfig(19, 6, 8, 2, 2, positions='rope', norm='rmsnorm'), generator=torch.Generator().manual_seed(seed))
    if world.size == 1: return model
    mesh = init_device_mesh('cpu', (world.size,))
    for block in model.blocks: fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded(world, folder, one):
    "What each of several processes does with its part of a model: train, save, read the file of one process, ask for the hidden states."
    found = {}
    for name in OPTIMIZERS:
        model, config = in_parts(world), TrainConfig(steps=1, lr=1e-3, weight_decay=.1)
        optimizers, norms = OPTIMIZERS[name](model, config), []
        mine = IDS[world.rank * 4 // world.size:(world.rank + 1) * 4 // world.size]
        for _ in range(3):
            model(mine, mine.roll(-1, 1)).backward()
            norms.append(float(gathered(clip_grad_norm(model.named_parameters(), .5))))
            for o in optimizers: o.step(); o.zero_grad()
        save(f'{folder}/{name}', model, optimizers, 3)
        found[name] = {'norms': norms, 'weights': {n: gathered(p.detach()).tolist() for n, p in model.named_parameters()}}
        other = in_parts(world, seed=1)
        again = OPTIMIZERS[name](other, config)
        assert load(f'{one}/{name}', other, again) == 3
        found[name]['hidden'] = other.hidden(IDS).tolist()             # a forward pass leaves some weights together
        save(f'{folder}/{name}-again', other, again, 3)
        write_tensors(f'{folder}/{name}-weights{world.rank}', other.state_dict())
        other.hidden(IDS)
        assert load(f'{one}/{name}', other, again) == 3
        other(mine, mine.roll(-1, 1)).backward()                     # and it goes on
        for o in again: o.step()
    config = TrainConfig(steps=6, batch_size=4, micro_batch_size=1, lr=1e-3, precision='float32', save_every=3, eval_every=3, eval_batches=2, optimizer='muon')
    def fresh():
        ids = np.random.default_rng(0).integers(0, 19, 299)
        return Trainer(in_parts(world), config, loader_for(config, ids, 6, world), loader_for(config, ids[:80], 6, world, shuffle=False), f'{folder}/run', world=world)
    whole_run, again = fresh(), fresh()
    found['losses'] = whole_run.fit().column('loss')[1]
    again.resume(step=3)
    found['again'] = again.fit().column('loss')[1]
    Path(f'{folder}/parts{world.rank}.json').write_text(json.dumps(found))


def split_layers(world, folder):
    "Each of two processes computes half of every layer, by torch's own tensor parallelism: how far is that from one?"
    torch.set_num_threads(3)                            # one vector's product would be shared out to all
    config = GPTConfig(32, 16, 32, 2, 4, positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=True, d_ff=4096)
    model, ids = GPT(config, generator=torch.Generator().manual_seed(0)), torch.arange(24).view(2, 12)
    expected = model(ids)
    expected.square().mean().backward()
    slopes = [block.feed_forward.up.weight.grad for block in model.blocks]
    model.zero_grad()
    mesh = init_device_mesh('cpu', (world.size,))
    plan = {f'attention.{name}': ColwiseParallel() for name in ('query', 'key', 'value')} | {f'feed_forward.{name}': ColwiseParallel() for name in ('gate', 'up')}
    plan |= {name: RowwiseParallel() for name in ('attention.output', 'feed_forward.down')}
    for block in model.blocks: parallelize_module(block, mesh, plan)
    logits = model(ids)
    logits.square().mean().backward()
    grads = [block.feed_forward.up.weight.grad.full_tensor() for block in model.blocks]
    with torch.no_grad(): one = model(ids[:1, :1])                                 # a single vector, as when it writes
    share = model.blocks[0].feed_forward.up.weight.to_local().shape[0] / config.ff_width
    worst = max((logits - expected).abs().max(), (one - expected[:1, :1]).abs().max(), *((a - b).abs().max() for a, b in zip(grads, slopes)))
    Path(f'{folder}/split{world.rank}.json').write_text(json.dumps({'share': share, 'worst': float(worst)}))


def full_disk(*args): raise OSError(28, 'No space left on device')


@pytest.fixture(scope='module', params=[pytest.param([], id='forked', marks=pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork; torchrun is tried with the slow tests')),
                                        pytest.param(TORCHRUN, id='torchrun', marks=pytest.mark.slow)])
def found(request, tmp_path_factory, one_thread):
    "What one process has found, then each of two; once more where the second kind died of a signal (seen once: of torch's memory, after all but the end)."
    env = {k: v for k, v in os.environ.items() if k not in ('WORLD_SIZE', 'RANK')} | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONFAULTHANDLER': '1'}
    for attempt in 'first', 'second':
        folder = tmp_path_factory.mktemp('together')
        (folder/'one').mkdir()
        together(ProcessGroup(), folder/'one'); sharded(ProcessGroup(), folder/'one', folder/'one')
        done = subprocess.run([sys.executable, *request.param, Path(__file__).with_name('together.py'), folder], env=env, capture_output=True, text=True, timeout=600)
        if done.returncode != KILLED: break
        warnings.warn(f'{attempt} attempt: a process was killed\n{done.stderr[-6000:]}', stacklevel=1)
    assert done.returncode == 0, done.stderr[-3000:]
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


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_model_in_parts_learns_what_a_whole_one_does(found, name):
    "torch's FSDP: each process holds half of every weight, and of what the optimizer remembers of it."
    folder = found[0]
    one, *two = (json.loads((folder/file).read_text())[name] for file in ('one/parts0.json', 'parts0.json', 'parts1.json'))
    for each in two:
        np.testing.assert_allclose(each['norms'], one['norms'], rtol=1e-5)
        for n, values in one['weights'].items(): np.testing.assert_allclose(each['weights'][n], values, rtol=0, atol=1e-6)
        np.testing.assert_allclose(each['hidden'], one['hidden'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_parts_are_saved_as_the_whole_and_read_again(found, name):
    folder = found[0]
    whole_file = (folder/'one'/name).read_bytes()
    assert (folder/f'{name}-again').read_bytes() == (folder/'one'/f'{name}-again').read_bytes() == whole_file and len((folder/name).read_bytes()) == len(whole_file)
    weights = (folder/'one'/f'{name}-weights0').read_bytes()
    assert (folder/f'{name}-weights0').read_bytes() == (folder/f'{name}-weights1').read_bytes() == weights


def test_a_trainer_takes_a_model_in_parts(found):
    "The losses are those of one process, and a resumed run gives them again, bit for bit."
    one, *two = (json.loads((found[0]/file).read_text()) for file in ('one/parts0.json', 'parts0.json', 'parts1.json'))
    for each in two:
        np.testing.assert_allclose(each['losses'], one['losses'], atol=1e-5)
        assert each['again'] == each['losses']
    ours, theirs = (load_checkpoint(found[0]/name).tensors for name in ('run', 'one/run'))
    for part in 'model', 'optimizer':
        for n, t in theirs[part].items(): torch.testing.assert_close(ours[part][n], t, rtol=0, atol=1e-5)


def test_layers_split_over_two_processes_against_one(found):
    for rank in '01':
        each = json.loads((found[0]/f'split{rank}.json').read_text())
        assert each['share'] == .5 and each['worst'] < 1e-5


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with join_processes('cpu') as world: assert world == ProcessGroup() and not isinstance(world, DataParallel)


MEETING = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}


@pytest.fixture
def surroundings(monkeypatch):
    "Sets the variables that a launcher would set, and no others."
    def put(**variables):
        for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'SLURM_PROCID', 'SLURM_LOCALID', *MEETING): monkeypatch.delenv(name, raising=False)
        for name, value in variables.items(): monkeypatch.setenv(name, value)
    return put


@pytest.mark.parametrize('variables', [{}, {'WORLD_SIZE': '1'}, {'WORLD_SIZE': '1', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}, {'WORLD_SIZE': '1', 'RANK': '0'}, {'SLURM_PROCID': '3', 'RANK': '2'}])
def test_a_process_that_is_alone_needs_no_others(surroundings, variables):
    surroundings(**variables)
    with join_processes('cpu') as world: assert world == ProcessGroup() and not isinstance(world, DataParallel)


@pytest.mark.parametrize(('variables', 'found'), [({'RANK': '5', 'LOCAL_RANK': '1'}, (5, 8, 1)), ({'SLURM_PROCID': '5', 'SLURM_LOCALID': '1'}, (5, 8, 1)), ({'RANK': '5'}, (5, 8, 5)), ({'RANK': '5', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '2'}, (5, 8, 2))])
def test_what_a_launcher_says_is_read_in_one_place(surroundings, variables, found):
    surroundings(WORLD_SIZE='8', **MEETING, **variables)
    assert read_environment() == found


@pytest.mark.parametrize(('variables', 'words'), [({'WORLD_SIZE': '2', **MEETING}, 'WORLD_SIZE is 2, but RANK is not set: start the processes with torchrun'), ({'WORLD_SIZE': '2', 'RANK': '0'}, 'but MASTER_ADDR, MASTER_PORT is not set'),
                                                  ({'WORLD_SIZE': 'two'}, "WORLD_SIZE must be a whole number, got 'two'")])
def test_half_an_environment_is_a_sentence(surroundings, variables, words):
    surroundings(**variables)
    with pytest.raises(ValueError, match=words), join_processes('cpu'): pass
