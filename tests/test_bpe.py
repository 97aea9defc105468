"""Chapter 3 beyond its own cells: peers on fuzzed Unicode, the real GPT-2, streams cut anywhere, and files that break."""
import itertools, json, os, pickle, random, re, subprocess, sys, time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings, strategies as st
from shapes import unchecked

import llm_from_scratch.bpe as bpe
from llm_from_scratch.bpe import (GPT2_PATTERN, GPT4_PATTERN, BPETokenizer, compile_pattern, count_pretokens,
                                  learn_merges, load_tokenizer, merge_bytes, model_folder)
from llm_from_scratch.data import fingerprint
from llm_from_scratch.files import digest
from llm_from_scratch.text import CharTokenizer, SpacedWordTokenizer, Tokenizer, WordTokenizer, pydoc_corpus

INPUTS = []

# Characters that every engine's edition of Unicode knows, and mixtures made to hurt the patterns.
known = st.text(st.characters(exclude_categories=['Cs', 'Cn']))
SPICE = [*" \t\n\r'.,-019aéſ", '  ', '\r\n', ' \n ', "'s", "'S", "'ll", "'LL", "'re", '\u3000', '\u00a0', '\u200d', '\x1c', '\x85', '<|end|>', '<|end|>!', '<|', '|>', '👩‍👩‍👧‍👦',
         '🏳️‍🌈', '👍🏽', '🇺🇳', 'e\u0301', '\u0301', '٣٤', 'हिन्दी', '中文字', '日本語。', 'ไทย', 'עברית', 'العربية', 'Ελλάδα', 'Привет', 'def f(x):\n    return x', '====', '½²', '𝔘𝔫𝔦']
spicy = st.lists(st.sampled_from(SPICE), max_size=25).map(''.join)
texts = st.one_of(known, spicy)
patterns = st.sampled_from([GPT2_PATTERN, GPT4_PATTERN])
SENTENCES = ['Whoever reads this, reads English.', "Wer das liest, liest Deutsch, größtenteils.", 'Quien lee esto, lee español, ¿no?', "Qui lit ceci lit le français, n'est-ce pas ?",
             'Кто читает это, читает по-русски.', 'Όποιος το διαβάζει, διαβάζει ελληνικά.', 'من يقرأ هذا يقرأ العربية.', 'जो यह पढ़ता है, वह हिन्दी पढ़ता है।', '读到这里的人会读中文。', 'これを読む人は日本語を読む。',
             'class Point:\n\tdef __init__(self, x=0.5e-3):\n\t\tself.x = x  # done\r\n', '    {"key": [1, 2.50, null]},\n\n\n', '🙂🙃 👨‍👩‍👧 🇯🇵🇩🇪 1️⃣ ❤️‍🔥', 'a  b   c    d\t\te \n f\n\n g ', "I'LL we'll Y'all's 'tis"]


@cache
def trained(pattern=GPT2_PATTERN, size=1000):
    "Trained once for each pattern: tests of one pattern do not run one after another."
    corpus = list(pydoc_corpus().values())[:30] + SENTENCES * 3
    with unchecked(): return BPETokenizer.train(corpus, size, ['<|end|>', '<|end|>!'], pattern)


@pytest.fixture(scope='module', params=[GPT2_PATTERN, GPT4_PATTERN], ids=['gpt2-pattern', 'gpt4-pattern'])
def own(request): return trained(request.param)


@pytest.fixture(scope='module')
def gpt2(shared_data):
    with unchecked(): return BPETokenizer.from_gpt2_files(shared_data/'gpt2'/'encoder.json', shared_data/'gpt2'/'vocab.bpe')


@pytest.fixture(scope='module')
def real_gpt2(shared_data):
    "tiktoken's own gpt2: its own reader of the files, its own pattern."
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    ranks = data_gym_to_mergeable_bpe_ranks(str(shared_data/'gpt2'/'vocab.bpe'), str(shared_data/'gpt2'/'encoder.json'))
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 50256})


@pytest.fixture(scope='module')
def hf_gpt2(shared_data):
    "GPT-2 by `tokenizers`, from the two files."
    model = tokenizers.models.BPE.from_file(str(shared_data/'gpt2'/'encoder.json'), str(shared_data/'gpt2'/'vocab.bpe'))
    peer = tokenizers.Tokenizer(model)
    peer.pre_tokenizer, peer.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    return peer


# Peers ------------------------------------------------------------------------------------------------------------

@settings(max_examples=80)
@given(text=texts)
@unchecked()
def test_against_real_gpt2(gpt2, real_gpt2, hf_gpt2, text):
    ids = gpt2.encode(text)
    assert ids == real_gpt2.encode_ordinary(text) == hf_gpt2.encode(text).ids
    assert gpt2.decode(ids) == text


def test_languages_code_and_emoji_against_real_gpt2(gpt2, real_gpt2, hf_gpt2):
    for sentence in SENTENCES: assert gpt2.encode(sentence) == real_gpt2.encode_ordinary(sentence) == hf_gpt2.encode(sentence).ids


