"Chapter 1 beyond its chapter: random formulas, extreme scores, exchange with torch.nn, errors, devices."
import copy, inspect, logging, math, random, sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from llm_from_scratch import tensors
from llm_from_scratch.tensors import (DeviceReport, Dropout, Embedding, Linear, Value, best_device, check_device, cross_entropy, linear,
                                      log_softmax, logsumexp, seed_all, softmax)

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
inf = math.inf


# ---- Value ----

BINARY = [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / (b * b + 0.5)]
UNARY = [lambda a: -a, lambda a: 3 - a, lambda a: 2.5 * a, lambda a: 0.5 + a, lambda a: a**2, lambda a: a**3.0, lambda a: a**0, lambda a: 1 / (a * a + 1), lambda a: a.tanh(),
         lambda a: a.tanh().exp(), lambda a: (a * a + 0.1).log(), lambda a: a.relu(), lambda a: a.sigmoid(), lambda a: (a * a + 1) ** -0.5]
numbers = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)
programs = st.lists(st.tuples(st.integers(0, len(BINARY) + len(UNARY) - 1), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=25)


def run_program(inputs, program):
    "Each step takes two earlier results, which may be the same, and is used by any number of later ones; tanh keeps it in range."
    pool = list(inputs)
    for op, i, j in program:
        a, b = pool[i % len(pool)], pool[j % len(pool)]
        pool.append((BINARY[op](a, b) if op < len(BINARY) else UNARY[op - len(BINARY)](a)).tanh())
    return sum(pool[1:], pool[0])


@given(st.lists(numbers, min_size=1, max_size=4), programs)
def test_value_against_autograd(data, program):
    ours, theirs = [Value(x) for x in data], [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in data]
    a, b = run_program(ours, program), run_program(theirs, program)
    a.backward()
    b.backward()
    assert math.isclose(a.data, b.item(), rel_tol=1e-9, abs_tol=1e-9)
    for x, t in zip(ours, theirs): assert math.isclose(x.grad, t.grad.item(), rel_tol=1e-7, abs_tol=1e-9)


@given(st.lists(numbers, min_size=1, max_size=3), programs)
def test_history_is_topological_and_without_repeats(data, program):
    history = run_program([Value(x) for x in data], program).history()
    place = {node: i for i, node in enumerate(history)}
    assert len(place) == len(history)
    assert all(place[source] < place[node] for node in history for source, _ in node.edges)


def test_gradients_accumulate_as_in_torch():
    ours, theirs = Value(0.7), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    shared, same = ours * ours, theirs * theirs
    for factor in (2.0, 5.0):
        (shared * factor).backward()
        (same * factor).backward(retain_graph=True)
    (shared.exp()).backward()
    (same.exp()).backward()
    assert math.isclose(ours.grad, theirs.grad.item(), rel_tol=1e-12)


def test_a_graph_far_deeper_than_the_stack():
    x = y = Value(1.0)
    for _ in range(20 * sys.getrecursionlimit()): y = y + x
    y.backward()
    assert x.grad == 20 * sys.getrecursionlimit() + 1


def test_work_grows_with_numbers_not_with_paths():
    x = y = Value(1.0)
    for _ in range(60): y = y + y
    y.backward()
    assert x.grad == 2.0**60 and len(y.history()) == 61


@pytest.mark.parametrize('x, n', [(0.0, 2), (0.0, 1), (0.0, 0), (-2.0, 3), (-2.0, -1), (2.0, 0.5)])
def test_powers_at_the_edges(x, n):
    ours, theirs = Value(x), torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (ours**n).backward()
    (theirs**n).backward()
    assert ours.grad == pytest.approx(theirs.grad.item())


def test_flat_ends():
    for x in (-1e4, 1e4):
        for f, expected in ((Value.tanh, math.copysign(1, x)), (Value.sigmoid, float(x > 0))):
            leaf = Value(x)
            y = f(leaf)
            y.backward()
            assert (y.data, leaf.grad) == (expected, 0.0)
    zero = Value(0.0)
    zero.relu().backward()
    assert zero.grad == 0.0


@pytest.mark.parametrize('f, error, words', [
    (lambda: Value(0.0).log(), ValueError, 'positive number, got 0'), (lambda: Value(-1.5).log(), ValueError, '-1.5'),
    (lambda: Value(-8.0) ** 0.5, ValueError, '-8'), (lambda: 1 / Value(0.0), ZeroDivisionError, '0'), (lambda: Value(0.0) ** 0.5, ZeroDivisionError, '0.5'),
    (lambda: Value(1000.0).exp(), OverflowError, '')])
def test_value_errors(f, error, words):
    with pytest.raises(error) as caught: f()
    assert words in str(caught.value)


def test_a_value_as_exponent_is_refused():
    with pytest.raises(TypeError, match='exponent must be a number'): inspect.unwrap(Value.__pow__)(Value(2.0), Value(3.0))


def test_drawing_names_numbers_and_gradients():
    a = Value(2.0, name='first')
    y = a * a + 1
    y.backward()
    drawing = y.graph()
    assert drawing == y.graph() and drawing.startswith('<svg') and all(words in drawing for words in ('first', 'grad 4', '×', '+'))
    assert repr(Value(2.0) * 3) == 'Value(6, grad=0)'


# ---- softmax and its family ----

PAIRS = [(softmax, torch.softmax), (log_softmax, torch.log_softmax), (logsumexp, torch.logsumexp)]
logits = st.floats(-1e4, 1e4, width=32) | st.just(-inf)


@st.composite
def score_tables(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    table = torch.tensor(draw(st.lists(st.lists(logits, min_size=columns, max_size=columns), min_size=rows, max_size=rows)), dtype=torch.float64)
    table[:, 0] = torch.where(table.isinf().all(1), 1.0, table[:, 0])            # rows without any possibility have a test of their own
    return table


def with_gradient(f, x, weights):
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    (y.masked_fill(y.isinf(), 0.0) * weights[..., : y.shape[-1]].view_as(y) if y.shape == weights.shape else y.sum()).sum().backward()
    return y.detach(), leaf.grad


@pytest.mark.parametrize('ours, theirs', PAIRS, ids=lambda f: f.__name__)
@given(x=score_tables(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_against_torch_in_value_and_gradient(ours, theirs, x, dtype):
    x = x.to(dtype)
    weights = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view_as(x)
    result, exact = with_gradient(ours, x, weights.to(dtype)), with_gradient(lambda t: theirs(t, -1), x.double(), weights)
    torch.testing.assert_close(result, exact, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-5 if dtype == torch.float32 else 1e-9, check_dtype=False)
    # torch's float32 gradient of logsumexp is exp(x - result), and a result of 10,000 is only known to 0.001.
    loose = {'rtol': 2e-3, 'atol': 2e-3} if (ours, dtype) == (logsumexp, torch.float32) else {}
    torch.testing.assert_close(result, with_gradient(lambda t: theirs(t, -1), x, weights.to(dtype)), **loose)


@pytest.mark.parametrize('ours, theirs', PAIRS, ids=lambda f: f.__name__)
def test_every_axis(ours, theirs):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for dim in range(-3, 3): torch.testing.assert_close(ours(x, dim), theirs(x, dim))


@given(score_tables(), st.floats(-1e3, 1e3))
def test_only_differences_matter(x, shift):
    torch.testing.assert_close(softmax(x + shift), softmax(x), atol=1e-8, rtol=1e-8)
    assert torch.allclose(softmax(x).sum(-1), torch.ones(len(x), dtype=x.dtype))


def test_far_from_zero_differences_stay_exact():
    x = torch.tensor([10_000.0, 9_999.0])                       # float32 numbers here are 0.001 apart
    expected = torch.log_softmax(torch.tensor([1.0, 0.0], dtype=torch.float64), -1).float()
    torch.testing.assert_close(log_softmax(x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_row_without_any_possibility(dtype):
    x = torch.tensor([[-inf] * 3, [0.0, 1.0, -inf]], dtype=dtype, requires_grad=True)
    assert torch.equal(softmax(x)[0], torch.zeros(3, dtype=dtype)) and torch.equal(log_softmax(x)[0], x[0]) and logsumexp(x)[0] == -inf
    for f in (softmax, logsumexp):
        gradient, = torch.autograd.grad((f(x) * 2).masked_fill(f(x).isinf(), 0).square().sum(), x)
        assert torch.equal(gradient[0], torch.zeros(3, dtype=dtype)) and gradient.isfinite().all() and gradient[1].any()
    gradient, = torch.autograd.grad(logsumexp(x).sum(), x)
    assert torch.equal(gradient[0], torch.zeros(3, dtype=dtype)) and torch.allclose(gradient[1], torch.softmax(x[1], -1))


def test_nan_and_infinity_are_not_hidden():
    assert softmax(torch.tensor([math.nan, 0.0])).isnan().all()
    assert logsumexp(torch.tensor([inf, 0.0])) == inf and softmax(torch.tensor([inf, 0.0])).isnan().any()


@pytest.mark.parametrize('f', [softmax, log_softmax, logsumexp, lambda x: cross_entropy(x, torch.tensor([0, 3, -100]))])
def test_gradcheck(f):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(f, x)


@given(st.integers(0, 2**31), st.sampled_from(['mean', 'sum', 'none']), st.sampled_from([1.0, 100.0, 1e4]), st.sampled_from([-100, 3]), st.sampled_from([torch.float32, torch.float64]))
def test_cross_entropy_against_torch(seed, reduction, scale, ignore_index, dtype):
    g = torch.Generator().manual_seed(seed)
    x, targets = scale * torch.randn(2, 3, 5, generator=g, dtype=dtype), torch.randint(5, (2, 3), generator=g)
    x = x.masked_fill(torch.rand(2, 3, 5, generator=g) < 0.2, -inf)
    x[..., 0] = 0.0
    targets[0, 0], targets[1, 1] = ignore_index, 1
    results = []
    for f, shaped in ((cross_entropy, lambda t: t), (F.cross_entropy, lambda t: t.transpose(1, 2))):
        leaf = x.clone().requires_grad_()
        y = f(shaped(leaf), targets, ignore_index=ignore_index, reduction=reduction)
        (y * torch.linspace(1, 2, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results)


def test_cross_entropy_of_nothing():
    x, ignored = torch.zeros(2, 3, requires_grad=True), torch.tensor([-100, -100])
    assert cross_entropy(x, ignored).isnan() and F.cross_entropy(x, ignored).isnan()
    assert cross_entropy(x, ignored, reduction='sum') == 0
    assert cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), reduction='none').shape == (0,)


def test_small_integer_targets():
    x, targets = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 3, 3])
    assert cross_entropy(x, targets.int()) == cross_entropy(x, targets)


# The jaxtyping checker of the tests would speak before the library does: `unwrap` asks the library alone.
@pytest.mark.parametrize('args, error, words', [
    ((torch.zeros(2, 5), torch.tensor([1, 5])), ValueError, ('target 5', '0 to 4')), ((torch.zeros(2, 5), torch.tensor([1, -1])), ValueError, ('target -1', '0 to 4')),
    ((torch.zeros(2, 3, 5), torch.zeros(2, 5, dtype=torch.long)), ValueError, ('(2, 3, 5)', '(2, 3)', '(2, 5)')),
    ((torch.zeros(2, 5), torch.zeros(2)), TypeError, ('float32',)), ((torch.zeros(2, 5), torch.tensor([1, 2]), -100, 'average'), ValueError, ("'average'", "'mean'"))])
def test_cross_entropy_errors(args, error, words):
    with pytest.raises(error) as caught: inspect.unwrap(cross_entropy)(*args)
    assert all(word in str(caught.value) for word in words)


def test_shapes_are_checked_while_tests_run():
    with pytest.raises(TypeError, match='targets'): cross_entropy(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))


# ---- layers ----

LAYERS = [(lambda: Linear(6, 4), lambda: nn.Linear(6, 4)), (lambda: Linear(6, 4, bias=False), lambda: nn.Linear(6, 4, bias=False)),
          (lambda: Embedding(9, 4), lambda: nn.Embedding(9, 4)), (lambda: Dropout(0.3), lambda: nn.Dropout(0.3))]


@pytest.mark.parametrize('make_ours, make_theirs', LAYERS, ids=['Linear', 'Linear without bias', 'Embedding', 'Dropout'])
def test_layers_exchange_state_with_torch(make_ours, make_theirs):
    seed_all(3); ours = make_ours()
    seed_all(3); theirs = make_theirs()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items(): assert torch.equal(tensor, theirs.state_dict()[name])
    first, second = make_ours(), make_theirs()
    first.load_state_dict(second.state_dict())                  # both ways, with every name accounted for
    theirs.load_state_dict(first.state_dict())
    for name, tensor in theirs.state_dict().items(): assert torch.equal(tensor, second.state_dict()[name])


def test_layers_are_what_tools_look_for():
    assert isinstance(Linear(3, 2), nn.Linear) and isinstance(Embedding(3, 2), nn.Embedding)
    for make in (lambda g: Linear(3, 2, generator=g), lambda g: Embedding(3, 2, generator=g)):
        before = torch.get_rng_state()
        layer = make(torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), before)                   # a generator of one's own leaves torch's alone
        first = [p.clone() for p in layer.parameters()]
        layer.reset_parameters(torch.Generator().manual_seed(5))
        assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(first, layer.parameters()))
        with torch.device('meta'): assert all(p.is_meta for p in make(None).parameters())
    torch.set_default_dtype(torch.float64)
    try: assert Linear(3, 2).weight.dtype == Embedding(3, 2).weight.dtype == torch.float64
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('shape', [(6,), (1, 6), (2, 3, 6), (0, 6)])
def test_linear_against_torch(shape):
    ours, x = Linear(6, 4), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), x @ ours.weight.T + ours.bias)


