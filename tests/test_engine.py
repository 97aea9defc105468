"""The engine: whatever happens beside a request, its tokens are those of the request alone; pages are never lost, shared wrongly or freed twice.

The tiny models are in float64, where a batch of another size rounds otherwise only in digits that decide nothing."""
import random, tempfile, threading
from collections import Counter

import pytest
import torch
from caches import check_cache
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from small import LLAMA

from llm_from_scratch.constraints import Constraint
from llm_from_scratch.engine import BlockTable, Engine, PagedCache, PagePool
from llm_from_scratch.generation import Sampler, SimpleCache, beam_search, generate, row_seeds, stream
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.text import CharTokenizer

INPUTS = []
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]
V = 40
LATENT = dict(mixer='latent', options={'latent': dict(kv_rank=6, d_nope=4, d_rope=4, d_value=4)})
MODELS = {
    'learned': dict(positions='learned'), 'rope': LLAMA, 'alibi': dict(positions='alibi'), 'grouped': {**LLAMA, 'n_kv_heads': 2, 'sinks': True}, 'window': {**LLAMA, 'window': 3},
    'one window': {**LLAMA, 'layers': ({'window': 4}, {})}, 'latent': {**LLAMA, **LATENT}, 'short_conv': {**LLAMA, 'layers': ({'mixer': 'short_conv'}, {})},
    'gated_delta': {**LLAMA, 'layers': ({'mixer': 'gated_delta'}, {})}}


def tiny(name='rope', context_length=64):
    "A small GPT with strong opinions, in float64."
    options = {**MODELS[name]}
    if 'gated_delta' in str(options): options['options'] = {'gated_delta': dict(n_key_heads=2, n_value_heads=2, d_key=4, d_value=4)}
    model = GPT(GPTConfig(vocab_size=V, context_length=context_length, d_model=16, n_layers=2, n_heads=4, **options), generator=torch.Generator().manual_seed(2)).double()
    for p in model.parameters(): p.data *= 3
    return model.eval()


KNOWN = {}


def known(name):
    if name not in KNOWN: KNOWN[name] = tiny(name)
    return KNOWN[name]


@pytest.fixture(autouse=True)
def fast(request):
    "Types and shapes of every call are checked in one test, `test_shapes_are_checked`, and not in the others."
    if request.function is test_shapes_are_checked: return (yield)
    with unchecked(): yield


def passes_of(model):
    "A list that grows by one (how many tokens) with each forward pass."
    seen = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    return seen, handle


def all_free(engine):
    pool = engine.cache.pool
    return pool.available == len(pool.users) and not any(pool.users)


# Pages ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60)
@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from(['take', 'share', 'release', 'name', 'find']), st.integers(0, 4)), max_size=40))
def test_a_pool_counts_like_a_counter(n, actions):
    "Against a multiset of users and a list of names, the longest unused first."
    pool, users, keys, idle = PagePool(n), Counter(), {}, []
    for action, i in actions:
        page, key = i % n, bytes([i])
        if action == 'take':
            if sum(c > 0 for c in users.values()) == n:
                with pytest.raises(MemoryError): pool.take()
                continue
            taken = pool.take()
            assert not users[taken]
            if taken in idle:
                assert taken == idle[0] and len(idle) + sum(c > 0 for c in users.values()) == n   # only if nothing else is free
                idle.remove(taken)
                keys = {k: p for k, p in keys.items() if p != taken}
            users[taken] = 1
        elif action == 'share':
            if not users[page] and page not in idle:
                with pytest.raises(ValueError, match='nothing is in it'): pool.share(page)
                continue
            pool.share(page)
            if page in idle: idle.remove(page)
            users[page] += 1
        elif action == 'release':
            if not users[page]:
                with pytest.raises(ValueError, match='free already'): pool.release(page)
                continue
            pool.release(page)
            users[page] -= 1
            if not users[page] and page in keys.values(): idle.append(page)
        elif action == 'name' and users[page]:
            pool.name(page, key)
            if key not in keys and page not in keys.values(): keys[key] = page
        else: assert pool.find(key) == keys.get(key)
        assert pool.users == [users[p] for p in range(n)] and pool.available == n - sum(c > 0 for c in users.values())
        assert all(pool.is_fixed(p) == (users[p] > 1 or p in keys.values()) for p in range(n))


