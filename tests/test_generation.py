"""Chapter 13 beyond its own cells: every processor against `transformers` and against its exact distribution, rows that do not know each other, text in any cut."""
import itertools, math, random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from caches import check_cache
from shapes import unchecked

from llm_from_scratch.attention import Cache
from llm_from_scratch.bpe import BPETokenizer
from llm_from_scratch.constraints import Constraint
from llm_from_scratch.generation import (PROCESSORS, Context, Sampler, SimpleCache, TextStream, TokenConstraint, as_end_tokens, beam_search, draw, generate, generate_steps, row_seeds,
                                         stream)
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.text import CharTokenizer, WordTokenizer

INPUTS = []
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]


def opinionated(positions='rope', vocab_size=40, context_length=32, **options):
    "A small GPT that looks at everything and has strong opinions."
    model = GPT(GPTConfig(vocab_size=vocab_size, context_length=context_length, d_model=16, n_layers=2, n_heads=4, positions=positions, **options),
                generator=torch.Generator().manual_seed(2)).double()
    for p in model.parameters(): p.data *= 5
    return model


RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
WARM = Sampler(temperature=1.5, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.1)


# Processors -------------------------------------------------------------------------------------------------------

def hf():
    transformers = pytest.importorskip('transformers')
    transformers.logging.set_verbosity_error()
    from transformers.generation import logits_process
    return logits_process


PEERS = {
    'logit_bias': ({2: 1.5, 9: -2.0}, lambda h, v: h.SequenceBiasLogitsProcessor({(i,): b for i, b in v.items()})),
    'repetition_penalty': (1.7, lambda h, v: h.RepetitionPenaltyLogitsProcessor(v)),
    'banned': ((0, 5), lambda h, v: h.SuppressTokensLogitsProcessor(list(v))),
    'temperature': (1.8, lambda h, v: h.TemperatureLogitsWarper(v)),
    'top_k': (7, lambda h, v: h.TopKLogitsWarper(v)),
    'top_p': (0.6, lambda h, v: h.TopPLogitsWarper(v)),
    'min_p': (0.1, lambda h, v: h.MinPLogitsWarper(v)),
    'typical_p': (0.5, lambda h, v: h.TypicalLogitsWarper(v)),
}


def random_rows(seed, V=30, B=64):
    g = torch.Generator().manual_seed(seed)
    read = torch.randint(V, (B, 14), generator=g)
    return 3 * torch.randn(B, V, generator=g, dtype=torch.float64), read, Context(read[:, :6].tolist(), read[:, 6:].tolist(), 5, [1])


@pytest.mark.parametrize('name', ['top_p', 'typical_p'])
def test_a_mass_of_one_changes_nothing_and_nan_is_refused(name):
    logits = torch.randn(3, 50_257, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [5.0], [0.0]])
    assert torch.equal(Sampler(**{name: 1.0})(logits), logits)
    broken = torch.tensor([[0.0, math.nan, 0.0, 0.0]])
    for value in (0.5, 1.0):
        for temperature in (0, 1):
            with pytest.raises(ValueError, match='NaN'): Sampler(temperature, **{name: value}).choose(broken, [0.5])
    kept = Sampler(**{name: 0.5})(torch.tensor([[0.0, -math.inf, 0.0, 0.0]]))                  # what cannot come is no NaN
    assert kept.isfinite().sum() == 2 and kept[0, 1] == -math.inf


@pytest.mark.parametrize('name', PEERS)
@pytest.mark.parametrize('seed', [0, 1])
def test_processor_against_transformers(name, seed):
    value, peer = PEERS[name]
    logits, read, context = random_rows(seed)
    ours = Sampler(**{name: value})(logits.clone(), context)
    torch.testing.assert_close(ours, peer(hf(), value)(read, logits.clone()), rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours, logits)


@pytest.mark.parametrize('edge', [{'top_p': 1e-9}, {'top_p': 1.0}, {'min_p': 1.0}, {'min_p': 0.0}, {'top_k': 1}, {'top_k': 10**6}, {'typical_p': 1e-9}])
def test_edges_against_transformers(edge):
    (name, value), = edge.items()
    logits, read, context = random_rows(3)
    peer = PEERS[name][1](hf(), value) if not (name == 'top_p' and value == 1.0) else lambda _, z: z
    torch.testing.assert_close(Sampler(**edge)(logits, context), peer(read, logits.clone()), rtol=1e-12, atol=1e-12)


