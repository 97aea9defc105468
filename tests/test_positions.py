"Chapter 7 beyond its chapter: other models' positions, gradients, compilers, 16 bits, shared tables, wrong use."
import copy, math, pickle, subprocess, sys
from itertools import product

import pytest
import torch
from conftest import ROOT
from hypothesis import given, strategies as st
from torch import nn

from llm_from_scratch import positions as module
from llm_from_scratch.positions import (POSITIONS, ROPE_SCALINGS, Alibi, LearnedPositions, PositionScheme, Rope, RopeScaling, SinusoidalPositions,
                                        alibi_slopes, half_to_interleaved, interleaved_to_half, position_scheme, rope_frequencies, sinusoidal)

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAYOUTS = ['half', 'interleaved']
layouts = pytest.mark.parametrize('layout', LAYOUTS)


def numbers(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_near(a, b, atol): torch.testing.assert_close(a, b, rtol=0, atol=atol)


def by_definition(x, positions, base=10_000.0, layout='half', fraction=1.0, frequencies=None):
    "Number by number, in Python's own arithmetic."
    width = int(x.shape[-1] * fraction)
    omega = [base ** (-2 * i / width) for i in range(width // 2)] if frequencies is None else frequencies.tolist()
    pairs = [(i, i + width // 2) if layout == 'half' else (2 * i, 2 * i + 1) for i in range(width // 2)]
    y = x.double().clone()
    for b, h, t in product(*map(range, x.shape[:3])):
        at = int(positions[b, t] if positions.ndim == 2 else positions[t])
        for (i, j), w in zip(pairs, omega):
            c, s = math.cos(at * w), math.sin(at * w)
            y[b, h, t, i] = x[b, h, t, i].item() * c - x[b, h, t, j].item() * s
            y[b, h, t, j] = x[b, h, t, i].item() * s + x[b, h, t, j].item() * c
    return y


# ---- sinusoidal and learned ----

@given(st.integers(0, 40), st.integers(1, 12), st.floats(2, 1e6))
def test_sinusoids_by_definition(length, half, base):
    table = sinusoidal(length, 2 * half, base, dtype=torch.float64)
    assert table.shape == (length, 2 * half)
    for t, i in product(range(length), range(half)):
        angle = t / base ** (i / half)
        assert math.isclose(table[t, 2 * i], math.sin(angle), abs_tol=1e-10) and math.isclose(table[t, 2 * i + 1], math.cos(angle), abs_tol=1e-10)


def test_sinusoids_follow_the_dtype_of_their_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(5, 8), SinusoidalPositions(8)

        def forward(self, ids): return self.words(ids) + self.places(torch.arange(ids.shape[1]))

    for dtype in TOLERANCE:
        model = Model().to(dtype)
        assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == dtype
        assert list(model.state_dict()) == ['words.weight']


def test_tables_grow_on_the_cpu():
    for places, f in ((SinusoidalPositions(4, context_length=3), lambda m, t: m(t)), (Rope(4, context_length=3), lambda m, t: m(torch.ones(1, 1, len(t), 4), t))):
        before = f(places, torch.tensor([0, 2]))
        far = f(places, torch.tensor([0, 2, 9, 1000]))
        assert places.length == 1001
        assert torch.equal(far[..., :2, :], before) and far.isfinite().all()
        f(places, torch.tensor([1001]))
        assert places.length == 2002


def test_learned_positions_start_small_and_are_drawn_from_the_generator():
    a, b = (LearnedPositions(64, 64, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.weight, b.weight) and list(a.state_dict()) == ['weight']
    assert abs(a.weight.std() / 0.02 - 1) < 0.05 and abs(a.weight.mean()) < 0.002
    batch = torch.tensor([[3, 1], [0, 63]])
    assert torch.equal(a(batch), a.weight[batch])


# ---- rope ----

@layouts
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('fraction', [1.0, 0.5, 0.25])
def test_rope_by_definition(layout, dtype, fraction):
    x = numbers(2, 3, 6, 16, dtype=torch.float64).to(dtype)
    for positions in (torch.arange(6), torch.tensor([[0, 1, 2, 3, 4, 5], [4000, 7, 7, 0, 2049, 3]])):
        y = Rope(16, layout=layout, fraction=fraction)(x, positions)
        assert y.dtype == dtype and y.shape == x.shape
        assert_near(y.double(), by_definition(x, positions, layout=layout, fraction=fraction), TOLERANCE[dtype])


@given(layout=st.sampled_from(LAYOUTS), base=st.floats(10, 1e6), half=st.integers(1, 6), rest=st.integers(0, 3), offset=st.integers(0, 2000), seed=st.integers(0, 9))
def test_scores_know_only_the_distance(layout, base, half, rest, offset, seed):
    width = 2 * half + 2 * rest
    q, k = numbers(2, 1, 2, 5, width, seed=seed, dtype=torch.float64)
    rope, t = Rope(width, base, layout, 2 * half / width), torch.tensor([0, 1, 2, 5, 11])
    def scores(positions): return rope(q, positions) @ rope(k, positions).mT
    assert_near(scores(t + offset), scores(t), 1e-9)
    assert half and not torch.allclose(scores(t), q @ k.mT)


@layouts
@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_rope_gradient_numerically(layout, fraction):
    x, rope = numbers(1, 2, 3, 8, dtype=torch.float64).requires_grad_(), Rope(8, layout=layout, fraction=fraction)
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.tensor([0, 3, 11])), (x,))


@layouts
def test_memory_order_of_the_heads_does_not_matter(layout):
    x, rope, t = numbers(2, 7, 3, 8), Rope(8, layout=layout), torch.arange(7)
    assert_near(rope(x.transpose(1, 2), t), rope(x.transpose(1, 2).contiguous(), t), 1e-6)


@layouts
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3))
def test_permuting_rows_exchanges_the_layouts(layout, n_kv_heads, half, rest, groups):
    d, t, fraction = 2 * half + 2 * rest, torch.arange(5), half / (half + rest)
    x = numbers(1, 5, 6, dtype=torch.float64)
    w_q, w_k = numbers(groups * n_kv_heads * d, 6, seed=1, dtype=torch.float64), numbers(n_kv_heads * d, 6, seed=2, dtype=torch.float64)
    there, back = (interleaved_to_half, half_to_interleaved) if layout == 'interleaved' else (half_to_interleaved, interleaved_to_half)
    other = LAYOUTS[layout == 'half']

    def scores(layout, w_q, w_k):
        rope = Rope(d, layout=layout, fraction=fraction)
        q, k = ((x @ w.T).unflatten(-1, (-1, d)).transpose(1, 2) for w in (w_q, w_k))
        return rope(q, t) @ rope(k, t).repeat_interleave(groups, 1).mT

    new_q, new_k = there(w_q, groups * n_kv_heads, fraction), there(w_k, n_kv_heads, fraction)
    assert_near(scores(other, new_q, new_k), scores(layout, w_q, w_k), 1e-10)
    assert torch.equal(back(new_q, groups * n_kv_heads, fraction), w_q)
    assert torch.equal(there(w_k[:, 0], n_kv_heads, fraction), new_k[:, 0])               # a bias is permuted like its matrix


def test_the_permutation_by_hand():
    assert interleaved_to_half(torch.arange(12), 2).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert interleaved_to_half(torch.arange(8), 1, 0.5).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]


def test_rope_has_no_state_and_travels():
    rope = Rope(8, scaling=RopeScaling('yarn', 4, 64))
    assert not list(rope.parameters()) and not rope.state_dict()
    x, t = numbers(1, 1, 4, 8), torch.arange(4)
    for twin in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope)), rope.half().float()): assert torch.equal(twin(x, t), rope(x, t))