def test_impossible_sizes_are_refused():
    for mistake in (lambda: PagePool(0), lambda: PagedCache(4, 0), lambda: Engine(known('rope'), chunk=0), lambda: Engine(known('rope'), max_running=0)):
        with pytest.raises(ValueError, match='at least 1'): mistake()
    with pytest.raises(ValueError, match='training mode'): Engine(tiny().train())


# The cache --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', MODELS)
@settings(max_examples=4)
@given(data=st.data())
def test_a_cache_changes_nothing(name, data):
    "Against the model without a cache: any chunks, padding, forks, page size; and no page is lost."
    size = data.draw(st.integers(1, 5), 'page size')
    cache = check_cache(lambda: PagedCache(60, size), known(name), data, V)
    for table in cache.tables: cache.release(table)
    assert cache.pool.available == 60 and not any(cache.pool.users)


def test_shapes_are_checked():
    cache, ids = PagedCache(4, 2), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad(): torch.testing.assert_close(known('grouped')(ids, positions=torch.arange(3), cache=cache), known('grouped')(ids))
    assert [table.pages for table in cache.tables] == [[0, 1], [2, 3]]
    with pytest.raises(MemoryError, match='all 4 pages'), torch.no_grad(): known('grouped')(ids[:, :2], positions=torch.tensor([3, 4]), cache=cache)
    engine = Engine(known('rope'), LETTERS, n_pages=8, page_size=2, chunk=2)
    asked = [engine.submit([1, 2, 3], 3, Sampler(temperature=0), stop=['x'], logprobs=1) for _ in range(2)]
    assert len([*engine.stream(asked[1])]) == 3
    engine.run()
    assert all_free(engine)


def test_a_reservation_is_made_once():
    cache, table = PagedCache(4, 2), BlockTable()
    for n, pages in ((1, [0]), (3, [0, 1]), (2, [0, 1]), (5, [0, 1, 2])):
        cache.reserve(table, n)
        assert table.pages == pages and table.length == 0
    with pytest.raises(MemoryError, match='all 4 pages'): cache.reserve(table, 9)
    cache.release(table)
    assert cache.pool.available == 4


def test_positions_follow_each_other_and_masks_are_refused():
    model, ids = known('rope'), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match='goes on at position 0, got \\[1, 2\\]'): model(ids, positions=torch.tensor([1, 2]), cache=PagedCache(4, 2))
    with pytest.raises(ValueError, match='takes no mask'): model(ids, positions=torch.arange(2), mask=torch.ones(2, 2, dtype=torch.bool), cache=PagedCache(4, 2))
    with pytest.raises(ValueError, match='padding'): model(ids, positions=torch.tensor([[-1, -1]]), cache=PagedCache(4, 2))


@settings(max_examples=12)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_forks_do_not_write_into_each_others_pages(size, n, keep, named):
    "Two rows from one, and a third from its first tokens; all go on, and each reads only what is its own."
    model, cache, ids = known('rope'), PagedCache(60, size), list(range(1, n + 1))
    texts = [ids + [7, 8], ids + [9, 10], ids[: min(keep, n)] + [11, 12]]
    with torch.no_grad():
        model(torch.tensor([ids]), positions=torch.arange(n), cache=cache)
        first = cache.tables[0]
        if named: cache.remember(first, ids)
        tables = [first, cache.fork(first), cache.fork(first, min(keep, n))]
        for t in range(2):
            for table, text in zip(tables, texts):
                cache.use([table])
                at = table.length
                logits = model(torch.tensor([[text[at]]]), positions=torch.tensor([at]), cache=cache)
                torch.testing.assert_close(logits[0, -1], model(torch.tensor([text[: at + 1]]))[0, -1])
        if named:
            found = cache.find(ids)
            assert found.length == n // size * size
            if found.length < n:
                cache.use([found])
                logits = model(torch.tensor([ids[found.length :]]), positions=torch.arange(found.length, n), cache=cache)
                torch.testing.assert_close(logits[0, -1], model(torch.tensor([ids]))[0, -1])
            tables.append(found)
    for table in tables: cache.release(table)
    assert cache.pool.available == 60


