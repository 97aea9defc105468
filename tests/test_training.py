"The trainer against the bare loop, one process against two, checkpoints against the safetensors library."
import io, json, logging, math, sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from torch import nn

from llm_from_scratch import training
from llm_from_scratch.costs import trace_step
from llm_from_scratch.data import IGNORE, BatchLoader
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.optim import SCHEDULES, AdamW
from llm_from_scratch.training import (
    OPTIMIZERS, Callback, DamagedCheckpoint, LivePlot, OptimizerMemory, ProcessGroup, SpikeDetector, TensorBoard, TrainConfig, Trainer, accumulate, checkpoints, choose_precision, compiled, evaluate,
    generator_states, join_state, latest_checkpoint, lm_loss, load, load_checkpoint, loader_for, lr_multiplier, matrix_speed, missing_compiler, plot_history, predict_run, read_log,
    restore_generators, save, save_checkpoint, split_state, write_tensors)

INPUTS = []
ROOT = Path(training.__file__).parent.parent
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]


def make(folder=None, d_model=8, dropout=.2, validation=True, parts=None, **settings):
    "A small trainer, the same each time."
    config = TrainConfig(**{'steps': 6, 'batch_size': 4, 'lr': .01, 'precision': 'float32', 'eval_batches': 2, **settings})
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=19, context_length=6, d_model=d_model, n_layers=1, n_heads=2, dropout=dropout))
    ids = np.random.default_rng(0).integers(0, 19, 300)
    held_out = loader_for(config, ids[:80], 6, shuffle=False) if validation else None
    return Trainer(model, config, loader_for(config, ids, 6), held_out, folder, world=ProcessGroup(), **(parts or {}))


def same_model(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


# Configuration ----------------------------------------------------------------------------------------------------

def test_a_configuration_survives_json():
    config = TrainConfig(tokens=10**6, betas=(.8, .99), schedule='wsd', decay=10, clip=None, on_spike='skip')
    assert TrainConfig.from_json(config.to_json()) == config and isinstance(TrainConfig.from_json(config.to_json()).betas, tuple)
    with pytest.raises(AttributeError): config.lr = 1.0


@pytest.mark.parametrize(('wrong', 'message'), [
    ({}, 'a run needs an end'), ({'steps': 0}, 'steps must be a whole number of at least 1 or None, got 0'), ({'steps': 2.0}, 'steps'), ({'steps': True}, 'steps'),
    ({'seconds': -1}, 'seconds must be a number above 0'), ({'seconds': math.inf}, 'seconds'), ({'lr': 0}, 'lr'), ({'lr': math.nan}, 'lr'), ({'lr': '1'}, 'lr'),
    ({'betas': (.9, 1)}, 'betas'), ({'muon_momentum': 1}, 'muon_momentum'), ({'betas': (.9,)}, 'betas'), ({'min_lr_ratio': 1.5}, 'min_lr_ratio'), ({'weight_decay': -1}, 'weight_decay'), ({'clip': 0}, 'clip'),
    ({'batch_size': 4, 'micro_batch_size': 8}, 'micro_batch_size 8 is more than batch_size 4'), ({'warmup': 11}, 'warmup of 11 steps'), ({'keep': 0}, 'keep'),
    ({'optimizer': 'adam'}, "optimizer must be one of adamw, muon, got 'adam'"), ({'schedule': 'cos'}, 'schedule'), ({'precision': 'fp8'}, 'precision'),
    ({'on_nan': 'ignore'}, 'on_nan'), ({'on_spike': 'x'}, 'on_spike'), ({'compile': 1}, 'compile'), ({'document_mask': 1}, 'document_mask'), ({'learning_rate': 1}, "no field 'learning_rate'"),
    ({'warm_up': 3}, "did you mean 'warmup'"), ({'eval_every': None, 'batch_size': None}, 'batch_size'), ({'on_save_error': 'x'}, 'on_save_error')])
def test_what_cannot_be_is_refused(wrong, message):
    given = {} if not wrong else {'steps': 10, **wrong}
    with pytest.raises((ValueError, TypeError), match=message): TrainConfig(**given)
    with pytest.raises((ValueError, TypeError), match=message): TrainConfig.from_json(json.dumps(given))


def test_settings_of_older_runs_are_read_by_their_names_of_today(tmp_path, caplog):
    old = {'steps': 9, 'floor': .1}
    assert TrainConfig.from_json(json.dumps(old)) == TrainConfig(steps=9, min_lr_ratio=.1) and training.renamed(old) == {'steps': 9, 'min_lr_ratio': .1}
    with pytest.raises(ValueError, match="no field 'floor'"): TrainConfig(steps=9, floor=.1)
    make(tmp_path, steps=2, min_lr_ratio=.1).fit()
    path = latest_checkpoint(tmp_path)/'state.json'
    state = training._read_state(path)
    state['about']['config']['floor'] = state['about']['config'].pop('min_lr_ratio')          # as an earlier version wrote it
    path.unlink(); training._write_state(path, state)
    with caplog.at_level(logging.WARNING): assert make(tmp_path, steps=2, min_lr_ratio=.1).resume() == 2
    assert 'another' not in caplog.text


def test_every_field_is_checked():
    for field in fields(TrainConfig):
        with unchecked(), pytest.raises((ValueError, TypeError), match=field.name): TrainConfig(**{'steps': 10, field.name: 'nonsense'})


def test_an_impossible_schedule_shows_before_the_run():
    with pytest.raises(ValueError, match='do not fit'): make(steps=6, schedule='wsd', warmup=4, decay=4)


def test_a_loader_of_another_run_is_refused():
    made = make()
    for wrong, message in ((BatchLoader(made.train.ids, 6, 8), 'batches have 8 rows'), (BatchLoader(made.train.ids, 6, 4, rank=1, world_size=2), 'loader_for')):
        with pytest.raises(ValueError, match=message): Trainer(made.model, made.config, wrong)


# The loop ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('schedule', sorted(SCHEDULES))
def test_against_the_bare_loop_of_torch(schedule):
    made = make(steps=12, schedule=schedule, warmup=3, min_lr_ratio=.1, lr=.01, clip=.5, dropout=0, weight_decay=.3)
    bare = make(dropout=0).model
    table = [p for n, p in bare.named_parameters() if p.ndim > 1 and 'embedding' not in n and n != 'head.weight']
    rest = [p for p in bare.parameters() if all(p is not q for q in table)]
    optimizer = torch.optim.AdamW([{'params': table, 'weight_decay': .3}, {'params': rest, 'weight_decay': 0.}], betas=(.9, .95), eps=1e-8)
    losses = []
    for step in range(12):
        for group in optimizer.param_groups: group['lr'] = SCHEDULES[schedule](step, 12, peak=.01, warmup=3, min_lr_ratio=.1)
        loss = bare(*made.train.batch(step))
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), .5)
        optimizer.step(); losses.append(loss.item())
    result = made.fit()
    np.testing.assert_allclose(result.column('loss')[1], losses, rtol=1e-6)
    for a, b in zip(made.model.parameters(), bare.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@settings(max_examples=15)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, .9), st.integers(0, 99))