def test_a_table_made_while_inferring_serves_training():
    rope, x = Rope(8, base=777.0, context_length=17), numbers(1, 1, 4, 8)
    with torch.inference_mode(): rope(x, torch.arange(4)), Alibi(3)(5)
    x.requires_grad_()
    (rope(x, torch.arange(4)).square().sum() + (x[0, 0, :, :5] * Alibi(3)(4, 5)).sum()).backward()
    assert x.grad.isfinite().all()


def test_models_made_on_the_meta_device_have_true_frequencies():
    with torch.device('meta'): rope, sinusoids = Rope(8), SinusoidalPositions(8)
    assert torch.equal(rope.inverse_frequencies, rope_frequencies(8))
    assert_near(rope(numbers(1, 1, 4, 8), torch.arange(4)), Rope(8)(numbers(1, 1, 4, 8), torch.arange(4)), 0)
    assert sinusoids.to_empty(device='cpu')(torch.arange(3)).shape == (3, 8)
    assert rope(torch.empty(1, 1, 4, 8, device='meta'), torch.arange(4, device='meta')).is_meta


def test_equal_tables_are_made_once():
    x, t = numbers(1, 1, 4, 8), torch.arange(4)
    Rope(8, base=4321.0)(x, t)
    misses = module._cached_table.cache_info().misses
    for _ in range(3): Rope(8, base=4321.0)(x, t)
    assert module._cached_table.cache_info().misses == misses
    Rope(8, base=4321.0)(x.double(), t)
    assert module._cached_table.cache_info().misses == misses + 1


