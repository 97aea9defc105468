"""Chapter 12 beyond its own cells: each token scored once however a text is cut, bytes of any text, modes, truth against enumeration, answers as `lm_eval` asks for them."""
import itertools, json, math, sys, types
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from torch import nn

from llm_from_scratch.bpe import BPETokenizer
from llm_from_scratch.evaluation import (KINDS_OF_WORDS, Cloze, Evaluation, LMEvalAdapter, bits_per_byte, bootstrap_interval, calibration, cloze, continue_greedily,
                                         document_losses, encode_pair, evaluate_text, evaluating, kind_of, kl_terms, kl_to_world, leak_bound, log_likelihoods,
                                         longest_copy, next_words, ngram_overlap, perplexity, rank_answers, read_rows, token_bytes, token_losses, window_plan)
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.storyland import SIZES, stories
from llm_from_scratch.text import SPACED_PATTERN, CharTokenizer, SpacedWordTokenizer, WordTokenizer

INPUTS = []
END = '<|endoftext|>'
promised = cache(next_words)                                     # two tests ask about the same stories
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]


def opinionated(vocab_size=40, context_length=32, dropout=0.0):
    "A small GPT whose losses depend on everything it reads."
    model = GPT(GPTConfig(vocab_size, context_length, 16, 2, 4, positions='rope', dropout=dropout), generator=torch.Generator().manual_seed(2)).double()
    for p in model.parameters(): p.data *= 5
    return model.eval()


@pytest.fixture(scope='module')
def model(): return opinionated()


@pytest.fixture(scope='module')
def micro():
    "A world, a tokenizer that knows its words, and a model that knows nothing."
    told = list(stories(300, size='micro', split=None))
    words = SpacedWordTokenizer.train([story.text for story in told], special_tokens=(END,))
    return told, words, opinionated(words.vocab_size, 256)


IDS = np.random.default_rng(0).integers(40, size=120).tolist()


def by_hand(model, ids, context):
    "The loss of each target from `context(i)` tokens before it, one forward pass each."
    with torch.no_grad():
        return np.array([-float(model(torch.tensor([ids[i - context(i):i]]))[0, -1].log_softmax(-1)[ids[i]]) for i in range(1, len(ids))])


# Units ------------------------------------------------------------------------------------------------------------

def test_units():
    assert perplexity(0) == 1 and perplexity(math.log(40)) == pytest.approx(40)
    assert bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3)
    with pytest.raises(ValueError, match='0 bytes'): bits_per_byte(1.0, 0)


@settings(max_examples=40)
@given(st.text(alphabet=st.characters(blacklist_categories=('Cs',)), max_size=60))
def test_bytes_of_any_text(text):
    bpe = BPETokenizer.train(['the cat sat on the mat, naïve café — 数学'], vocab_size=280, special_tokens=(END,))
    assert token_bytes(bpe)[bpe.encode(text)].sum() == len(text.encode())
    if text:
        chars = CharTokenizer.train([text], special_tokens=(END,))
        ids = [*chars.encode(text), chars.special_tokens[END]]
        assert token_bytes(chars)[ids].sum() == len(text.encode())
        assert token_bytes(chars)[-1] == 0                       # the end is no text


def test_bytes_of_words_with_their_space(micro):
    told, words, _ = micro
    for story in told[:50]: assert token_bytes(words)[words.encode(story.text)].sum() == len(story.text.encode())
    with pytest.raises(ValueError, match='loses the text between'): token_bytes(WordTokenizer.train(['a b']))


# Windows ----------------------------------------------------------------------------------------------------------