@pytest.fixture
def shared_out(monkeypatch):
    "Sets the number of threads; notes which products are shared out."
    seen, share, threads = [], tensors._share_out, torch.get_num_threads()
    monkeypatch.setattr(tensors, '_share_out', lambda *a: seen.append(a) or share(*a))
    yield seen
    torch.set_num_threads(threads)


@pytest.mark.parametrize('threads', [2, 3, 7])
@pytest.mark.parametrize('rows', [1024, 1025, 1027])
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_one_vector_shared_out_against_torch(shared_out, threads, rows, bias):
    g = torch.Generator().manual_seed(0)
    torch.set_num_threads(threads)
    weight, b = torch.randn(rows, 2 * 160, generator=g)[:, ::2], torch.randn(rows, generator=g) if bias else None    # rows that do not lie side by side
    for n, shape in enumerate([(160,), (1, 160), (1, 1, 160)], start=1):
        x = torch.randn(shape, generator=g)
        torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)
        assert len(shared_out) == n
    with torch.autocast('cpu', torch.bfloat16): assert linear(x, weight, b).dtype == F.linear(x, weight, b).dtype == torch.bfloat16


@torch.no_grad()
def test_more_cores_than_rows(shared_out):
    torch.set_num_threads(7)
    x, weight = (torch.randn(n, 40_000, generator=torch.Generator().manual_seed(n)) for n in (1, 5))
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-3)
    assert len(shared_out) == 1


