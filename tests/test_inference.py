"Chapter 16: every cache keeps the promise of all caches, tokens can be taken back, speculative decoding changes no text and no distribution, work is counted as torch counts it."
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from caches import check_cache
from hypothesis import HealthCheck, given, settings, strategies as st
from shapes import unchecked
from small import LLAMA, model as small

from llm_from_scratch.architectures import GatedDeltaNet
from llm_from_scratch.attention import Cache, MultiHeadAttention
from llm_from_scratch.costs import cache_size
from llm_from_scratch.generation import Sampler, SimpleCache, draw, generate
from llm_from_scratch.gpt import GPTConfig, blueprint
from llm_from_scratch.inference import (
    Draft, DraftModel, Int8Cache, PromptLookup, RingCache, Roofline, Round, StaticCache, Work, accept, best_time, distillation_loss, generate_speculative, pack,
    speculate, unpack)

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
GREEDY = Sampler(temperature=0)


def peaked(**options):
    "A tiny model of clear preferences, in float64: no tie is decided by rounding."
    made = small(**{**LLAMA, 'context_length': 64, **options}).double().eval()
    for p in made.parameters(): p.data *= 3
    return made


KINDS = {
    'rope': {}, 'grouped': dict(n_kv_heads=2), 'learned': dict(positions='learned'), 'alibi': dict(positions='alibi'),
    'window': dict(window=3), 'alibi, window': dict(positions='alibi', window=4), 'mixed': dict(layers=({'window': 3}, {}), sinks=True),
}
MODELS = {name: peaked(**options) for name, options in KINDS.items()}
CACHES = {'growing': Cache, 'simple': SimpleCache, 'static': lambda: StaticCache(60), 'ring': RingCache}


def with_spare(make, spare):
    cache = make()
    cache.spare = max(cache.spare, spare)
    return cache


CHECKED = {'test_a_model_in_training_is_put_back', 'test_no_more_can_be_taken_back_than_there_is', 'test_a_student_is_drawn_to_its_teacher_as_torch_says', 'test_a_vector_of_zeros_stays_zero',
           'test_bytes_are_weights_and_what_a_cache_holds', 'test_ragged_rows_and_recurrent_layers_refuse', 'test_prompt_lookup_needs_a_token', 'test_a_window_takes_back_what_it_spares'}


@pytest.fixture(autouse=True)
def few_checks(request):
    "Shapes are checked where a few calls are made, and not in the thousands after them."
    if request.node.originalname in CHECKED: yield
    else:
        with unchecked(): yield


# Caches -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['static', 'ring'])
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), kind=st.sampled_from([*KINDS]), spare=st.integers(0, 3))
def test_any_chunks_padding_and_rows_equal_the_full_pass(name, data, kind, spare):
    check_cache(lambda: with_spare(CACHES[name], spare), MODELS[kind], data, 23)


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), kind=st.sampled_from(['rope', 'window']))
def test_eight_bits_stay_near_the_full_pass(data, kind):
    check_cache(Int8Cache, small(**{**LLAMA, 'context_length': 24, **KINDS[kind]}).double().eval(), data, 23, tolerance=0.02)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(x=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_eight_bits_are_off_by_half_a_scale(x, dtype):
    x = torch.tensor([x]).to(dtype)
    packed = pack(x)
    assert packed.dtype == torch.int8 and packed.shape[-1] == x.shape[-1] + 4
    back, coarse = unpack(packed, dtype), torch.finfo(dtype).eps
    assert back.dtype == dtype and ((back - x).abs().double() <= x.abs().amax().double() * (1 / 254 + 2 * max(coarse, 1e-7))).all()


def test_eight_bits_take_a_quarter_and_four_bytes():
    caches = {}
    for make in SimpleCache, Int8Cache:
        cache = caches[make] = make()
        MODELS['grouped'](torch.zeros(2, 9, dtype=torch.long), positions=torch.arange(9), cache=cache)
    d = 4                                                                  # width of a head, in float64 here
    for name in ('keys', 'values'): assert caches[Int8Cache].state(0)[name].nbytes * 8 * d == caches[SimpleCache].state(0)[name].nbytes * (d + 4)


def test_a_vector_of_zeros_stays_zero(): assert not unpack(pack(torch.zeros(2, 5)), torch.float32).any()


def test_a_static_cache_takes_its_memory_once_and_says_when_it_is_full():
    cache, new = StaticCache(5), torch.ones(2, 1, 2, 4)
    cache.update(0, new, new)
    before = cache.state(0)['keys'].data_ptr()
    keys, _ = cache.update(0, new, new)
    assert keys.shape[2] == 4 and cache.state(0)['keys'].data_ptr() == before and cache.state(0)['keys'].shape[2] == 5
    with pytest.raises(ValueError, match='holds 5 tokens, and these would be 6'): cache.update(0, new, new)
    assert cache.update(0, new[:, :, :1], new[:, :, :1])[0].shape[2] == 5                 # the refused ones left nothing behind
    with pytest.raises(ValueError, match='at least 1'): StaticCache(0)


@pytest.mark.parametrize('length', [3, 200])
def test_a_ring_is_as_large_for_any_text(length):
    layer, cache = MultiHeadAttention(8, 2, window=3), RingCache()
    with torch.no_grad():
        for t in range(0, length, 2): layer(torch.randn(1, 2, 8), cache=cache)
    assert sum(x.nbytes for x in cache.state(0).values() if isinstance(x, torch.Tensor)) == 4 * (2 * 2 * 4 * 4 + 8)


def test_a_ring_keeps_no_order_for_a_mask():
    with pytest.raises(ValueError, match='mask'): MultiHeadAttention(8, 2, window=3)(torch.ones(1, 2, 8), mask=torch.ones(2, 2, dtype=torch.bool), cache=RingCache())


def test_more_spare_later_does_not_overwrite_what_is_needed():
    layer, cache, x = MultiHeadAttention(8, 2, window=4).requires_grad_(False), RingCache(), torch.randn(1, 16, 8)
    parts = []
    for t in range(0, 16, 2):
        parts.append(layer(x[:, t:t + 2], cache=cache))
        cache.spare = 3
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))


