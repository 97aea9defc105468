"Chapter 10 beyond its chapter: AdamW and Muon against torch in every setting, states that change hands, groups, schedules, clipping, the finder."
import copy, inspect, json, math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from llm_from_scratch import optim
from llm_from_scratch.optim import (LR_ADJUSTMENTS, QUINTIC, SCHEDULES, AdamW, Muon, clip_grad_norm, constant_schedule, cosine_schedule,
                                    find_learning_rate, linear_schedule, newton_schulz, param_groups, wsd_schedule)

INPUTS = []
SHAPES = (5, 7), (7,), (3, 2, 4), (), (1, 1), (16, 3)
pytestmark = [pytest.mark.portable, pytest.mark.usefixtures('one_thread')]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in shapes]


def steps(optimizer, params, first, last, size=1.0):
    "Random gradients of many sizes; every third step one parameter has none, and one is exactly zero."
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            p.grad = (size * 10.0 ** (i - 3) * torch.randn(p.shape, generator=g) + 0.1 * p.detach()).to(p.dtype)
            if i == 1 and step % 3 == 0: p.grad = None
            if i == 2 and step % 5 == 0: p.grad.zero_()
        optimizer.step()


def agree(ours, theirs, tolerance=0.0):
    for a, b in zip(ours, theirs, strict=True): assert (a.detach() - b.detach()).abs().max() <= tolerance


# ---- AdamW ----

SETTINGS = [{}, {'lr': 3e-3, 'betas': (0.9, 0.95), 'weight_decay': 0.1}, {'lr': 0.1, 'betas': (0.0, 0.5), 'weight_decay': 0.0}, {'eps': 1e-3, 'lr': 0.01}, {'lr': 0.0}]


# In bfloat16 torch's own two paths round differently; ours is the one with lists.
@pytest.mark.parametrize('dtype, foreach', [(torch.float32, True), (torch.float32, False), (torch.float64, True), (torch.bfloat16, True)])
@pytest.mark.parametrize('settings', SETTINGS)
def test_adamw_against_torch_over_200_steps_bit_for_bit(settings, dtype, foreach):
    a, b = parameters(dtype=dtype), parameters(dtype=dtype)
    steps(AdamW(a, **settings), a, 0, 200)
    steps(torch.optim.AdamW(b, foreach=foreach, **settings), b, 0, 200)
    agree(a, b)


@pytest.mark.parametrize('settings', SETTINGS)
def test_fused_adamw_against_torch_fused(settings):
    a, b, c = parameters(), parameters(), parameters()
    steps(AdamW(a, fused=True, **settings), a, 0, 200)
    steps(torch.optim.AdamW(b, fused=True, **settings), b, 0, 200)
    steps(AdamW(c, **settings), c, 0, 200)
    agree(a, b)
    agree(a, c, 1e-5)


@pytest.mark.parametrize('kinds', [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (AdamW, AdamW)])
@pytest.mark.parametrize('fused', [None, True])
def test_states_change_hands_in_both_directions(kinds, fused, tmp_path):
    first, second = kinds
    p, q = parameters(), parameters()
    torch_only = torch.optim.AdamW(q, lr=0.01, weight_decay=0.2, fused=fused)
    steps(torch_only, q, 0, 120)
    optimizer = first(p, lr=0.01, weight_decay=0.2, fused=fused)
    steps(optimizer, p, 0, 60)
    torch.save(optimizer.state_dict(), tmp_path/'state.pt')
    state = torch.load(tmp_path/'state.pt', weights_only=True)
    assert {frozenset(s) for s in state['state'].values()} == {frozenset({'step', 'exp_avg', 'exp_avg_sq'})}
    assert all(s['step'].shape == () and s['step'].dtype == torch.float32 for s in state['state'].values())
    other = second(p)
    other.load_state_dict(state)
    assert other.param_groups[0]['lr'] == 0.01 and other.param_groups[0]['weight_decay'] == 0.2
    steps(other, p, 60, 120)
    agree(p, q)