def test_accumulated_gradients_are_those_of_the_whole_batch(rows, micro, ignored, seed):
    torch.manual_seed(seed)
    x, y = torch.randint(0, 19, (rows, 6)), torch.randint(0, 19, (rows, 6))
    y[torch.rand(rows, 6) < ignored] = IGNORE
    y[0, 0] = 3
    with unchecked():
        model = make(dropout=0).model
        model(x, y).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = accumulate(model, (x, y), micro)
    with unchecked(): torch.testing.assert_close(loss, model(x, y).detach(), rtol=1e-6, atol=1e-6)
    for p, g in zip(model.parameters(), whole): torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6)


def test_every_group_follows_the_schedule():
    made = make(steps=6, optimizer='muon', warmup=4)
    made.step = 2
    share = training.lr_multiplier(made.config, made.step, made.planned_steps())
    training.set_learning_rate(made.optimizers, share)
    assert share == lr_multiplier(made.config, 2, 6) == .6          # the third of four steps up, and one to go
    assert {g['lr'] for o in made.optimizers for g in o.param_groups} == {share * made.config.lr, share * made.config.muon_lr}


def test_a_run_in_micro_batches_is_the_run_in_whole_batches():
    whole, parts = make(steps=10, dropout=0, batch_size=6), make(steps=10, dropout=0, batch_size=6, micro_batch_size=4)
    np.testing.assert_allclose(parts.fit().column('loss')[1], whole.fit().column('loss')[1], atol=1e-6)


def test_a_batch_without_targets_moves_nothing_and_is_a_number():
    model = make(dropout=0).model
    x, y = torch.zeros(2, 6, dtype=torch.long), torch.full((2, 6), IGNORE)
    assert accumulate(model, (x, y), 1) == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_evaluation_drops_nothing_counts_targets_and_disturbs_nothing():
    made = make(dropout=.5)
    model, loader = made.model, made.validation
    states = generator_states(model)
    surprise, counted = evaluate(model, loader, 3)
    assert (surprise, counted) == evaluate(model, loader, 3) and generator_states(model)['torch'] == states['torch'] and model.training
    model.eval()
    with torch.no_grad(): losses = [(model(*loader.batch(i)).item(), int((loader.batch(i)[1] != IGNORE).sum())) for i in range(3)]
    assert counted == sum(n for _, n in losses) and surprise == pytest.approx(sum(l * n for l, n in losses))
    evaluate(model, loader, 1)
    assert not model.training


@pytest.mark.parametrize('name', sorted(OPTIMIZERS))
def test_every_optimizer_learns_and_is_resumed_bit_for_bit(tmp_path, name):
    settings = {'optimizer': name, 'steps': 12, 'muon_lr': .02}
    whole, fresh = make(**settings), make(**settings); whole.fit()
    half = make(tmp_path, **settings, save_every=5)
    half.listeners.append(lambda r: r['step'] == 7 and half.stop('interrupted'))
    half.fit()
    again = make(tmp_path, **settings)
    assert again.resume(step=5) == 5 and not same_model(again, whole)
    again.fit()
    assert same_model(again, whole) and not any(torch.equal(a, b) for a, b in zip(whole.model.parameters(), fresh.model.parameters()))
    assert [r['loss'] for r in again.history] == [r['loss'] for r in whole.history]