def test_gpt2_as_published(gpt2):
    assert gpt2.vocab_size == 50257 and gpt2.special_tokens == {'<|endoftext|>': 50256}
    assert gpt2.encode('hello world') == [31373, 995]
    assert gpt2.encode('<|endoftext|>', allowed_special='all') == [50256] != gpt2.encode('<|endoftext|>')


def test_shakespeare_every_way(gpt2, real_gpt2, shared_data, tmp_path):
    text, path = (shared_data/'tinyshakespeare.txt').read_text(encoding='utf-8')[:300_000], tmp_path/'text.txt'
    path.write_bytes(text.encode())
    expected = real_gpt2.encode_ordinary(text)
    with unchecked():
        assert gpt2.encode(text) == expected == list(gpt2.encode_iterable(text)) == list(itertools.chain(*gpt2.encode_file(path))) == gpt2.encode_batch([text])[0]
    assert gpt2.decode(expected) == text


@settings(max_examples=50)
@given(text=texts)
@unchecked()
def test_against_tiktoken_and_tokenizers(own, hf, text):
    hf.encode_special_tokens = True                                 # special tokens in the text are text
    assert own.encode(text) == own._fast.encode_ordinary(text) == own.encode_batch([text])[0] == hf.encode(text).ids


@settings(max_examples=50)
@given(text=spicy.filter(lambda text: '<|end|>!' not in text))
@unchecked()
def test_special_tokens_against_tokenizers(own, hf, text):
    hf.encode_special_tokens = False
    assert hf.encode(text).ids == own.encode(text, allowed_special='all')


@pytest.fixture(scope='module')
def hf_file(own, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hf')
    own.to_hf(folder)
    return folder/'tokenizer.json'


@pytest.fixture(scope='module')
def hf(hf_file): return tokenizers.Tokenizer.from_file(str(hf_file))


def test_transformers_loads_it(tmp_path):
    from transformers import PreTrainedTokenizerFast
    for ours in trained(GPT2_PATTERN), trained(GPT4_PATTERN):
        ours.to_hf(tmp_path/'tokenizer.json')
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path/'tokenizer.json'))
        assert len(theirs) == ours.vocab_size
        for text in SENTENCES: assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
        assert theirs.encode('a<|end|> b') == ours.encode('a<|end|> b', allowed_special='all')


def test_gpt2_goes_to_hf_and_back_its_merges_recovered_from_ids_alone(gpt2, shared_data, tmp_path):
    lines = (shared_data/'gpt2'/'vocab.bpe').read_text(encoding='utf-8').split('\n')[1:]
    with unchecked():
        gpt2.to_hf(tmp_path)
        assert BPETokenizer.from_hf(tmp_path) == gpt2
    merges = json.loads((tmp_path/'tokenizer.json').read_text(encoding='utf-8'))['model']['merges']
    assert [pair if isinstance(pair, str) else ' '.join(pair) for pair in merges] == [line for line in lines if line]


def test_hf_and_back(own, tmp_path):
    for tokenizer in own, trained(r'\p{L}+|\s'):
        tokenizer.to_hf(tmp_path)
        back = BPETokenizer.from_hf(tmp_path)
        assert (back.vocab, back.special_tokens) == (tokenizer.vocab, tokenizer.special_tokens)
        for text in SENTENCES: assert back.encode(text) == tokenizer.encode(text)


def test_from_hf_reads_what_tokenizers_trained(tmp_path):
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer, peer.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=['<s>'], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    peer.train_from_iterator(list(pydoc_corpus().values())[:30], trainer)
    peer.save(str(tmp_path/'tokenizer.json'))
    ours = BPETokenizer.from_hf(tmp_path)
    assert ours.special_tokens == {'<s>': 0} and ours.vocab_size == 900
    for text in SENTENCES: assert ours.encode(text) == peer.encode(text).ids


@pytest.mark.parametrize('change, names', [
    (lambda f: f['model'].update(type='WordPiece'), 'WordPiece'),
    (lambda f: f['model'].update(byte_fallback=True), 'byte_fallback'),
    (lambda f: f['model']['merges'].reverse(), 'order of merges'),
    (lambda f: f['model'].pop('vocab'), 'vocab'),
    (lambda f: f.update(normalizer={'type': 'NFKC'}), 'NFKC'),
    (lambda f: f.update(pre_tokenizer={'type': 'Whitespace'}), 'Whitespace'),
    (lambda f: f['pre_tokenizer']['pretokenizers'][1].update(add_prefix_space=True), 'add_prefix_space'),
    (lambda f: f['pre_tokenizer']['pretokenizers'][0].update(behavior='Removed'), 'behavior'),
])
def test_from_hf_names_what_it_cannot_do(hf_file, tmp_path, change, names):
    file = json.loads(hf_file.read_text(encoding='utf-8'))
    change(file)
    (tmp_path/'tokenizer.json').write_text(json.dumps(file), encoding='utf-8')
    with pytest.raises(ValueError, match=names): BPETokenizer.from_hf(tmp_path)


