"Corpora, token files and batches: properties, downloads from a server on this machine, errors that say which."
import gzip, hashlib, http.server, itertools, subprocess, sys, threading, tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from shapes import unchecked

from llm_from_scratch import data
from llm_from_scratch.data import (IGNORE, SOURCES, SPLITS, BatchLoader, BatchPlan, DownloadError, Source, TokenFile, TokenWriter, as_ids, check_ids, check_windows,
                                   download, fingerprint, id_type, load_corpus, shuffle_index, slide, split_documents,
                                   split_text, windows)
from llm_from_scratch.text import CharTokenizer, WordTokenizer

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
few = settings(max_examples=50)                   # of what opens files or makes many batches
documents = st.lists(st.lists(st.integers(0, 299), max_size=40), min_size=1, max_size=12).filter(lambda d: any(d))


def write(path, docs, vocab_size=300):
    with TokenFile.create(path, vocab_size=vocab_size) as file:
        for ids in docs: file.append(ids)
    return path


# windows

@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_against_loops(n, T, stride):
    ids = list(range(100, 100 + n))
    starts = [i for i in range(0, n, stride) if i + T + 1 <= n]
    if not starts:
        with pytest.raises(ValueError, match='a window of|empty corpus'): windows(ids, T, stride)
        return
    x, y = windows(ids, T, stride)
    assert x.tolist() == [ids[i:i + T] for i in starts]
    assert y.tolist() == [ids[i + 1:i + T + 1] for i in starts]


def test_windows_share_memory_and_cannot_be_written():
    ids = np.arange(1000)
    x, y = windows(ids, 10, 1)
    assert np.shares_memory(x, ids) and not x.flags.writeable and not y.flags.writeable


@pytest.mark.parametrize('arguments, words', [
    (([1, 2, 3], 3), 'a window of 3 tokens and its last target need 4 tokens; the data has 3'),
    (([], 3), 'empty corpus'), (([1, 2, 3], 0), 'context_length is 0'), (([1, 2, 3], 1, 0), 'stride is 0'), (([1, 2, 3], 1, -2), 'stride is -2'),
    (([1.5, 2], 1), 'not float64'), (([[1, 2], [3, 4]], 1), r'shape \(2, 2\)')])
def test_windows_say_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words): windows(*arguments)


def test_as_ids_copies_no_array_and_check_windows_lets_the_last_one_pass():
    ids = np.arange(5, dtype=np.uint16)
    assert as_ids(ids) is ids and as_ids([]).dtype.kind == 'i' and as_ids(torch.tensor([1, 2])).tolist() == [1, 2]
    check_windows(4, 3, 1)
    with pytest.raises(ValueError): check_windows(3, 3, 1)


# corpora

@given(st.text(alphabet='ab \n', max_size=300))
def test_splits_of_a_text_partition_it(text):
    parts = {split: split_text(text, split) for split in SPLITS}
    assert ''.join(parts.values()) == text


def test_splits_end_at_paragraphs_and_have_their_shares():
    text = '\n\n'.join('a line of text\nand one more' for _ in range(2000))
    for split, (start, stop) in SPLITS.items():
        part = split_text(text, split)
        assert abs(len(part) / len(text) - (stop - start)) < 0.002
        assert part.startswith('a line') and (split == 'test' or part.endswith('\n\n'))


@given(st.integers(3, 200))
def test_splits_of_documents_partition_them(n):
    parts = [list(split_documents(range(n), split)) for split in SPLITS]
    assert sum(parts, []) == list(range(n)) and all(parts)
    if n >= 20: assert abs(len(parts[0]) - 0.9 * n) <= 1


def test_a_folder_is_read_in_order_of_its_names(tmp_path):
    (tmp_path/'b').mkdir()
    for name, text in ('b/1.txt', '\ufeffsecond'), ('a.txt', 'first'), ('c.txt', 'third\r\nline'), ('c.pdf', 'not text'): (tmp_path/name).write_bytes(text.encode())
    assert [next(load_corpus(tmp_path, split)) for split in SPLITS] == ['first', 'second', 'third\nline']
    assert list(load_corpus(str(tmp_path/'a.txt'))) == ['first']
    with pytest.raises(ValueError, match=r'empty corpus: .*a\.txt is too short to have a test part'): load_corpus(tmp_path/'a.txt', 'test')
    (tmp_path/'c.txt').write_bytes('café'.encode('latin-1'))
    with pytest.raises(ValueError, match=r'c\.txt is not UTF-8: byte 0xe9 at 3'): list(load_corpus(tmp_path, 'test'))