def test_only_one_large_vector_is_shared_out(shared_out, monkeypatch):
    torch.set_num_threads(2)
    layer, x = Linear(400, 400), torch.randn(1, 400)
    loss = layer(x).square().sum()                                                       # gradients are wanted
    loss.backward()
    with torch.no_grad():
        layer(torch.randn(2, 400)), layer(torch.randn(0, 400)), Linear(9, 9)(torch.randn(1, 9))
        copy.deepcopy(layer).double()(x.double())
        with monkeypatch.context() as compiling:                                         # a compiler writes its own product
            compiling.setattr(torch.compiler, 'is_compiling', lambda: True)
            layer(x)
        torch.set_num_threads(1)
        layer(x)
        assert not shared_out
        torch.set_num_threads(2)
        layer(x)
        assert len(shared_out) == 1


def test_embedding_gradient_against_one_hot():
    layer, ids = Embedding(7, 3), torch.tensor([[2, 5, 2], [0, 2, 5]])
    weight = layer.weight.detach().clone().requires_grad_()
    weights = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    (layer(ids) * weights).sum().backward()
    (F.one_hot(ids, 7).float() @ weight * weights).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    assert layer(torch.zeros(0, dtype=torch.long)).shape == (0, 3)


@pytest.mark.parametrize('p', [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_against_torch(p):
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    seed_all(1); ours = Dropout(p)(x)
    seed_all(1); theirs = nn.Dropout(p)(x)
    torch.testing.assert_close(ours, theirs)
    if p < 1: torch.testing.assert_close(ours[ours != 0], x[ours != 0] / (1 - p))
    assert Dropout(p).eval()(x) is x


def test_dropout_keeps_the_mean_and_draws_anew():
    layer, ones = Dropout(0.3, generator=torch.Generator().manual_seed(0)), torch.ones(100_000)
    first, second = layer(ones), layer(ones)
    assert abs(first.mean() - 1) < 0.01 and abs((first == 0).float().mean() - 0.3) < 0.01 and not torch.equal(first, second)
    assert torch.equal(first, Dropout(0.3, generator=torch.Generator().manual_seed(0))(ones))
    assert torch.equal(copy.deepcopy(layer)(ones), layer(ones))


def test_generators_decide_the_first_weights():
    for make in (lambda g: Linear(5, 3, generator=g), lambda g: Embedding(5, 3, generator=g)):
        state = torch.get_rng_state()
        a, b, c = (make(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight)
        assert torch.equal(torch.get_rng_state(), state)        # nobody else's numbers were used up
    limit = 400**-0.5
    weight = Linear(400, 400).weight
    assert weight.abs().max() <= limit and weight.abs().max() > 0.99 * limit and abs(weight.std() - limit / 3**0.5) < 0.01 * limit


@pytest.mark.parametrize('f, error, words', [
    (lambda: Linear(0, 3), ValueError, '0 and 3'), (lambda: Embedding(3, 0), ValueError, '3 and 0'), (lambda: Dropout(1.5), ValueError, '1.5'), (lambda: Dropout(-0.1), ValueError, '-0.1'),
    (lambda: inspect.unwrap(Linear.forward)(Linear(6, 4), torch.zeros(2, 5)), ValueError, 'size 6, got shape (2, 5)'),
    (lambda: inspect.unwrap(Linear.forward)(Linear(6, 4), torch.tensor(1.0)), ValueError, 'got shape ()'),
    (lambda: inspect.unwrap(Embedding.forward)(Embedding(6, 4), torch.zeros(2)), TypeError, 'float32'),
    (lambda: Embedding(6, 4)(torch.tensor([0, 6])), ValueError, 'token 6 is outside the vocabulary: expected 0 to 5'), (lambda: Embedding(6, 4)(torch.tensor([-1])), ValueError, 'token -1')])
def test_layer_errors(f, error, words):
    with pytest.raises(error) as caught: f()
    assert words in str(caught.value)


# ---- seeds and devices ----

def test_one_seed_for_all():
    def draw(): return random.random(), np.random.rand(), torch.rand(()).item()
    generator = seed_all(5)
    first, own = draw(), torch.rand(3, generator=generator)
    assert torch.equal(torch.rand(3, generator=seed_all(5)), own) and draw() == first
    seed_all(6)
    assert all(a != b for a, b in zip(draw(), first))


@pytest.mark.parametrize('seed, error', [(-1, ValueError), (2**32, ValueError), ('7', TypeError), (1.0, TypeError)])
def test_seeds_that_will_not_do(seed, error):
    with pytest.raises(error, match=str(seed)): inspect.unwrap(seed_all)(seed)


def test_the_device_check_compares():
    report = check_device('cpu')
    assert report.ok and set(report.errors) == {'matmul', 'softmax', 'gradient'} and 'agrees' in str(report)
    for name in ('meta', 'no such device'):
        report = check_device(name)
        assert not report.ok and not report.errors and report.verdict.startswith(f'{name} cannot compute')


@pytest.mark.parametrize('which, damage, ok', [('matmul', lambda t: t * 1.02, False), ('softmax', lambda t: t * math.nan, False), ('gradient', torch.zeros_like, False),
                                               ('gradient', lambda t: t * 1.0005, True)])
def test_a_device_that_computes_something_else_is_not_trusted(monkeypatch, caplog, which, damage, ok):
    honest = tensors._probe
    def probe(device):
        results = honest('cpu')
        return {**results, which: damage(results[which])} if device == 'cuda' else results
    monkeypatch.setattr(tensors, '_probe', probe)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert check_device('cuda').ok == ok and isinstance(check_device('cuda'), DeviceReport)
    with caplog.at_level(logging.INFO): device = best_device()
    assert device == torch.device('cuda' if ok else 'cpu')
    if not ok: assert which in caplog.text and 'disagrees' in caplog.text and 'using the CPU' in caplog.text


def test_the_fallback_is_logged(monkeypatch, caplog):
    for part in (torch.cuda, torch.xpu, torch.backends.mps): monkeypatch.setattr(part, 'is_available', lambda: False)
    with caplog.at_level(logging.INFO): assert best_device() == torch.device('cpu')
    assert 'using the CPU' in caplog.text


@pytest.mark.skipif(not torch.accelerator.is_available(), reason='no accelerator here')
def test_a_real_accelerator_agrees_or_is_left_alone():
    report = check_device(torch.accelerator.current_accelerator())
    assert report.ok == (best_device().type != 'cpu'), str(report)


def test_all_layers_together_learn():
    "The letters of a word from their places: the smallest training loop there is."
    g = seed_all(0)
    net = nn.Sequential(Embedding(6, 8, generator=g), Linear(8, 5, generator=g))
    places, targets = torch.arange(6), torch.tensor([0, 3, 1, 3, 4, 0])
    losses = []
    for _ in range(200):
        loss = cross_entropy(net(places), targets)
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters(): parameter -= 0.5 * parameter.grad
        losses.append(loss.item())
    assert losses[-1] < 0.02 < losses[0] and torch.equal(softmax(net(places)).argmax(-1), targets)