# Taking tokens back -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', CACHES)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), kind=st.sampled_from([*KINDS]))
def test_taken_back_is_as_if_never_read(name, data, kind):
    model, spare = MODELS[kind], 3
    cache, kept, read = with_spare(CACHES[name], spare), [], data.draw
    while len(kept) < 12:
        new = [*kept, *read(st.lists(st.integers(0, 22), min_size=1, max_size=5), 'tokens')]
        at = torch.arange(len(kept), len(new))
        with torch.no_grad():
            logits = model(torch.tensor([new])[:, at], positions=at, cache=cache)
            torch.testing.assert_close(logits, model(torch.tensor([new]))[:, at], rtol=0, atol=1e-9)
        back = read(st.integers(0, min(spare, len(new) - len(kept))), 'taken back')
        cache.truncate(back)
        kept = new[:len(new) - back]


@pytest.mark.parametrize('name', CACHES)
def test_no_more_can_be_taken_back_than_there_is(name):
    cache, layer, x = CACHES[name](), MultiHeadAttention(8, 2), torch.randn(1, 4, 8)
    layer(x, cache=cache)
    for n in (-1, 5):
        with pytest.raises(ValueError, match='take back'): cache.truncate(n)
    cache.truncate(4)
    torch.testing.assert_close(layer(x, cache=cache), layer(x))


@pytest.mark.parametrize('name', ['growing', 'simple', 'ring'])
def test_a_window_takes_back_what_it_spares(name):
    cache, layer = with_spare(CACHES[name], 2), MultiHeadAttention(8, 2, window=3)
    layer(torch.randn(1, 9, 8), cache=cache)
    with pytest.raises(ValueError, match='take back'): cache.truncate(3)
    cache.truncate(2)


@pytest.mark.parametrize('name', CACHES)
def test_ragged_rows_and_recurrent_layers_refuse(name):
    for window in (None, 3):
        cache = with_spare(CACHES[name], 2)
        MultiHeadAttention(8, 2, window=window)(torch.randn(2, 3, 8), torch.tensor([[-1, 0, 1], [0, 1, 2]]), cache=cache)
        with pytest.raises(ValueError, match='ragged'): cache.truncate(1)
    cache = CACHES[name]()
    MultiHeadAttention(8, 2)(torch.randn(1, 3, 8), cache=cache)
    GatedDeltaNet(8, 2, layer=1)(torch.randn(1, 3, 8), cache=cache)
    with pytest.raises(ValueError, match='mixed'): cache.truncate(1)
    assert cache.state(0)['read'] == 3                                                     # nothing has changed


# Speculative decoding ---------------------------------------------------------------------------------------------

