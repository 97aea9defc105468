"Chapter 6 beyond its chapter: every option on every backend, peers from `transformers`, caches, compilation."
import functools, inspect, json, math, subprocess, sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from caches import check_cache
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from small import random, with_gradients
from torch import nn
from torch.nn import functional as F

from llm_from_scratch.attention import (BACKENDS, Cache, MultiHeadAttention, PositionBias, Rotary, attention, attention_weights, causal_mask,
                                        document_mask, document_positions, sliding_window_mask)
from llm_from_scratch.gpt import GPT, GPTConfig, MIXERS
from llm_from_scratch.positions import Alibi, Rope

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
inf = math.inf
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_seed(): torch.manual_seed(0)


# ---- every option, every backend ----

lengths = st.integers(1, 9).flatmap(lambda S: st.tuples(st.integers(1, S), st.just(S)))
groups = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)])


def reference(q, k, v, mask, causal, bias, scale, softcap, sinks):
    "One output at a time, in Python, from the definition."
    B, H, T, d = q.shape
    S, group, y = k.shape[2], H // k.shape[1], torch.zeros_like(q)
    for b, h, t in product(range(B), range(H), range(T)):
        seen = [s for s in range(S) if (not causal or s <= t + S - T) and (mask is None or bool(mask[b, h, t, s]))]
        scores = [q[b, h, t] @ k[b, h // group, s] * (d**-0.5 if scale is None else scale) for s in seen]
        if softcap is not None: scores = [softcap * torch.tanh(x / softcap) for x in scores]
        if bias is not None: scores = [x + bias[h, t, s] for x, s in zip(scores, seen)]
        total = sum(x.exp() for x in scores) + (sinks[h].exp() if sinks is not None else 0)
        if seen: y[b, h, t] = sum(x.exp() / total * v[b, h // group, s] for x, s in zip(scores, seen))
    return y


@settings(max_examples=60)
@given(lengths, groups, st.booleans(), st.sampled_from([None, 2, 3, 4, 1]), st.booleans(), st.sampled_from([None, 0.3]), st.sampled_from([None, 1.5]), st.booleans(), st.integers(0, 99))
def test_backends_against_the_definition(TS, HK, causal, mask_axes, biased, scale, softcap, sunk, seed):
    (T, S), (H, K), B = TS, HK, 2
    q, k, v, bias, sinks = random(seed, (B, H, T, 4), (B, K, S, 4), (B, K, S, 4), (H, T, S), (H,))
    full = torch.rand(B, H, T, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    given = {None: None, 2: full[0, 0], 3: full[:, 0], 4: full, 1: full[:, :1]}[mask_axes]
    whole = None if given is None else (given[:, None] if given.ndim == 3 else given).expand(B, H, T, S)
    options = dict(causal=causal, scale=scale, softcap=softcap)
    expected = reference(q, k, v, whole, causal, bias if biased else None, scale, softcap, sinks if sunk else None)
    extra = [bias] * biased + [sinks] * sunk
    def run(backend, q, k, v, *extra):
        rest = list(extra)
        return attention(q, k, v, given, bias=rest.pop(0) if biased else None, sinks=rest.pop(0) if sunk else None, backend=backend, **options)
    results = [with_gradients(partial(run, backend), [q, k, v, *extra]) for backend in ('manual', 'sdpa')]
    torch.testing.assert_close(results[0][0], expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)
    assert all(t.isfinite().all() for result in results for t in result)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('H, K', [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize('backend', ['manual', 'sdpa'])
def test_against_torch_sdpa(backend, H, K, dtype):
    tensors = random(1, (2, H, 17, 8), (2, K, 17, 8), (2, K, 17, 8), dtype=dtype)
    ours = with_gradients(partial(attention, causal=True, backend=backend), tensors)
    def theirs(q, k, v): return F.scaled_dot_product_attention(q, k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1), is_causal=True)
    torch.testing.assert_close(ours, with_gradients(theirs, tensors), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('backend, sunk, biased', [*product(['manual', 'sdpa'], [False, True], [False, True])])
def test_a_fully_masked_row_gives_zeros(backend, sunk, biased, dtype):
    q, k, v, bias, sinks = random(2, (2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (4, 5, 5), (4,), dtype=dtype)
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 2] = mask[1] = False
    def f(q, k, v, bias, sinks): return attention(q, k, v, mask, bias=bias if biased else None, sinks=sinks if sunk else None, backend=backend) + 0 * (bias.sum() + sinks.sum())
    y, *slopes = with_gradients(f, [q, k, v, bias, sinks])
    assert not y[0, :, 2].any() and not y[1].any() and y[0, :, [0, 1, 3, 4]].abs().min() > 0
    assert not slopes[0][0, :, 2].any() and not any(s[1].any() for s in slopes[:3])
    assert all(s.isfinite().all() for s in slopes)


# The compiler cannot see through the shape checker, so these run in a process of their own, one after another.

START = """
import json, sys, torch, traceback, warnings
from llm_from_scratch.attention import MultiHeadAttention, attention
from llm_from_scratch.positions import Alibi, Rope
warnings.simplefilter('ignore'); torch.set_num_threads(1)
"""

PARTS = {'flex against manual': """
q, k, v, bias, sinks = (torch.randn(s) for s in ((2, 4, 3, 8), (2, 2, 7, 8), (2, 2, 7, 8), (4, 3, 7), (4,)))
mask = torch.rand(2, 3, 7) < 0.5
mask[0, 1] = False
cases = (True, None, None, None, None), (False, mask, None, None, sinks), (True, mask[:, None], bias, 2.0, sinks)
with torch.no_grad():
    for causal, m, b, cap, s in cases:
        options = dict(causal=causal, bias=b, softcap=cap, sinks=s)
        flex = attention(q, k, v, m, backend='flex', **options)
        torch.testing.assert_close(flex, attention(q, k, v, m, backend='manual', **options), atol=1e-5, rtol=1e-5)
        if m is not None: assert not flex[0, :, 1].any()
""", 'flex compiles': """
with torch.no_grad():
    layer = MultiHeadAttention(64, 4, 2, rotary=Rope(16), window=5, backend='flex').eval()      # compiled on a CPU: no sinks, no gradients
    x, at = torch.randn(2, 16, 64), torch.arange(16)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)(x, at)
    layer.backend = 'manual'
    torch.testing.assert_close(compiled, layer(x, at), atol=1e-5, rtol=1e-5)
""", 'the layer compiles': """
x, at = torch.randn(2, 7, 16), torch.arange(7)
for part in ({'rotary': Rope(4), 'qk_norm': True, 'sinks': True, 'window': 3},):
    layer = MultiHeadAttention(16, 4, 2, **part)
    results = []
    for f in (layer, torch.compile(layer, fullgraph=True, backend=compiler)):
        layer.zero_grad()
        y = f(x, at)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
""", 'one layer for every length': """
layer, plain = MultiHeadAttention(16, 4, 2, rotary=Rope(4)), torch.compile(attention, fullgraph=True, backend=compiler)
compiled = torch.compile(layer, fullgraph=True, backend=compiler)
for T in (7, 9, 1):
    x, (q, k, v) = torch.randn(2, T, 16), torch.randn(3, 1, 2, T, 8)
    torch.testing.assert_close(compiled(x, torch.arange(T)), layer(x, torch.arange(T)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain(q, k, v, causal=True), attention(q, k, v, causal=True), atol=1e-5, rtol=1e-5)
"""}

EACH = """
compilers, parts = json.loads(sys.argv[1])
found = {}
for name, code in parts.items():
    compiler = compilers[name]
    torch.manual_seed(0); torch._dynamo.reset()
    try: exec(code, dict(globals())); found[name] = 'as promised'
    except Exception: found[name] = traceback.format_exc()[-3000:]
print(json.dumps(found))
"""


def alone(compiler, **others):
    "What became of each part, compiled by `compiler` or by its own, in a process without the shape checker."
    pytest.importorskip('torch.nn.attention.flex_attention')
    done = subprocess.run([sys.executable, '-c', START + EACH, json.dumps([dict.fromkeys(PARTS, compiler) | others, PARTS])], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_flex_against_manual_and_compiled_without_a_break():
    "With the whole compiler but for the C++ at its end; that one graph serves every length, its first half decides."
    assert alone('aot_eager', **{'one layer for every length': 'eager'}) == dict.fromkeys(PARTS, 'as promised')


@pytest.mark.slow
def test_compiled_to_machine_code(): assert alone('inductor') == dict.fromkeys(PARTS, 'as promised')


def test_fast_path_makes_no_mask(monkeypatch):
    seen = []
    def spy(*tensors, **options): seen.append((len(tensors), options)); return torch.zeros_like(tensors[0])
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    layer = MultiHeadAttention(16, 4, 2, window=9)
    layer(torch.randn(1, 7, 16), torch.arange(7))
    assert seen == [(3, dict(dropout_p=0.0, is_causal=True, scale=None, enable_gqa=True))]


def test_causal_reads_no_later_value():
    x = torch.randn(1, 8, 16)
    for backend, part in product(('manual', 'sdpa'), ({}, {'rotary': Rope(4)}, {'position_bias': Alibi(4)}, {'window': 3}, {'sinks': True}, {'softcap': 3.0}, {'qk_norm': True})):
        layer = MultiHeadAttention(16, 4, 2, backend=backend, **part)
        for t in range(8):
            changed = x.clone()
            changed[:, t] += 1
            a, b = layer(x, torch.arange(8)), layer(changed, torch.arange(8))
            torch.testing.assert_close(a[:, :t], b[:, :t])
            assert not torch.allclose(a[:, t], b[:, t])


def test_dropout_in_training_only():
    layer, x, at = MultiHeadAttention(16, 4, dropout=0.5), torch.randn(1, 8, 16), torch.arange(8)
    assert not torch.equal(layer(x, at), layer(x, at))
    layer.eval()
    assert torch.equal(layer(x, at), layer(x, at))
    calm = MultiHeadAttention(16, 4).eval()
    calm.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, at), calm(x, at))


# ---- masks ----

@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 12))
def test_masks_against_their_words(T, earlier, window):
    S = T + earlier
    past, windowed = causal_mask(T, S), sliding_window_mask(T, window, S)
    for t, s in product(range(T), range(S)):
        behind = t + earlier - s
        assert bool(past[t, s]) == (behind >= 0)
        assert bool(windowed[t, s]) == (0 <= behind < window)


def test_a_packed_row_reads_like_its_documents():
    layer = MultiHeadAttention(16, 4, 2, rotary=Rope(4))
    x, segments = torch.randn(1, 9, 16), torch.tensor([[0] * 4 + [1] * 5])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = layer(x, positions, document_mask(segments))
    alone = [layer(x[:, a:b], torch.arange(b - a)) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


# ---- peers ----

@pytest.mark.parametrize('bias, dtype', [*product([True, False], TOLERANCE)])
def test_layer_against_torch_nn(bias, dtype):
    theirs = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True, dtype=dtype)
    ours = MultiHeadAttention(24, 4, bias=bias).to(dtype)
    kinds = ('weight', 'bias') if bias else ('weight',)
    if bias: nn.init.normal_(theirs.in_proj_bias), nn.init.normal_(theirs.out_proj.bias)
    state = {f'{name}.{kind}': part for kind in kinds for name, part in zip(('query', 'key', 'value'), theirs.get_parameter(f'in_proj_{kind}').chunk(3))}
    ours.load_state_dict(state | {f'output.{kind}': theirs.out_proj.get_parameter(kind) for kind in kinds})
    x, = random(4, (3, 10, 24), dtype=dtype)
    results = []
    for module, call in ((ours, lambda x: ours(x, torch.arange(10))), (theirs, lambda x: theirs(x, x, x, attn_mask=~causal_mask(10), need_weights=False)[0])):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad])
    for kind in kinds:
        results[0].append(torch.cat([getattr(ours, name).get_parameter(kind).grad for name in ('query', 'key', 'value')]))
        results[1].append(theirs.get_parameter(f'in_proj_{kind}').grad)
    torch.testing.assert_close(*results, atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    weights = theirs(x, x, x, attn_mask=~causal_mask(10), average_attn_weights=False)[1]
    torch.testing.assert_close(ours.weights(x, torch.arange(10)), weights, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_against_transformers_qwen3():
    "Grouped heads, a width of head of its own, QK-norm and rotary positions, all at once."
    transformers = pytest.importorskip('transformers')
    from transformers.models.qwen3 import modeling_qwen3 as qwen
    config = transformers.Qwen3Config(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=False, rms_norm_eps=1e-6,
                                      num_hidden_layers=1, max_position_embeddings=64, attn_implementation='eager')
    theirs = qwen.Qwen3Attention(config, 0).eval()
    for norm in (theirs.q_norm, theirs.k_norm): nn.init.normal_(norm.weight)
    ours = MultiHeadAttention(24, 4, 2, d_head=8, qk_norm=True, rotary=Rope(8))
    names = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'output': 'o_proj', 'query_norm': 'q_norm', 'key_norm': 'k_norm'}
    ours.load_state_dict({f'{a}.weight': theirs.get_parameter(f'{b}.weight') for a, b in names.items()})
    x, at = torch.randn(2, 9, 24), torch.arange(9)
    angles = at[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.cat([angles, angles], -1)[None]
    blocked = torch.zeros(9, 9).masked_fill(~causal_mask(9), -inf)[None, None]
    y = theirs(x, (turn.cos(), turn.sin()), blocked)[0]
    torch.testing.assert_close(ours(x, at), y, atol=1e-5, rtol=1e-5)


def test_softcap_and_sinks_against_transformers():
    pytest.importorskip('transformers')
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sunk
    module = nn.Module()
    module.num_key_value_groups, module.head_dim, module.sinks = 2, 8, torch.randn(4)
    q, k, v = random(5, (2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), dtype=torch.float32)
    blocked = torch.zeros(6, 6).masked_fill(~causal_mask(6), torch.finfo(torch.float32).min)[None, None]
    for backend in ('manual', 'sdpa'):
        y = attention(q, k, v, causal=True, softcap=1.5, backend=backend)
        torch.testing.assert_close(y.transpose(1, 2), capped(module, q, k, v, blocked, scaling=8**-0.5, softcap=1.5)[0], atol=1e-5, rtol=1e-5)
        y = attention(q, k, v, causal=True, sinks=module.sinks, backend=backend)
        torch.testing.assert_close(y.transpose(1, 2), sunk(module.eval(), q, k, v, blocked, scaling=8**-0.5)[0], atol=1e-5, rtol=1e-5)


# ---- caches ----

class OwnRotary:
    "What rotates: three lines of somebody else, not a module."
    def __call__(self, x, positions):
        a, b, angle = *x.chunk(2, -1), positions[..., None, :, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class OwnBias:
    "What biases: the slopes of ALiBi for four heads, on any positions."
    def __call__(self, n_queries, n_keys, device=None, dtype=None):
        at = torch.arange(n_keys)
        return self.between(at[None, n_keys - n_queries :], at[None], dtype)[0]

    def between(self, query_positions, key_positions, dtype=None):
        distance = (query_positions[:, :, None] - key_positions[:, None]).abs()[:, None]
        return (-torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * distance).to(dtype)


@pytest.mark.parametrize('name, own, theirs', [('rotary', OwnRotary(), Rope(4)), ('position_bias', OwnBias(), Alibi(4))])
def test_any_object_that_rotates_or_biases_will_do(name, own, theirs):
    x, = random(21, (2, 9, 16))
    ragged = torch.tensor([[*range(9)], [-1, *range(7), -1]])
    ours, expected = (MultiHeadAttention(16, 4, 2, window=4, **{name: part}).double() for part in (own, theirs))
    ours.load_state_dict(expected.state_dict())
    bare = MultiHeadAttention(16, 4, 2, window=4).double()
    bare.load_state_dict(expected.state_dict())
    for at in (torch.arange(9), ragged):
        whole, cache = expected(x, at), Cache()
        torch.testing.assert_close(ours(x, at), whole, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(ours.weights(x, at), expected.weights(x, at), atol=1e-10, rtol=1e-10)
        pieces = [ours(x[:, part], at[..., part], cache=cache) for part in (slice(0, 4), slice(4, 9))]
        real = at.expand(2, -1) >= 0
        torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-10, rtol=1e-10)
        assert not torch.allclose(bare(x, at)[real], whole[real], atol=1e-3)             # it does something
    for part, rotates in ((own, name == 'rotary'), (theirs, name == 'rotary')):
        assert isinstance(part, Rotary) and isinstance(part, PositionBias) != rotates


class ListCache(Cache):
    "Only an `update`: keeps every piece in a list, and joins them when asked."
    def __init__(self):
        super().__init__()
        self.pieces = {}

    def update(self, layer, k, v):
        self.pieces.setdefault(layer, []).append((k, v))
        keys, values = zip(*self.pieces[layer])
        return torch.cat(keys, 2), torch.cat(values, 2)


def layer_for(scheme, K, window, extras, backend='sdpa'):
    parts = {'rotary': {'rotary': Rope(4)}, 'partial': {'rotary': Rope(4, fraction=0.5, layout='interleaved')}, 'alibi': {'position_bias': Alibi(4)}, 'none': {}}[scheme]
    torch.manual_seed(0)
    return MultiHeadAttention(16, 4, K, window=window, qk_norm=extras, sinks=extras, bias=extras, layer=3, backend=backend, **parts).double()


@settings(max_examples=80)
@given(st.integers(1, 12).flatmap(lambda T: st.tuples(st.just(T), st.sets(st.integers(1, 11)).map(lambda cuts: sorted(c for c in cuts if c < T)))),
       st.sampled_from(['rotary', 'partial', 'alibi', 'none']), st.sampled_from([1, 2, 4]), st.sampled_from([None, 1, 2, 5, 40]), st.booleans(), st.sampled_from(['manual', 'sdpa']))
def test_any_split_gives_the_whole(split, scheme, K, window, extras, backend):
    (T, cuts), layer = split, layer_for(scheme, K, window, extras, backend)
    x, = random(6, (2, T, 16))
    cache, borders = ListCache(), [0, *cuts, T]
    pieces = [layer(x[:, a:b], torch.arange(a, b), cache=cache) for a, b in zip(borders, borders[1:])]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x, torch.arange(T)), atol=1e-10, rtol=1e-10)
    assert list(cache.pieces) == [3] and sum(k.shape[2] for k, _ in cache.pieces[3]) == T


def test_a_mask_replaces_the_default_with_a_cache_too():
    layer, cache = layer_for('rotary', 2, 3, False), ListCache()
    x, = random(7, (1, 8, 16))
    layer(x[:, :5], torch.arange(5), cache=cache)
    second = layer(x[:, 5:], torch.arange(5, 8), causal_mask(3, 8), cache=cache)
    torch.testing.assert_close(second, layer(x, torch.arange(8), causal_mask(8))[:, 5:])
    cache = Cache()                                                          # one that has forgotten what the window has passed
    layer(x[:, :5], torch.arange(5), cache=cache)
    with unchecked(), pytest.raises(ValueError, match=r'3 queries and 5 keys .* got \(3, 8\)'): layer(x[:, 5:], torch.arange(5, 8), causal_mask(3, 8), cache=cache)


@functools.cache
def small(name):
    "A GPT with strong opinions and one of the plans that a cache has to serve."
    with pytest.MonkeyPatch.context() as m:
        m.setitem(MIXERS, 'decay', lambda c, layer, scheme: Decay(layer))
        config = GPTConfig(vocab_size=40, context_length=32, d_model=16, n_layers=2, n_heads=4, **{'positions': 'rope', **PLANS[name]})
        made = GPT(config, generator=torch.Generator().manual_seed(2))
    for p in made.parameters(): p.data *= 5
    return made.double()


PLANS = {**{name: {'positions': name} for name in ('learned', 'rope', 'alibi', 'sinusoidal', 'none')}, 'window': {'window': 3}, 'window of one': {'window': 1},
         'alibi, window': {'positions': 'alibi', 'window': 2, 'backend': 'manual'}, 'grouped, sinks': {'n_kv_heads': 2, 'sinks': True}, 'mixed': {'layers': [{'window': 2}, {}]},
         'recurrent': {'layers': [{'mixer': 'decay'}, {'window': 4}]}}


class Decay(nn.Module):
    "A layer without keys and values: h ← h / 2 + x, over the tokens that are no padding. What it remembers is a state."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, positions=None, mask=None, cache=None):
        state = {} if cache is None else cache.state(self.layer)
        h, out = state.get('h', torch.zeros_like(x[:, 0])), []
        real = torch.ones_like(x[..., 0]).bool() if positions is None else (positions >= 0).expand(x.shape[:2])
        for t in range(x.shape[1]):
            h = torch.where(real[:, t, None], h / 2 + x[:, t], h)
            out.append(h)
        state['h'] = h
        return torch.stack(out, 1)


@pytest.mark.parametrize('name', PLANS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_cache_changes_nothing(name, data):
    with unchecked(): check_cache(Cache, small(name), data, 40)


@pytest.mark.parametrize('name', ['rope', 'window', 'alibi'])
@settings(max_examples=8)
@given(data=st.data())
def test_an_update_is_all_that_a_cache_needs(name, data):
    with unchecked(): check_cache(ListCache, small(name), data, 40, reorders=False)


@pytest.mark.parametrize('ragged', [False, True])
def test_a_window_bounds_the_memory(ragged):
    "Whatever the length, a layer keeps no more than its window (of ragged rows: twice), and says the same."
    cache, model, ids = Cache(), small('window'), torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        for t in range(30):
            positions = torch.tensor([t]).expand(2, 1) if ragged else torch.tensor([t])
            torch.testing.assert_close(model(ids[:, t : t + 1], positions=positions, cache=cache), expected[:, t : t + 1])
            assert all(cache.state(layer)['keys'].shape[2] <= (2 * 3 if ragged else 2) for layer in (0, 1))


def test_a_cache_is_called_once_a_layer_and_its_mask_made_once(monkeypatch):
    "Of ragged rows, layers with the same window share the positions of the keys and the mask."
    import llm_from_scratch.attention as module
    calls, model = [], small('rope')
    monkeypatch.setattr(module, 'visible', lambda *a, real=module.visible: calls.append(1) or real(*a))
    cache, positions = Cache(), torch.tensor([[0, 1, 2], [-1, 0, 1]])
    for n in (1, 2):
        model(torch.zeros(2, 3).long(), positions=positions, cache=cache)
        assert len(calls) == n and cache.state(0)['positions'] is cache.state(1)['positions']
        positions += 3                                                       # in place, as a decoding loop with fixed memory does
        positions[1, 0] = -1
    assert cache.state(1)['positions'].tolist() == [[0, 1, 2, 3, 4, 5], [-1, 0, 1, -1, 3, 4]]
    for _ in range(6): model(torch.zeros(2, 3).long(), positions=positions, cache=cache)
    assert len(cache._shared) <= 2                                           # nothing of earlier passes is kept


def test_positions_that_all_rows_share_and_none():
    layer, plain = layer_for('rotary', 2, 3, False), layer_for('alibi', 2, 3, False)
    x, = random(8, (3, 6, 16))
    torch.testing.assert_close(layer(x, torch.arange(6)[None]), layer(x, torch.arange(6)))
    torch.testing.assert_close(layer.weights(x, torch.arange(6)[None]), layer.weights(x, torch.arange(6)))
    cache = Cache()
    torch.testing.assert_close(torch.cat([layer(x[:, :4], torch.arange(4)[None], cache=cache), layer(x[:, 4:], torch.arange(4, 6)[None], cache=cache)], 1), layer(x, torch.arange(6)))
    torch.testing.assert_close(plain(x), plain(x, torch.arange(6)))
    with pytest.raises(ValueError, match='rotary embeddings need positions'): layer(x)
    with pytest.raises(ValueError, match=r'\(2, 6\)'), unchecked(): layer(x, torch.arange(6).expand(2, -1))


def test_padding_is_seen_by_nobody_without_a_cache():
    layer = layer_for('alibi', 2, 3, True)
    x, = random(8, (1, 5, 16))
    padded, at = torch.cat([torch.ones(1, 2, 16), x, torch.ones(1, 1, 16)], 1).double(), torch.tensor([[-1, -1, 0, 1, 2, 3, 4, -1]])
    torch.testing.assert_close(layer(padded, at)[:, 2:7], layer(x))
    assert layer.weights(padded, at)[..., 2:7, [0, 1, 7]].abs().max() == 0


def test_positions_of_each_row_are_used():
    layer = layer_for('rotary', 2, None, False)
    x, = random(8, (1, 6, 16))
    both = layer(x.expand(2, -1, -1), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 7, 8, 9]]))
    torch.testing.assert_close(both[:1], layer(x, torch.arange(6)))
    assert not torch.allclose(both[1], both[0])