def test_transformers_builds_the_same_list_in_the_same_order():
    "A generation config of theirs, and a sampler of ours, with everything on."
    pytest.importorskip('transformers')
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    theirs = dict(temperature=0.8, top_k=9, top_p=0.8, min_p=0.05, typical_p=0.7, repetition_penalty=1.4)
    config = GenerationConfig(do_sample=True, num_beams=1, sequence_bias=[[[2], 1.5]], **theirs)
    logits, read, context = random_rows(4)
    processors = peer._get_logits_processor(config, read.shape[1], read, None, [], device='cpu')
    torch.testing.assert_close(Sampler(logit_bias={2: 1.5}, **theirs)(logits, context), processors(read, logits.clone()), rtol=1e-9, atol=1e-9)


def exact(name, value, z, context):
    "The distribution that a processor leaves, in plain Python: no code shared with the library."
    V, seen, new = len(z), set(context.prompts[0]) | set(context.written[0]), context.written[0]
    if name == 'logit_bias': z = [x + value.get(i, 0) for i, x in enumerate(z)]
    if name == 'repetition_penalty': z = [(x / value if x > 0 else x * value) if i in seen else x for i, x in enumerate(z)]
    if name == 'presence_penalty': z = [x - value * (i in new) for i, x in enumerate(z)]
    if name == 'frequency_penalty': z = [x - value * new.count(i) for i, x in enumerate(z)]
    if name == 'temperature': z = [x / value if value else (0 if x == max(z) else -math.inf) for x in z]
    p = [math.exp(x) for x in z]
    p = [x / sum(p) for x in p]
    H = -sum(x * math.log(x) for x in p if x)
    kept = set(range(V))
    if name == 'banned': kept -= set(value)
    if name == 'required': kept = set(value) - set(new) if context.remaining <= len(set(value) - set(new)) else kept - {*context.end_tokens}
    if name == 'top_k': kept = set(sorted(kept, key=lambda i: -p[i])[:value])
    if name == 'min_p': kept = {i for i in kept if p[i] >= value * max(p)}
    if name in ('top_p', 'typical_p'):
        order = sorted(kept, key=lambda i: -p[i] if name == 'top_p' else abs(-math.log(p[i]) - H))
        kept = set(next(order[:n] for n in range(1, V + 1) if sum(p[i] for i in order[:n]) >= value))
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(V)]


VALUES = [('logit_bias', {0: 1.0, 3: -1.0}), ('repetition_penalty', 1.5), ('presence_penalty', 0.7), ('frequency_penalty', 0.4), ('banned', (1, 4)), ('required', (2, 5)),
          ('temperature', 0.6), ('temperature', 2.0), ('temperature', 0), ('top_k', 3), ('top_p', 0.55), ('top_p', 0.9), ('min_p', 0.25), ('typical_p', 0.5)]


@pytest.mark.parametrize(('name', 'value'), VALUES)
def test_draws_follow_the_exact_distribution(name, value, n=20_000):
    "Pearson's test; the statistic as a number of standard deviations (Wilson and Hilferty)."
    z = [1.2, 0.9, 0.1, -0.4, -1.0, 0.4, -2.0]
    context = Context([[1, 6]], [[0, 0, 3]], remaining=2, end_tokens=[0])
    p = exact(name, value, z, context)
    rows = Sampler(**{name: value}).probabilities(torch.tensor([z], dtype=torch.float64), context)
    torch.testing.assert_close(rows[0], torch.tensor(p, dtype=torch.float64))
    coin = random.Random(f'{name} {value}')
    drawn = draw(rows.expand(n, -1), [coin.random() for _ in range(n)])
    counts = [drawn.count(i) for i in range(len(z))]
    assert all(not count for count, x in zip(counts, p) if x == 0)
    k = sum(x > 0 for x in p) - 1
    if k:
        x = sum((count - n * q) ** 2 / (n * q) for count, q in zip(counts, p) if q)
        assert ((x / k) ** (1 / 3) - 1 + 2 / (9 * k)) / (2 / (9 * k)) ** 0.5 < 4