class Noise:
    "Proposes anything: sometimes what the model would say, sometimes nothing."
    def __init__(self, seed, known=()): self.coin, self.known = random.Random(seed), list(known)

    def propose(self, ids, n, share, coin):
        right = self.known[len(ids):len(ids) + n]
        return [x if self.coin.random() < 0.7 else self.coin.randrange(23) for x in right][:self.coin.randrange(n + 1)], None


@pytest.mark.parametrize(('name', 'kind'), [('simple', 'rope'), ('ring', 'window'), ('static', 'alibi, window'), ('growing', 'mixed'), ('ring', 'mixed')])
def test_greedy_texts_are_those_of_generate(name, kind):
    model, prompt = MODELS[kind], [1, 2, 3, 1, 2]
    plain, = generate(model, [prompt], 16, GREEDY)
    drafts = [Noise(0, [*prompt, *plain]), PromptLookup(), DraftModel(MODELS['window'], RingCache), DraftModel(model)]
    for draft in drafts:
        for n_draft in (0, 3) if name == 'simple' else (3,):
            assert generate_speculative(model, [prompt], 16, draft, GREEDY, n_draft=n_draft, cache=CACHES[name]) == [plain]


@pytest.mark.parametrize('name', CACHES)
def test_rejected_tokens_leave_the_cache(name):
    cache = CACHES[name]()
    rounds = [*speculate(MODELS['rope'], [1, 2, 3], 12, Noise(1, [0] * 40), GREEDY, cache=lambda: cache)]
    assert any(r.accepted < len(r.proposed) for r in rounds) and cache.state(0)['read'] == 3 + sum(len(r.written) for r in rounds) - 1


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(ends=st.sets(st.integers(0, 22), max_size=6), n=st.integers(0, 12), seed=st.integers(0, 9), required=st.lists(st.integers(0, 22), max_size=2, unique=True))
def test_ends_and_processors_are_those_of_generate(ends, n, seed, required):
    required = [x for x in required if x not in ends][:n]
    sampler = Sampler(temperature=0, repetition_penalty=1.3, frequency_penalty=0.2, banned=(4,), required=[x for x in required if x != 4])
    plain, = generate(MODELS['rope'], [[1, 2]], n, sampler, end_tokens=[*ends])
    assert generate_speculative(MODELS['rope'], [[1, 2]], n, Noise(seed, [1, 2, *plain]), sampler, end_tokens=[*ends]) == [plain]


@pytest.mark.parametrize('extra', [0, 1])
def test_guesses_need_no_room_beyond_the_new_tokens(extra):
    prompt, new = [1, 2, 3], 10
    make = lambda: StaticCache(len(prompt) + new - 2 + extra)      # noqa: E731
    if extra: assert len(generate_speculative(MODELS['rope'], [prompt], new, DraftModel(MODELS['rope']), GREEDY, cache=make)[0]) == new
    else:
        with pytest.raises(ValueError, match='full'): generate_speculative(MODELS['rope'], [prompt], new, DraftModel(MODELS['rope']), GREEDY, cache=make)


def test_a_perfect_draft_needs_the_fewest_passes():
    model = MODELS['rope']
    plain, = generate(model, [[1, 2]], 20, GREEDY)
    rounds = [*speculate(model, [1, 2], 20, DraftModel(model), GREEDY, n_draft=4)]
    assert rounds[0] == Round(proposed=plain[:4], accepted=4, written=plain[:5])
    assert len(rounds) == 4 and all(r.accepted == len(r.proposed) == 4 and len(r.written) == 5 for r in rounds)


def test_a_draft_model_goes_from_text_to_text():
    model, draft = MODELS['rope'], DraftModel(MODELS['grouped'])
    prompts = [[1, 2, 3], [1, 2, 3, 4], [9], [1, 2, 3]]
    assert generate_speculative(model, prompts, 8, draft, GREEDY) == generate(model, prompts, 8, GREEDY)


def test_seeds_are_those_of_the_rows():
    model, prompts = MODELS['rope'], [[1, 2], [1, 2], [3]]
    rows = generate_speculative(model, prompts, 6, PromptLookup(), seed=5)
    assert rows == generate_speculative(model, prompts, 6, PromptLookup(), seed=5) and rows[0] != rows[1]
    assert generate_speculative(model, prompts[1:2], 6, PromptLookup(), seed=[7]) == generate_speculative(model, prompts[:1], 6, PromptLookup(), seed=[7])