# ---- the layer ----

def test_state_dict_names():
    full = MultiHeadAttention(16, 4, 2, d_head=6, bias=True, output_bias=False, qk_norm=True, sinks=True, rotary=Rope(6), position_bias=Alibi(4))
    shapes = {name: tuple(t.shape) for name, t in full.state_dict().items()}
    assert shapes == {'sinks': (4,), 'query.weight': (24, 16), 'query.bias': (24,), 'key.weight': (12, 16), 'key.bias': (12,), 'value.weight': (12, 16), 'value.bias': (12,),
                      'output.weight': (16, 24), 'query_norm.weight': (6,), 'key_norm.weight': (6,)}
    assert set(MultiHeadAttention(16, 4).state_dict()) == {f'{n}.weight' for n in ('query', 'key', 'value', 'output')}
    assert 'output.bias' in MultiHeadAttention(16, 4, bias=True).state_dict()


@pytest.mark.parametrize('heads, words', [((64, 0), '^n_heads must be at least 1, got 0'), ((64, 8, 0), 'n_kv_heads must divide n_heads, got 0 and 8'), ((64, 8, 3), 'n_kv_heads .* 3 and 8')])
def test_heads_that_cannot_be_are_named(heads, words):
    with pytest.raises(ValueError, match=words): MultiHeadAttention(*heads)