def test_settings_of_groups_are_their_own_and_can_be_written_as_json():
    a, b = parameters(), parameters()
    def groups(params): return [{'params': params[:2], 'lr': 0.1, 'name': 'first'}, {'params': params[2:], 'weight_decay': 0.5, 'betas': (0.5, 0.6)}]
    ours, theirs = AdamW(groups(a), lr=0.02), torch.optim.AdamW(groups(b), lr=0.02)
    steps(ours, a, 0, 30)
    steps(theirs, b, 0, 30)
    agree(a, b)
    json.dumps(ours.state_dict()['param_groups'])
    json.dumps(Muon(parameters([(2, 3)])).state_dict()['param_groups'])


def test_the_first_step_is_the_learning_rate_long_whatever_the_gradient():
    for size in (1e-3, 1.0, 1e4):
        p = nn.Parameter(torch.zeros(4))
        p.grad = size * torch.tensor([1.0, -1.0, 2.0, -5.0])
        AdamW([p], lr=0.01).step()
        torch.testing.assert_close(p.detach(), -0.01 * p.grad.sign(), rtol=1e-4, atol=0)


def test_decay_does_not_depend_on_the_gradient():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.5)
    for _ in range(10):
        p.grad = torch.zeros(3)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95**10))


@pytest.mark.parametrize('make', [AdamW, Muon])
def test_closure_is_called_with_gradients_on_and_its_value_returned(make):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss
    assert optimizer.step(closure) == 4
    assert (p < 1).any() and p.requires_grad
    assert optimizer.step() is None


@pytest.mark.parametrize('make', [AdamW, Muon])
def test_without_gradients_nothing_happens(make):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make([p], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(p, torch.ones(2, 2)) and not optimizer.state


@pytest.mark.parametrize('settings, message', [({'lr': -1.0}, 'lr must be at least 0'), ({'lr': math.nan}, 'lr'), ({'betas': (1.0, 0.9)}, 'beta1'), ({'betas': (0.9, -0.1)}, 'beta2'),
                                               ({'eps': -1e-8}, 'eps'), ({'weight_decay': math.inf}, 'weight_decay')])
def test_adamw_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message): AdamW(parameters(), **settings)


def test_a_state_of_another_algorithm_is_refused_before_anything_changes():
    p = parameters()
    for other in (torch.optim.Adam(p), torch.optim.SGD(p, 0.1), torch.optim.AdamW(p, maximize=True), torch.optim.AdamW(p, amsgrad=True)):
        ours = AdamW(p, lr=0.5)
        with pytest.raises(ValueError, match='not a state of AdamW'): ours.load_state_dict(other.state_dict())
        assert ours.param_groups[0]['lr'] == 0.5


def test_sparse_and_complex_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match='dense'): AdamW(table.parameters()).step()
    z = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(ValueError, match='real'): AdamW([z]).step()


# ---- Newton–Schulz and Muon ----

@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 99), st.floats(1e-3, 1e3))
def test_newton_schulz_acts_on_singular_values_alone(m, n, count, seed, scale):
    x = scale * torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(count): s = sum(k * s**power for k, power in zip(QUINTIC, (1, 3, 5)))
    torch.testing.assert_close(newton_schulz(x, count), u * s @ vh, rtol=1e-7, atol=1e-9)


def test_newton_schulz_of_a_batch_is_each_alone_and_of_nothing_is_nothing():
    x = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    together = newton_schulz(x)
    assert torch.equal(x, before) and together.shape == x.shape
    for i in range(2):
        for j in range(3): torch.testing.assert_close(together[i, j], newton_schulz(x[i, j]), rtol=1e-4, atol=1e-5)
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('settings', [{}, {'lr': 0.02, 'nesterov': True, 'momentum': 0.9}, {'adjust_lr_fn': 'match_rms_adamw', 'weight_decay': 0.0}, {'adjust_lr_fn': 'original', 'ns_steps': 3},
                                      {'ns_coefficients': (1.5, -0.5, 0.0), 'eps': 1e-3}])