def test_muon_is_given_what_the_configuration_says():
    muon, adamw = make(optimizer='muon', muon_lr=.03, muon_momentum=.8, weight_decay=.2, lr=.004).optimizers
    assert {(g['momentum'], g['weight_decay']) for g in muon.param_groups} == {(.8, .2)} and {g['weight_decay'] for g in adamw.param_groups} == {0.0}


def test_muon_needs_matrices_and_something_else():
    with pytest.raises(ValueError, match='does not have both'): OPTIMIZERS['muon'](nn.Linear(3, 3, bias=False), TrainConfig(steps=1))


# Budgets and ends -------------------------------------------------------------------------------------------------

@pytest.fixture
def steps_of_a_second(monkeypatch):
    "A trainer on a clock of its own: each forward pass in training takes a second."
    matrix_speed(torch.device('cpu'), torch.float32)                     # measured by the real clock, and remembered
    now = [100.0]
    monkeypatch.setattr(training, 'time', SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0]))
    def begin(folder=None, seconds=4.5, **settings):
        made = make(folder, validation=False, **{'steps': None, 'seconds': seconds, **settings})
        made.model.register_forward_pre_hook(lambda model, _: now.append(now.pop() + model.training))
        return made
    return begin


def test_budgets_end_a_run(steps_of_a_second):
    per_step = 4 * 6
    assert make(steps=None, tokens=5 * per_step - 3).fit().step in (5, 6)
    assert make(steps=3, tokens=10**6).fit().reason == 'steps'
    result = steps_of_a_second().fit()
    assert (result.reason, result.step, result.seconds) == ('seconds', 5, 5.0)


def test_seconds_count_across_interruptions(tmp_path, steps_of_a_second):
    first = steps_of_a_second(tmp_path)
    first.listeners.append(lambda r: r['step'] == 2 and first.stop('interrupted'))
    assert first.fit().step == 2
    again = steps_of_a_second(tmp_path)
    assert again.resume() == 2 and again.fit().step == 5
    once_more = steps_of_a_second(tmp_path)
    assert once_more.resume() == 5 and once_more.fit().step == 5


def test_a_run_is_saved_by_the_clock_unasked(tmp_path, steps_of_a_second):
    assert TrainConfig(steps=1).save_seconds == 300
    steps_of_a_second(tmp_path, 10, save_seconds=3, keep=9).fit()
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [3, 6, 9, 10]
    never = steps_of_a_second(tmp_path/'never', 10, save_seconds=None)
    never.fit()
    assert [int(p.name[5:]) for p in checkpoints(tmp_path/'never')] == [10]


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, steps_of_a_second, monkeypatch):
    made = steps_of_a_second(tmp_path, 100, save_seconds=3, keep=99)
    save = training.save_checkpoint
    def slow(*args):
        made.model.train()(torch.zeros(1, 1, dtype=torch.long)); made.model.train()          # a second passes
        return save(*args)
    monkeypatch.setattr(training, 'save_checkpoint', slow)
    made.fit()
    at = [int(p.name[5:]) for p in checkpoints(tmp_path)]
    assert at[:2] == [3, 5] and {b - a for a, b in zip(at[1:], at[2:-1])} == {19}, at      # what the first took is known at the second


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    made = make(tmp_path, steps=200, lr=.5, eval_every=2, patience=3, keep=1)
    with unchecked(): result = made.fit()
    losses = result.column('validation')[1]
    assert result.reason == 'patience' and min(losses) == result.best[0] and losses.index(min(losses)) == len(losses) - 4
    assert {int(p.name[5:]) for p in checkpoints(tmp_path)} == {result.best[1], result.step}
    assert load_checkpoint(tmp_path/f'step-{result.best[1]:08d}').state['parts']['Evaluator']['best'][0] == result.best[0]


def test_spikes():
    quiet = SpikeDetector(6.0)
    assert not any(quiet.is_spike(5 - i / 20 + .1 * (-1) ** i) for i in range(40))
    assert quiet.is_spike(9.0) and quiet.is_spike(9.0) and not quiet.is_spike(3.0)
    assert not any(SpikeDetector(6.0, least=4).is_spike(x) for x in (1., 2., 99.)) and SpikeDetector(6.0).limit() == math.inf


# Precision and the compiler ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(('speed', 'expected'), [(.02, 'float32'), (1.1, 'float32'), (2.3, 'bfloat16')])
def test_auto_takes_bfloat16_only_where_it_is_faster(monkeypatch, speed, expected):
    monkeypatch.setattr(training, 'bfloat16_speed', lambda device: speed)
    assert choose_precision('auto', 'cpu')[0] == expected and f'{speed:.2g} times' in choose_precision('auto', 'cpu')[1]
    assert choose_precision('float16', 'cpu') == ('float16', 'as configured')
    with pytest.raises(ValueError, match='unknown precision'): choose_precision('int8', 'cpu')