def test_text_files_of_every_kind(tmp_path, caplog):
    "Packed or not, in capitals or not; what is hidden or of another kind is left out, and said once."
    for name, text in ('A.TXT', b'one'), ('b.txt.gz', gzip.compress(b'two', mtime=0)), ('c.JSONL', b'\xef\xbb\xbf{"text": "three", "n": 1}\n\n{"text": "f\\u00f6ur"}\r\n'), ('d.md', b'five'), ('e.jsonl.GZ', gzip.compress(b'{"text": "six"}', mtime=0)):
        (tmp_path/name).write_bytes(text)
    for name in '.ipynb_checkpoints/a.txt', '.hidden.txt', 'f.pdf': (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).write_text('no text')
    assert [list(load_corpus(tmp_path, split)) for split in SPLITS] == [['one', 'two', 'three', 'föur'], ['five'], ['six']]
    assert [r.getMessage() for r in caplog.records] == [f'{tmp_path}: left out 3 of 8 files, hidden or no .txt, .md or .jsonl, such as .hidden.txt, .ipynb_checkpoints/a.txt, f.pdf']
    (tmp_path/'one.jsonl').write_text('\n'.join(f'{{"text": "{i}"}}' for i in range(20)))
    assert [list(load_corpus(tmp_path/'one.jsonl', split)) for split in SPLITS] == [[str(i) for i in range(18)], ['18'], ['19']]      # a line is a document


@pytest.mark.parametrize('name, content, words', [
    ('a.jsonl', b'{"text": "a"}\n{"txt": 1}', r'a\.jsonl, line 2: expected a field "text" that is a string, got None'), ('a.jsonl', b'[1]', r'a\.jsonl, line 1: expected a JSON object, got list'),
    ('a.jsonl', b'{"text": 5}', 'got 5'), ('a.txt.gz', b'plain', r'a\.txt\.gz is not a whole gzip file'), ('a.txt.gz', gzip.compress(b'cut' * 99, mtime=0)[:-9], 'not a whole gzip file'),
    ('a.md.gz', gzip.compress(b'\xff', mtime=0), 'a.md.gz is not UTF-8: byte 0xff at 0')])
def test_what_is_wrong_in_a_text_file_is_named(tmp_path, name, content, words):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=words): list(load_corpus(tmp_path))


def test_unknown_corpus_and_split_name_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'nope'; known are storyland, pydoc, shakespeare, the-verdict"): load_corpus('nope')
    with pytest.raises(ValueError, match=r"no split 'dev'; there are train, validation, test"): load_corpus(split='dev')
    with pytest.raises(ValueError, match='empty corpus: there is no .txt, .md or .jsonl file'): load_corpus(tmp_path)


def test_storyland_is_the_default_and_repeats():
    a, b = list(load_corpus(n=5)), list(load_corpus('storyland', 'train', n=5, seed=0))
    assert a == b and len(set(a)) == 5 and all(isinstance(text, str) and text for text in a)
    assert not set(a) & set(load_corpus(split='test', n=5)) and a != list(load_corpus(n=5, seed=1))
    assert len(list(itertools.islice(load_corpus(), 7))) == 7            # without n it goes on


def test_pydoc_needs_no_network():
    texts = [text for split in SPLITS for text in load_corpus('pydoc', split)]
    assert len(texts) > 50 and any('try' in text for text in texts) and len(list(load_corpus('pydoc', n=3))) == 3


# downloads, from a server on this machine

class Server:
    "Serves `text` at /good, a shortened transfer at /cut, other bytes at /wrong, errors elsewhere; remembers what was asked for."
    def __init__(self, text):
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                body = {'/good': text, '/cut': text[:100], '/wrong': b'not ' + text}.get(self.path)
                self.send_response(200 if body else 404)
                self.send_header('Content-Length', str(len(text if self.path == '/cut' else body or b'')))
                self.end_headers()
                self.wfile.write(body or b'')

            def log_message(self, *args): pass

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self): self.http.shutdown(); self.http.server_close()