def flags(**given): return {**dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False), 'special': True, **given}


ALPHABET = bpe.byte_alphabet()
def spelled(token): return ''.join(ALPHABET[b] for b in token)


@st.composite
def pipelines(draw):
    "The content of a tokenizer.json: random merges, in an order of their own, and random values of every field that changes ids."
    tokens, merges = [bytes([b]) for b in range(256)], []
    parts = [b'a', b'b', b'c', b' ', b'\xc3', b'\xa9']
    for _ in range(draw(st.integers(0, 6))):
        a, b = draw(st.sampled_from(parts)), draw(st.sampled_from(parts))
        if a + b in parts and draw(st.booleans()): continue
        merges.append([spelled(a), spelled(b)])
        if a + b not in tokens: tokens.append(a + b); parts.append(a + b)
    vocab = {spelled(token): i for i, token in enumerate(tokens)}
    names = draw(st.lists(st.sampled_from(['<e>', '<e>x', '<s>', 'é<', 'a<', '  ']), unique=True, max_size=3))
    some, byte_level = st.fixed_dictionaries({f: st.booleans() for f in ('lstrip', 'rstrip', 'single_word')}), {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    added = [{'id': len(vocab) + i, 'content': name, **flags(**draw(some))} for i, name in enumerate(names)]
    pattern = draw(st.sampled_from(['', GPT2_PATTERN, GPT4_PATTERN, r'\p{L}+', r' ?[ab]+|c']))
    pre = {**byte_level, 'use_regex': draw(st.booleans())} if not pattern else {'type': 'Sequence', 'pretokenizers': [
        {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}, {**byte_level, 'use_regex': False}]}
    nothing = {'type': 'TemplateProcessing', 'single': [{'Sequence': {'id': 'A', 'type_id': 0}}], 'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}], 'special_tokens': {}}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'pre_tokenizer': pre, 'decoder': byte_level | {'use_regex': True},
            'normalizer': draw(st.sampled_from([None, {'type': 'NFC'}, {'type': 'Sequence', 'normalizers': []}, {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}]}])),
            'post_processor': draw(st.sampled_from([None, byte_level | {'use_regex': True}, nothing])),
            'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
                      'ignore_merges': draw(st.booleans()), 'vocab': vocab, 'merges': merges}}


marked = st.lists(st.sampled_from(['a', 'b', 'c', 'ab', 'é', 'e\u0301', '<e>', '<e>x', '<s>', ' ', '  ', '\n', '.', '<', 'x', '_', '²']), max_size=12).map(''.join)


@settings(max_examples=60)
@given(content=pipelines(), texts=st.lists(marked, min_size=1, max_size=5))
@unchecked()
def test_a_foreign_file_gives_the_same_ids_or_is_refused(tmp_path_factory, content, texts):
    path = tmp_path_factory.mktemp('hf')/'tokenizer.json'
    path.write_text(json.dumps(content), encoding='utf-8')
    peer = tokenizers.Tokenizer.from_file(str(path))
    try: ours = BPETokenizer.from_hf(path)
    except ValueError as e:
        assert re.search('merges|white space at an end', str(e)), e
        return
    expected = [peer.encode(text).ids for text in texts]
    assert [ours.encode(text, 'all') for text in texts] == expected == ours.encode_batch(texts, 'all') == [list(ours.encode_iterable(text, 'all')) for text in texts]
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    ours.save(path.with_name('saved.json')); ours.to_hf(path)
    for again in BPETokenizer.load(path.with_name('saved.json')), BPETokenizer.from_hf(path), tokenizers.Tokenizer.from_file(str(path)):
        if isinstance(again, BPETokenizer): assert [again.encode(text, 'all') for text in texts] == expected and fingerprint(again) == fingerprint(again)
        else: assert [again.encode(text).ids for text in texts] == expected


def example(change=lambda file: None, tokens=(), merges=(), added=()):
    vocab = {spelled(bytes([b])): b for b in range(256)} | {spelled(token): 256 + i for i, token in enumerate(tokens)}
    file = {'version': '1.0', 'added_tokens': list(added), 'normalizer': None, 'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}, 'post_processor': None,
            'decoder': None, 'model': {'type': 'BPE', 'ignore_merges': False, 'vocab': vocab, 'merges': [[spelled(a), spelled(b)] for a, b in merges]}}
    change(file)
    return file


BOS = {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]}