@pytest.mark.parametrize(('precision', 'dtype'), [('float32', torch.float32), ('bfloat16', torch.bfloat16), ('float16', torch.float16)])
def test_the_model_runs_in_the_precision_that_was_asked_for(precision, dtype):
    made, seen = make(precision=precision, steps=3), set()
    made.model.blocks[0].attention.query.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    result = made.fit()
    assert seen == {dtype} and all(p.dtype == torch.float32 for p in made.model.parameters())
    reference = make(steps=3).fit()
    np.testing.assert_allclose(result.column('loss')[1], reference.column('loss')[1], atol=.05)


def test_float16_overflow_is_left_out_and_the_factor_shrinks(tmp_path):
    made = make(tmp_path, precision='float16', steps=12)
    made.model.head.weight.register_hook(lambda g: g * (float('inf') if made.step in (2, 3) else 1))
    result = made.fit()
    overflows = [r['step'] for r in result.history if r.get('event') == 'overflow']
    assert result.reason == 'steps' and {3, 4} <= set(overflows) and len(overflows) < 6
    assert made.precision.scaler.get_scale() == 65536 / 2 ** len(overflows)
    again = make(tmp_path, precision='float16', steps=12); again.resume()
    assert again.precision.scaler.get_scale() == made.precision.scaler.get_scale()
    made = make(precision='float16', steps=99)
    made.model.head.weight.register_hook(lambda g: g * float('inf'))
    with unchecked(): assert made.fit().reason == 'nan' and made.step == 40


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'bfloat16_speed', lambda device: 9.0)
    made = make(tmp_path, precision='auto', steps=2); made.fit()
    monkeypatch.setattr(training, 'bfloat16_speed', lambda device: .1)
    again = make(tmp_path, precision='auto', steps=2); again.resume()
    assert made.precision.name == again.precision.name == 'bfloat16'


def test_without_a_compiler_the_model_stays_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(training.shutil, 'which', lambda name: None)
    model = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING): assert compiled(model, 'cpu') is model
    assert 'compile=True is left off: there is no C++ compiler' in caplog.text and missing_compiler('cpu')
    monkeypatch.undo()
    monkeypatch.setattr(training.torch, 'compile', lambda model: nn.Sequential(model))
    monkeypatch.setattr(training, 'missing_compiler', lambda device: None)
    assert compiled(model, 'cpu')[0] is model


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler('cpu') is not None, reason='there is no compiler')
def test_a_compiled_run_learns_the_same(tmp_path):
    eager, fused = make(steps=5, dropout=0), make(tmp_path, steps=5, dropout=0, compile=True)
    np.testing.assert_allclose(fused.fit().column('loss')[1], eager.fit().column('loss')[1], atol=1e-5)
    assert set(load_checkpoint(tmp_path).tensors['model']) == set(eager.model.state_dict())


# Checkpoints ------------------------------------------------------------------------------------------------------

def test_files_are_those_of_the_safetensors_library(tmp_path):
    types = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {f't{i}': torch.arange(6).view(2, 3).to(t) for i, t in enumerate(types)}
    tensors |= {'scalar': torch.tensor(3.5), 'empty': torch.empty(0, 4), 'strided': torch.arange(12.).view(3, 4).T[1:]}
    facts = write_tensors(tmp_path/'x.safetensors', tensors)
    found = safetensors.torch.load_file(tmp_path/'x.safetensors')
    assert set(found) == set(tensors) and facts['bytes'] == (tmp_path/'x.safetensors').stat().st_size
    for name, t in tensors.items(): assert found[name].dtype == t.dtype and found[name].shape == t.shape and torch.equal(found[name], t)
    with pytest.raises(ValueError, match='cannot save z'): write_tensors(tmp_path/'y', {'z': torch.zeros(1, dtype=torch.complex64)})


def test_the_newest_stay_and_the_best(tmp_path):
    for step in range(1, 8): save_checkpoint(tmp_path, step, {'model': {'w': torch.full((2,), float(step))}}, keep=2, best=3 if step > 2 else None)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [3, 6, 7] and latest_checkpoint(tmp_path).name == 'step-00000007'
    assert load_checkpoint(tmp_path).tensors['model']['w'].tolist() == [7, 7]
    save_checkpoint(tmp_path, 7, {'model': {'w': torch.zeros(2)}}, {'note': 'ß'})
    assert load_checkpoint(tmp_path).tensors['model']['w'].tolist() == [0, 0] and load_checkpoint(tmp_path).state['note'] == 'ß'


def test_every_generator_is_put_back():
    import random
    from llm_from_scratch.tensors import Dropout
    model = nn.Sequential(nn.Linear(2, 2), Dropout(.5, generator=torch.Generator().manual_seed(3)))
    def draw(): return random.random(), random.gauss(), np.random.random(), np.random.normal(), torch.rand(3).tolist(), torch.rand(2, generator=model[1].generator).tolist()
    random.gauss(); np.random.normal()                # both keep a second number back
    states = json.loads(json.dumps(generator_states(model)))
    first = draw()
    assert draw() != first
    restore_generators(model, states)
    assert draw() == first