def test_a_model_in_training_is_put_back():
    model = small(**LLAMA, dropout=0.5).train()
    quiet = small(**LLAMA).eval()
    assert generate_speculative(model, [[1, 2]], 8, PromptLookup(), GREEDY) == generate(quiet, [[1, 2]], 8, GREEDY) and model.training


@pytest.mark.parametrize(('change', 'message'), [
    (dict(prompt=[]), 'empty'), (dict(max_new_tokens=-1), 'max_new_tokens'), (dict(n_draft=-1), 'n_draft'), (dict(max_new_tokens=63), 'context of 65')])
def test_what_cannot_work_is_refused_before_the_first_round(change, message):
    given = {'prompt': [1, 2, 3], 'max_new_tokens': 4, 'n_draft': 4, **change}
    with pytest.raises(ValueError, match=message): speculate(MODELS['rope'], given['prompt'], given['max_new_tokens'], PromptLookup(), n_draft=given['n_draft'])


def test_a_recurrent_model_refuses_in_the_first_round():
    model = small(**LLAMA, layers=({'mixer': 'gated_delta'}, {})).eval()
    with pytest.raises(ValueError, match='mixed'): generate_speculative(model, [[1, 2]], 4, PromptLookup())


def z_of(counts, p):
    "Pearson's chi-square as a standard normal (Wilson and Hilferty)."
    n, k, spread = counts.sum(), len(p) - 1, 2 / (9 * (len(p) - 1))
    return float((((counts - n * p) ** 2 / (n * p)).sum() / k) ** (1 / 3) - (1 - spread)) / spread**0.5


def z_of_rule(rule, seed=1, n=500):
    "How far n texts of three tokens that a rule for two guesses writes are from the model's own."
    p, q = (torch.tensor(row, dtype=torch.double).expand(3, 3) for row in ((0.5, 0.3, 0.2), (0.1, 0.8, 0.1)))
    coin, counts = random.Random(seed), torch.zeros(27, dtype=torch.double)
    for _ in range(n):
        tokens = [draw(row[None], [coin.random()])[0] for row in q[:2]]
        accepted, token = rule(tokens, q[:2], p, coin)
        written = [*tokens[:accepted], token]
        while len(written) < 3: written += draw(p[:1], [coin.random()])
        counts[written[0] * 9 + written[1] * 3 + written[2]] += 1
    return z_of(counts, torch.einsum('a,b,c->abc', *p).flatten())


def rule(keep, replacement):
    def accept(tokens, q, p, coin):
        for i, x in enumerate(tokens):
            if coin.random() < keep(p[i, x], q[i, x]): continue
            return i, draw(replacement(p[i], q[i])[None], [coin.random()])[0]
        return len(tokens), draw(p[-1:], [coin.random()])[0]
    return accept


def ratio(p, q): return p / q
def missing(p, q): return (p - q).clamp(min=0)
def not_normalized(p, q): return missing(p, q) + torch.tensor([0, 0, 1 - missing(p, q).sum()])       # what is left of the unit falls to the last token


def test_accept_or_resample_is_exact():
    z = z_of_rule(accept)
    assert abs(z) < 4 and z_of_rule(rule(ratio, missing)) == z


@pytest.mark.parametrize(('keep', 'replacement'), [(ratio, lambda p, q: p), (ratio, not_normalized), (lambda p, q: q / p, missing), (lambda p, q: 1, missing)],
                         ids=['replaced from p', 'residual not normalized', 'min(1, q/p)', 'always kept'])
def test_a_wrong_rule_is_told_by_as_many_draws(keep, replacement): assert z_of_rule(rule(keep, replacement)) > 5


def table_model(seed, scale=0.5):
    logits = scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    def model(ids, positions=None, cache=None): return logits[ids]
    return model, logits


@pytest.mark.parametrize(('sampler', 'draft'), [(Sampler(), 'lookup'), (Sampler(temperature=0.7, top_k=3), 'model'), (Sampler(presence_penalty=0.8), 'model')],
                         ids=['plain', 'top-k', 'presence'])
def test_texts_are_distributed_as_the_sampler_says(sampler, draft):
    model, logits = table_model(0)
    guess = DraftModel(table_model(1)[0]) if draft == 'model' else PromptLookup(1)
    exact, counts = torch.zeros(4, 4, dtype=torch.double), torch.zeros(4, 4, dtype=torch.double)
    from llm_from_scratch.generation import Context
    prompt = [1, 2, 3, 0]
    for a, pa in enumerate(sampler.probabilities(logits[:1], Context([prompt], [[]]))[0].double()):
        exact[a] = pa * sampler.probabilities(logits[a:a + 1], Context([prompt], [[a]]))[0].double()
    for seed in range(300):
        a, b = (t for r in speculate(model, prompt, 2, guess, sampler, seed=seed, n_draft=2) for t in r.written)
        counts[a, b] += 1
    possible = exact > 0
    assert not counts[~possible].any() and abs(z_of(counts[possible], exact[possible] / exact.sum())) < 4