def test_a_page_with_a_name_is_never_written():
    "A fork that ends within it, and is its only user by now, writes into a copy: who finds the page finds what its name says."
    cache, model, ids = PagedCache(6, 4), known('rope'), [1, 2, 3, 4, 5, 6, 7, 8]
    with torch.no_grad():
        model(torch.tensor([ids]), positions=torch.arange(8), cache=cache)
        first = cache.tables[0]
        cache.remember(first, ids)
        part = cache.fork(first, 6)
        cache.release(first)
        cache.use([part])
        model(torch.tensor([[30]]), positions=torch.tensor([6]), cache=cache)
        cache.use([found := cache.find(ids)])
        logits = model(torch.tensor([[9]]), positions=torch.tensor([8]), cache=cache)
        torch.testing.assert_close(logits[0, -1], model(torch.tensor([[*ids, 9]]))[0, -1])
    assert found.pages[1] != part.pages[1]


@pytest.mark.parametrize('name', ['rope', 'window'])
@settings(max_examples=4)
@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_tokens_are_taken_back(name, size, n_junk, named):
    "As if they were never read; a page with a name stays as it is; what a window has left behind cannot come back."
    model, cache, ids = known(name), PagedCache(40, size), torch.arange(1, 21)[None]
    cache.spare = 5
    with torch.no_grad():
        expected = model(ids)
        for t in range(20):
            if t:
                model(torch.arange(30, 30 + n_junk)[None], positions=torch.arange(t, t + n_junk), cache=cache)
                if named: cache.remember(cache.tables[0], [*range(1, t + 1), *range(30, 30 + n_junk)])
                cache.truncate(n_junk)
            torch.testing.assert_close(model(ids[:, t : t + 1], positions=torch.tensor([t]), cache=cache), expected[:, t : t + 1])
    with pytest.raises(ValueError, match='21 of 20'): cache.truncate(21)
    if name == 'window':
        with pytest.raises(ValueError, match='15 of 20'): cache.truncate(15)
    assert cache.tables[0].length == 20
    cache.release(cache.tables[0])
    assert cache.pool.available == 40


def test_a_state_cannot_go_back():
    cache = PagedCache(8, 2)
    with torch.no_grad(): known('short_conv')(torch.tensor([[1, 2]]), positions=torch.arange(2), cache=cache)
    with pytest.raises(ValueError, match='recurrent'): cache.truncate(1)


def test_a_name_covers_all_that_came_before():
    "Equal pages after different beginnings are different pages."
    cache, model = PagedCache(8, 2), known('rope')
    with torch.no_grad(): model(torch.tensor([[1, 2, 3, 4]]), positions=torch.arange(4), cache=cache)
    cache.remember(cache.tables[0], [1, 2, 3, 4])
    assert [cache.find(ids).length for ids in ([1, 2, 3, 4, 5], [1, 2, 9, 9], [9, 9, 3, 4], [3, 4])] == [4, 2, 0, 0]


def test_pages_outside_of_every_window_are_given_back():
    model, cache, ids = known('window'), PagedCache(4, 2), torch.randint(V, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        for t in range(40):
            torch.testing.assert_close(model(ids[:, t : t + 1], positions=torch.tensor([t]), cache=cache), expected[:, t : t + 1])
            assert sum(cache.pool.users) <= 3
    cache.release(cache.tables[0])
    assert cache.pool.available == 4


@pytest.mark.parametrize('name', ['rope', 'learned', 'gated_delta'])
def test_generate_and_beam_search_take_it_as_it_is(name):
    model, prompts, made = known(name), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [4]], []
    def make(): made.append(PagedCache(200, 3)); return made[-1]
    assert generate(model, prompts, 9, seed=1, cache=make) == generate(model, prompts, 9, seed=1)
    for (ids, score), (expected, wanted) in zip(*(beam_search(model, [1, 2, 3, 4], 3, 6, cache=kind) for kind in (make, SimpleCache)), strict=True):
        assert ids == expected and score == pytest.approx(wanted)
    assert sum(len(t.pages) for t in made[-1].tables) > 200 - made[-1].pool.available          # beams share pages