# Save and load ----------------------------------------------------------------------------------------------------

class TestSaveAndLoad:
    "A file of one's own loop: (model, optimizers, step) as they were, at a path or in a file object."
    def loop(self, optimizers=None, seed=0):
        made = make(dropout=0)
        torch.manual_seed(seed)
        for p in made.model.parameters(): p.data.normal_(0, .02)
        return made.train, made.model, optimizers or [AdamW(made.model.parameters(), lr=.01)]

    def go(self, train, model, optimizers, steps):
        for step in steps:
            for o in optimizers: o.zero_grad()
            model(*train.batch(step)).backward()
            for o in optimizers: o.step()
        return [p.detach().clone() for p in model.parameters()]

    @pytest.mark.parametrize('name', [*sorted(OPTIMIZERS), 'torch'])
    @pytest.mark.parametrize('where', ['path', 'object'])
    def test_a_loop_goes_on_bit_for_bit(self, tmp_path, name, where):
        def fresh(seed, **settings):
            train, model, _ = self.loop(seed=seed)
            kinds = {'torch': lambda: [torch.optim.AdamW(model.parameters(), lr=.03, **settings)]}
            return train, model, kinds.get(name, lambda: OPTIMIZERS[name](model, TrainConfig(steps=1, lr=.03)))()
        run = fresh(0)
        self.go(*run, range(3))
        for o in run[2]: o.param_groups[0]['lr'] *= .5
        file = tmp_path/'x.safetensors' if where == 'path' else io.BytesIO()
        save(file, run[1], run[2] if len(run[2]) > 1 else run[2][0], step=3)
        if where == 'object': file.seek(0)
        other = fresh(1)
        for o in other[2]: o.param_groups[-1]['lr'] = 7.0
        step = load(file, other[1], other[2] if len(other[2]) > 1 else other[2][0])
        assert step == 3 and [[g['lr'] for g in o.param_groups] for o in other[2]] == [[g['lr'] for g in o.param_groups] for o in run[2]]
        assert [[g.get('betas') for g in o.param_groups] for o in other[2]] == [[g.get('betas') for g in o.param_groups] for o in run[2]]
        assert all(map(torch.equal, self.go(*run, range(3, 6)), self.go(*other, range(3, 6))))

    def test_the_file_is_safetensors_and_the_same_in_an_object(self, tmp_path):
        run = self.loop(); self.go(*run, range(2))
        save(tmp_path/'x', run[1], run[2], 2)
        save(file := io.BytesIO(), run[1], run[2], 2)
        assert (tmp_path/'x').read_bytes() == file.getvalue()
        found = safetensors.torch.load_file(tmp_path/'x')
        assert all(torch.equal(found[f'model.{n}'], t) for n, t in run[1].state_dict().items())
        assert {n for n in found if n.startswith('optimizer.norm.bias')} == {f'optimizer.norm.bias.{k}' for k in ('step', 'exp_avg', 'exp_avg_sq')}

    def test_without_an_optimizer_the_weights_alone(self, tmp_path):
        run, (_, model, _) = self.loop(), self.loop(seed=1)
        save(tmp_path/'x', run[1], run[2], 5)
        assert load(tmp_path/'x', model) == 5 and all(map(torch.equal, run[1].parameters(), model.parameters()))

    def test_every_flipped_byte_and_every_cut_is_noticed(self, tmp_path):
        run = self.loop(); self.go(*run, range(1))
        save(file := io.BytesIO(), run[1], run[2], 1)
        whole, draw = file.getvalue(), np.random.default_rng(0)
        before = [p.detach().clone() for p in run[1].parameters()]
        for at in [0, 3, 7, 8, len(whole) - 1, *(whole.index(b'crc32') + i for i in range(18)), *map(int, draw.integers(0, len(whole), 120)), *map(int, draw.integers(8, 2000, 120))]:
            hurt = bytearray(whole); hurt[at] ^= 1 << int(draw.integers(8))
            with pytest.raises(DamagedCheckpoint, match='the file'): load(io.BytesIO(bytes(hurt)), run[1], run[2])
        for size in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
            with pytest.raises(DamagedCheckpoint): load(io.BytesIO(whole[:size]), run[1], run[2])
        with pytest.raises(DamagedCheckpoint, match='checksum'): load(io.BytesIO(whole + b'\0'), run[1], run[2])
        assert all(map(torch.equal, before, run[1].parameters())) and load(io.BytesIO(whole), run[1], run[2]) == 1

    def test_what_another_program_wrote_is_named_and_never_unpickled(self, tmp_path):
        _, model, optimizers = self.loop()
        torch.save(model.state_dict(), tmp_path/'model.pt')
        safetensors.torch.save_file(model.state_dict(), tmp_path/'model.safetensors')
        (tmp_path/'list').write_bytes((2).to_bytes(8, 'little') + b'[]')
        (tmp_path/'words').write_bytes((23).to_bytes(8, 'little') + b'{"__metadata__": [1, 2]}')
        for name, words in (('model.pt', 'no readable header'), ('words', 'no readable header'), ('model.safetensors', 'not written by `save`: its format is None'), ('list', 'no readable header')):
            with pytest.raises(DamagedCheckpoint, match=f'{name} .*{words}'): load(tmp_path/name, model, optimizers)
        with pytest.raises(FileNotFoundError): load(tmp_path/'none', model)

    def test_another_model_or_optimizer_is_refused_and_nothing_has_changed(self, tmp_path):
        _, model, optimizers = self.loop()
        save(tmp_path/'x', model, optimizers, 1)
        save(tmp_path/'bare', model)
        wide = make(d_model=16).model
        before = [p.detach().clone() for p in wide.parameters()]
        with pytest.raises(ValueError, match=r"x is of another model: missing \[\], unknown \[\], other shapes \['token_embedding.weight \(19, 8\) for \(19, 16\)'"): load(tmp_path/'x', wide)
        with pytest.raises(ValueError, match=r"another model: missing \['bias', 'weight'\]"): load(tmp_path/'x', nn.Linear(2, 2))
        assert all(map(torch.equal, before, wide.parameters()))
        _, other, _ = self.loop(seed=1)
        before = [p.detach().clone() for p in other.parameters()]
        for wrong, words in ((torch.optim.SGD(other.parameters()), 'AdamW of 1 groups.*SGD'), (AdamW(OPTIMIZERS['adamw'](other, TrainConfig(steps=1))[0].param_groups), '3 groups')):
            with pytest.raises(ValueError, match=words): load(tmp_path/'x', other, wrong)
        with pytest.raises(ValueError, match='no optimizer'): load(tmp_path/'bare', other, AdamW(other.parameters()))
        assert all(map(torch.equal, before, other.parameters()))

    def test_a_write_that_fails_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        run = self.loop()
        save(tmp_path/'x', run[1], run[2], 1)
        before = (tmp_path/'x').read_bytes()
        puts = iter(range(9))
        def full(file, *args, put=training._put):
            if next(puts) == 5: raise OSError(28, 'No space left on device')
            return put(file, *args)
        monkeypatch.setattr(training, '_put', full)
        with pytest.raises(OSError, match='No space'): save(tmp_path/'x', run[1], run[2], 2)
        assert (tmp_path/'x').read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['x']