def test_muon_against_torch_bit_for_bit(settings, dtype):
    shapes = (8, 8), (16, 8), (8, 33), (1, 5), (7, 1)
    a, b = parameters(shapes, dtype), parameters(shapes, dtype)
    steps(Muon(a, **settings), a, 0, 60)
    steps(torch.optim.Muon(b, **settings), b, 0, 60)
    agree(a, b)


def test_muon_without_nesterov_against_torch():
    a, b = parameters([(8, 8), (4, 9)]), parameters([(8, 8), (4, 9)])
    steps(Muon(a, lr=0.02, nesterov=False), a, 0, 60)
    steps(torch.optim.Muon(b, lr=0.02, nesterov=False), b, 0, 60)
    agree(a, b)


def test_muon_keeps_its_momentum_in_bfloat16_without_nesterov():
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Muon([p], nesterov=False)
    p.grad = torch.full((4, 4), 8.0, dtype=torch.bfloat16)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]['momentum_buffer'].float(), torch.full((4, 4), 0.4), rtol=0.01, atol=0)


@pytest.mark.parametrize('kinds', [(Muon, torch.optim.Muon), (torch.optim.Muon, Muon)])
def test_muon_states_change_hands(kinds):
    p, q = parameters([(6, 4), (4, 4)]), parameters([(6, 4), (4, 4)])
    whole = torch.optim.Muon(q, lr=0.02)
    steps(whole, q, 0, 40)
    first = kinds[0](p, lr=0.02)
    steps(first, p, 0, 20)
    second = kinds[1](p)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, p, 20, 40)
    agree(p, q)


def test_muon_in_float32_is_close_to_bfloat16_and_moves_every_direction():
    p = parameters([(32, 48)])[0]
    before = p.detach().clone()
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -2, 48)
    optimizer = Muon([p], lr=1.0, weight_decay=0.0, ns_dtype='float32')
    optimizer.step()
    values = torch.linalg.svdvals(before - p.detach())
    assert 0.3 < values.min() and values.max() < 1.3


def test_muon_refuses_what_is_no_matrix_and_stays_as_it_was():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r'\(2,\)'): Muon([matrix, vector])
    optimizer = Muon([matrix])
    with pytest.raises(ValueError, match='AdamW'): optimizer.add_param_group({'params': [vector]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match='known are None'): Muon([matrix], adjust_lr_fn='other')
    with pytest.raises(ValueError, match='momentum'): Muon([matrix], momentum=1.0)
    assert LR_ADJUSTMENTS[None](16, 4) == 2.0 and LR_ADJUSTMENTS['original'](4, 16) == 1.0


# ---- groups ----

def gpt(**changes):
    from llm_from_scratch.gpt import GPT, GPTConfig
    return GPT(GPTConfig(**{'vocab_size': 31, 'context_length': 8, 'd_model': 12, 'n_layers': 2, 'n_heads': 3, **changes}))


@pytest.mark.parametrize('changes', [{}, {'tie_embeddings': False}, {'positions': 'rope', 'norm': 'rmsnorm', 'feed_forward': 'swiglu', 'bias': False, 'qk_norm': True}, {'sinks': True}])
def test_every_parameter_is_in_exactly_one_group(changes):
    model = gpt(**changes)
    groups = param_groups(model, weight_decay=0.3)
    found = [id(p) for group in groups for p in group['params']]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)]: group['name'] for group in groups for p in group['params']}
    for name, kind in kinds.items():
        table = name.startswith(('token_embedding', 'position_embedding', 'head'))
        assert kind == ('embeddings' if table else 'matrices' if model.get_parameter(name).ndim == 2 else 'vectors'), name
    assert {group['name']: group['weight_decay'] for group in groups} == {'matrices': 0.3, 'embeddings': 0.0, 'vectors': 0.0}
    AdamW(groups)
    Muon([group for group in groups if group['name'] == 'matrices'])


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    assert [(g['name'], len(g['params'])) for g in param_groups(model)] == [('matrices', 1), ('vectors', 1)]
    for p in model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='no parameter'): param_groups(model)