def test_gradients_numerically():
    layer = MultiHeadAttention(8, 2, 1, rotary=Rope(4), qk_norm=True, sinks=True, bias=True).double()
    x = random(9, (1, 4, 8))[0].requires_grad_()
    names = list(dict(layer.named_parameters()))
    def f(x, *weights): return torch.func.functional_call(layer, dict(zip(names, weights)), (x, torch.arange(4)))
    assert torch.autograd.gradcheck(f, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters())))


@pytest.mark.parametrize('wrong, words', [
    (dict(d_model=64, n_heads=5), ('5 heads', '64')), (dict(d_model=64, n_heads=8, n_kv_heads=3), ('3', '8')), (dict(d_model=64, n_heads=0), ('n_heads', 'got 0')),
    (dict(d_model=64, n_heads=8, dropout=1.0), ('dropout', '1.0')), (dict(d_model=64, n_heads=8, softcap=-1.0), ('softcap', '-1.0')), (dict(d_model=64, n_heads=8, window=0), ('window', 'got 0')),
    (dict(d_model=64, n_heads=8, backend='fused'), ("'fused'", 'sdpa'))])
def test_settings_that_cannot_work(wrong, words):
    with pytest.raises(ValueError) as error: MultiHeadAttention(**wrong)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('shapes, options, kind, words', [
    (((1, 3, 2, 4), (1, 2, 2, 4)), {}, ValueError, ('2 and 3',)), (((1, 2, 0, 4), (1, 2, 2, 4)), {}, ValueError, ('empty', '0 queries')), (((1, 2, 2, 4), (1, 2, 0, 4)), {}, ValueError, ('empty', '0 keys')),
    (((1, 2, 5, 4), (1, 2, 3, 4)), dict(causal=True), ValueError, ('5 queries', '3')), (((1, 2, 2, 4), (1, 2, 2, 6)), {}, ValueError, ('width 4', 'width 6')),
    (((1, 2, 2, 4), (1, 2, 3, 4)), dict(mask=torch.ones(3, 2, dtype=torch.bool)), ValueError, ('(2, 3)', 'got (3, 2)')), (((2, 2, 2, 4), (2, 2, 3, 4)), dict(mask=torch.ones(3, 2, 3, dtype=torch.bool)), ValueError, ('(2, 2, 3)',)),
    (((1, 2, 2, 4), (1, 2, 2, 4)), dict(mask=torch.zeros(2, 2)), TypeError, ('float32',)), (((1, 2, 2, 4), (1, 2, 2, 4)), dict(bias=torch.zeros(1, 2, 2)), ValueError, ('(2, 2, 2)', '(1, 2, 2)')),
    (((1, 2, 2, 4), (1, 2, 2, 4)), dict(sinks=torch.zeros(3)), ValueError, ('2 heads', '(3,)')), (((1, 2, 2, 4), (1, 2, 2, 4)), dict(backend='x'), ValueError, ("'x'", 'manual'))])