@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_each_target_once_with_enough_context(n, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for i, (start, known) in enumerate(window_plan(n, window, stride)):
        end = min(start + window, n)
        scored += range(start + known, end)
        assert end <= n and (i == 0 or known >= window - stride)
    assert scored == [*range(n)]


@pytest.mark.parametrize('n, window, stride', [(50, 8, 1), (50, 8, 3), (50, 8, 8), (9, 8, 8), (5, 8, 4), (2, 8, 8), (120, 32, 16)])
def test_windows_against_one_pass_per_target(model, n, window, stride):
    plan, context = window_plan(n - 1, window, stride), {}
    for start, known in plan:
        for i in range(start + known, min(start + window, n - 1)): context[i + 1] = i + 1 - start
    assert np.allclose(token_losses(model, IDS[:n], window, stride), by_hand(model, IDS[:n], lambda i: context[i]))
    if stride == 1: assert all(context[i] == min(i, window) for i in context)


def test_windows_refuse(model):
    for wrong in ({'window': 33}, {'window': 0}, {'stride': 0}, {'stride': 33}):
        with pytest.raises(ValueError, match='must lie between 1 and'): token_losses(model, IDS, **wrong)
    with pytest.raises(ValueError, match='at least 2 tokens, got 1'): token_losses(model, [3])
    with pytest.raises(ValueError, match='no context_length'): token_losses(lambda ids: ids, [1, 2])


def test_documents_do_not_see_each_other(model):
    documents = [IDS[:5], IDS[5:40], IDS[40:42], IDS[50:], [7], IDS[3:30]]
    losses = document_losses(model, documents, stride=8)
    for ids, found in zip(documents, losses, strict=True):
        assert len(found) == len(ids) - 1
        if len(ids) > 1: assert np.allclose(found, token_losses(model, ids, stride=8))


@pytest.mark.parametrize('tokens_at_once', [1, 40, 10_000])
def test_padding_changes_nothing(model, tokens_at_once):
    rows = [IDS[:3], IDS[:20], IDS[30:31], IDS[5:25]]
    found = dict(read_rows(model, rows, tokens_at_once))
    assert sorted(found) == [0, 1, 2, 3]
    for i, row in enumerate(rows):
        with torch.no_grad(): assert torch.allclose(found[i].double(), model(torch.tensor([row]))[0], atol=1e-4)


# Modes ------------------------------------------------------------------------------------------------------------

def test_dropout_is_off_and_comes_back():
    model = opinionated(dropout=0.5)
    quiet = token_losses(model, IDS, stride=8)
    model.train(); model.blocks[0].eval()                        # a mixture of modes
    modes = [m.training for m in model.modules()]
    tokens = {'letters': CharTokenizer.train(['abc'], special_tokens=(END,))}['letters']
    assert np.array_equal(token_losses(model, IDS, stride=8), quiet)
    assert np.array_equal(document_losses(model, [IDS[:20]])[0], document_losses(model, [IDS[:20]])[0])
    a, b = (evaluate_text(model, tokens, ['abcabc', 'cab']).nats for _ in range(2))
    assert np.array_equal(a, b)
    assert continue_greedily(model, [1, 2], 5) == continue_greedily(model, [1, 2], 5)
    assert len({x.log_p for _ in range(3) for x in log_likelihoods(model, [([1, 2], [3])])}) == 1
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


def test_modes_come_back_after_an_error():
    model = nn.Dropout(0.5)
    with pytest.raises(KeyError), evaluating(model): raise KeyError
    assert model.training and torch.is_grad_enabled()
    with evaluating(lambda ids: ids): assert not torch.is_grad_enabled()


# Whole evaluations ------------------------------------------------------------------------------------------------

def test_evaluate_text(model):
    letters = CharTokenizer.train(['abcdefghijklmnopqrstuvwxyz äé.,!?'], special_tokens=(END,))
    texts = ['a café, naïve!'.replace('ï', 'i'), 'words and more words and even more than the context holds.', 'x']
    found, end = evaluate_text(model, letters, texts), letters.special_tokens[END]
    assert isinstance(found, Evaluation)
    assert found.tokens.tolist() == [len(text) + 1 for text in texts]          # the end is predicted, too
    assert found.n_bytes.tolist() == [len(text.encode()) for text in texts]
    for text, nats in zip(texts, found.nats, strict=True): assert nats == pytest.approx(token_losses(model, [end, *letters.encode(text), end]).sum())
    assert found.nats_per_token == pytest.approx(found.nats.sum() / found.tokens.sum())
    assert found.bits_per_byte == pytest.approx(found.nats.sum() / math.log(2) / sum(len(t.encode()) for t in texts))
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_token))
    for unit in ('nats_per_token', 'perplexity', 'bits_per_byte'):
        low, high = found.interval(unit)
        assert low <= getattr(found, unit) <= high
    with pytest.raises(ValueError, match="unknown unit 'bits'"): found.interval('bits')
    with unchecked(): read_once = evaluate_text(model, letters, (text for text in texts))
    assert read_once.n_bytes.tolist() == found.n_bytes.tolist() and read_once.nats.tolist() == found.nats.tolist()
    for call in (lambda: evaluate_text(model, letters, 'abc'), lambda: rank_answers(model, letters, 'a', 'bc', end=END), lambda: cloze(next(stories(1)), letters, 'names')):
        with unchecked(), pytest.raises(TypeError, match='got one string'): call()
    with pytest.raises(ValueError, match='no text'): evaluate_text(model, letters, [])
    with pytest.raises(ValueError, match="no special token '<eos>'; it has"): evaluate_text(model, letters, ['a'], end='<eos>')