def test_every_processor_is_tested_and_has_a_field():
    assert {name for name, _ in VALUES} == set(PROCESSORS) == {name for name, _ in vars(Sampler()).items()} - {'order'}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda p: sum(p) > 1e-6), st.floats(0, 1, exclude_max=True))
@settings(max_examples=150)
def test_draw_never_takes_what_has_no_weight(p, u):
    token, = draw(torch.tensor([p], dtype=torch.float64), [u])
    assert p[token] > 0


@pytest.mark.parametrize('temperature', [0, 1e-3, 1.0])
def test_nothing_is_chosen_where_nothing_is_left(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [math.nan, 0.0, 0.0]])
    assert Sampler(temperature=temperature, banned=[0, 2]).choose(logits[:1], [0.9]) == [1]
    with pytest.raises(ValueError, match='row 0: no token is left'): Sampler(temperature=temperature, banned=[0, 1, 2]).choose(logits, [0.5, 0.5])
    with pytest.raises(ValueError, match='row 1: .* NaN'): Sampler(temperature=temperature).choose(logits, [0.5, 0.5])


def test_at_temperature_0_the_choice_is_what_a_draw_would_be():
    logits, u = torch.randn(200, 9, generator=torch.Generator().manual_seed(0)), [i / 200 for i in range(200)]
    for sampler in (Sampler(temperature=0), Sampler(temperature=0, banned=[3], top_k=2, repetition_penalty=1.3), Sampler(temperature=0, order=tuple(reversed(tuple(PROCESSORS))))):
        context = Context([[1, 2]] * 200, [[4]] * 200, 5)
        assert sampler.choose(logits, u, context) == draw(sampler.probabilities(logits, context), u)


def test_steps_are_in_order_and_only_those_that_act():
    sampler = Sampler(top_p=0.9, temperature=0.5, banned=[3])
    assert [name for name, _ in sampler.steps] == ['banned', 'temperature', 'top_p']
    turned = Sampler(top_p=0.9, temperature=0.5, order=tuple(reversed(tuple(PROCESSORS))))
    assert [name for name, _ in turned.steps] == ['top_p', 'temperature'] and sampler != turned and hash(sampler) != hash(turned)


@pytest.mark.parametrize('wrong', [dict(temperature=-1), dict(temperature=1e-9), dict(temperature=math.inf), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1),
                                   dict(min_p=-0.1), dict(typical_p=0.0), dict(repetition_penalty=0.0), dict(presence_penalty=math.inf), dict(frequency_penalty=math.nan),
                                   dict(logit_bias={1: math.inf}), dict(logit_bias={-1: 1.0}), dict(banned=[-1]), dict(banned=[1], required=[1]), dict(order=('top_k',))])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match='must be'): Sampler(**wrong)


# Rows that do not know each other ---------------------------------------------------------------------------------

MODELS = {**{name: {'positions': name} for name in ('learned', 'rope', 'alibi', 'sinusoidal', 'none')}, 'window': {'positions': 'rope', 'window': 3},
          'grouped': {'positions': 'rope', 'n_kv_heads': 2}, 'sinks': {'positions': 'rope', 'sinks': True}}


@pytest.mark.parametrize('name', MODELS)
def test_a_row_does_not_depend_on_the_others_nor_on_a_cache(name):
    model = opinionated(**MODELS[name])
    for cache in ({}, {'cache': None}): generate(model, RAGGED, 3, WARM, **cache)              # with every shape checked
    with unchecked():
        rows = generate(model, RAGGED, 20, WARM, seed=3)
        assert generate(model, RAGGED, 20, WARM, seed=3, cache=None) == rows
        assert generate(model, RAGGED[::-1], 20, WARM, seed=row_seeds(3, 4)[::-1]) == rows[::-1]
        for prompt, seed, row in zip(RAGGED, row_seeds(3, 4), rows, strict=True):
            assert generate(model, [prompt], 20, WARM, seed=[seed])[0] == row
        assert len({tuple(row) for row in generate(model, [[1, 2, 3]] * 4, 20, WARM)}) == 4    # rows draw by themselves