@pytest.mark.parametrize('file, names', [
    (example(tokens=[b'ab', b'bc', b'abc'], merges=[(b'a', b'b'), (b'b', b'c'), (b'a', b'bc')]), "never make b'abc'"),
    (example(tokens=[b'abc'], merges=[]), 'ids and merges disagree'),
    (example(lambda f: f.update(post_processor=BOS)), 'post_processor TemplateProcessing'),
    (example(lambda f: f.update(post_processor={'type': 'Sequence', 'processors': [BOS]})), 'post_processor TemplateProcessing'),
    (example(lambda f: f.update(truncation={'max_length': 3})), 'truncation'), (example(lambda f: f.update(padding={'strategy': 'BatchLongest'})), 'padding'),
    (example(lambda f: f.update(version='2.0')), "version='2.0'"), (example(lambda f: f.update(news=1)), 'news=1'), (example(lambda f: f['model'].update(news=1)), 'news=1'),
    (example(lambda f: f.update(normalizer={'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, {'type': 'Lowercase'}]})), 'Lowercase'),
    (example(lambda f: f.update(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [{'type': 'Digits'}, {'type': 'ByteLevel'}]})), 'Digits'),
    (example(lambda f: f.update(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [{'type': 'Split', 'pattern': {'Regex': r'\h+'}, 'behavior': 'Isolated'}, {'type': 'ByteLevel', 'use_regex': False}]})), 'something else'),
    (example(added=[{'id': 256, 'content': '<a>', **flags(normalized=True)}, {'id': 257, 'content': '<b>', **flags()}]), 'normalized'),
    (example(lambda f: f.update(normalizer={'type': 'NFC'}), added=[{'id': 256, 'content': '<a>', **flags(normalized=True)}]), 'normalized'),
    (example(added=[{'id': 300, 'content': '<a>', **flags()}]), "'<a>' has the id 300, by the order of the file it is 256"),
    (example(added=[{'id': 124, 'content': '|', **flags()}]), "'|' is one of its merges"),
])
def test_what_would_change_ids_is_refused_by_name(tmp_path, file, names):
    (tmp_path/'tokenizer.json').write_text(json.dumps(file), encoding='utf-8')
    with pytest.raises(ValueError, match=re.escape(names)): BPETokenizer.from_hf(tmp_path)


@settings(max_examples=30)
@given(corpus=spicy, names=st.lists(st.sampled_from(['<|a|>', '<|a|>x', 'b', '|', ' ', 'é', '<', 'x|']), unique=True, max_size=3), ids=st.permutations(range(290, 293)), texts=st.lists(spicy, max_size=4))
@unchecked()
def test_an_export_gives_the_same_ids_or_is_refused(tmp_path_factory, corpus, names, ids, texts):
    "Special tokens of any spelling, with any ids."
    ours = BPETokenizer(BPETokenizer.train(corpus, 270).vocab, special_tokens=dict(zip(names, ids)))
    texts = [*texts, *(''.join(order) for order in itertools.permutations(['<|a|>', 'x', '|', ' b']))]
    path = tmp_path_factory.mktemp('export')/'tokenizer.json'
    prefixes = any(b.startswith(a) for a, b in itertools.permutations(names, 2))
    if prefixes: pytest.raises(ValueError, ours.to_tiktoken)
    else: assert [ours.to_tiktoken().encode(text, allowed_special='all') for text in texts] == [ours.encode(text, 'all') for text in texts]
    if set(names) & {spelled(token) for token in ours.vocab}:
        with pytest.raises(ValueError, match='is spelled like a token'): ours.to_hf(path)
        return
    ours.to_hf(path)
    assert [e.ids for e in tokenizers.Tokenizer.from_file(str(path)).encode_batch(texts)] == [ours.encode(text, 'all') for text in texts]


def test_from_hf_reads_the_file_that_those_were_made_of(own, hf_file): assert BPETokenizer.from_hf(hf_file.parent).vocab == own.vocab


# Training ---------------------------------------------------------------------------------------------------------

def recount(pieces, n_merges):
    "The definition: recount everything at each step."
    parts = {p: [bytes([b]) for b in p.encode()] for p in pieces}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for p, n in pieces.items():
            for pair in zip(parts[p], parts[p][1:]): pairs[pair] += n
        if not pairs: break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for p in pieces:
            old, new, i = parts[p], [], 0
            while i < len(old):
                step = 2 if tuple(old[i:i + 2]) == best else 1
                new.append(b''.join(old[i:i + step])); i += step
            parts[p] = new
    return merges


@settings(max_examples=50)
@given(st.dictionaries(st.one_of(st.text('ab', min_size=1, max_size=12), st.text('aé猫', min_size=1, max_size=6), known.filter(bool)), st.integers(1, 4), max_size=8))
@unchecked()
def test_training_against_the_definition(pieces):
    assert learn_merges(pieces, 40) == recount(pieces, 40)


def test_ties_go_to_the_greatest_pair():
    assert learn_merges({'ab': 1, 'cd': 1, 'ca': 1}, 1) == [(b'c', b'd')]
    assert learn_merges({'ba': 2, 'é': 2, 'zz': 1}, 2) == [(b'\xc3', b'\xa9'), (b'b', b'a')]


@pytest.mark.parametrize('pattern', [GPT2_PATTERN, GPT4_PATTERN])
@pytest.mark.parametrize('block', [1, 7, 60])
def test_blocks_change_no_count(monkeypatch, pattern, block):
    rng = random.Random(block)
    text = ''.join(rng.choices(SPICE + [' the', 'word', '12345'], k=3000))
    special = ['<|end|>', '<|end|>!']
    whole = count_pretokens(text, pattern, special)
    assert whole == bpe._count_block([text], pattern, tuple(special))
    monkeypatch.setattr(bpe, '_BLOCK', block)
    assert count_pretokens(text, pattern, special) == whole
    assert len(list(bpe._blocks(bpe._read(text), pattern, special))) > 100


def test_files_texts_and_workers_train_the_same(tmp_path):
    documents = list(pydoc_corpus().values())[:8]
    paths = [tmp_path/f'{i}.txt' for i in range(len(documents))]
    for path, text in zip(paths, documents): path.write_bytes(text.encode())
    by_text = BPETokenizer.train(documents, 400, ['<|end|>'])
    assert by_text == BPETokenizer.train(paths, 400, ['<|end|>']) == BPETokenizer.train(iter(documents), 400, ['<|end|>'])
    assert by_text == BPETokenizer.train(documents, 400, ['<|end|>'], workers=2)


def test_workers_without_a_main_guard_say_so(tmp_path):
    (tmp_path/'script.py').write_text('from llm_from_scratch.bpe import BPETokenizer\nBPETokenizer.train("some text", 260, workers=2)\n')
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, 'PYTHONPATH': str(Path(bpe.__file__).parent.parent)})
    assert done.returncode and '__main__' in done.stderr.strip().splitlines()[-1]