def test_bootstrap_against_theory():
    "For many independent documents of one token, the interval is that of the normal distribution."
    x = np.random.default_rng(1).normal(3, 2, 1000)
    low, high = bootstrap_interval(x, n=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / math.sqrt(len(x)), rel=0.06)
    assert (low + high) / 2 == pytest.approx(x.mean(), abs=0.01)
    wide = bootstrap_interval(x, level=0.99)
    assert wide[0] < low and wide[1] > high


def test_bootstrap_draws_documents():
    "Tokens that agree within a document make the interval wider than tokens alone would."
    g = np.random.default_rng(2)
    means = g.normal(0, 1, 60).repeat(50).reshape(60, 50)
    low, high = bootstrap_interval(means.sum(1), np.full(60, 50))
    assert high - low > 5 * 2 * 1.96 * means.std() / math.sqrt(means.size)
    assert bootstrap_interval([1, 2, 3], [2, 4, 6]) == (0.5, 0.5)
    for wrong in (([1.0],), ([1.0, 2.0], [1.0]), ([[1.0, 2.0]],)):
        with pytest.raises(ValueError, match='at least 2 documents'): bootstrap_interval(*wrong)
    with pytest.raises(ValueError, match='between 0 and 1'): bootstrap_interval([1, 2], level=95)


def test_calibration_by_hand():
    found = calibration([0.1, 0.15, 0.95, 1.0, 0.55], [0, 1, 1, 1, 0])
    assert found.count.tolist() == [2, 1, 2]
    assert np.allclose(found.confidence, [0.125, 0.55, 0.975]) and np.allclose(found.accuracy, [0.5, 0, 1])
    assert found.error == pytest.approx((2 * 0.375 + 0.55 + 2 * 0.025) / 5)
    assert calibration([0.85, 0.95, 1.0], [1, 1, 1]).count.tolist() == [1, 2]      # the last bin is its own, and closed
    with pytest.raises(ValueError, match='between 0 and 1'): calibration([1.2], [1])
    with pytest.raises(ValueError, match='as many outcomes'): calibration([0.2, 0.3], [1])


# The world --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', SIZES)
def test_truth_word_by_word_against_choices(size):
    for story in stories(15, seed=3, size=size, split=None):
        words = next_words(story.text, SPACED_PATTERN, size)
        assert ''.join(word for word, _ in words) == story.text and words[-1] == ('', {'': 1.0})
        assert all(sum(p.values()) == pytest.approx(1, abs=1e-9) and word in p for word, p in words)
        assert math.fsum(math.log(p[word]) for word, p in words) == pytest.approx(story.log_probability, abs=1e-8)


def test_truth_against_counts(micro):
    "What 300 stories say after the same beginning comes as often as the world promises."
    told, _, _ = micro
    after = {}
    for story in told:
        seen = ''
        for word, p in promised(story.text, SPACED_PATTERN, 'micro'):
            after.setdefault(seen, (p, []))[1].append(word)
            seen += word
    checked = 0
    for p, words in after.values():
        assert set(words) <= set(p)
        if len(words) < 60 or len(p) < 2: continue
        expected = {w: len(words) * x for w, x in p.items()}
        chi = sum((words.count(w) - e) ** 2 / e for w, e in expected.items())
        assert chi < len(p) - 1 + 5 * math.sqrt(2 * len(p))
        checked += 1
    assert checked >= 4


def test_no_word_is_mistaken_for_its_beginning():
    "After `The`, options that begin with `Then` are out."
    story = next(s for s in stories(500, split=None) if ' The sky changed' in s.text)
    words = next_words(story.text, SPACED_PATTERN)
    at = next(i for i, (w, _) in enumerate(words) if w == ' sky' and words[i - 1][0] == ' The')
    assert words[at][1] == {' sky': 1.0} and ' Then' in words[at - 1][1]