# Peers ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pairs(hf, tmp_path_factory):
    "A model and a smaller one, ours and theirs, in float64."
    found = []
    for i, layers in enumerate((3, 1)):
        model = peaked(vocab_size=61, d_model=48, n_layers=layers, n_kv_heads=2, tie_embeddings=False)
        folder = tmp_path_factory.mktemp(f'peer{i}')
        model.float().to_hf(folder)
        found += [model.double(), hf.AutoModelForCausalLM.from_pretrained(folder).double().eval()]
    return found


def their_text(peer, prompt, n, **options):
    row = torch.tensor([prompt])
    return peer.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None, **options)[0, len(prompt):].tolist()


@pytest.mark.parametrize('options', [{}, {'cache_implementation': 'static'}], ids=['dynamic', 'static'])
def test_against_hf_caches(pairs, options):
    ours, peer, *_ = pairs
    theirs = their_text(peer, [3, 5, 7], 16, **options)
    for make in CACHES.values(): assert generate(ours, [[3, 5, 7]], 16, GREEDY, cache=make)[0] == theirs


def test_against_hf_assisted_generation_and_prompt_lookup(pairs):
    ours, peer, small, assistant = pairs
    for prompt, draft, options in (([3, 5, 7, 3, 5], DraftModel(small), {'assistant_model': assistant}), ([3, 5, 7, 3, 5], PromptLookup(), {'prompt_lookup_num_tokens': 3})):
        mine = generate_speculative(ours, [prompt], 16, draft, GREEDY)[0]
        assert mine == their_text(peer, prompt, 16, **options)


# Fixed shapes -----------------------------------------------------------------------------------------------------

COMPILED = """
import torch
from small import LLAMA, model as small
from llm_from_scratch.inference import StaticCache
torch.set_num_threads(1)
made, ids = [], torch.randint(23, (2, 14), generator=torch.Generator().manual_seed(0))
kinds = {'window': 3, 'positions': 'alibi'}, {}
model = small(**{**LLAMA, 'context_length': 24, 'layers': kinds, 'sinks': True}).double().eval()
def counting(graph, inputs): made.append(graph); return graph.forward
with torch.no_grad():
    compiled, cache, whole = torch.compile(model, backend=counting, fullgraph=True), StaticCache(24), model(ids)
    model(ids[:, :9], positions=torch.arange(9), cache=cache)
    for t in range(9, 14):
        at = torch.tensor([t])
        torch.testing.assert_close(compiled(ids[:, at], positions=at, cache=cache), whole[:, at], rtol=0, atol=1e-9)
print(len(made))
"""


@pytest.mark.long(8)
def test_compiled_steps_share_one_graph():
    "And equal the full pass. In a process of its own: the compiler cannot see through the shape checker."
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), str(root/'tests')])
    done = subprocess.run([sys.executable, '-c', COMPILED], capture_output=True, text=True, encoding='utf-8', cwd=root, env={**os.environ, 'PYTHONPATH': path})
    assert done.stdout == '1\n', done.stderr


# Work -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('past', 'batch'), [(0, 1), (7, 1), (12, 3)])
def test_operations_are_those_that_torch_counts(past, batch):
    from torch.utils.flop_counter import FlopCounterMode
    model, cache = small(**LLAMA, context_length=32, backend='manual').eval(), SimpleCache()
    with torch.no_grad():
        if past: model(torch.zeros(batch, past, dtype=torch.long), positions=torch.arange(past), cache=cache)
        with FlopCounterMode(display=False) as counted: model(torch.zeros(batch, 1, dtype=torch.long), positions=torch.tensor([past]), cache=cache)
    assert Work.of(model, past=past, batch=batch).flops == counted.get_total_flops()


def test_operations_of_a_prompt_are_those_of_its_tokens():
    model = blueprint(GPTConfig(23, 64, 16, 2, 4, **LLAMA))
    assert Work.of(model, new=9, past=4).flops == sum(Work.of(model, past=t).flops for t in range(4, 13))