TEXT = '\n\n'.join(f'Speech number {i}: café.' for i in range(400)).encode()
SHA = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.delenv('LLM_FROM_SCRATCH_CACHE', raising=False)
    found = Server(TEXT)
    yield found
    found.stop()


def source(server, *paths, sha=SHA): return Source(tuple(server.url + p for p in paths), sha)


def test_download_is_split_and_then_cached_without_a_network(server, tmp_path):
    sources = {'speeches': source(server, '/good')}
    parts = [next(load_corpus('speeches', split, sources=sources, cache=tmp_path)) for split in SPLITS]
    assert ''.join(parts) == TEXT.decode() and server.asked == ['/good']
    server.stop()
    assert next(load_corpus('speeches', sources=sources, cache=tmp_path)) == parts[0]


def test_mirrors_are_tried_in_order(server, tmp_path):
    dead = 'http://127.0.0.1:9/book'                                 # nothing listens there
    found = download('x', Source((dead, f'{server.url}/missing', f'{server.url}/wrong', f'{server.url}/cut', f'{server.url}/good', f'{server.url}/never'), SHA), tmp_path)
    assert found.read_bytes() == TEXT and server.asked == ['/missing', '/wrong', '/cut', '/good']


@pytest.mark.parametrize('path, reason', [('/wrong', f'its SHA-256 is not {SHA[:8]}'), ('/cut', 'Error'), ('/missing', 'HTTPError')])
def test_a_bad_download_is_named_and_not_kept(server, tmp_path, path, reason):
    with pytest.raises(DownloadError, match=r"'x'; load_corpus\('storyland'\) needs no network") as error: download('x', source(server, path), tmp_path)
    assert f'{server.url}{path}: ' in str(error.value) and reason in str(error.value)
    assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_connection_refused_names_the_default(tmp_path):
    with pytest.raises(DownloadError, match='storyland') as error: download('x', Source(('http://127.0.0.1:9/x',), SHA), tmp_path)
    assert 'http://127.0.0.1:9/x: ConnectionError' in str(error.value)


def test_a_damaged_copy_in_the_cache_is_fetched_again(server, tmp_path):
    path = download('x', source(server, '/good'), tmp_path)
    path.write_bytes(TEXT[:-1])
    assert download('x', source(server, '/good'), tmp_path).read_bytes() == TEXT and len(server.asked) == 2


def test_cache_folder_from_the_environment_and_the_argument(server, tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_FROM_SCRATCH_CACHE', str(tmp_path/'env'))
    assert download('x', source(server, '/good')).parent == tmp_path/'env'
    assert download('x', source(server, '/good'), tmp_path/'arg').parent == tmp_path/'arg'


def test_progress_goes_to_a_bar(server, tmp_path, capsys):
    download('x', source(server, '/good'), tmp_path, progress=True)
    captured = capsys.readouterr()
    assert '100%' in captured.err and not captured.out


def test_missing_pooch_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'pooch', None)
    with pytest.raises(ImportError, match=r"llm-from-scratch\[hub\]"): next(load_corpus('shakespeare', cache=tmp_path))


@pytest.mark.parametrize('name, file', [('shakespeare', 'tinyshakespeare.txt'), ('the-verdict', 'the-verdict.txt')])
def test_checksums_against_reference_copies(shared_data, name, file):
    assert hashlib.sha256((shared_data/file).read_bytes()).hexdigest() == SOURCES[name].sha256
    assert all(url.startswith('https://') for url in SOURCES[name].urls)


# token files

@few
@given(documents, st.sampled_from([300, 65_536, 65_537, 1 << 32]))
def test_token_file_round_trip(tmp_path_factory, docs, vocab_size):
    path = write(tmp_path_factory.mktemp('t')/'x.tok', docs, vocab_size)
    with TokenFile.open(path, verify=True) as file:
        assert [ids.tolist() for ids in file] == docs and len(file) == len(docs)
        assert file.ids.tolist() == sum(docs, []) and file.ids.dtype.itemsize == (2 if vocab_size <= 65_536 else 4)
        assert file[-1].tolist() == docs[-1] and file.vocab_size == vocab_size
        with pytest.raises(IndexError): file[len(docs)]