# The law ----------------------------------------------------------------------------------------------------------

def alone(model, request, options):
    return generate(model, [request.prompt], request.max_new_tokens, **options)[0]


@pytest.mark.parametrize('name', ['rope', 'alibi', 'window', 'latent', 'gated_delta'])
@settings(max_examples=5)
@given(data=st.data())
def test_a_request_gets_what_it_would_get_alone(name, data):
    "Whatever arrives, is cancelled or preempted beside it, with any page size, memory, chunk."
    draw, model = data.draw, known(name)
    size = draw(st.integers(1, 5), 'page size')
    engine = Engine(model, n_pages=-(-26 // size) + draw(st.integers(0, 12), 'more pages'), page_size=size, chunk=draw(st.integers(1, 12), 'chunk'),
                    max_running=draw(st.integers(1, 5), 'running'), prefix_cache=draw(st.booleans(), 'prefix cache'))
    rng, beginning = random.Random(draw(st.integers(0, 99), 'seed')), [3, 1, 4, 1, 5, 9, 2, 6]
    coming, asked = rng.randint(1, 5), []
    while coming or engine.busy:
        if coming and rng.random() < 0.4:
            coming -= 1
            prompt = (beginning[: rng.randint(0, 8)] + [rng.randrange(V) for _ in range(rng.randint(0, 6))]) or [1]
            options = dict(sampler=Sampler(temperature=0) if rng.random() < 0.5 else Sampler(top_p=0.9, frequency_penalty=0.3), seed=rng.randint(0, 3),
                           end_tokens=[7, 8] if rng.random() < 0.5 else ())
            asked.append((engine.submit(prompt, rng.randint(0, 12), **options), options, rng.random() < 0.2))
        for request, _, impatient in asked:
            if impatient and len(request.tokens) == 2: request.cancel()
        engine.step()
        assert sum(u > 0 for u in engine.cache.pool.users) + engine.cache.pool.available == len(engine.cache.pool.users)
    for request, options, _ in asked:
        expected = alone(model, request, options)
        if request.finish_reason == 'cancelled': assert request.tokens == expected[: len(request.tokens)] and len(request.tokens) < request.max_new_tokens
        else: assert request.tokens == expected
        assert [e.token for e in request.events if e.token is not None] == request.tokens
    assert all_free(engine)


def test_requests_share_forward_passes():
    "16 requests of 10 tokens take 10 passes, not 160; a pass of those who write has one token for each."
    model = tiny()
    engine, (seen, handle) = Engine(model, n_pages=64, page_size=4, chunk=1000), passes_of(model)
    asked = [engine.submit([i + 1] * (1 + i % 4), 10, seed=i) for i in range(16)]
    engine.run()
    handle.remove()
    assert seen == [sum(len(r.prompt) for r in asked), *[16] * 9]
    assert all([r.tokens] == generate(model, [r.prompt], 10, seed=i) for i, r in enumerate(asked))


def test_a_long_prompt_is_read_in_pieces_beside_those_who_write():
    engine = Engine(known('rope'), n_pages=64, page_size=4, chunk=5)
    writing, reading = engine.submit([1], 30), None
    engine.step()
    reading = engine.submit(range(1, 24), 3)
    for _ in range(4):
        assert [event.request for event in engine.step()] == [writing]                          # 23 tokens, 5 at a time
    assert {event.request for event in engine.step()} == {writing, reading}


def test_the_youngest_gives_way_and_the_oldest_never():
    engine = Engine(known('rope'), n_pages=8, page_size=2, prefix_cache=False)
    asked = [engine.submit([i + 1, i + 2], 13, seed=i) for i in range(3)]                        # 14 tokens: 7 pages each
    ends, preempted = [], Counter()
    while engine.busy:
        before = [*engine.running]
        ends += [event.request for event in engine.step() if event.finish_reason]
        preempted.update(r for r in before if r in engine.waiting)
    assert ends == asked and preempted[asked[0]] == 0 and preempted[asked[2]] >= 1
    assert [r.tokens for r in asked] == [generate(known('rope'), [r.prompt], 13, seed=i)[0] for i, r in enumerate(asked)]


def test_first_come_first_served():
    "A large request is not overtaken for ever by small ones that would fit."
    engine = Engine(known('rope'), n_pages=10, page_size=2, max_running=4)
    small = [engine.submit([1, 2], 8, seed=i) for i in range(2)]
    engine.step()
    large = engine.submit(range(1, 19), 2)
    later = [engine.submit([5, 6], 8, seed=i) for i in range(4)]
    order = []
    while engine.busy: order += [event.request for event in engine.step() if len(event.request.tokens) == 1]
    assert order == [large, *later] and all(r.finish_reason == 'length' for r in (*small, large, *later))


# Shared beginnings ------------------------------------------------------------------------------------------------

def test_a_beginning_is_read_once():
    model = tiny()
    (counted, _), engine, prompt = passes_of(model), Engine(model, n_pages=40, page_size=4), list(range(1, 19))
    three = [engine.submit(prompt, 5, seed=[seed]) for seed in row_seeds(9, 3)]                   # n = 3 of an API
    engine.run()
    assert [r.cached_tokens for r in three] == [0, 17, 17] and sum(counted) == 18 + 2 + 3 * 4
    assert [r.tokens for r in three] == generate(tiny(), [prompt] * 3, 5, seed=9)
    counted.clear()
    later = engine.submit([*prompt[:14], 30, 31], 3)
    engine.run()
    assert later.cached_tokens == 12 and sum(counted) == 4 + 2
    assert [later.tokens] == generate(tiny(), [later.prompt], 3) and all_free(engine)


def test_the_least_recently_used_go_first():
    engine = Engine(known('rope'), n_pages=6, page_size=2)
    def ask(*prompt):
        request = engine.submit(prompt, 1)
        engine.run()
        return request.cached_tokens
    assert [ask(1, 2, 3, 4, 5), ask(6, 7, 8, 9, 10), ask(1, 2, 3, 4, 5), ask(11, 12, 13, 14, 15)] == [0, 0, 4, 0]
    assert ask(1, 2, 3, 4, 5) == 4 and ask(6, 7, 8, 9, 10) < 4


def test_without_a_prefix_cache_nothing_is_found():
    for model, options in ((known('rope'), {'prefix_cache': False}), (known('gated_delta'), {})):
        engine = Engine(model, n_pages=40, page_size=2, **options)
        asked = [engine.submit(range(1, 9), 4) for _ in range(2)]
        engine.run()
        assert [r.cached_tokens for r in asked] == [0, 0] and asked[0].tokens == asked[1].tokens


# What a server needs ----------------------------------------------------------------------------------------------

LETTERS = CharTokenizer.train(['abcdefghijklmnopqrstuvwxyz ,.!?0123456789'[:V]])


def test_the_text_comes_as_from_stream():
    model, prompt = known('rope'), 'once upon'
    for stop, ends in (((), ()), (('e',), ()), (('a', 'b', 'c'), (3, 4)), ((), range(20))):
        engine = Engine(model, LETTERS, n_pages=40)
        engine.submit([1, 2, 3], 20, seed=5)
        request = engine.submit(LETTERS.encode(prompt), 20, seed=3, stop=stop, end_tokens=ends)
        pieces = [event.text for event in engine.stream(request)]
        assert ''.join(pieces) == request.text == ''.join(stream(model, LETTERS, prompt, 20, seed=3, stop=stop, end_tokens=ends))
        assert request.events[-1].finish_reason == request.finish_reason and [e.finish_reason for e in request.events[:-1]] == [None] * (len(request.events) - 1)
        assert stop or ends or request.finish_reason == 'length'


def test_two_streams_at_a_time_lose_nothing():
    engine = Engine(known('rope'), n_pages=40)
    one, two = (engine.submit([i], 8, seed=i) for i in (1, 2))
    first, second, got = engine.stream(one), engine.stream(two), {one: [], two: []}
    got[one].append(next(first))
    got[two] += second
    got[one] += first
    assert all([e.token for e in got[r]] == r.tokens and len(r.tokens) == 8 for r in (one, two))


def test_log_probabilities_are_the_models_own():
    model = known('rope')
    engine = Engine(model, n_pages=40)
    request, plain = engine.submit([1, 2, 3], 6, Sampler(temperature=2.0, top_k=5), logprobs=3), engine.submit([1], 2)
    engine.run()
    with torch.no_grad(): log_p = model(torch.tensor([request.prompt + request.tokens]))[0, 2:-1].log_softmax(-1)
    for event, row in zip(request.events, log_p, strict=True):
        assert event.log_p == pytest.approx(float(row[event.token])) and [t for t, _ in event.top] == row.topk(3).indices.tolist()
    assert plain.events[0].log_p is None and plain.events[0].top == ()
    with pytest.raises(ValueError, match='logprobs must not be negative'): engine.submit([1], 2, logprobs=-1)


def test_constraints_and_their_ends():
    model, word = known('rope'), Constraint('(yes|no)+', LETTERS)
    for ends in ((), (39,)):
        engine = Engine(model, LETTERS, n_pages=40)
        asked = [engine.submit([i], 7, Sampler(temperature=3.0), seed=i, constraint=word, end_tokens=ends) for i in range(1, 6)]
        engine.run()
        for i, r in enumerate(asked, 1):
            assert [r.tokens] == generate(model, [[i]], 7, Sampler(temperature=3.0), seed=i, constraint=word, end_tokens=ends, tokenizer=LETTERS)
            assert r.finish_reason in ('stop', 'length') and all_free(engine)
    three = engine.submit([1], 9, constraint=Constraint('no', LETTERS))
    engine.run()
    assert (three.text, three.finish_reason) == ('no', 'stop')


def test_a_request_can_be_cancelled_at_any_time():
    engine = Engine(known('rope'), n_pages=20, page_size=2, max_running=1)
    runs, waits = engine.submit([1, 2, 3], 20), engine.submit([4], 20)
    assert engine.n_waiting == 2
    engine.step()
    assert engine.n_waiting == 1
    for request in (runs, waits): request.cancel()
    assert {(e.request, e.token, e.finish_reason) for e in engine.step()} == {(runs, None, 'cancelled'), (waits, None, 'cancelled')}
    assert all_free(engine) and not engine.busy and len(runs.tokens) == 1


def test_a_fault_of_one_request_is_not_that_of_others():
    model = known('rope')
    engine = Engine(model, n_pages=20)
    bad, good = engine.submit([1], 5, Sampler(banned=range(V))), engine.submit([1], 5)
    engine.run()
    assert bad.finish_reason == 'error' and 'no token is left' in str(bad.error) and [good.tokens] == generate(model, [[1]], 5) and all_free(engine)


def test_a_page_never_shows_what_another_left():
    "A nan that an earlier request left in a page would reach every later one, through weights of zero."
    model = tiny()
    engine = Engine(model, n_pages=3, page_size=4, prefix_cache=False)
    with torch.no_grad():
        row = model.token_embedding.weight[5].clone()
        model.token_embedding.weight[5] = float('nan')
    bad = engine.submit([5, 5, 5, 5, 5, 5, 5, 5, 5], 2)
    engine.run()
    with torch.no_grad(): model.token_embedding.weight[5] = row
    good = engine.submit([1, 2], 6)
    engine.run()
    assert bad.finish_reason == 'error' and good.finish_reason == 'length' and [good.tokens] == generate(model, [[1, 2]], 6)


def test_a_pass_that_fails_is_done_again():
    "An exception in the model (here: out of memory) loses nobody and nothing."
    model = tiny()
    engine = Engine(model, n_pages=20, page_size=2)
    asked = [engine.submit([i + 1, 2, 3], 8, seed=i) for i in range(3)]
    for _ in range(3): engine.step()
    hidden = model.blocks[1].forward
    model.blocks[1].forward = lambda *_, **__: (_ for _ in ()).throw(RuntimeError('out of memory'))
    with pytest.raises(RuntimeError, match='out of memory'): engine.step()
    model.blocks[1].forward = hidden
    engine.step()
    model.logits, logits = lambda _: (_ for _ in ()).throw(RuntimeError('out of memory')), model.logits
    with pytest.raises(RuntimeError, match='out of memory'): engine.step()
    model.logits = logits
    engine.run()
    assert [r.tokens for r in asked] == [generate(model, [r.prompt], 8, seed=i)[0] for i, r in enumerate(asked)] and all_free(engine)


def test_the_request_that_makes_passes_fail_is_found():
    "A pass with token 7 fails: its suspects are read alone, the guilty one is failed, the others get what they would get alone, and no page is lost."
    model = tiny()
    engine, hidden = Engine(model, n_pages=40, page_size=2), model.hidden
    def failing(ids, **options):
        if (ids == 7).any(): raise RuntimeError('seven')
        return hidden(ids, **options)
    model.hidden, failed = failing, []
    asked = [engine.submit([i + 5, 2, 3], 6, Sampler(banned=[7]), seed=i) for i in range(4)]
    while engine.busy:
        try: engine.step()
        except RuntimeError as error:
            failed.append(len(engine.suspects))
            if failed[-1] == 1: assert engine.fail(engine.suspects[0], error).request is asked[2]
    assert failed == [4, 1] and asked[2].finish_reason == 'error' and str(asked[2].error) == 'seven' and not engine.suspects and all_free(engine)
    model.hidden = hidden
    for i in (0, 1, 3): assert [asked[i].tokens] == generate(model, [asked[i].prompt], 6, Sampler(banned=[7]), seed=i)


def test_what_cannot_work_is_refused_at_once():
    engine = Engine(known('rope'), LETTERS, n_pages=4, page_size=4)
    for mistake, said in ((lambda: engine.submit([], 3), 'empty'), (lambda: engine.submit([1], -1), 'negative'), (lambda: engine.submit([1] * 10, 8), 'needs 5 pages, the engine has 4'),
                          (lambda: engine.submit([1] * 60, 9), 'context'), (lambda: engine.submit([1], 3, stop=['']), 'empty'),
                          (lambda: Engine(known('rope'), n_pages=4).submit([1], 3, stop=['a']), 'tokenizer')):
        with pytest.raises(ValueError, match=said): mistake()
    nothing = engine.submit([1], 0)
    assert nothing.finish_reason == 'length' and nothing.tokens == [] and not engine.busy
    assert len(engine.submit([1] * 10, 7).prompt) == 10                                          # 16 tokens are read: 4 pages
    engine.run()


def test_requests_may_come_from_other_threads():
    engine, asked = Engine(known('rope'), n_pages=60, page_size=2, max_running=8), []
    def user(i):
        for j in range(4): asked.append((i, engine.submit([i + 1, j + 1], 6, seed=i)))
    users = [threading.Thread(target=user, args=(i,)) for i in range(4)]
    for thread in users: thread.start()
    while any(thread.is_alive() for thread in users) or engine.busy: engine.step()
    assert len(asked) == 16 and all([r.tokens] == generate(known('rope'), [r.prompt], 6, seed=i) for i, r in asked)
    assert all_free(engine)


# Against another engine -------------------------------------------------------------------------------------------

def test_against_hf_generate_batch(hf):
    "transformers has continuous batching over a paged cache, too: equal greedy tokens, of ragged prompts."
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    peer = hf.LlamaForCausalLM(config).eval()
    for p in peer.parameters(): p.data = torch.randn_like(p) * 0.3
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours = GPT.from_hf(folder)
    prompts = [[1 + i] * (1 + i) + list(range(2, 2 + i)) for i in range(6)]
    config = hf.GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    limits = hf.ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)                  # or it takes most of the memory
    told = peer.generate_batch(prompts, generation_config=config, continuous_batching_config=limits, warmup=False, progress_bar=False)
    engine = Engine(ours, n_pages=20, page_size=4, chunk=5)
    asked = [engine.submit(prompt, 9, Sampler(temperature=0)) for prompt in prompts]
    engine.run()
    by_prompt = {tuple(out.prompt_ids): list(out.generated_tokens) for out in told.values()}
    assert [by_prompt[tuple(r.prompt)] for r in asked] == [r.tokens for r in asked]