def test_a_program_from_a_pipe_may_ask_for_workers():
    "No process can read it again, so this one counts."
    program = 'from llm_from_scratch.bpe import BPETokenizer\nprint(BPETokenizer.train(["low lower"] * 9, 259, workers=2).vocab_size)\n'
    done = subprocess.run([sys.executable, '-'], input=program, capture_output=True, text=True, timeout=600, env={**os.environ, 'PYTHONPATH': str(Path(bpe.__file__).parent.parent)})
    assert (done.stdout, done.stderr) == ('259\n', '')


def test_line_ends_of_files_are_kept(tmp_path):
    (tmp_path/'a.txt').write_bytes(b'one\r\ntwo\rthree\n')
    assert count_pretokens(tmp_path/'a.txt') == {'one': 1, 'two': 1, 'three': 1, '\r': 2, '\n': 2}


def test_special_tokens_are_boundaries_of_training_text():
    assert count_pretokens('ab<|end|>!cd <|end|>ab', special_tokens=['<|end|>', '<|end|>!']) == {'ab': 2, 'cd': 1, ' ': 1}


@pytest.mark.parametrize('call, message', [
    (lambda path: BPETokenizer.train('x', 255), 'vocab_size=255'),
    (lambda path: BPETokenizer.train('x', 257, ['<a>', '<b>']), 'vocab_size=257'),
    (lambda path: BPETokenizer.train('x', 300, ['<a>', '<a>']), 'twice'),
    (lambda path: BPETokenizer.train('x', 300, ['']), 'empty'),
    (lambda path: BPETokenizer.train('x\ud800', 300), r'U\+D800'),
    (lambda path: BPETokenizer.train('x', 300, pattern='(a)'), 'groups'),
    (lambda path: BPETokenizer.train('x', 300, pattern='a*'), 'empty'),
    (lambda path: BPETokenizer.train('x', 300, pattern='['), 'regular expression'),
    (lambda path: BPETokenizer.train(path, 300), 'latin.txt is not UTF-8'),
    (lambda path: BPETokenizer({bytes([b]): b for b in range(256)}, special_tokens={'<a>': 3}), 'same id'),
    (lambda path: BPETokenizer({bytes([b]): b for b in range(255)}), '0xFF'),
])
def test_bad_input_is_named(tmp_path, call, message):
    (tmp_path/'latin.txt').write_bytes('é'.encode('latin-1') * 5)
    with pytest.raises(ValueError, match=message): call(tmp_path/'latin.txt')


# Round trips ------------------------------------------------------------------------------------------------------

@settings(max_examples=50)
@given(text=st.one_of(st.text(st.characters(exclude_categories=['Cs'])), spicy))
@unchecked()
def test_every_text_comes_back(own, text):
    ids = own.encode(text)
    assert own.decode(ids, errors='strict') == text
    assert own.decode(own.encode(text, allowed_special='all')) == text
    assert all(i < own.vocab_size - 2 for i in ids), 'a special token came from text that was not allowed to make it'


@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 999), max_size=30))
@unchecked()
def test_stream_of_any_ids_is_their_text(own, ids):
    pieces = list(own.decode_stream(ids))
    assert ''.join(pieces) == own.decode(ids) and '' not in pieces


@settings(max_examples=50)
@given(text=texts)
@unchecked()
def test_a_stream_never_shows_half_a_character(own, text):
    so_far = ''
    for piece in own.decode_stream(own.encode(text)):
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text


@pytest.mark.parametrize('pattern', [r'\w+', r'a', r'[^ ]+ ?', r'(?i)x|[\s\S]{2}', r'\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\p{L}+'])
def test_own_patterns_lose_nothing_and_agree(pattern):
    tokenizer = trained(pattern, 400)
    for text in [*SENTENCES, 'abc 12345\n']:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids == tokenizer.encode_batch([text])[0] == list(tokenizer.encode_iterable(text))