def test_other_worlds_are_refused():
    with pytest.raises(ValueError, match='no story of this world'): next_words('Once upon a time there was a dragon.', SPACED_PATTERN)


def test_kinds():
    assert [*map(kind_of, ['Mia', ' she', '\nHis', ' mill', ' kite', ' nuts', ' six', ' red', ' noon', '.', '', ' went'])] == [
        'names', 'pronouns', 'pronouns', 'places', 'things', 'goods', 'counts', 'colors', 'times', 'marks', 'the end', 'other words']


@given(st.integers(0, 10_000))
def test_terms_sum_to_the_divergence(seed):
    g = torch.Generator().manual_seed(seed)
    log_q, p = torch.randn(5, 7, generator=g).log_softmax(-1), torch.rand(5, 7, generator=g).double()
    p[torch.rand(5, 7, generator=g) < 0.5] = 0
    p[:, 0] += 0.1
    p /= p.sum(-1, keepdim=True)
    truth = [{i: float(x) for i, x in enumerate(row) if x > 0} for row in p]
    terms = kl_terms(log_q, truth, torch.tensor([0, 0, 1, 1, 1, 2, 3]), 4)
    kl = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q.double()), 0.0).sum(-1)
    assert np.allclose(terms.sum(1), kl.numpy(), atol=1e-6) and terms.min() > -1e-6


def test_gap_of_a_stranger(micro):
    told, words, model = micro
    some = told[:12]
    gap = kl_to_world(model, words, some, END)
    losses = document_losses(model, [[words.vocab_size - 1, *words.encode(s.text), words.vocab_size - 1] for s in some])
    assert np.allclose(gap.loss, np.concatenate(losses), atol=1e-4)
    assert -gap.surprise.sum() == pytest.approx(sum(s.log_probability for s in some))
    assert gap.kl.mean() > 0.5 and gap.terms.shape == (len(gap.ids), len(KINDS_OF_WORDS))
    sums, tokens = gap.by_story(gap.kl)
    assert sums.sum() == pytest.approx(gap.kl.sum()) and tokens.tolist() == [len(x) for x in losses]


class Oracle:
    "Says exactly what the world would say; for texts of one world, from their beginning."
    def __init__(self, told, words):
        self.words, self.known = words, {}
        ids = {words.decode([i]): i for i in range(words.vocab_size)} | {'': words.vocab_size - 1}
        for story in told:
            seen = (words.vocab_size - 1,)
            for word, p in promised(story.text, words.pattern, story.size):
                self.known[seen] = {ids[w]: x for w, x in p.items()}
                seen += (ids[word],)

    def __call__(self, ids):
        logits = torch.full((*ids.shape, self.words.vocab_size), -1e4)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                for w, x in self.known.get(tuple(row[:t + 1]), {}).items(): logits[b, t, w] = math.log(x)
        return logits


def test_a_model_that_is_the_world(micro):
    "No divergence, calibrated one by one, every question right, nothing leaked."
    told, words, _ = micro
    some = told[:15]
    oracle = Oracle(some, words)
    gap = kl_to_world(oracle, words, some, END)
    assert np.abs(gap.kl).max() < 1e-5 and np.allclose(gap.loss, gap.surprise, atol=1e-5)
    assert np.allclose(gap.confidence, gap.truth, atol=1e-5)
    asked = [q for story in some for q in cloze(story, words, kinds=('names', 'places', 'things', 'counts'))]
    assert len(asked) > 30
    for q in asked:
        scores = rank_answers(oracle, words, q.prompt, q.choices)
        assert q.choices[int(np.argmax(scores))] == q.answer and max(scores) == pytest.approx(0, abs=1e-4)
        assert words.decode(continue_greedily(oracle, [words.vocab_size - 1, *words.encode(q.prompt)], 1)) == q.answer
    assert all(leak_bound(*pair) > 0.99 for pair in zip(*(gap.by_story(x)[0] for x in (gap.loss, gap.surprise))))


def test_cloze_asks_what_is_certain(micro):
    told, words, _ = micro
    asked = cloze(told[0], words)
    assert {q.kind for q in asked} >= {'names', 'places'}
    for q in asked:
        assert isinstance(q, Cloze) and q.answer in q.choices and told[0].text.startswith(q.prompt + q.answer)
        assert all(kind_of(c) == q.kind for c in q.choices)