@pytest.mark.parametrize('name', ['learned', 'rope', 'alibi'])
@pytest.mark.parametrize('limit', [1, 5, 8])
def test_sliding_is_the_same_alone_in_a_batch_and_with_a_cache(name, limit):
    model, options = opinionated(name), dict(overflow='slide', context_length=limit)
    for cache in ({}, {'cache': None}) if limit == 5 else (): generate(model, RAGGED, limit + 2, WARM, **options, **cache)       # with every shape checked
    with unchecked():
        rows = generate(model, RAGGED, 20, WARM, seed=3, **options)
        assert generate(model, RAGGED, 20, WARM, seed=3, cache=None, **options) == rows
        for prompt, seed, row in zip(RAGGED, row_seeds(3, 4), rows, strict=True):
            assert generate(model, [prompt], 20, WARM, seed=[seed], **options)[0] == row


def test_sliding_reads_what_it_says():
    "The model sees the last part of the text only, and never more than the context."
    seen = []
    def model(ids, positions=None, cache=None):
        seen.append(ids.tolist())
        return torch.eye(50, dtype=torch.float64)[(ids + 1) % 50].log()
    assert generate(model, [[0]], 12, overflow='slide', context_length=4, cache=None) == [list(range(1, 13))]
    assert [row for row, in seen] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [2, 3, 4], [2, 3, 4, 5], [4, 5, 6], [4, 5, 6, 7], [6, 7, 8], [6, 7, 8, 9], [8, 9, 10], [8, 9, 10, 11]]


def test_the_whole_context_can_be_used_and_not_a_token_more():
    model = opinionated('learned', context_length=10)
    assert len(generate(model, [[1, 2, 3]], 8)[0]) == 8                      # reads 3 + 7
    with pytest.raises(ValueError, match='context of 11, the model has 10'): generate(model, [[1, 2, 3]], 9)


@pytest.mark.parametrize('name', ['learned', 'alibi', 'window', 'grouped'])
@settings(max_examples=10)
@given(data=st.data())
def test_a_cache_changes_nothing(name, data):
    with unchecked(): check_cache(SimpleCache, opinionated(**MODELS[name]), data, 40)