@settings(max_examples=50)
@given(data=st.binary(max_size=200))
@unchecked()
def test_merging_against_rescanning(own, data):
    parts = [data[i:i + 1] for i in range(len(data))]
    while ranked := [(own.vocab[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in own.vocab]:
        i = min(ranked)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    assert merge_bytes(data, own.vocab) == [own.vocab[part] for part in parts]


def test_it_is_a_tokenizer(own):
    assert isinstance(own, Tokenizer)
    assert pickle.loads(pickle.dumps(own)) == own and own != trained(own.pattern, 400)


# Streams of text --------------------------------------------------------------------------------------------------

@settings(max_examples=60)
@given(text=texts, data=st.data(), allowed=st.sampled_from([(), ('<|end|>',), 'all']), size=st.sampled_from([1, 4, 30]))
@unchecked()
def test_parts_give_the_ids_of_the_whole(own, text, data, allowed, size):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
    before, bpe._PART = bpe._PART, size
    try: assert list(own.encode_iterable(parts, allowed)) == own.encode(text, allowed)
    finally: bpe._PART = before


def test_every_first_look_at_a_contraction_or_a_gap(own, monkeypatch):
    text = "I'll we've 'S x  \n  y they're  \r\n\n z"
    own = BPETokenizer.train(text * 3, 330, pattern=own.pattern)      # knows 'll and the gaps as tokens, so that a wrong cut shows
    expected = own.encode(text)
    for size in range(1, len(text)):                                 # where the first look ends
        monkeypatch.setattr(bpe, '_PART', size)
        assert list(own.encode_iterable(text)) == expected, size


@pytest.mark.parametrize('unit', ['a', 'ab', 'banana', 'é', '中文', '=-', "'", '7', '\n=', '=\n \n', 'x \n', '😀'])
def test_runs_longer_than_the_buffer(own, monkeypatch, unit):
    monkeypatch.setattr(bpe, '_PART', 150)
    with unchecked():
        for tail, allowed in itertools.product(['', 'a', "'ll", ' \n', '\n\n  x', '<|end|>!', ' '], [(), 'all']):
            text = 'So ' + unit * (450 // len(unit)) + tail
            assert list(own.encode_iterable(text, allowed)) == own.encode(text, allowed), (tail, allowed)


@pytest.mark.parametrize('unit', ['a', 'banana', '中文', '12', '=\n \n', '😀!', 'no end '])
def test_memory_is_bounded_however_long_the_text(own, monkeypatch, unit):
    monkeypatch.setattr(bpe, '_PART', 10_000)
    kept = [0]
    class Watched(BPETokenizer):
        def _finished(self, text, special, hold):
            ids, rest = super()._finished(text, special, hold)
            kept.append(len(rest))
            return ids, rest
    watched = Watched(own.vocab, own.pattern, own.special_tokens)
    with unchecked(): n = sum(1 for _ in watched.encode_iterable((unit * (10_000 // len(unit)) for _ in range(8)), 'all'))
    assert n > 5_000 and len(kept) > 3 and max(kept) < 5000


def test_a_vocabulary_not_made_by_merges_streams_too():
    odd = BPETokenizer({bytes([b]): b for b in range(256)} | {b'abcab': 256, b'ab': 257})
    text = 'abcab' * 30_000
    assert list(odd.encode_iterable(text)) == odd.encode(text)
    with pytest.raises(ValueError, match='abcab'): print(odd.merges)


def test_a_surrogate_is_named_wherever_it_comes_in(own, tmp_path):
    for call in (lambda: own.encode('ab\ud800'), lambda: own.encode_batch(['', 'ab\ud800']), lambda: list(own.encode_iterable(['a', 'b\ud800'])),
                 lambda: own.encode('<|end|>ab\ud800'[5:], 'all') and None):
        with pytest.raises(ValueError, match=r'U\+D800 at position \d'): call()
    with pytest.raises(ValueError, match='position 70002'): list(own.encode_iterable(['x ' * 35_001, '\udfff']))


class Counted(dict):
    "A table that counts how often it is asked."
    asked = 0
    def get(self, *key): self.asked += 1; return super().get(*key)
    def __getitem__(self, key): self.asked += 1; return super().__getitem__(key)


@pytest.mark.parametrize('n', [1_000, 30_000])
def test_work_grows_with_the_length_of_a_piece(n):
    "One look at each pair, two more after each merge, one for each id; to scan again after each merge would be a look at every pair each time."
    tokenizer = BPETokenizer.train('a' * 4096, 266)                # twos, fours, eights …
    tokenizer.vocab = Counted(tokenizer.vocab)
    ids = tokenizer.encode('a' * n)
    assert n <= tokenizer.vocab.asked <= 4 * n and len(ids) < n / 100 and tokenizer.decode(ids) == 'a' * n


@settings(max_examples=50)
@given(texts=st.lists(texts, max_size=5), allowed=st.sampled_from([(), ('<|end|>',), 'all']))
@unchecked()
def test_batches_are_single_texts(own, texts, allowed):
    assert own.encode_batch(texts, allowed) == [own.encode(text, allowed) for text in texts]


@pytest.mark.parametrize('pattern', [r'\X', r'\h+', r'\w+', r'(?:low){e<=1}', r'(?V1)[\w--\d]+', r'x{2}+', r'low$', r'(?|low|er)', r'(?i:ss)'])
def test_what_other_engines_read_otherwise_is_encoded_here_and_not_exported(pattern, tmp_path):
    ours = BPETokenizer.train(['low lower e\u0301 xxxxx a--b ab'] * 9, 290, pattern=pattern)
    for text in 'low e\u0301\u0302 xxxxx', 'a--b  lowe\n', ' 12 ½low': assert ours.encode_batch([text]) == [ours.encode(text)]
    with pytest.raises(ValueError, match='may mean something else'): ours.to_tiktoken()
    with pytest.raises(ValueError, match='may mean something else'): ours.to_hf(tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_white_space_than_tiktoken_can_look_over(tmp_path):
    own, text = small(), 'low' + ' ' * 1_050_000 + 'low'
    with unchecked():
        expected = own.encode(text)
        (tmp_path/'text.txt').write_bytes(text.encode())
        assert own.encode_batch([text, 'low']) == [expected, own.encode('low')] and sum(own.encode_file(tmp_path/'text.txt'), []) == expected


def test_what_can_be_read_once_is_read_once(own):
    texts = ['a<|end|>', 'low', '<|end|>!']
    with unchecked():
        for allowed in (), ['<|end|>'], 'all':
            again = (lambda: iter(allowed)) if isinstance(allowed, list) else (lambda: allowed)
            expected = [own.encode(text, allowed) for text in texts]
            assert own.encode_batch(iter(texts), again()) == expected == [own.encode(text, again()) for text in texts]
            assert list(own.encode_iterable(iter(texts), again())) == own.encode(''.join(texts), allowed)
        assert BPETokenizer.train(iter(texts), 260, iter(['<|end|>'])) == BPETokenizer.train(texts, 260, ['<|end|>'])
        assert count_pretokens(texts * 2, special_tokens=iter(['<|end|>'])) == count_pretokens(texts * 2, special_tokens=['<|end|>'])
        for call in (lambda: own.encode_batch('ab'), lambda: own.encode_batch([1]), lambda: own.encode_batch([b'a']), lambda: own.encode_batch(['a'], '<|end|>'),
                     lambda: BPETokenizer.train('ab', 260, '<e>'), lambda: count_pretokens('ab', special_tokens='<e>')):
            with pytest.raises(TypeError, match='expected|allowed_special'): call()


def test_the_longest_special_token_wins(own):
    short, long = own.special_tokens['<|end|>'], own.special_tokens['<|end|>!']
    assert own.encode('<|end|>!<|end|>', 'all') == [long, short]
    assert own.encode('<|end|>!', {'<|end|>'}) == [short, *own.encode('!')]
    assert list(own.encode_iterable(['<|e', 'nd|', '>', '!'], 'all')) == [long]
    with pytest.raises(ValueError, match='<nope>'): own.encode('x', {'<nope>'})


def test_files_of_several_blocks(own, monkeypatch, tmp_path):
    monkeypatch.setattr(bpe, '_BLOCK', 1000)
    text = '<|end|>'.join(pydoc_corpus().values())[:50_000] + '中' * 3000
    (tmp_path/'text.txt').write_bytes(text.encode())
    for allowed in (), 'all':
        blocks = list(own.encode_file(tmp_path/'text.txt', allowed, threads=2))
        assert len(blocks) > 20 and list(itertools.chain(*blocks)) == own.encode(text, allowed)


# Saved files ------------------------------------------------------------------------------------------------------

def small(size=262): return BPETokenizer.train('banana bandana é', size, ['<|end|>'], GPT4_PATTERN)


@unchecked()
def test_saved_and_loaded(gpt2, tmp_path):
    for tokenizer in trained(GPT2_PATTERN), trained(GPT4_PATTERN), gpt2, small():
        tokenizer.save(tmp_path/'t.json')
        assert BPETokenizer.load(tmp_path/'t.json') == tokenizer
    assert [p.name for p in tmp_path.iterdir()] == ['t.json']


@unchecked()
def test_truncation_anywhere_is_named(tmp_path):
    path = tmp_path/'t.json'
    small().save(path)
    for n in reversed(range(0, path.stat().st_size - 1, 3)):          # the last byte is only a line end
        os.truncate(path, n)
        with pytest.raises(ValueError, match='t.json is not a saved BPETokenizer'): BPETokenizer.load(path)


def flip(path, at, bit):
    with open(path, 'r+b') as file:
        file.seek(at); byte = file.read(1)[0]
        file.seek(at); file.write(bytes([byte ^ 1 << bit]))


@unchecked()
def test_flipped_bits_are_named_or_harmless(tmp_path):
    path, tokenizer = tmp_path/'t.json', small()
    tokenizer.save(path)
    whole, named = path.read_bytes(), 0
    for at in range(0, len(whole), 3):
        flip(path, at, at * 5 % 8)
        try: assert BPETokenizer.load(path) == tokenizer
        except ValueError as e: assert 't.json is not a saved BPETokenizer' in str(e); named += 1
        flip(path, at, at * 5 % 8)
    assert path.read_bytes() == whole and named > .95 * len(range(0, len(whole), 3))


def test_a_killed_writer_leaves_the_old_file_or_the_new(tmp_path):
    path, versions = tmp_path/'t.json', [small(260), small(264)]
    versions[0].save(path)
    program = ('import sys, pickle\nfrom pathlib import Path\none, two = pickle.loads(Path(sys.argv[2]).read_bytes())\n'
               'while True:\n    two.save(sys.argv[1]); one.save(sys.argv[1])\n')
    (tmp_path/'versions').write_bytes(pickle.dumps(versions))
    rng = random.Random(0)
    for _ in range(3):
        before = path.stat().st_mtime_ns
        writer = subprocess.Popen([sys.executable, '-c', program, str(path), str(tmp_path/'versions')])
        try:
            while path.stat().st_mtime_ns == before: assert writer.poll() is None, 'the writer stopped by itself'; time.sleep(.001)
            time.sleep(rng.uniform(0.005, 0.05))
            assert writer.poll() is None, 'the writer stopped by itself'
        finally: writer.kill(); writer.wait()
        assert BPETokenizer.load(path) in versions


# The library ------------------------------------------------------------------------------------------------------

def test_import_brings_no_torch_and_no_tiktoken():
    code = 'import sys, llm_from_scratch.bpe; print([m for m in ("torch", "tiktoken", "matplotlib", "tokenizers", "tqdm") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(bpe.__file__).parent.parent)
    assert done.stdout.strip() == '[]'


def test_patterns_cover_every_text():
    rng = random.Random(0)
    for pattern in GPT2_PATTERN, GPT4_PATTERN, r'\w+':
        text = ''.join(chr(rng.choice([rng.randrange(0xd800), rng.randrange(0xe000, 0x110000), rng.randrange(128)])) for _ in range(20_000))
        assert ''.join(compile_pattern(pattern).findall(text)) == text


def test_each_tokenizer_is_found_by_its_file(tmp_path):
    texts = ['Once there was a girl.\nShe had a hat.']
    for made in (CharTokenizer.train(texts), WordTokenizer.train(texts), SpacedWordTokenizer.train(texts, special_tokens=['<end>']), BPETokenizer.train(texts, 260)):
        made.save(tmp_path/'tokenizer.json')
        again = load_tokenizer(tmp_path)
        assert load_tokenizer(tmp_path/'tokenizer.json') == again == made
        assert type(again) is type(made) and again.encode('Once a hat.') == made.encode('Once a hat.') and again.vocab_size == made.vocab_size
    for made in (SpacedWordTokenizer.train(texts, special_tokens=['<end>']), BPETokenizer.train(texts, 260)):
        made.to_hf(tmp_path)
        assert load_tokenizer(tmp_path) == made and load_tokenizer(tmp_path).encode('Once a hat.') == made.encode('Once a hat.')
    for text in ('', '[1]', '{}', '{"class": "WordTokenizer"}', '{"model": 1}', '{"model": {"type": "WordLevel"}}', '{"model": {"type": "Unigram"}}'):
        (tmp_path/'tokenizer.json').write_text(text, encoding='utf-8')
        with pytest.raises(ValueError, match='tokenizer.json'): load_tokenizer(tmp_path)
    (tmp_path/'tokenizer.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'there is no tokenizer .*: expected a file, a folder with tokenizer.json, or storyland, storyland-chat'): load_tokenizer(tmp_path)
    assert load_tokenizer('storyland').vocab_size == 448 and model_folder('storyland').is_dir()


@pytest.mark.parametrize('vocab', [{'a': 'x'}, {'a': [1]}, {'a': 0}, [], {bytes([b]).decode('latin-1'): b - 1 for b in range(256)}])
def test_a_forged_file_is_named_whatever_it_holds(tmp_path, vocab):
    content = {'pattern': GPT2_PATTERN, 'special_tokens': {}, 'vocab': vocab}
    (tmp_path/'t.json').write_text(json.dumps({'format': 'llm_from_scratch.bpe', 'version': 1, 'sha256': digest(content), **content}), encoding='utf-8')
    with pytest.raises(ValueError, match='t.json is not a saved BPETokenizer: '): BPETokenizer.load(tmp_path/'t.json')
    (tmp_path/'encoder.json').write_text(json.dumps(vocab), encoding='utf-8')
    (tmp_path/'vocab.bpe').write_text('#version: 0.2\n', encoding='utf-8')
    with pytest.raises(ValueError, match="encoder.json, .*vocab.bpe is not GPT-2's pair of files: "): BPETokenizer.from_gpt2_files(tmp_path/'encoder.json', tmp_path/'vocab.bpe')