@few
@given(documents, documents)
def test_extending_equals_creating_at_once(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp('t')
    write(folder/'x.tok', first)
    with TokenFile.extend(folder/'x.tok') as file:
        for ids in second: file.append(ids)
    assert (folder/'x.tok').read_bytes() == write(folder/'y.tok', first + second).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ['x.tok', 'y.tok']


def test_extending_copies_more_than_one_chunk(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, 3_000_000)
    write(tmp_path/'x.tok', [ids])
    with TokenFile.extend(tmp_path/'x.tok') as file: file.append([1, 2])
    with TokenFile.open(tmp_path/'x.tok', verify=True) as file: assert np.array_equal(file[0], ids) and file[1].tolist() == [1, 2]


@pytest.mark.parametrize('top, vocab_size', [(65_535, 65_536), (65_536, 65_537), ((1 << 32) - 1, 1 << 32)])
def test_the_largest_id_fits(tmp_path, top, vocab_size):
    write(tmp_path/'x.tok', [[top, 0]], vocab_size)
    assert TokenFile.open(tmp_path/'x.tok').ids.tolist() == [top, 0]
    with pytest.raises(ValueError, match=f'token id {top + 1} at position 2'): write(tmp_path/'y.tok', [[0, 0, top + 1]], vocab_size)


def test_ids_take_two_bytes_where_they_can():
    assert [id_type(v).itemsize for v in (1, 65_536, 65_537, 1 << 32)] == [2, 2, 4, 4]
    for v in 0, (1 << 32) + 1:
        with pytest.raises(ValueError, match='vocab_size is'): id_type(v)


def test_the_first_bad_id_is_named_whatever_the_shape():
    check_ids(np.array([[0, 4]]), 5)
    with pytest.raises(ValueError, match='token id 7 at position 3 is outside my model: ids run from 0 to 4'): check_ids(np.array([[0, 4], [1, 7], [9, 9]]), 5, 'my model')


def test_create_gives_a_writer_that_counts(tmp_path):
    with TokenFile.create(tmp_path/'x.tok', vocab_size=9) as file:
        assert isinstance(file, TokenWriter)
        file.append([1, 2]); file.append([3])
        assert (file.n_documents, file.n_tokens) == (2, 3) and not (tmp_path/'x.tok').exists()


@pytest.mark.parametrize('ids, words', [([3, -1], 'token id -1 at position 1'), ([300], 'token id 300 at position 0 .* 0 to 299'), ([.5], 'one row of integers'), ([[1]], 'one row of integers')])
def test_a_bad_document_is_named_and_nothing_is_written(tmp_path, ids, words):
    with pytest.raises(ValueError, match=words): write(tmp_path/'x.tok', [[1, 2], ids])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_corpus_makes_no_file(tmp_path):
    for docs in [], [[], []]:
        with pytest.raises(ValueError, match='empty corpus'): write(tmp_path/'x.tok', docs)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match='tokenizer or a vocab_size'):
        with TokenFile.create(tmp_path/'x.tok'): pass


@pytest.mark.parametrize('ids', [[1, 2, 299], np.array([1, 2, 299], np.uint16), np.array([1, 2, 299], np.int64), torch.tensor([1, 2, 299]), range(297, 300)])
def test_documents_of_any_kind(tmp_path, ids):
    write(tmp_path/'x.tok', [ids])
    assert TokenFile.open(tmp_path/'x.tok').ids.tolist() == list(map(int, ids))


def test_the_tokenizer_must_be_the_one(tmp_path):
    one, other = CharTokenizer.train(['abc'], special_tokens=['<|endoftext|>']), CharTokenizer.train(['abd'], special_tokens=['<|endoftext|>'])
    file = TokenFile.from_texts(tmp_path/'x.tok', ['ab', 'ca'], one)
    assert [ids.tolist() for ids in file] == [[0, 1, 3], [2, 0, 3]]
    with unchecked(), pytest.raises(TypeError, match='got one string'): TokenFile.from_texts(tmp_path/'new.tok', 'abc', one)
    assert not (tmp_path/'new.tok').exists()
    TokenFile.open(tmp_path/'x.tok', tokenizer=one)
    for use in TokenFile.open, lambda *a: TokenFile.extend(*a).__enter__():
        with pytest.raises(ValueError, match='x.tok was made by another tokenizer'): use(tmp_path/'x.tok', other)
    write(tmp_path/'y.tok', [[1]])
    with pytest.raises(ValueError, match='y.tok does not say which tokenizer'): TokenFile.open(tmp_path/'y.tok', one)