def test_angles_are_exact_far_out():
    "In 32 bits the angle of position 1,000,000 would be off by up to 0.03."
    x, t = numbers(1, 1, 1, 8), torch.tensor([1_000_003])
    for layout in LAYOUTS: assert_near(Rope(8, layout=layout, context_length=8)(x, t).double(), by_definition(x, t, layout=layout), 1e-5)


# ---- scaling ----

def hf(kind, width=64, length=None, base=10_000.0, trained=512, **options):
    transformers = pytest.importorskip('transformers')
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = transformers.LlamaConfig(hidden_size=width, num_attention_heads=1, max_position_embeddings=trained,
                                      rope_parameters={'rope_type': kind, 'rope_theta': base, **options})
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)


@pytest.mark.parametrize('width, base, trained', [(64, 1e4, 512), (128, 5e5, 8192), (16, 1e6, 4096), (80, 1e4, 2048)])
@pytest.mark.parametrize('factor', [1.0, 2.0, 8.0, 32.0])
def test_scaling_against_transformers(width, base, trained, factor):
    old = dict(width=width, base=base, factor=factor)
    cases = [(RopeScaling('linear', factor), hf('linear', **old)), (RopeScaling('ntk', factor), hf('dynamic', length=2 * trained, trained=trained, **{**old, 'factor': factor - 1})),
             (RopeScaling('llama3', factor, trained, 2.0, 8.0), hf('llama3', original_max_position_embeddings=trained, low_freq_factor=2.0, high_freq_factor=8.0, **old)),
             (RopeScaling('yarn', factor, trained), hf('yarn', original_max_position_embeddings=trained, **old)),
             (RopeScaling('yarn', factor, trained, beta_fast=8.0, beta_slow=0.5, attention_factor=0.7),
              hf('yarn', original_max_position_embeddings=trained, beta_fast=8.0, beta_slow=0.5, attention_factor=0.7, **old))]
    for scaling, (frequencies, attention_factor) in cases:
        rope = Rope(width, base, scaling=scaling)
        torch.testing.assert_close(rope.inverse_frequencies, frequencies.double(), rtol=1e-5, atol=0)
        assert math.isclose(rope.attention_factor, attention_factor, rel_tol=1e-12)


@layouts
@pytest.mark.parametrize('scaling', [RopeScaling('linear', 4), RopeScaling('ntk', 4), RopeScaling('llama3', 4, 64), RopeScaling('yarn', 4, 64)], ids=lambda s: s.kind)
def test_scaled_frequencies_and_attention_factor_are_used(layout, scaling):
    x, t = numbers(1, 1, 5, 16, dtype=torch.float64), torch.tensor([0, 1, 50, 64, 255])
    rope = Rope(16, layout=layout, scaling=scaling)
    expected = rope.attention_factor * by_definition(x, t, layout=layout, frequencies=rope.inverse_frequencies)
    assert_near(rope(x, t), expected, 1e-10)
    assert (rope.attention_factor > 1.1) == (scaling.kind == 'yarn')


# ---- alibi ----

@given(st.integers(1, 300))
def test_slopes(n):
    slopes = alibi_slopes(n).tolist()
    assert len(set(slopes)) == n and all(1 / 256 <= m < 1 for m in slopes)
    if n & (n - 1) == 0: assert all(math.isclose(m, 2 ** (-8 * h / n), rel_tol=1e-6) for h, m in enumerate(slopes, 1))
    whole = 2 ** (n.bit_length() - 1)
    assert slopes[:whole] == alibi_slopes(whole).tolist() and slopes[whole:] == alibi_slopes(2 * whole)[0::2][: n - whole].tolist()


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 7))
def test_the_bias_by_definition(n_heads, n_queries, before):
    bias = Alibi(n_heads)(n_queries, n_queries + before, dtype=torch.float64)
    slopes = alibi_slopes(n_heads)
    expected = [[[-slopes[h].item() * abs(t + before - s) for s in range(n_queries + before)] for t in range(n_queries)] for h in range(n_heads)]
    assert bias.dtype == torch.float64 and torch.equal(bias, torch.tensor(expected, dtype=torch.float64))
    assert Alibi(n_heads)(n_queries).shape == (n_heads, n_queries, n_queries)
    at, order = torch.arange(n_queries + before), torch.randperm(n_queries + before, generator=torch.Generator().manual_seed(before))
    assert torch.equal(Alibi(n_heads).between(at[None, before:], at[order][None], torch.float64)[0], bias[..., order])          # in any order