def test_wrong_use_is_named(shapes, options, kind, words):
    plain, k = inspect.unwrap(attention), torch.randn(shapes[1])                # as a user calls it, without the shape checker
    with pytest.raises(kind) as error: plain(torch.randn(shapes[0]), k, k, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_empty_sequences_and_positions_that_do_not_fit():
    layer, forward = MultiHeadAttention(8, 2), inspect.unwrap(MultiHeadAttention.forward)
    with pytest.raises(ValueError, match='empty sequence'): forward(layer, torch.zeros(1, 0, 8), torch.arange(0))
    with pytest.raises(ValueError, match=r'\(4,\) or \(2, 4\), got \(5,\)'): forward(layer, torch.zeros(2, 4, 8), torch.arange(5))
    with pytest.raises(ValueError, match='values'): inspect.unwrap(attention)(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2, 4))
    with pytest.raises(ValueError, match='1 to 3'): causal_mask(4, 3)
    with pytest.raises(ValueError, match='at least 1'): sliding_window_mask(4, 0)
    with pytest.raises(ValueError, match='dropout'): attention(*[torch.zeros(1, 2, 3, 4)] * 3, dropout=0.1, backend='flex')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype):
    layer = MultiHeadAttention(16, 4, 2, rotary=Rope(4), position_bias=Alibi(4), sinks=True, qk_norm=True)
    x, at = torch.randn(2, 7, 16), torch.arange(7)
    y = layer(x, at)
    half = layer.to(dtype)(x.to(dtype), at)
    assert half.dtype == dtype and half.isfinite().all()
    torch.testing.assert_close(half.float(), y, atol=0.05, rtol=0.05)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12).map(sorted))
def test_masks_and_positions_against_loops(segments):
    g = torch.tensor([segments, segments])
    T = len(segments)
    assert document_mask(g)[1].tolist() == [[u <= t and segments[u] == segments[t] for u in range(T)] for t in range(T)]
    assert document_positions(g)[0].tolist() == [t - segments.index(segments[t]) for t in range(T)]


def test_weights_sum_to_one_or_less():
    q, k = random(10, (1, 2, 5, 4), (1, 2, 5, 4))
    torch.testing.assert_close(attention_weights(q, k, causal=True).sum(-1), torch.ones(1, 2, 5, dtype=torch.float64))
    assert (attention_weights(q, k, causal=True, sinks=torch.zeros(2)).sum(-1) < 1).all()
    assert set(BACKENDS) == {'manual', 'sdpa', 'flex', 'flash'}