@pytest.mark.parametrize('ragged', [False, True])
def test_a_window_bounds_the_memory(ragged):
    model, cache, ids = opinionated(window=4), SimpleCache(), torch.randint(40, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        for t in range(32):
            positions = torch.tensor([t]).expand(2, 1) if ragged else torch.tensor([t])
            torch.testing.assert_close(model(ids[:, t : t + 1], positions=positions, cache=cache), expected[:, t : t + 1])
            assert all(cache.state(layer)['keys'].shape[2] <= 4 * 4 for layer in (0, 1))


def test_a_cache_gives_back_what_it_was_given_and_moves_seldom():
    g, cache, whole, places = torch.Generator().manual_seed(0), SimpleCache(), [], set()
    for n in (3, *[1] * 200, 5, 1):
        whole.append(torch.randn(2, 3, n, 4, generator=g))
        k, v = cache.update(7, whole[-1], -whole[-1])
        places.add(k.data_ptr())
        assert torch.equal(k, torch.cat(whole, 2)) and torch.equal(v, -k)
    assert len(places) <= 8                                                  # 3, 8, 18, 38 … positions
    cache.reorder([1, 1, 0])
    assert isinstance(cache, Cache)
    more = torch.randn(3, 3, 1, 4, generator=g)
    k, v = cache.update(7, more, more)
    assert torch.equal(k, torch.cat([torch.cat(whole, 2)[[1, 1, 0]], more], 2)) and torch.equal(v[:, :, -1:], more)


def test_a_model_in_training_is_left_as_it_was():
    model = opinionated('rope', dropout=0.5)
    expected = generate(model.eval(), RAGGED, 8, WARM)
    model.train()
    model.blocks[0].eval()                                                   # somebody's choice
    before = [m.training for m in model.modules()]
    steps = generate_steps(model, RAGGED, 8, WARM)
    rows = [[] for _ in RAGGED]
    for step in steps:
        assert torch.is_grad_enabled() and [m.training for m in model.modules()] == before
        for row, token in zip(rows, step): row.append(token)
    assert rows == expected
    steps = generate_steps(lambda ids, **_: 1 / 0, RAGGED, 3)
    with pytest.raises(ZeroDivisionError): next(steps)


def test_rows_end_by_themselves():
    model = opinionated('rope', vocab_size=6)
    with unchecked(): rows = generate(model, RAGGED[:1] * 30, 25, end_tokens=5)
    assert all(5 not in row[:-1] for row in rows) and any(len(row) < 25 for row in rows) and all(row[-1] == 5 or len(row) == 25 for row in rows)
    with unchecked():
        for row, seed in zip(rows, row_seeds(0, 30), strict=True): assert generate(model, RAGGED[:1], 25, end_tokens=5, seed=[seed])[0] == row
    steps = list(generate_steps(model, RAGGED[:1] * 30, 25, end_tokens=5))
    for i, row in enumerate(rows): assert [step[i] for step in steps] == row + [None] * (len(steps) - len(row))


def test_a_row_ends_with_any_of_several_tokens():
    def counts(ids, positions=None, cache=None): return torch.eye(10)[(ids + 1) % 10].log()      # 0 1 2 3 …
    letters = CharTokenizer.train(['abcdefghij'])
    for ends in ([5, 8], (8, 5), np.array([5, 8], np.uint16), torch.tensor([5, 8])):
        with unchecked(): assert generate(counts, [[1], [6]], 9, end_tokens=ends) == [[2, 3, 4, 5], [7, 8]]
    for end in (5, np.uint16(5), [5]):
        with unchecked(): assert generate(counts, [[1]], 9, end_tokens=end) == [[2, 3, 4, 5]] and ''.join(stream(counts, letters, 'b', 9, end_tokens=end)) == 'cde'
    kept = Sampler(required=[9])(torch.zeros(1, 10), Context([[1]], [[]], 5, [3, 4]))
    assert kept[0].isneginf().nonzero()[:, 0].tolist() == [3, 4]
    only = Constraint('c(de)?', letters)
    with unchecked(): assert {*map(tuple, generate(lambda ids, **_: torch.zeros(*ids.shape, 12), [[1]] * 40, 6, constraint=only, end_tokens=[10, 11]))} == {
        (2, 10), (2, 11), (2, 3, 4, 10), (2, 3, 4, 11)}
    for call in (generate, generate_steps): pytest.raises(TypeError, call, counts, [[1]], 3, end_token=5)
    with pytest.raises(TypeError): beam_search(counts, [1], 2, 3, end_token=5)
    for wrong in (None, 'x', 1.5, [1.5]):
        with unchecked(), pytest.raises(TypeError, match='end_tokens is a token id or several'): generate(counts, [[1]], 3, end_tokens=wrong)


@pytest.mark.parametrize('make', [lambda ids: np.array(ids, np.uint16), lambda ids: torch.tensor(ids, dtype=torch.uint16), torch.tensor, lambda ids: [np.int64(i) for i in ids]])
def test_ids_may_be_of_any_whole_numbers(make):
    model = opinionated()
    with unchecked():
        assert generate(model, [make(ids) for ids in RAGGED], 4, WARM, seed=np.int64(1)) == generate(model, RAGGED, 4, WARM, seed=1)
        assert generate(model, [make([1, 2])], 4, WARM, seed=make([5])) == generate(model, [[1, 2]], 4, WARM, seed=[5])
        assert beam_search(model, make([1, 2, 3]), 3, 4) == beam_search(model, [1, 2, 3], 3, 4)
        for wrong in (make([1, 2]), [1.5], [[1.5]], [None]):
            with pytest.raises(TypeError, match='list of lists'): generate(model, wrong, 3)


class Counted:
    "A model, and how many tokens it was given to read in each pass."
    def __init__(self, model): self.model, self.read = model, []
    def __call__(self, ids, **options):
        self.read.append(ids.numel())
        return self.model(ids, **options)


@pytest.mark.parametrize('cache', [SimpleCache, Cache, None])
@pytest.mark.parametrize('name', ['rope', 'alibi', 'window'])
def test_a_shared_prompt_is_read_once(name, cache):
    "Four samples of each of two prompts: two rows are read, eight go on, and each is what it would be alone."
    model = opinionated(**MODELS[name])
    for prompts, pad in (([[1, 2, 3]] * 4 + [[4, 5, 6]] * 4, 0), ([[1, 2, 3], [7]] * 4, 2)):
        counted = Counted(model)
        with unchecked():
            rows = generate(counted, prompts, 6, WARM, seed=3, context_length=32, cache=cache)
            assert counted.read == [sum(map(len, {*map(tuple, prompts)})) + pad, *[8] * 5] if cache else counted.read[0] == 6
            for prompt, seed, row in zip(prompts, row_seeds(3, 8), rows, strict=True): assert generate(model, [prompt], 6, WARM, seed=[seed])[0] == row
    counted = Counted(model)
    found, expected = beam_search(counted, [1, 2, 3], 3, 5, context_length=32, cache=cache), beam_search(model, [1, 2, 3], 3, 5)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected] and [s for _, s in found] == pytest.approx([s for _, s in expected])
    assert counted.read == ([3, *[3] * 4] if cache else [3, *(3 * n for n in range(4, 8))])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=40)