@pytest.mark.parametrize('kind', ['rope', 'grouped', 'window'])
def test_bytes_are_weights_and_what_a_cache_holds(kind):
    model, cache = MODELS[kind], Cache()
    model(torch.zeros(2, 11, dtype=torch.long), positions=torch.arange(11), cache=cache)
    multiplied = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)
    work = Work.of(model, past=10, batch=2)
    assert work.bytes == 8 * (multiplied + 2 * cache_size(model, 11))
    if kind != 'window': assert work.bytes - 8 * multiplied == sum(cache.state(i)[name].nbytes for i in range(2) for name in ('keys', 'values'))


def test_a_roofline_is_the_lower_of_two_limits():
    machine = Roofline(bandwidth=10.0, speed=40.0)
    assert machine.ridge == 4 and [machine.attainable(i) for i in (0.5, 4, 9)] == [5, 40, 40]
    assert machine.seconds(Work(80.0, 10.0)) == 2 and machine.seconds(Work(80.0, 50.0)) == 5 and Work(80.0, 10.0).intensity == 8


def test_a_machine_can_be_measured():
    found = Roofline.measure(n_bytes=1 << 22, width=64, repeats=2)
    assert found.bandwidth > 0 and found.speed > 0
    called = []
    assert best_time(lambda: called.append(1), 3) >= 0 and len(called) == 4


# Drafts -----------------------------------------------------------------------------------------------------------

@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(ids=st.lists(st.integers(0, 3), max_size=20), n=st.integers(0, 5), longest=st.integers(1, 4))
def test_prompt_lookup_proposes_what_followed(ids, n, longest):
    tokens, q = PromptLookup(longest).propose(ids, n, None, None)
    assert q is None and len(tokens) <= n
    sizes = [size for size in range(1, min(longest, len(ids) - 1) + 1) if any(ids[i:i + size] == ids[-size:] for i in range(len(ids) - size))]
    if not sizes: assert not tokens
    else:
        size = max(sizes)
        starts = [i for i in range(len(ids) - size) if ids[i:i + size] == ids[-size:]]
        assert tokens == ids[max(starts) + size:max(starts) + size + n]


def test_the_cache_of_a_draft_model_follows_the_text():
    "After every round it holds the text but the last token, whatever was rejected."
    model, draft, ids = MODELS['rope'], DraftModel(MODELS['grouped']), [1, 2, 3]
    for r in speculate(model, ids, 14, draft, n_draft=3, seed=2):
        if r.proposed: assert draft._cache.state(0)['read'] == len(ids) + len(r.proposed) - 1
        ids = [*ids, *r.written]
        tokens, q = draft.propose(ids, 1, lambda logits, _: logits.softmax(-1), random.Random(0))
        torch.testing.assert_close(q[0], MODELS['grouped'](torch.tensor([ids]))[0, -1].softmax(-1))
    assert len(ids) == 17


def test_both_are_drafts(): assert all(isinstance(draft, Draft) for draft in (PromptLookup(), DraftModel(table_model(0)[0]), Noise(0)))


def test_prompt_lookup_needs_a_token():
    with pytest.raises(ValueError, match='at least 1'): PromptLookup(0)



# Distillation -----------------------------------------------------------------------------------------------------

def test_a_student_is_drawn_to_its_teacher_as_torch_says():
    student, teacher = (2 * torch.randn(2, 3, 7, dtype=torch.double, generator=torch.Generator().manual_seed(i)) for i in range(2))
    student.requires_grad_(), teacher.requires_grad_()
    loss = distillation_loss(student, teacher)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(torch.autograd.grad(loss, student, retain_graph=True)[0], ((q - p) / 6).detach())
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)         # the teacher does not learn
    assert abs(distillation_loss(teacher, teacher)) < 1e-12 and abs(loss - distillation_loss(teacher, student)) > 0.1          # which is which matters


def test_a_teacher_may_be_certain():
    loss = distillation_loss(torch.zeros(1, 3), torch.tensor([[0.0, -torch.inf, -torch.inf]]))
    assert abs(loss - torch.log(torch.tensor(3.0))) < 1e-6


@settings(max_examples=40)
@given(logits=st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=2, max_size=2))
def test_a_small_loss_means_that_guesses_are_accepted(logits):
    student, teacher = (torch.tensor([row], dtype=torch.double) for row in logits)
    rate = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum()
    assert rate >= 1 - (distillation_loss(student, teacher) / 2).clamp(min=0) ** 0.5 - 1e-9