# ---- schedules ----

@settings(max_examples=60)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(0, 15), st.integers(0, 25), st.floats(1e-5, 1), st.floats(0, 1))
def test_schedules_rise_to_the_peak_and_never_again(name, warmup, rest, peak, share):
    total, floor = warmup + rest, share * peak
    extra = {'decay': rest // 2} if name == 'wsd' else {}
    rates = [SCHEDULES[name](step, total, peak=peak, warmup=warmup, min_lr_ratio=share, **extra) for step in range(total + 5)]
    for step in range(warmup): assert math.isclose(rates[step], peak * (step + 1) / (warmup + 1))
    if rest > 1: assert math.isclose(rates[warmup], peak)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(rates[warmup:], rates[warmup + 1:]))
    assert all(0 < rate <= peak * (1 + 1e-9) or floor == 0 for rate in rates)
    for rate in rates[total:]: assert math.isclose(rate, peak if name == 'constant' else floor, abs_tol=1e-12)


def test_schedules_against_transformers():
    transformers = pytest.importorskip('transformers')
    total, warmup = 50, 10
    def theirs(make, **settings):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], 1.0)
        scheduler, rates = make(optimizer, warmup, total, **settings), []
        for _ in range(total):
            rates.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            scheduler.step()
        return rates
    for ours, make in ((cosine_schedule, transformers.get_cosine_schedule_with_warmup), (linear_schedule, transformers.get_linear_schedule_with_warmup)):
        for step, rate in enumerate(theirs(make)):
            if step >= warmup: assert math.isclose(ours(step, total, peak=1.0, warmup=warmup), rate, abs_tol=1e-9)


def test_wsd_known_values():
    rates = [wsd_schedule(step, 10, peak=1.0, warmup=3, decay=4, min_lr_ratio=0.2) for step in range(12)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]))
    assert wsd_schedule(79, 100, peak=1.0) == 1.0 > wsd_schedule(81, 100, peak=1.0)


@pytest.mark.parametrize('schedule', SCHEDULES.values())
def test_schedules_refuse(schedule):
    with pytest.raises(ValueError, match='from 0'): schedule(-1, 10, peak=1.0)
    with pytest.raises(ValueError, match='does not fit'): schedule(0, 10, peak=1.0, warmup=11)
    with pytest.raises(ValueError, match='min_lr_ratio'): schedule(0, 10, peak=1.0, min_lr_ratio=2.0)


def test_schedules_have_no_state():
    for schedule in SCHEDULES.values():
        forward = [schedule(step, 30, peak=1.0, warmup=5) for step in range(30)]
        assert forward[::-1] == [schedule(step, 30, peak=1.0, warmup=5) for step in reversed(range(30))]
    assert constant_schedule(10**9, 5, peak=0.1) == 0.1


# ---- clipping ----

@given(st.floats(1e-6, 1e6), st.floats(1e-4, 1e4), st.integers(0, 99))
def test_clipping_against_torch(size, limit, seed):
    a, b = parameters(seed=seed), parameters(seed=seed)
    for params in (a, b):
        for p in params[1:]: p.grad = size * p.detach().clone()
    length = clip_grad_norm(iter(a), limit)
    assert torch.equal(length, nn.utils.clip_grad_norm_(b, limit))
    for p, q in zip(a[1:], b[1:]): assert torch.equal(p.grad, q.grad)
    assert a[0].grad is None
    after = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in a[1:]]))
    assert after <= limit * 1.001