def test_fingerprints_tell_tokenizers_apart():
    from llm_from_scratch.bpe import BPETokenizer
    texts = ['the cat sat on the mat, the cat', 'a bat and a rat']
    made = [CharTokenizer.train(texts), CharTokenizer.train(texts, special_tokens=['<e>']), WordTokenizer.train(texts), WordTokenizer.train(texts, lowercase=True),
            BPETokenizer.train(texts, 262), BPETokenizer.train(texts, 261), BPETokenizer.train(texts[::-1] + ['at at at at ra ra ra'] * 3, 262),
            BPETokenizer.train(texts, 262, pattern=r'\w+|\W+')]
    assert len({fingerprint(t) for t in made}) == len(made)
    assert fingerprint(BPETokenizer.train(texts, 262)) == fingerprint(made[4])


def test_a_stranger_is_known_by_what_it_decodes():
    class Stranger:
        vocab_size, special_tokens = 3, {}
        def __init__(self, pieces): self.pieces = pieces
        def encode(self, text): return [self.pieces.index(c) for c in text]
        def decode(self, ids): return ''.join(self.pieces[i] for i in ids)
    assert fingerprint(Stranger('abc')) == fingerprint(Stranger('abc')) != fingerprint(Stranger('acb'))


def test_closing_lets_go_of_the_file(tmp_path):
    file = TokenFile.open(write(tmp_path/'x.tok', [[1, 2, 3]]))
    with file: pass
    assert file._map.closed
    with pytest.raises(ValueError, match='x.tok is closed'): print(file.ids)
    with TokenFile.open(tmp_path/'x.tok') as file: kept = file.ids[1:]
    assert kept.tolist() == [2, 3]                                    # a slice outlives the file …
    held = file._map
    del kept
    held.close()                                                      # … and nothing else holds the map
    assert held.closed


def test_mapped_ids_cannot_be_written(tmp_path):
    file = TokenFile.open(write(tmp_path/'x.tok', [[1, 2, 3]]))
    with pytest.raises(ValueError): file.ids[0] = 9


def test_writing_and_reading_keep_memory_small(tmp_path):
    document = np.arange(10_000, dtype=np.uint16)
    tracemalloc.start()
    write(tmp_path/'x.tok', (document for _ in range(1_000)), 10_000)  # 20 MB
    with TokenFile.open(tmp_path/'x.tok', verify=True) as file: loader = BatchLoader(file, 64, 8); loader.batch(3)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert (tmp_path/'x.tok').stat().st_size > 20e6 and peak < 4e6, f'{peak:,}'


def test_import_needs_no_torch():
    code = "import sys, llm_from_scratch.data as d; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules and 'pooch' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(data.__file__).parent.parent)


# the shuffle

@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 8))
def test_shuffle_is_a_bijection(n, key, rounds):
    assert np.array_equal(np.sort(shuffle_index(np.arange(n), n, key, rounds)), np.arange(n))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**64 - 1))
