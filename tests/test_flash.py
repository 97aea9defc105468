"Chapter 18 beyond its chapter: every option against plain attention, with gradients; memory, skipped tiles, merging, the kernel in triton's interpreter."
import inspect, math, os, subprocess, sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from caches import check_cache
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from small import LLAMA, model, random, some_ids, with_gradients
from torch.nn import functional as F

from llm_from_scratch import flash
from llm_from_scratch.attention import BACKENDS, Cache, MultiHeadAttention, attention, document_mask, sliding_window_mask
from llm_from_scratch.costs import Ledger
from llm_from_scratch.flash import flash_attention, merge_attention, split_attention, triton_attention
from llm_from_scratch.generation import SimpleCache
from llm_from_scratch.tensors import logsumexp

INPUTS = []
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')


def assert_same(ours, theirs): torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


# ---- every option ----

lengths = st.integers(1, 11).flatmap(lambda S: st.tuples(st.integers(1, S), st.just(S)))
groups = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)])


@settings(max_examples=40)
@given(lengths, groups, st.integers(1, 13), st.booleans(), st.sampled_from([None, 2, 3, 4, 1]), st.sampled_from([None, 3, 4]), st.sampled_from([None, 0.3]), st.sampled_from([None, 1.5]),
       st.booleans(), st.integers(0, 99))