# Likelihoods ------------------------------------------------------------------------------------------------------

def test_likelihoods_against_token_losses(model):
    pairs = [(IDS[:4], IDS[4:9]), (IDS[:4], [7]), (IDS[:4], [8]), (IDS[:60], IDS[60:63]), (IDS[:1], IDS[1:30])]
    for (context, after), found in zip(pairs, log_likelihoods(model, pairs), strict=True):
        row = [*context, *after][-33:]
        assert found.log_p == pytest.approx(-token_losses(model, row)[-len(after):].sum(), rel=1e-5) and found.tokens == len(after)
    best = continue_greedily(model, IDS[:4], 3)
    assert [x.is_greedy for x in log_likelihoods(model, [(IDS[:4], best), (IDS[:4], [*best[:2], (best[2] + 1) % 40])])] == [True, False]
    for wrong in (([], [1]), ([1], []), ([1], [1] * 33)):
        with pytest.raises(ValueError, match='cannot score'): log_likelihoods(model, [wrong])


def test_probabilities_of_all_continuations_sum_to_one(model):
    pairs = [([3, 1], list(pair)) for pair in itertools.product(range(40), repeat=2)]
    assert math.fsum(math.exp(x.log_p) for x in log_likelihoods(model, pairs)) == pytest.approx(1, abs=1e-4)


def test_pairs_are_cut_where_the_context_ends():
    bpe = BPETokenizer.train(['the cat sat on the mat'] * 9, vocab_size=280, special_tokens=(END,))
    context, after = encode_pair(bpe, 'the cat ', 'sat', END)
    assert bpe.decode(context[1:]) == 'the cat' and bpe.decode(after) == ' sat' and context[0] == bpe.special_tokens[END]
    assert encode_pair(bpe, '', 'the', END) == ([bpe.special_tokens[END]], bpe.encode('the'))
    with pytest.raises(ValueError, match='empty continuation'): encode_pair(bpe, 'the', '', END)


def test_ranking_units(model):
    letters = CharTokenizer.train(['abcdé'], special_tokens=(END,))
    whole, token, byte = (rank_answers(model, letters, 'ab', ['cd', 'é'], per) for per in ('answer', 'token', 'byte'))
    assert np.allclose(token, [whole[0] / 2, whole[1]]) and np.allclose(byte, [whole[0] / 2, whole[1] / 2])
    with pytest.raises(ValueError, match="unknown unit 'word'"): rank_answers(model, letters, 'a', ['b'], 'word')


def test_greedy_stops_and_slides(model):
    free = continue_greedily(model, IDS[:30], 10)
    assert len(free) == 10                                       # beyond the context of 32
    assert continue_greedily(model, IDS[:30], 10, stop=lambda ids: len(ids) == 4) == free[:4]
    assert continue_greedily(model, IDS[:30], 0) == []


# Memory -----------------------------------------------------------------------------------------------------------

rows = st.lists(st.integers(0, 3), min_size=0, max_size=12)