def test_one_round_slides_rows_and_the_next_columns(rows, columns, key):
    index = np.arange(rows * columns, dtype=np.uint64)
    keys = np.broadcast_to(np.array([[key], [0]], np.uint64), (2, len(index)))
    once, twice = (slide(index, rows, columns, keys[:r]).reshape(rows, columns).astype(int) for r in (1, 2))
    for r in range(rows):                                             # each row stays a row, turned by one amount
        assert set(once[r] // columns) == {r} and len(set((once[r] - np.arange(columns)) % columns)) == 1
    assert (twice % columns == once % columns).all() and len(set(twice.ravel())) == rows * columns


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_shuffle_one_by_one_equals_all_at_once(n, key, index):
    index = np.array(index) % n
    together = shuffle_index(index, n, key)
    assert together.tolist() == [int(shuffle_index(np.array([i]), n, key)[0]) for i in index]
    assert ((0 <= together) & (together < n)).all() and len(set(together.tolist())) == len(set(index.tolist()))


def test_shuffle_is_the_same_on_every_machine():
    assert shuffle_index(np.arange(10), 10, 0).tolist() == GOLDEN_10
    assert int(shuffle_index(np.array([123_456_789]), 10**12, 42)[0]) == GOLDEN_BIG


GOLDEN_10, GOLDEN_BIG = [1, 2, 8, 0, 4, 3, 9, 7, 6, 5], 197256504471


@pytest.mark.parametrize('n', [17, 100, 101])
def test_every_index_goes_everywhere_equally_often(n):
    trials = 400 * n
    keys = np.repeat(np.arange(trials, dtype=np.uint64), 3)
    where = shuffle_index(np.tile([0, 1, n - 1], trials), n, keys).reshape(-1, 3)
    for column in where.T:
        chi2 = ((np.bincount(column, minlength=n) - 400) ** 2 / 400).sum()
        assert abs(chi2 - (n - 1)) < 6 * np.sqrt(2 * (n - 1))         # mean and deviation of chi-square with n - 1 degrees of freedom
    distance = (where[:, 1] - where[:, 0]) % n                         # neighbors, too, end up at every distance
    chi2 = ((np.bincount(distance, minlength=n)[1:] - trials / (n - 1)) ** 2 / (trials / (n - 1))).sum()
    assert abs(chi2 - (n - 2)) < 6 * np.sqrt(2 * (n - 2))


# batches

shapes = st.tuples(st.integers(2, 400), st.integers(1, 20), st.integers(1, 9)).filter(lambda s: s[0] > s[1])


@given(shapes, st.integers(0, 2**63), st.integers(0, 3), st.booleans())
def test_an_epoch_brings_every_target_once(shape, seed, epoch, shuffle):
    n, T, B = shape
    loader = BatchLoader(np.arange(n), T, B, seed=seed, shuffle=shuffle)
    N = loader.plan.n_windows
    rows = [row for step in range(epoch * N // B, -(-(epoch + 1) * N // B)) for row in zip(*loader.batch(step))]
    x, y = (torch.stack(part) for part in zip(*rows[epoch * N % B:][:N]))
    assert torch.equal(y[y != IGNORE].sort().values, torch.arange(1, n))
    assert torch.equal(y[y != IGNORE], x[y != IGNORE] + 1)


@few
@given(shapes, st.integers(0, 5), st.integers(0, 10**9), st.data())
def test_ranks_partition_the_batch(shape, seed, step, draw):
    n, T, B = shape
    world = draw.draw(st.integers(1, B))
    file_like = np.arange(n)
    whole = BatchLoader(file_like, T, B, seed=seed).batch(step)
    parts = [BatchLoader(file_like, T, B, seed=seed, rank=k, world_size=world).batch(step) for k in range(world)]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole[0]) and torch.equal(torch.cat([y for _, y in parts]), whole[1])
    assert max(len(x) for x, _ in parts) - min(len(x) for x, _ in parts) <= 1


@few
@given(shapes, st.lists(st.integers(0, 3000), min_size=1, max_size=8))
def test_batches_do_not_depend_on_what_was_asked_before(shape, steps):
    n, T, B = shape
    used = BatchLoader(np.arange(n), T, B, seed=3)
    for step in steps:
        fresh = BatchLoader(np.arange(n), T, B, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(used.batch(step), fresh.batch(step)))


@few
@given(shapes, st.integers(0, 12))
def test_resuming_anywhere_equals_never_stopping(shape, stop):
    n, T, B = shape
    def forever(loader):
        while True: yield from loader
    through = list(itertools.islice(forever(BatchLoader(np.arange(n), T, B)), stop + 6))
    first = BatchLoader(np.arange(n), T, B)
    for _ in itertools.islice(forever(first), stop): pass
    second = BatchLoader(np.arange(n), T, B)
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {'step': stop}
    for (a, b), (c, d) in zip(through[stop:], forever(second)): assert torch.equal(a, c) and torch.equal(b, d)


@few
@given(shapes)
def test_length_is_the_number_of_batches(shape):
    n, T, B = shape
    loader = BatchLoader(np.arange(n), T, B)
    for _ in range(3):
        length = len(loader)
        assert length == sum(1 for _ in loader)
    assert -(-3 * loader.plan.n_windows // B) <= loader.step + 3


def test_epochs_and_seeds_reshuffle():
    def epoch(e, seed): return np.concatenate([BatchPlan(60, 4, seed).windows(s) for s in range(15 * e, 15 * e + 15)]).tolist()
    orders = [epoch(e, seed) for e in range(4) for seed in (0, 1, -1, 2**64 + 5)]
    assert len({tuple(o) for o in orders}) == len(orders) and all(sorted(o) == list(range(60)) for o in orders)
    assert np.concatenate([BatchPlan(60, 4, shuffle=False).windows(s) for s in range(15)]).tolist() == list(range(60))


@settings(max_examples=40)
@given(documents.filter(lambda d: sum(map(len, d)) > 8), st.integers(1, 7), st.integers(0, 9))
def test_documents_in_rows_against_brute_force(tmp_path_factory, docs, T, step):
    with TokenFile.open(write(tmp_path_factory.mktemp('t')/'x.tok', docs)) as file:
        owner = [i for i, ids in enumerate(docs) for _ in ids]
        crossing, separate = BatchLoader(file, T, 3), BatchLoader(file, T, 3, cross_documents=False)
        (x, y), (x2, y2), segments = crossing.batch(step), separate.batch(step), separate.segments(step)
        for row, start in enumerate(separate.starts(step)):
            assert x[row].tolist() == x2[row].tolist() == file.ids[start:start + T].tolist()
            assert segments[row].tolist() == owner[start:start + T]
            for j in range(T):
                expected = int(y[row, j]) if owner[start + j] == owner[start + j + 1] else IGNORE
                assert int(y2[row, j]) == expected
        del x, y, x2, y2


def test_batches_are_contiguous_int64_of_their_own(tmp_path):
    file = TokenFile.open(write(tmp_path/'x.tok', [range(300)]))
    x, y = BatchLoader(file, 10, 4).batch(0)
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous() and x.shape == y.shape == (4, 10)
    x.zero_()                                                         # the caller may write; the file is not touched
    assert file.ids.tolist() == list(range(300))


def test_batches_against_torch_dataloader(tmp_path):
    file = TokenFile.open(write(tmp_path/'x.tok', [np.random.default_rng(0).integers(0, 300, 64 * 50 + 1)]))
    loader = BatchLoader(file, 64, 5, seed=11)
    dataset = torch.utils.data.TensorDataset(*(torch.tensor(np.array(part, np.int64)) for part in windows(file.ids, 64)))
    order = np.concatenate([loader.plan.windows(step) for step in range(len(loader))]).tolist()
    peer = list(torch.utils.data.DataLoader(dataset, batch_size=5, sampler=order))
    ours = list(loader)
    assert len(peer) == len(ours) == 10 and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(ours, peer))


@pytest.mark.parametrize('options, words', [
    (dict(vocab_size=299), "x.tok has ids up to 299, the model's vocabulary ends at 298"),
    (dict(context_length=300), 'a window of 300 tokens and its last target need 301 tokens; x.tok has 300'),
    (dict(context_length=0), 'context_length is 0'), (dict(batch_size=0), 'batch of 0 rows'),
    (dict(rank=2, world_size=2), 'rank 2 is out of range: 2 ranks are numbered 0 to 1'), (dict(rank=-1), 'rank -1 is out of range'),
    (dict(world_size=0), 'world_size is 0'), (dict(world_size=5), 'a batch of 4 rows cannot be shared by 5 ranks')])
def test_loader_says_what_is_wrong(tmp_path, options, words):
    file = TokenFile.open(write(tmp_path/'x.tok', [range(300)]))
    with pytest.raises(ValueError, match=words): BatchLoader(file, **{'context_length': 10, 'batch_size': 4, **options})


def test_loader_checks_arrays_and_steps():
    with pytest.raises(ValueError, match="token id 9 at position 2 is outside the model's vocabulary: ids run from 0 to 8"): BatchLoader([1, 2, 9], 1, 1, vocab_size=9)
    with pytest.raises(ValueError, match='token id -4 at position 1'): BatchLoader([1, -4, 9], 1, 1)
    with pytest.raises(ValueError, match='empty corpus'): BatchLoader([], 1, 1)
    with pytest.raises(ValueError, match='step is -1'): BatchLoader([1, 2, 3], 1, 1).batch(-1)
    BatchLoader([1, 2, 8], 1, 1, vocab_size=9)