def test_required_tokens_come_and_banned_ones_do_not(required, extra, seed):
    banned = [i for i in range(7) if i not in required][:1]
    def model(ids, positions=None, cache=None): return torch.zeros(*ids.shape, 8, dtype=torch.float64)
    row, = generate(model, [[0]], len(required) + extra, Sampler(required=required, banned=banned), end_tokens=7, seed=seed)
    assert set(required) <= set(row) and not set(banned) & set(row)


def test_nothing_is_written_where_nothing_is_asked():
    assert generate(opinionated(), RAGGED, 0) == [[], [], [], []]


def test_what_cannot_work_is_said_before_the_first_token():
    model, letters = opinionated(), CharTokenizer.train(['abc'])
    for error, words, call in [(TypeError, 'list of lists', lambda: generate_steps(model, 'abc', 3)), (TypeError, 'list of lists', lambda: generate_steps(model, [1, 2], 3)),
                               (ValueError, 'no prompt', lambda: generate_steps(model, [], 3)), (ValueError, 'prompt 1 is empty', lambda: generate_steps(model, [[1], []], 3)),
                               (ValueError, 'negative, got -1', lambda: generate_steps(model, [[1]], -1)), (ValueError, 'need a tokenizer', lambda: generate_steps(model, [[1]], 3, stop=['x'])),
                               (ValueError, "got 'fall'", lambda: generate_steps(model, [[1]], 3, overflow='fall')), (ValueError, 'required', lambda: generate_steps(model, [[1]], 1, Sampler(required=[1, 2]))),
                               (ValueError, '2 seeds for 1 rows', lambda: generate_steps(model, [[1]], 3, seed=[1, 2])), (ValueError, 'need a context of 40', lambda: generate_steps(model, [[1]], 40)),
                               (ValueError, 'prompt 0 is empty', lambda: stream(model, letters, '', 3)),
                               (ValueError, 'at least 4 tokens', lambda: generate_steps(model, [[1]], 3, constraint=Constraint('aaaa', letters)))]:
        with unchecked(), pytest.raises(error, match=words): call()          # it is the library that says it, not the checker of types
    with pytest.raises(ValueError, match='NaN'): generate(lambda ids, **_: torch.full((1, 1, 4), math.nan), [[0]], 1)
    with pytest.raises(ValueError, match='beyond the vocabulary'): generate(model, [[1]], 3, Sampler(banned=[40]))


# Text -------------------------------------------------------------------------------------------------------------

class Pieces:
    "A tokenizer whose tokens are the given pieces of a text, as bytes."
    special_tokens, vocab_size = {}, 1000
    def __init__(self, pieces): self.pieces = pieces
    def encode(self, text): raise NotImplementedError
    def decode(self, ids): return b''.join(self.pieces[i] for i in ids).decode('utf-8', 'replace')


def first_stop(text, stops):
    "Character by character: the text before the stop string that is complete first."
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found: return text[: end - max(map(len, found))], True
    return text, False