# Beside the run ---------------------------------------------------------------------------------------------------

def test_the_log_says_what_the_history_says(tmp_path):
    made = make(tmp_path, steps=6, eval_every=3)
    result = made.fit()
    assert read_log(tmp_path/'log.jsonl') == result.history and len(result.history) == 6
    assert result.column('validation')[0] == [3, 6] and result.column('loss')[0] == [1, 2, 3, 4, 5, 6]


def test_a_prediction_disturbs_nothing_and_counts_right():
    made = make(dropout=.3, micro_batch_size=2)
    before, states = {k: v.clone() for k, v in made.model.state_dict().items()}, generator_states(made.model)
    found = predict_run(made.model, made.config, made.train)
    n = sum(p.numel() for p in made.model.parameters())
    assert (found.weights, found.gradients, found.optimizer) == (4 * n, 4 * n, 8 * n) and found.steps == 6 and found.seconds > 0
    assert generator_states(made.model)['torch'] == states['torch'] and all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())
    assert all(p.grad is None for p in made.model.parameters())
    x, y = made.train.batch(0)
    trace = trace_step(made.model, (x[:2], y[:2]), times=2)
    assert (found.activations, found.step) == (trace.activations, trace.peak) and found.memory == 12 * n + max(trace.peak, 4 * n)
    assert not replace(found, available=found.memory).fits and 'does not fit' in str(replace(found, available=1))
    muon = predict_run(made.model, replace(made.config, optimizer='muon'), made.train, seconds=False)
    state = sum(v.nbytes for o in OPTIMIZERS['muon'](made.model, made.config) for p in o.param_groups for v in p['params']) * 2
    assert muon.optimizer < state == found.optimizer and muon.step_seconds is None


@pytest.mark.parametrize('looks', [False, True])
def test_a_prediction_moves_no_buffer(looks):
    "A batch norm counts and averages in every forward pass, and so would a model that is tried."
    from test_costs import Normed
    config = TrainConfig(steps=1, batch_size=4)
    made, loader = Normed(looks), loader_for(config, np.arange(99) % 9, 6)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert predict_run(made, config, loader).seconds > 0
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())


def test_the_predicted_optimizer_memory_is_what_it_takes():
    for name in OPTIMIZERS:
        made = make(optimizer=name, steps=1)
        predicted = predict_run(made.model, made.config, made.train, seconds=False).optimizer
        made.fit()
        assert predicted == sum(v.nbytes for o in made.optimizers for s in o.state.values() for k, v in s.items() if k != 'step')