def test_non_finite_gradients_are_named_and_nothing_is_touched():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model(torch.ones(4, 2)).sum().backward()
    model[0].weight.grad[0, 0] = math.nan
    model[2].bias.grad[:] = -math.inf
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r'0\.weight \(1 values\), 2\.bias \(3 values\)$'): clip_grad_norm(model.named_parameters(), 1.0)
    with pytest.raises(ValueError, match='parameter 0 .*, parameter 5 '): clip_grad_norm(model.parameters(), 1.0)
    for p, g in zip(model.parameters(), before): assert torch.equal(p.grad.nan_to_num(7.0), g.nan_to_num(7.0))
    for p in model.parameters(): p.grad.fill_(math.nan)
    with pytest.raises(ValueError, match='and 3 more'): clip_grad_norm(model.named_parameters(), 1.0)


def test_clipping_one_tensor_no_gradients_and_wrong_limits():
    p = nn.Parameter(torch.ones(4))
    assert clip_grad_norm(p, 1.0) == 0
    p.grad = torch.ones(4)
    assert clip_grad_norm(p, 1.0) == 2
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match='positive'): clip_grad_norm(p, wrong)


# ---- the finder ----

def line():
    "A bowl with curvature 1, and its optimizer: SGD is stable below a rate of 2."
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    return model, torch.optim.SGD(model.parameters(), 0.5, momentum=0.1)


def test_the_finder_finds_the_edge_of_a_bowl_and_leaves_no_trace():
    model, optimizer = line()
    model(torch.ones(1, 1)).backward()
    optimizer.step()
    weight, state = model.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    search = find_learning_rate(model, optimizer, lambda i: ((model.weight - 0.5 * math.sin(i)) ** 2).sum() / 2 + 1, low=1e-3, high=100.0)
    assert 0.05 < search.suggestion < 3
    assert len(search.rates) == len(search.losses) < 100 and search.rates == sorted(search.rates)
    assert torch.equal(model.weight, weight) and model.weight.grad is None
    assert optimizer.state_dict()['param_groups'] == state['param_groups']
    assert torch.equal(optimizer.state_dict()['state'][0]['momentum_buffer'], state['state'][0]['momentum_buffer'])


def test_the_finder_puts_everything_back_when_it_fails():
    model, optimizer = line()
    def fails(i):
        if i == 5: raise RuntimeError('no more data')
        return (model.weight**2).sum()
    with pytest.raises(RuntimeError, match='no more data'): find_learning_rate(model, optimizer, fails)
    assert model.weight.item() == 3.0 and optimizer.param_groups[0]['lr'] == 0.5
    with pytest.raises(ValueError, match='does not fall'): find_learning_rate(model, optimizer, lambda i: model.weight.sum() * math.nan)
    with pytest.raises(ValueError, match='low < high'): find_learning_rate(model, optimizer, fails, low=1.0, high=0.1)
    with pytest.raises(ValueError, match='at least 10'): find_learning_rate(model, optimizer, fails, steps=3)


# ---- the whole ----

def test_every_public_name_is_documented_and_typed():
    for name in ('AdamW', 'Muon', 'newton_schulz', 'param_groups', 'clip_grad_norm', 'find_learning_rate', *(f.__name__ for f in SCHEDULES.values())):
        thing = getattr(optim, name)
        assert thing.__doc__, name
        hints = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing)
        assert all(p.annotation is not inspect.Parameter.empty for p in hints.parameters.values() if p.name != 'self'), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_adamw_and_muon_against_torch_on_a_gpu():
    for ours, theirs, more in ((AdamW, torch.optim.AdamW, {}), (AdamW, torch.optim.AdamW, {'fused': True}), (Muon, torch.optim.Muon, {})):
        a, b = ([nn.Parameter(p.detach().cuda()) for p in parameters([(64, 48), (16, 16)])] for _ in range(2))
        optimizers = ours(a, lr=0.01, **more), theirs(b, lr=0.01, **more)
        for step in range(50):
            for p, q in zip(a, b): p.grad = torch.full_like(p, math.sin(step)) + p.detach(); q.grad = p.grad.clone()
            for optimizer in optimizers: optimizer.step()
        agree(a, b, 1e-6)
