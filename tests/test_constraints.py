"""The appendix on constraints: automata against Python's `re`, distances against trying all texts, and texts that always match."""
import itertools, re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from shapes import unchecked

from llm_from_scratch.bpe import BPETokenizer
from llm_from_scratch.constraints import Constraint, token_texts
from llm_from_scratch.generation import Sampler, generate, generate_steps
from llm_from_scratch.text import CharTokenizer, WordTokenizer

INPUTS = []
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]

atoms = st.sampled_from(['a', 'b', 'c', '[ab]', '.', '[^a]', r'\w', r'\.', '[a-c]'])
patterns = st.recursive(atoms, lambda inner: st.one_of(
    st.tuples(inner, inner).map(''.join), st.tuples(inner, inner).map(lambda ab: f'({ab[0]}|{ab[1]})'), inner.map(lambda a: f'(?:{a}|)'),
    st.tuples(inner, st.sampled_from(['*', '+', '?', '{2}', '{1,2}', '{,2}', '{2,}', '{0,0}', '*?'])).map(lambda aq: f'({aq[0]}){aq[1]}')), max_leaves=6)
PAIRS = CharTokenizer.train(['abc.\n'])
MANY = BPETokenizer.train('abc abc cab bca ab . aab', 262)


def accepts(constraint, ids):
    state = 0
    for i in ids:
        state = constraint.advance(state, i)
        if state < 0: return False
    return constraint.is_complete(state)


@given(patterns, st.lists(st.text('abc.\n', max_size=6), min_size=8, max_size=8))
@settings(max_examples=150)
def test_automaton_against_re(pattern, texts):
    try: constraint = Constraint(pattern, PAIRS)
    except ValueError as e:
        assert 'can be spelled' in str(e) and not any(re.fullmatch(pattern, text) for text in texts)
        return
    for text in texts: assert accepts(constraint, PAIRS.encode(text)) == bool(re.fullmatch(pattern, text)), (pattern, text)


@given(patterns)
@settings(max_examples=25)
def test_distance_is_the_least_number_of_tokens(pattern):
    "Against trying all texts of up to three tokens."
    try: constraint = Constraint(pattern, PAIRS)
    except ValueError: return
    shortest = min((n for n in range(4) for ids in itertools.product(range(PAIRS.vocab_size), repeat=n) if accepts(constraint, ids)), default=None)
    assert shortest == constraint.distance[0] if shortest is not None else constraint.distance[0] > 3


@given(patterns, st.integers(0, 3), st.integers(0, 100), st.booleans())
@settings(max_examples=30)
def test_constrained_text_always_matches(pattern, extra, seed, ends):
    for tokenizer in (PAIRS, MANY):
        end = tokenizer.vocab_size if ends else None
        def model(ids, **_): return torch.zeros(*ids.shape, tokenizer.vocab_size + 1)
        try: constraint = Constraint(pattern, tokenizer)
        except ValueError: continue
        room = int(constraint.distance[0]) + extra
        row, = generate(model, [[0]], room, constraint=constraint, end_tokens=() if end is None else end, seed=seed)
        if row and row[-1] == end: row = row[:-1]
        if room: assert re.fullmatch(pattern, tokenizer.decode(row)), (pattern, tokenizer.decode(row))
        if constraint.distance[0]:
            with pytest.raises(ValueError, match='takes at least'): generate_steps(model, [[0]], int(constraint.distance[0]) - 1, constraint=constraint)


def test_choices_are_exactly_the_choices():
    options = ['a', 'ab', 'c.b', 'ba*']
    tokenizer = CharTokenizer.train(['abc.*'])
    constraint = Constraint.choices(options, tokenizer)
    for n in range(4):
        for text in map(''.join, itertools.product('abc.*', repeat=n)): assert accepts(constraint, tokenizer.encode(text)) == (text in options)
    first, = tokenizer.encode('c')
    assert constraint.can_continue(constraint.advance(0, first), 2) and not constraint.can_continue(constraint.advance(0, first), 1)     # "c" needs ".b"
    prepared = constraint.prepare(Sampler(banned=tokenizer.encode('a')), 3)
    assert prepared.distance[0] == 3 and constraint.distance[0] == 1
    with pytest.raises(ValueError, match='can be spelled'): constraint.prepare(Sampler(banned=tokenizer.encode('ac')), 3)
    with pytest.raises(ValueError, match='required tokens and a constraint'): constraint.prepare(Sampler(required=[0]), 3)
    with unchecked(), pytest.raises(TypeError, match='got one string'): Constraint.choices('yes', tokenizer)
    with unchecked(): assert Constraint.choices((option for option in options), tokenizer).pattern == constraint.pattern
    with pytest.raises(ValueError, match='nothing to choose from'): Constraint.choices([], tokenizer)


@pytest.mark.parametrize('pattern, words', [
    *((pattern, 'is not a regular expression') for pattern in ('(a', '[b-a]', 'a{2,1}')), ('x', 'can be spelled'), ('a{5000}', 'more than 2000 states'),
    *((pattern, 'a constraint knows') for pattern in (r'\ba', '^a', 'a$', r'(a)\1', '(?=a)', '(?P<x>a)', 'a*+'))])
def test_patterns_that_cannot_work(pattern, words):
    with pytest.raises(ValueError, match=words): Constraint(pattern, PAIRS)


def test_tokens_by_what_they_add():
    texts = token_texts(WordTokenizer.train(['one two , three'], special_tokens=('<end>',)))
    assert sorted(texts.values()) == [' ,', ' one', ' three', ' two']
    halves = BPETokenizer.train('é é é é', 257)
    assert 'é' in token_texts(halves).values() and all('\ufffd' not in text for text in token_texts(halves).values())
    assert all(halves.decode([i]) == text for i, text in token_texts(halves).items())