def test_progress_plots_and_tensorboard(capsys, monkeypatch):
    matplotlib = pytest.importorskip('matplotlib'); matplotlib.use('agg')
    import matplotlib.pyplot as plt
    live = LivePlot(every=0, floor=1.0)
    made = make(steps=4, eval_every=2); made.listeners.append(live)
    result = made.fit(progress=True)
    assert 'tokens/s' in capsys.readouterr().err and len(live.history) == 4
    figure, ax = plt.subplots()
    plot_history(ax, result.history, floor=1.0)
    assert [line.get_label() for line in ax.lines] == ['training', 'validation', 'floor']
    plt.close(figure)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(ImportError, match='pip install tensorboard'): TensorBoard('x')


def test_tensorboard_hears_numbers(monkeypatch, tmp_path):
    said = []
    writer = lambda folder: SimpleNamespace(add_scalar=lambda *args: said.append(args))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=writer))
    TensorBoard(tmp_path)({'step': 3, 'loss': 1.5, 'event': 'nan'})
    assert said == [('loss', 1.5, 3)]


# Parts: callbacks, losses, documents ------------------------------------------------------------------------------

class Average(Callback):
    "A moving average of the weights: tensors and a number to be saved."
    name = 'ema'
    def __init__(self): self.weights, self.seen = {}, 0

    def step(self, trainer, record):
        self.seen += 1
        for name, p in trainer.model.named_parameters():
            self.weights[name] = .9 * self.weights.get(name, p.detach()) + .1 * p.detach()
        record['seen'] = self.seen

    def state_dict(self): return {'weights': self.weights, 'seen': self.seen}
    def load_state_dict(self, state): self.weights, self.seen = dict(state['weights']), state['seen']


def test_a_callback_of_the_user_is_saved_and_resumed(tmp_path):
    whole, cut, again = Average(), Average(), Average()
    make(steps=6, parts={'callbacks': [whole]}).fit()
    half = make(tmp_path, steps=6, parts={'callbacks': [cut], 'listeners': [lambda r: r['step'] == 3 and half.stop('interrupted')]})
    half.fit()
    made = make(tmp_path, steps=6, parts={'callbacks': [again]})
    assert made.resume() == 3 and again.seen == 3 and all(torch.equal(v, again.weights[k]) for k, v in cut.weights.items())
    result = made.fit()
    assert result.column('seen')[1] == [1, 2, 3, 4, 5, 6] and all(torch.equal(v, again.weights[k]) for k, v in whole.weights.items())
    with pytest.raises(ValueError, match="two callbacks are called 'ema'"): make(parts={'callbacks': [Average(), Average()]})


def test_hooks_are_called_in_their_order_and_close_whatever_happens():
    heard = []
    class Ear(Callback):
        def begin(self, trainer): heard.append('begin')
        def judge(self, trainer, record): heard.append(f"judge {trainer.step} {record['loss'] > 0}"); return 'enough' if record['step'] == 2 else None
        def step(self, trainer, record):
            heard.append(f"step {record.get('event')} {record.get('message')}")
            if self.fails: raise KeyError
        def end(self, trainer): heard.append('end')
        def close(self, trainer): heard.append('close')
        fails = False
    ear, before = Ear(), None
    made = make(steps=2, parts={'callbacks': [ear]})
    made.listeners.append(lambda r: before.update(made.model.state_dict()) if r['step'] == 1 else None)
    before = {}
    made.fit()
    assert heard == ['begin', 'judge 0 True', 'step None None', 'judge 1 True', 'step skipped enough', 'end', 'close']
    heard.clear(); ear.fails = True
    with pytest.raises(KeyError): make(steps=2, parts={'callbacks': [ear]}).fit()
    assert heard == ['begin', 'judge 0 True', 'step None None', 'close']


def test_a_judge_that_says_no_leaves_the_weights():
    class No(Callback):
        def judge(self, trainer, record): return 'no'
    made, fresh = make(parts={'callbacks': [No()]}), make()
    assert made.fit().step == 6 and same_model(made, fresh) and {r['message'] for r in made.history} == {'no'}


def test_another_loss_needs_no_other_trainer():
    def doubled(model, batch): return 2 * lm_loss(model, batch)
    twice, once = make(steps=1, dropout=0, parts={'loss': doubled}), make(steps=1, dropout=0)
    assert twice.fit().history[0]['loss'] == pytest.approx(2 * once.fit().history[0]['loss'])
    assert twice.history[0]['gradient'] == pytest.approx(2 * once.history[0]['gradient'], rel=1e-5)
    assert twice.best[0] == pytest.approx(2 * evaluate(twice.model, twice.validation, 2)[0] / evaluate(twice.model, twice.validation, 2)[1])


class TestOptimizerMemory:
    def memory(self, name='adamw'):
        made = make(steps=2, optimizer=name); made.fit()
        return made, OptimizerMemory(made.model, made.optimizers)

    @pytest.mark.parametrize('name', sorted(OPTIMIZERS))
    def test_it_is_kept_by_the_name_of_the_parameter(self, name):
        made, memory = self.memory(name)
        state = memory.state_dict()
        assert set(state) == {n for n, _ in made.model.named_parameters()}
        for n, p in made.model.named_parameters():
            assert all(t is state[n][k] for o in made.optimizers if p in o.state for k, t in o.state[p].items()) and state[n]
        other = make(steps=2, optimizer=name)
        OptimizerMemory(other.model, other.optimizers).load_state_dict(dict(reversed(state.items())))     # in any order
        for n, entry in OptimizerMemory(other.model, other.optimizers).state_dict().items():
            assert all(torch.equal(t, state[n][k]) for k, t in entry.items()) and entry.keys() == state[n].keys()

    def test_what_is_missing_or_left_over_is_named(self):
        _, memory = self.memory()
        state = memory.state_dict()
        with pytest.raises(ValueError, match=r"missing \['norm.bias'\], unknown \['norm.shift'\]"):
            memory.load_state_dict({('norm.shift' if n == 'norm.bias' else n): entry for n, entry in state.items()})