@given(st.text('ab.é😀 ', max_size=14), st.lists(st.text('ab.é😀 ', min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=200)
def test_text_does_not_depend_on_how_it_is_cut(text, stops, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    out = TextStream(Pieces(pieces), stops)
    given_out = []
    for i in range(len(pieces)):
        given_out.append(out.push(i))
        so_far = b''.join(pieces[: i + 1]).decode('utf-8', 'ignore')
        expected = first_stop(so_far, stops)[0]
        assert expected.startswith(''.join(given_out)) and '\ufffd' not in ''.join(given_out)
        if out.stopped: break
    given_out.append(out.finish())
    assert (''.join(given_out), out.stopped) == first_stop(text, stops)


def test_nothing_is_held_back_without_reason():
    out = TextStream(Pieces([b'the ', b'en', b'try', b'\xf0\x9f', b'\x98\x80', b' en']), ['end'])
    assert [out.push(i) for i in range(6)] == ['the ', '', 'entry', '', '😀', ' '] and out.finish() == 'en' and not out.stopped


def test_bytes_that_are_no_text_come_out_in_the_end():
    out = TextStream(Pieces([b'a', b'\xf0', b'b', b'\xe2']), [])
    assert [out.push(i) for i in range(4)] + [out.finish()] == ['a', '', '\ufffdb', '', '\ufffd']


def test_streamed_text_is_the_text_of_the_tokens():
    tokenizer = BPETokenizer.train('the cat sat on the mat é 😀 ' * 4, 290)
    model = opinionated('rope', vocab_size=tokenizer.vocab_size)
    ids = tokenizer.encode('the cat')
    with unchecked():
        for seed in range(5):
            row, = generate(model, [ids], 20, seed=seed)
            assert ''.join(stream(model, tokenizer, 'the cat', 20, seed=seed)) == tokenizer.decode(row)
    words = WordTokenizer.train(['the cat sat on the mat . ' * 3], special_tokens=('<end>',))
    row, = generate(opinionated('rope', vocab_size=words.vocab_size), [words.encode('the cat')], 9)
    assert ''.join(stream(opinionated('rope', vocab_size=words.vocab_size), words, 'the cat', 9)) == ' ' + words.decode(row)


@given(st.text('ab.é😀', min_size=1, max_size=12), st.lists(st.text('ab.é😀', min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=200)
def test_the_border_of_the_prompt_is_no_border_of_the_text(text, stops, data):
    "A prompt may end inside a character or inside a stop string; what is complete in the prompt does not count."
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    n = data.draw(st.integers(0, len(pieces)))
    known = len(b''.join(pieces[:n]).decode('utf-8', 'ignore'))
    out, given_out = TextStream(Pieces(pieces), stops, list(range(n))), []
    for i in range(n, len(pieces)):
        given_out.append(out.push(i))
        if out.stopped: break
    given_out.append(out.finish())
    for end in range(known + 1, len(text) + 1):                              # the stop string that is complete first after the prompt
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            assert (''.join(given_out), out.stopped) == (text[known : max(known, end - max(map(len, found)))], True)
            return
    assert (''.join(given_out), out.stopped) == (text[known:], False)


def test_a_replacement_character_of_the_prompt_is_not_said_again():
    for prompt, new in (('a\ufffd'.encode(), b'b'), (b'a\xff', b'b'), ('\ufffd'.encode(), 'é'.encode())):
        out = TextStream(Pieces([prompt, new]), prompt=[0])
        assert out.push(1) + out.finish() == new.decode()


def test_a_stop_string_across_tokens_ends_a_row_and_its_stream():
    letters = CharTokenizer.train(['abcdefghij'])
    def counts(ids, positions=None, cache=None): return torch.eye(10)[(ids + 1) % 10].log()     # a b c d …
    options = dict(stop=['ef', 'j'], tokenizer=letters)
    assert [letters.decode(row) for row in generate(counts, [[0], [6], [3]], 9, **options)] == ['bcdef', 'hij', 'ef']
    assert ''.join(stream(counts, letters, 'a', 9, stop=['ef', 'j'])) == 'bcd'
    with unchecked():
        assert [letters.decode(row) for row in generate(counts, [[0], [6], [3]], 9, stop=iter(['ef', 'j']), tokenizer=letters)] == ['bcdef', 'hij', 'ef']   # read once, for every row
        assert ''.join(stream(counts, letters, 'a', 9, stop=iter(['ef', 'j']))) == 'bcd'
        for call in (lambda: generate(counts, [[0]], 9, stop='ef', tokenizer=letters), lambda: stream(counts, letters, 'a', 9, stop='ef')):
            with pytest.raises(TypeError, match='got one string'): call()
    assert ''.join(stream(counts, letters, 'abc', 9, stop=['cd', 'abc'])) == '' and generate(counts, [[2]], 9, stop=['cd', 'c'], tokenizer=letters) == [[3]]


# Beams ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('alpha', [-1.0, 0.0, 0.6, 1.0, 3.0])
@pytest.mark.parametrize('end', [(), 0, (0, 2)])
def test_beam_search_against_everything(alpha, end, n=4, V=4):
    model = opinionated('rope', vocab_size=V)
    scores, ends = {}, {*as_end_tokens(end)}
    for length in range(1, n + 1):
        every = [ids for ids in itertools.product(range(V), repeat=length) if not ends & {*ids[:-1]} and (length == n or ids[-1] in ends)]
        if not every: continue
        with torch.no_grad(): log_p = model(torch.tensor([[1, 2, *ids] for ids in every]))[:, 1:-1].log_softmax(-1)
        for ids, rows in zip(every, log_p, strict=True): scores[ids] = float(sum(row[i] for row, i in zip(rows, ids, strict=True))) / length**alpha
    exact_ = sorted(scores.items(), key=lambda item: -item[1])
    found = beam_search(model, [1, 2], V**n, n, alpha, end_tokens=end)
    assert [tuple(ids) for ids, _ in found] == [ids for ids, _ in exact_]
    assert [s for _, s in found] == pytest.approx([s for _, s in exact_])
    few = beam_search(model, [1, 2], 3, n, alpha, end_tokens=end)
    assert len(few) == 3 and all(scores[tuple(ids)] == pytest.approx(s) for ids, s in few)


def test_one_beam_is_greedy():
    for name in ('learned', 'alibi'):
        model = opinionated(name)
        with unchecked():
            for prompt in RAGGED: assert beam_search(model, prompt, 1, 12)[0][0] == generate(model, [prompt], 12, Sampler(temperature=0))[0]


def test_beam_search_says_what_cannot_work():
    for words, ids, beams, n in (('got 0 and 3', [1], 0, 3), ('got 2 and 0', [1], 2, 0), ('is empty', [], 2, 3), ('need a context of 40', [1], 2, 40)):
        with pytest.raises(ValueError, match=words): beam_search(opinionated(), ids, beams, n)


# Constraints ------------------------------------------------------------------------------------------------------

class Rising:
    "A constraint of our own: each token is larger than the last; its state is the last token and 1."
    def prepare(self, sampler, max_new_tokens): return self
    def mask(self, logits, state, remaining): logits[:state] = -math.inf
    def advance(self, state, token): return token + 1
    def is_complete(self, state): return True
    def can_continue(self, state, remaining): return state < 40


def test_any_object_with_the_five_methods_can_constrain():
    assert isinstance(Rising(), TokenConstraint) and isinstance(Constraint('a', CharTokenizer.train(['a'])), TokenConstraint) and not isinstance('a', TokenConstraint)
    rows = generate(opinionated(), RAGGED, 20, constraint=Rising())
    assert all(row == sorted(set(row)) for row in rows) and len({*map(tuple, rows)}) == 4
    assert [generate(opinionated(), [p], 20, seed=[s], constraint=Rising())[0] for p, s in zip(RAGGED, row_seeds(0, 4))] == rows


def test_what_no_tokenizer_knows_is_never_drawn():
    "A vocabulary that was padded to a round number: the model gives the padding the highest score."
    letters = CharTokenizer.train(['abc'])
    padded = GPT(GPTConfig(64, 8, 8, 1, 1))
    padded.forward = lambda ids, **_: torch.arange(64.).expand(*ids.shape, 64)
    assert ''.join(stream(padded, letters, 'a', 4, Sampler(temperature=0))) == 'cccc'
    assert generate(padded, [[0]], 3, Sampler(temperature=0, banned=(2,)), tokenizer=letters) == [[1, 1, 1]]
    assert generate(padded, [[0]], 3, Sampler(temperature=0)) == [[63, 63, 63]]          # without a tokenizer, nobody knows