# ---- compilers ----

COMPILED = """
import torch
from torch import nn
from llm_from_scratch.positions import Alibi, LearnedPositions, Rope, SinusoidalPositions

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.sinusoids, self.learned = SinusoidalPositions(8, context_length=64), LearnedPositions(64, 8)
        self.half, self.paired, self.alibi = Rope(8, fraction=0.5, context_length=64), Rope(8, layout='interleaved', context_length=64), Alibi(2)

    def forward(self, x, positions):
        x = x + self.sinusoids(positions) + self.learned(positions)
        return (self.half(x, positions) @ self.paired(x, positions).mT + self.alibi(x.shape[2])).softmax(-1) @ x

torch.set_num_threads(1)
model = Model()
fast = torch.compile(model, fullgraph=True)
for length in (5, 9, 12):
    for positions in (torch.arange(length), torch.arange(length) + 40):
        outputs, x = [], torch.randn(2, 2, length, 8)
        for f in (model, fast):
            leaf = x.clone().requires_grad_()
            y = f(leaf, positions)
            y.square().sum().backward()
            outputs += [y.detach(), leaf.grad]
        torch.testing.assert_close(outputs[:2], outputs[2:], rtol=1e-5, atol=1e-5)
try: fast(torch.randn(2, 2, 12, 8), torch.arange(12) + 60)
except RuntimeError as error: assert 'out of bounds' in str(error)
else: raise AssertionError('a position beyond the table went unseen')
"""