@given(rows, st.lists(rows, max_size=4), st.integers(1, 5))
def test_overlap_by_hand(document, corpus, n):
    def runs(ids): return [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    known = {run for row in corpus for run in runs(row)}
    share = np.mean([run in known for run in runs(document)]) if runs(document) else 0
    assert ngram_overlap([document], corpus, n)[0] == pytest.approx(share)
    longest = max((m for m in range(1, len(document) + 1) for i in range(len(document) - m + 1)
                   if any(document[i:i + m] == row[j:j + m] for row in corpus for j in range(len(row)))), default=0)
    assert longest_copy(document, corpus) == longest


def test_overlap_does_not_cross_documents():
    assert longest_copy([1, 2, 3, 4], [[1, 2], [3, 4]]) == 2 and ngram_overlap([[2, 3]], [[1, 2], [3, 4]], 2)[0] == 0
    with pytest.raises(ValueError, match='n=0'): ngram_overlap([[1]], [[1]], 0)


def test_leak_bound():
    assert leak_bound(9, 9) == 1 and leak_bound(12, 9) == 1 and leak_bound(9, 12) == pytest.approx(math.exp(-3))


# The harness ------------------------------------------------------------------------------------------------------

class LM:
    "What the adapter needs of `lm_eval.api.model.LM`."
    def __init__(self): self.cache_hook = None


@pytest.fixture
def harness(monkeypatch):
    "The package is large; where it is missing, a stand-in for its base class."
    for name in ('lm_eval', 'lm_eval.api', 'lm_eval.api.model'): monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules['lm_eval.api.model'].LM = LM
    return LM


def request(*args): return SimpleNamespace(args=args)


def test_adapter_answers_as_the_chapter_does(harness, micro):
    told, words, model = micro
    lm, end = LMEvalAdapter(model, words), words.special_tokens[END]
    assert isinstance(lm, harness)
    q = cloze(told[0], words)[0]
    for choice in q.choices[:3]:
        (log_p, greedy), = lm.loglikelihood([request(q.prompt, choice)])
        ids = [end, *words.encode(q.prompt + choice)]
        assert log_p == pytest.approx(-token_losses(model, ids)[-1], rel=1e-5)
        assert greedy == (continue_greedily(model, ids[:-1], 1) == ids[-1:])
    texts = [told[0].text, '', told[0].text + ''.join(story.text.removeprefix('Once') for story in told[1:7])]
    assert len(words.encode(texts[2])) > 256                                  # longer than the context
    whole = lm.loglikelihood_rolling([request(text) for text in texts])
    for text, log_p in zip(texts, whole, strict=True): assert log_p == pytest.approx(-sum(token_losses(model, [end, *words.encode(text)])) if text else 0, rel=1e-5)


def test_adapter_stops_at_strings(harness, micro):
    told, words, _ = micro
    oracle = Oracle(told, words)
    lm, text = LMEvalAdapter(oracle, words), told[0].text
    prompt = text[:text.index('.') + 1]
    free = lm.generate_until([request(prompt, {'until': [], 'max_gen_toks': 12})])[0]
    assert len(words.encode(prompt + free)) == len(words.encode(prompt)) + 12
    stop = words.decode(words.encode(prompt + free)[-5:-3])                 # a string over two tokens
    assert lm.generate_until([request(prompt, {'until': [stop], 'max_gen_toks': 12})])[0] == free[:free.index(stop)]
    assert lm.generate_until([request(prompt, {'until': stop})])[0] == free[:free.index(stop)]
    with pytest.raises(ValueError, match='sampling'): lm.generate_until([request(prompt, {'do_sample': True})])


def test_adapter_names_the_extra(monkeypatch, micro):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(ImportError, match=r'llm-from-scratch\[eval\]'): LMEvalAdapter(micro[2], micro[1])


def test_against_lm_eval(tmp_path, micro, monkeypatch):
    "A task from a local file in the real harness: its accuracy and log-likelihoods are ours."
    for name, value in (('HF_HOME', str(tmp_path)), ('HF_HUB_OFFLINE', '1'), ('HF_DATASETS_OFFLINE', '1')): monkeypatch.setenv(name, value)
    lm_eval = pytest.importorskip('lm_eval', reason='lm_eval is an extra of 700 MB: pip install -e .[eval]')
    from lm_eval.tasks import TaskManager
    told, words, model = micro
    asked = [q for story in told[:6] for q in cloze(story, words)][:25]
    lines = [{'prompt': q.prompt, 'choices': q.choices, 'answer': q.choices.index(q.answer)} for q in asked]
    (tmp_path/'questions.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
    (tmp_path/'storyland.yaml').write_text(f'''
task: storyland_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(tmp_path/'questions.jsonl'))}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
''', encoding='utf-8')
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    report = lm_eval.simple_evaluate(LMEvalAdapter(model, words), tasks=['storyland_cloze'], task_manager=tasks, bootstrap_iters=0, log_samples=True)
    scores = [rank_answers(model, words, q.prompt, q.choices) for q in asked]
    right = np.mean([q.choices[int(np.argmax(s))] == q.answer for q, s in zip(asked, scores)])
    assert report['results']['storyland_cloze']['acc,none'] == pytest.approx(right)
    for sample in report['samples']['storyland_cloze']:
        theirs = [float(answer[0][0]) for answer in sample['resps']]
        assert theirs == pytest.approx(scores[sample['doc_id']], rel=1e-5)