@given(st.recursive(st.one_of(st.integers(), st.text(max_size=3), st.none(), st.builds(lambda n: torch.full((n,), 1.5), st.integers(0, 3))),
                    lambda inner: st.dictionaries(st.text('ab', min_size=1, max_size=2), inner, max_size=3), max_leaves=8))
def test_a_state_is_split_and_joined(state):
    tensors, rest = split_state(state, 'top')
    def same(a, b):
        if isinstance(a, torch.Tensor): return torch.equal(a, b)
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else a == b
    assert same(join_state(tensors, json.loads(json.dumps(rest))), state)


def test_a_state_that_would_not_come_back_is_refused():
    with pytest.raises(ValueError, match="two tensors of a state are called 'a.b'"): split_state({'a': {'b': torch.ones(1)}, 'a.b': torch.ones(1)})
    with pytest.raises(TypeError, match='strings, got 3'): split_state({3: 4})


def test_a_checkpoint_of_an_older_version_is_named(tmp_path):
    save_checkpoint(tmp_path, 4, {'model': {'w': torch.ones(1)}}, {'tokens': 96})
    with pytest.raises(ValueError, match='step-00000004 was written by an older version'): make(tmp_path).resume()


def test_a_state_of_a_callback_that_is_gone_is_said(tmp_path, caplog):
    make(tmp_path, steps=2, parts={'callbacks': [Average()]}).fit()
    with caplog.at_level(logging.WARNING): assert make(tmp_path, steps=2).resume() == 2
    assert 'has a state of ema' in caplog.text


@pytest.mark.parametrize('positions', ['learned', 'rope'])
def test_documents_in_a_row_are_as_they_are_alone(tmp_path, positions):
    from llm_from_scratch.data import TokenFile
    from llm_from_scratch.text import CharTokenizer
    letters, draw = CharTokenizer.train(['abcdefghijklmnopqrs']), np.random.default_rng(1)
    texts = [''.join(chr(97 + i) for i in draw.integers(0, 19, n)) for n in (3, 5, 2, 9, 4, 6, 7, 3, 8, 5)]
    file = TokenFile.from_texts(tmp_path/'x.tok', texts, letters, end=None)
    config = TrainConfig(steps=2, batch_size=3, document_mask=True, precision='float32', eval_batches=2)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=letters.vocab_size, context_length=8, d_model=8, n_layers=2, n_heads=2, positions=positions))
    for parameter in model.parameters(): parameter.data.mul_(8)                     # so that attention matters
    loader = loader_for(config, file, 8)
    made = Trainer(model, config, loader, loader, world=ProcessGroup())
    x, y = loader.batch(0)
    segments = loader.segments(0)
    total, n = 0.0, 0
    with torch.no_grad():
        for row, (ids, targets) in enumerate(zip(x, y)):
            for document in segments[row].unique():
                here = segments[row] == document
                kept = targets[here] != IGNORE
                if kept.any(): total, n = total + float(model(ids[here][None], targets[here][None])) * int(kept.sum()), n + int(kept.sum())
    plain = float(model(x, y).detach())
    record = made.train_step()
    assert record['loss'] == pytest.approx(total / n, rel=1e-5) and record['loss'] != pytest.approx(plain, rel=1e-3)
    assert evaluate(model, loader, 1, segments=True)[0] != pytest.approx(evaluate(model, loader, 1)[0], rel=1e-4)


def test_the_log_has_the_speed_and_a_share_of_what_the_device_can_do(monkeypatch, steps_of_a_second):
    from llm_from_scratch.costs import flops_per_token
    assert matrix_speed(torch.device('cpu'), torch.float32) == matrix_speed(torch.device('cpu'), torch.float32) > 0         # measured once
    monkeypatch.setattr(training, 'matrix_speed', lambda device, dtype: 1e4)                      # a device slow enough for a share with digits
    made = steps_of_a_second(seconds=3.5)
    for r in made.fit().history:
        assert r['tokens_per_second'] == 24
        assert r['mfu'] == pytest.approx(24 * flops_per_token(made.model, 6) / 1e4, rel=1e-2, abs=1e-3)


def test_each_batch_is_fetched_once_and_the_next_one_early():
    made, asked = make(steps=3, validation=False), []
    batch = made.train.batch
    made.train.batch = lambda step: asked.append((step, made.step)) or batch(step)
    made.fit()
    assert asked == [(0, 0), (1, 0), (2, 1), (3, 2)] and made.train.step == 3