@pytest.mark.slow
def test_all_compile_without_a_break():
    "In a process of its own: the compiler cannot look through the shape checker of the tests."
    done = subprocess.run([sys.executable, '-X', 'utf8', '-c', COMPILED], capture_output=True, text=True, encoding='utf-8', cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_exported_and_traced_without_leaving_fakes_behind():
    rope, args = Rope(8, base=555.0), (numbers(1, 1, 4, 8), torch.arange(4))
    program = torch.export.export(rope, args).module()
    assert_near(program(*args), rope(*args), 1e-6)
    assert type(rope(*args)) is torch.Tensor


# ---- by name ----

SIZES = dict(d_model=8, n_heads=2, d_head=4, context_length=16, rope_base=500.0, rope_layout='interleaved', rope_fraction=0.5, rope_scaling=RopeScaling('linear', 2))


def test_each_scheme_by_its_name():
    schemes = {name: position_scheme(name, **SIZES) for name in POSITIONS}
    kinds = {name: tuple(type(part) for part in (s.embedding, s.rotary, s.bias)) for name, s in schemes.items()}
    nothing = type(None)
    assert kinds == {'none': (nothing,) * 3, 'sinusoidal': (SinusoidalPositions, nothing, nothing), 'learned': (LearnedPositions, nothing, nothing),
                     'rope': (nothing, Rope, nothing), 'alibi': (nothing, nothing, Alibi), 'alibi_scaled': (nothing, nothing, Alibi)}
    rope = schemes['rope'].rotary
    assert torch.equal(rope.inverse_frequencies, rope_frequencies(2, 500.0) / 2) and (rope.layout, rope.width, rope.length) == ('interleaved', 2, 16)
    assert schemes['learned'].embedding.weight.shape == (16, 8) and schemes['alibi'].bias.n_heads == 2


def test_the_dictionary_can_be_extended(monkeypatch):
    monkeypatch.setitem(POSITIONS, 'mine', lambda **_: PositionScheme(bias=Alibi(1)))
    assert position_scheme('mine', d_model=3).bias.n_heads == 1


# ---- wrong use ----

def rotate(positions, **options): return Rope(8, **options)(torch.zeros(2, 1, 4, 8), torch.tensor(positions))


@pytest.mark.parametrize('f, error, words', [
    (lambda: sinusoidal(3, 5), ValueError, 'even and positive, got 5'), (lambda: sinusoidal(3, 0), ValueError, 'got 0'), (lambda: sinusoidal(-1, 4), ValueError, 'got -1'),
    (lambda: sinusoidal(3, 4, 1.0), ValueError, 'above 1, got 1.0'), (lambda: SinusoidalPositions(7), ValueError, 'got 7'), (lambda: SinusoidalPositions(8, context_length=0), ValueError, 'got 0'),
    (lambda: SinusoidalPositions(8)(torch.tensor([3, -2])), ValueError, 'count from 0, got -2'),
    (lambda: LearnedPositions(0, 4), ValueError, 'got 0 and 4'), (lambda: LearnedPositions(9, 4)(torch.tensor([9])), ValueError, 'position 9 is beyond the table: it has 9'),
    (lambda: LearnedPositions(9, 4)(torch.tensor([-1])), ValueError, 'count from 0, got -1'), (lambda: LearnedPositions(9, 4)(torch.tensor([0, 100, -1])), ValueError, '-1'),
    (lambda: Rope(7), ValueError, 'even and positive, got 7 of 7'), (lambda: Rope(20, fraction=0.25), ValueError, 'got 5 of 20'), (lambda: Rope(8, fraction=0.0), ValueError, 'got 0.0'),
    (lambda: Rope(8, fraction=1.5), ValueError, 'got 1.5'), (lambda: Rope(8, layout='llama'), ValueError, "'llama'"), (lambda: Rope(8, base=-1.0), ValueError, '-1.0'),
    (lambda: rotate([0, 1, 2, -7]), ValueError, 'got -7'), (lambda: Rope(8, context_length=0), ValueError, 'got 0'),
    (lambda: Rope(2, scaling=RopeScaling('ntk', 2)), ValueError, 'at least 4'), (lambda: RopeScaling('dynamic', 2), ValueError, "kind must be one of linear, ntk, llama3, yarn, got 'dynamic'"),
    (lambda: RopeScaling('linear', 0.5), ValueError, 'got 0.5'), (lambda: RopeScaling('linear', math.nan), ValueError, 'nan'), (lambda: RopeScaling('yarn', 2), ValueError, 'yarn scaling needs'),
    (lambda: RopeScaling('llama3', 2), ValueError, 'llama3 scaling needs'), (lambda: RopeScaling('yarn', 2, 0), ValueError, 'original_context_length must be a whole number of at least 1 or None, got 0'), (lambda: RopeScaling('yarn', 2, 64, attention_factor=-1.0), ValueError, '-1.0'),
    (lambda: RopeScaling('llama3', 2, 64, low_freq_factor=4.0), ValueError, 'below high_freq_factor'), (lambda: RopeScaling('yarn', 2, 64, beta_fast=0.5), ValueError, 'below beta_fast'),
    (lambda: interleaved_to_half(torch.zeros(10, 3), 4), ValueError, '10 rows'), (lambda: half_to_interleaved(torch.zeros(12, 3), 4), ValueError, 'got 3 of 3'),
    (lambda: alibi_slopes(0), ValueError, 'got 0'), (lambda: Alibi(0), ValueError, 'got 0'), (lambda: Alibi(2)(5, 3), ValueError, '5 queries and 3 keys'), (lambda: Alibi(2)(0), ValueError, '0 queries'),
    (lambda: position_scheme('rotary'), ValueError, "'rotary': expected one of none, sinusoidal, learned, rope, alibi")])
def test_wrong_use(f, error, words):
    with pytest.raises(error) as caught: f()
    assert words in str(caught.value)



@pytest.mark.parametrize('x, positions', [((2, 1, 4, 6), (4,)), ((2, 1, 4, 8), (3,)), ((2, 1, 4, 8), (3, 4)), ((2, 1, 4, 8), (1,))])
def test_shapes_that_do_not_fit(x, positions):
    with pytest.raises(ValueError, match='expected'): module._check_fit(torch.zeros(x), torch.zeros(positions, dtype=torch.long), 8)


def test_positions_that_are_no_numbers_of_places():
    for wrong in (torch.zeros(3), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(TypeError, match='whole numbers'): module._check_positions(wrong)


def test_nothing_to_rotate_is_nothing():
    assert Rope(8)(torch.zeros(2, 1, 0, 8), torch.arange(0)).shape == (2, 1, 0, 8)
    assert LearnedPositions(4, 8)(torch.arange(0)).shape == (0, 8) and sinusoidal(0, 4).shape == (0, 4)


def test_every_scaling_has_a_test_above(): assert set(ROPE_SCALINGS) == {'linear', 'ntk', 'llama3', 'yarn'}