def test_every_option_against_attention(TS, HK, size, causal, mask_axes, biased, scale, softcap, sunk, seed):
    (T, S), (H, K), B = TS, HK, 2
    q, k, v, bias, sinks = random(seed, (B, H, T, 4), (B, K, S, 4), (B, K, S, 3), (H, T, S) if biased == 3 else (B, H, T, S), (H,))
    full = torch.rand(B, H, T, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask = {None: None, 2: full[0, 0], 3: full[:, 0], 4: full, 1: full[:, :1]}[mask_axes]
    extra = [bias] * bool(biased) + [sinks] * sunk
    def run(f, q, k, v, *extra):
        rest = list(extra)
        return f(q, k, v, mask, causal=causal, bias=rest.pop(0) if biased else None, sinks=rest.pop(0) if sunk else None, scale=scale, softcap=softcap)
    with unchecked(): ours, theirs = (with_gradients(partial(run, f), [q, k, v, *extra]) for f in (partial(flash_attention, size=size), partial(attention, backend='manual')))
    assert_same(ours, theirs)
    assert all(t.isfinite().all() for t in ours)


@settings(max_examples=20)
@given(lengths, st.integers(1, 12), st.integers(1, 13), st.booleans(), st.integers(0, 99))
def test_windows_and_documents_against_their_masks(TS, window, size, packed, seed):
    T, S = TS
    q, k, v = random(seed, (2, 4, T, 4), (2, 2, S, 4), (2, 2, S, 4))
    segments = torch.randint(0, 2, (2, S), generator=torch.Generator().manual_seed(seed)).cumsum(1)
    mask = sliding_window_mask(T, window, S)
    if packed: mask = mask & document_mask(segments)[:, -T:]
    with unchecked():
        ours = with_gradients(partial(flash_attention, window=window, segments=segments if packed else None, size=size), [q, k, v])
        theirs = with_gradients(partial(attention, mask=mask, backend='manual'), [q, k, v])
    assert_same(ours, theirs)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize('T, causal', [(70, True), (70, False), (9, True), (1, True)])
def test_against_attention_to_the_promised_digits(T, causal, dtype, tolerance):
    q, k, v = random(3, (1, 2, T, 16), (1, 2, 70, 16), (1, 2, 70, 16), dtype=dtype)
    torch.testing.assert_close(flash_attention(q, k, v, causal=causal, size=16), attention(q, k, v, causal=causal, backend='manual'), atol=tolerance, rtol=tolerance)


def test_against_torch_sdpa():
    q, k, v = random(4, *[(2, 3, 33, 8)] * 3)
    ours = with_gradients(partial(flash_attention, causal=True, size=8), [q, k, v])
    assert_same(ours, with_gradients(partial(F.scaled_dot_product_attention, is_causal=True), [q, k, v]))


def test_gradients_of_result_and_log_sum_exp_by_finite_differences():
    tensors = [t.requires_grad_() for t in random(5, (1, 2, 3, 2), (1, 1, 5, 2), (1, 1, 5, 3), (2, 3, 5), (2,))]
    def f(q, k, v, bias, sinks): return flash_attention(q, k, v, causal=True, window=3, bias=bias, sinks=sinks, softcap=1.5, size=2, return_lse=True)
    with unchecked(): assert torch.autograd.gradcheck(f, tensors)


def test_log_sum_exp_against_logsumexp():
    q, k, v = random(6, (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    _, lse = flash_attention(q, k, v, size=3, return_lse=True)
    assert_same(lse, logsumexp(q @ k.repeat_interleave(2, 1).mT / 8**0.5))


def test_gradients_of_gradients_are_refused():
    q, k, v = (t.requires_grad_() for t in random(6, *[(1, 1, 3, 4)] * 3))
    first, = torch.autograd.grad(flash_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): first.sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('sunk', [False, True])
def test_a_fully_masked_row_gives_zeros(sunk, dtype):
    q, k, v, sinks = random(2, (2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (4,), dtype=dtype)
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[0, 2] = mask[1] = False
    y, lse = flash_attention(q, k, v, mask, sinks=sinks if sunk else None, size=2, return_lse=True)
    _, *slopes = with_gradients(lambda *x: flash_attention(*x, mask, sinks=sinks if sunk else None, size=2), [q, k, v])
    assert not y[0, :, 2].any() and not y[1].any() and y[0, :, [0, 1, 3, 4]].abs().min() > 0 and y.dtype == dtype
    assert not slopes[0][0, :, 2].any() and not any(s[1].any() for s in slopes) and all(s.isfinite().all() for s in slopes)
    assert_same(lse[1], sinks.to(lse.dtype)[:, None].expand(4, 5) if sunk else torch.full_like(lse[1], -math.inf))


def test_very_large_scores():
    q, k, v = random(7, *[(1, 1, 20, 4)] * 3)
    q = q * 1e4
    assert_same(flash_attention(q, k, v, causal=True, size=4), attention(q, k, v, causal=True, backend='manual'))


# ---- what it costs ----

def count_tiles(monkeypatch, T, size, **options):
    "How many tiles are absorbed for one head."
    seen, absorb = [], flash._absorb
    monkeypatch.setattr(flash, '_absorb', lambda *inputs: seen.append(1) or absorb(*inputs))
    q, k, v = random(0, *[(1, 1, T, 4)] * 3)
    flash_attention(q, k, v, size=size, **options)
    monkeypatch.undo()
    return len(seen)


def test_tiles_that_are_skipped(monkeypatch):
    count = partial(count_tiles, monkeypatch, 80, 8)
    block = torch.block_diag(*[torch.ones(8, 8)] * 10).bool()
    assert count() == 100 and count(causal=True) == 55 and count(mask=block) == 10
    assert count(window=1) == 10 and count(window=9) == 19 and count(window=10) == 1 + 2 + 8 * 3 and count(window=80) == 55
    assert count(segments=torch.arange(80)[None] // 16) == 5 * 4 and count(segments=torch.arange(80)[None] // 16, causal=True) == 5 * 3
    assert count(mask=torch.zeros(80, 80, dtype=torch.bool)) == 0


def test_tiles_of_the_last_queries(monkeypatch):
    seen, absorb = [], flash._absorb
    monkeypatch.setattr(flash, '_absorb', lambda *inputs: seen.append(tuple(inputs[3].shape[-2:])) or absorb(*inputs))
    q, k, v = random(0, (1, 1, 5, 4), (1, 1, 21, 4), (1, 1, 21, 4))
    flash_attention(q, k, v, window=6, size=4)                      # queries 16 to 20; 16 reaches back to 11, 20 to 15
    assert seen == [(4, 4), (4, 4), (4, 4), (1, 4), (1, 4), (1, 1)]


def peak(f, *inputs):
    with unchecked(), Ledger(inputs) as ledger: f(*inputs)
    return max(ledger.line)


@pytest.mark.parametrize('options, trained', [({'causal': True}, False), ({'causal': True}, True), ({'window': 50}, True), ({'softcap': 3.0}, True)])
def test_memory_is_linear(options, trained):
    def run(q, k, v):
        leaves = [x.detach().requires_grad_(trained) for x in (q, k, v)]
        y = flash_attention(*leaves, size=40, **options)
        if trained: torch.autograd.grad(y.sum(), leaves)
    a, b, c = (peak(run, *random(0, (1, 2, T, 16), (1, 1, T, 16), (1, 1, T, 16), dtype=torch.float32)) for T in (80, 160, 320))
    assert abs((c - b) / (b - a) - 2) < 0.05 and c < 2 * 320**2 * 4        # a square would give 4; less than the matrices of both heads


def test_documents_take_no_matrix():
    segments = torch.arange(1024)[None] // 100
    def run(q, k, v): flash_attention(q, k, v, causal=True, segments=segments, size=128)
    assert peak(run, *random(0, *[(1, 1, 1024, 16)] * 3, dtype=torch.float32)) < 1024 * 1024           # a boolean matrix


@pytest.mark.parametrize('name, rule', [('causal', lambda b, h, t, u: u <= t), ('window', lambda b, h, t, u: (u <= t) & (t - u < 50))])
def test_tiles_against_flex_attention(name, rule, monkeypatch):
    from torch.nn.attention.flex_attention import create_block_mask
    block = create_block_mask(rule, None, None, 256, 256, device='cpu', BLOCK_SIZE=32)
    needed = int(block.kv_num_blocks.sum() + block.full_kv_num_blocks.sum())
    assert count_tiles(monkeypatch, 256, 32, **({'causal': True} if name == 'causal' else {'window': 50})) == needed


# ---- parts ----

@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(0, 99), st.data())
def test_merging_in_any_order_and_grouping_against_the_whole(pieces, seed, data):
    S = sum(pieces)
    q, k, v = random(seed, (2, 4, 3, 4), (2, 2, S, 4), (2, 2, S, 5))
    mask = torch.rand(2, 3, S, generator=torch.Generator().manual_seed(seed)) < 0.5
    with unchecked(): parts = [flash_attention(q, a, b, m, size=2, return_lse=True) for a, b, m in zip(k.split(pieces, 2), v.split(pieces, 2), mask.split(pieces, 2))]
    order = data.draw(st.permutations(range(len(parts))))
    shuffled = [parts[i] for i in order]
    cut = data.draw(st.integers(1, len(parts) - 1))
    nested = merge_attention([merge_attention(shuffled[:cut]), merge_attention(shuffled[cut:])])
    assert_same(nested, flash_attention(q, k, v, mask, return_lse=True))
    assert_same(merge_attention(parts)[0], attention(q, k, v, mask, backend='manual'))


def test_an_empty_part_changes_nothing():
    part = flash_attention(*random(8, *[(1, 2, 3, 4)] * 3), return_lse=True)
    nothing = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.full((1, 2, 3), -math.inf, dtype=torch.float64)
    assert_same(merge_attention([nothing, part]), part)
    empty, lse = merge_attention([nothing, nothing])
    assert not empty.any() and (lse == -math.inf).all()


@pytest.mark.parametrize('T', [1, 3])
@pytest.mark.parametrize('n_parts', [1, 3, 30])
def test_split_against_attention(n_parts, T):
    q, k, v, sinks = random(9, (2, 4, T, 8), (2, 2, 23, 8), (2, 2, 23, 6), (4,))
    mask = torch.rand(2, T, 23, generator=torch.Generator().manual_seed(0)) < 0.5
    for options, m in (({}, None), ({}, mask), ({'sinks': sinks, 'softcap': 2.0, 'scale': 0.4}, mask[:, None]), ({'sinks': sinks}, mask[0])):
        with unchecked(): ours, theirs = (with_gradients(lambda *x, f=f: f(*x, m, **options), [q, k, v]) for f in (partial(split_attention, n_parts=n_parts), partial(attention, backend='manual')))
        assert_same(ours, theirs)


def test_gradients_pass_through_a_ring():
    "Four devices, each with a quarter of the keys: the gradient of the log-sum-exp matters."
    def ring(q, k, v):
        pieces = [x.chunk(4, 2) for x in (q, k, v)]
        return torch.cat([merge_attention([flash_attention(mine, k, v, causal=i == j, size=2, return_lse=True) for j, (k, v) in enumerate(zip(*pieces[1:])) if j <= i])[0]
                          for i, mine in enumerate(pieces[0])], 2)
    tensors = random(10, *[(1, 2, 16, 4)] * 3)
    assert_same(with_gradients(ring, tensors), with_gradients(partial(attention, causal=True, backend='manual'), tensors))


# ---- precision ----

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    q, k, v = random(11, *[(1, 2, 200, 16)] * 3, dtype=dtype)
    exact = attention(q.double(), k.double(), v.double(), causal=True, backend='manual')
    ours, naive = (f(q, k, v, causal=True) for f in (partial(flash_attention, size=16), partial(attention, backend='manual')))
    def error(y): return float((y.double() - exact).abs().mean())
    assert ours.dtype == dtype and error(ours) < 1.05 * error(exact.to(dtype)) < error(naive)


def test_autocast_does_not_reach_inside():
    q, k, v = random(12, *[(1, 2, 20, 8)] * 3, dtype=torch.float32)
    expected = with_gradients(partial(flash_attention, causal=True, size=4), [q, k, v])
    with torch.autocast('cpu', dtype=torch.bfloat16): found = with_gradients(partial(flash_attention, causal=True, size=4), [q, k, v])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_half_precision_gradients_keep_their_dtype():
    q, k, v, sinks = random(13, *[(1, 2, 9, 8)] * 3, (2,), dtype=torch.bfloat16)
    for t in with_gradients(lambda q, k, v, s: flash_attention(q, k, v, causal=True, sinks=s, size=4), [q, k, v, sinks]): assert t.dtype == torch.bfloat16 and t.isfinite().all()


# ---- models ----

@pytest.mark.parametrize('options', [{}, LLAMA, {**LLAMA, 'n_kv_heads': 2, 'window': 3, 'sinks': True, 'softcap': 3.0}, {'positions': 'alibi'}, {'d_head': 6, 'qk_norm': True}])
def test_a_model_with_this_backend_is_the_same_model(options):
    plain, other = model(**options), model(**options, backend='flash')
    other.load_state_dict(plain.state_dict())
    ids, slopes = some_ids(), []
    for m in (plain, other):
        m.double()(ids, ids.roll(1, 1)).backward()
        slopes.append([p.grad for p in m.parameters()])
    assert_same(other(ids), plain(ids))
    assert_same(*slopes)


@settings(max_examples=6)
@given(st.data())
def test_caches_and_ragged_rows(data):
    made = model(**LLAMA, n_kv_heads=2, window=data.draw(st.sampled_from([None, 3])), backend='flash').double().eval()
    with unchecked(): check_cache(data.draw(st.sampled_from([Cache, SimpleCache])), made, data, 23, longest=8)


def test_it_is_a_backend_by_name():
    assert 'flash' in BACKENDS
    q, k, v = random(14, *[(1, 2, 5, 4)] * 3)
    assert_same(attention(q, k, v, causal=True, backend='flash'), attention(q, k, v, causal=True))
    layer = MultiHeadAttention(8, 2, dropout=0.1, backend='flash')
    assert layer.eval()(torch.randn(1, 3, 8)).shape == (1, 3, 8)
    with pytest.raises(ValueError, match='dropout'): layer.train()(torch.randn(1, 3, 8))


# ---- the kernel, and what is refused ----

PROCESS = """
import sys, llm_from_scratch.attention
print('flash with attention:', 'llm_from_scratch.flash' in sys.modules)
from llm_from_scratch.flash import triton_attention
print('triton with flash:', 'triton' in sys.modules)
import torch
from llm_from_scratch.attention import attention
torch.manual_seed(0)
try: import triton
except ImportError: sys.exit()
for B, T, S, H, K, d, size, causal, scale, dtype, tolerance in (
        (1, 33, 33, 2, 2, 16, 16, True, None, torch.float32, 1e-5), (2, 33, 33, 2, 1, 16, 16, False, None, torch.float32, 1e-5), (1, 20, 50, 4, 2, 32, 16, True, 0.5, torch.float32, 1e-5),
        (1, 1, 50, 4, 1, 16, 32, True, None, torch.float32, 1e-5), (1, 20, 50, 2, 2, 16, 16, True, None, torch.float16, 2e-3)):
    q, k, v = (torch.randn(B, n, length, d).to(dtype) for n, length in ((H, T), (K, S), (K, S)))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)                                  # as it comes out of a projection
    exact = attention(q.double(), k.double(), v.double(), causal=causal, scale=scale, backend='manual')
    torch.testing.assert_close(triton_attention(q, k, v, causal=causal, scale=scale, size=size).double(), exact, atol=tolerance, rtol=tolerance)
rising = torch.linspace(0, 30, 40)[None, None, :, None].expand(1, 1, 40, 16)
torch.testing.assert_close(triton_attention(rising, rising, rising, size=16), attention(rising, rising, rising))
print('kernel: equal')
"""


@pytest.mark.long(5)
def test_triton_kernel_against_attention_and_what_imports_what():
    "In a process of its own, because triton's interpreter has to be chosen before triton is imported."
    done = subprocess.run([sys.executable, '-c', PROCESS], capture_output=True, text=True, encoding='utf-8', cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT), 'TRITON_INTERPRET': '1'})
    assert done.stdout.startswith('flash with attention: False\ntriton with flash: False\n'), done.stderr
    if find_spec('triton') is None: pytest.skip('triton is an extra: kernels')
    assert 'kernel: equal' in done.stdout, done.stderr


def test_without_triton_it_says_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    flash._kernel.cache_clear()
    with pytest.raises(ImportError, match=r"llm-from-scratch\[kernels\]"): triton_attention(*[torch.zeros(1, 1, 16, 16)] * 3)


one = (1, 1, 16, 16)
@pytest.mark.parametrize('f, shapes, options, error, words', [
    (flash_attention, [(1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)], {}, ValueError, ('2 and 3',)), (flash_attention, [(1, 2, 4, 8), (1, 2, 4, 6), (1, 2, 4, 8)], {}, ValueError, ('8', '6')),
    (flash_attention, [(1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 3, 8)], {}, ValueError, ('pair up',)), (flash_attention, [(1, 2, 4, 8), (1, 2, 3, 8), (1, 2, 3, 8)], {'window': 2}, ValueError, ('4 queries', '3')),
    (flash_attention, [one] * 3, {'window': 0}, ValueError, ('window', '0')), (flash_attention, [one] * 3, {'size': 0}, ValueError, ('tile', '0')),
    (flash_attention, [one] * 3, {'segments': torch.zeros(1, 5).long()}, ValueError, ('(1, 16)', '(1, 5)')), (flash_attention, [one] * 3, {'mask': torch.ones(16, 16)}, TypeError, ('boolean',)),
    (flash_attention, [one] * 3, {'sinks': torch.zeros(2)}, ValueError, ('(2,)',)), (split_attention, [one] * 3, {'n_parts': 0}, ValueError, ('part', '0')),
    (triton_attention, [(1, 1, 16, 12)] * 3, {}, ValueError, ('width', '12')), (triton_attention, [one] * 3, {'size': 8}, ValueError, ('size', '8'))])
def test_errors_name_the_value(f, shapes, options, error, words):
    with pytest.raises(error) as caught: inspect.unwrap(f)(*[torch.zeros(s) for s in shapes], **options)
    assert all(w in str(caught.value) for w in words)


def test_the_kernel_refuses_gradients_and_merging_nothing():
    q = torch.zeros(one, requires_grad=True)
    with pytest.raises(ValueError, match='no gradients'): triton_attention(q, q, q)
    with pytest.raises(ValueError, match='at least one part'): merge_attention([])
