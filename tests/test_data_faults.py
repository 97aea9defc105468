"What can happen to a token file: a kill at any moment, a cut at every byte, a flip of every bit, a full disk, a forged header."
import contextlib, os, random, struct, subprocess, sys, time, zlib
from pathlib import Path

import pytest

from llm_from_scratch import data
from llm_from_scratch.data import HEADER_SIZE, MAGIC, TokenFile, TokenHeader, read_header
from llm_from_scratch.text import CharTokenizer

INPUTS = []
ROOT = Path(data.__file__).parent.parent
pytestmark = pytest.mark.portable


@pytest.fixture
def small(tmp_path):
    path = tmp_path/'small.tok'
    with TokenFile.create(path, vocab_size=300) as file:
        for ids in [1, 2, 299], [], [5] * 6: file.append(ids)
    return path


def test_the_header_says_where_everything_is(small):
    with open(small, 'rb') as file: header = read_header(file, 'small')
    assert header.offsets_start == HEADER_SIZE + 24 and header.file_size == small.stat().st_size == HEADER_SIZE + 24 + 4 * 8
    assert header.pack() == small.read_bytes()[:HEADER_SIZE] and len(header.pack()) == HEADER_SIZE == 128
    with pytest.raises(ValueError, match='small does not say which tokenizer'): header.check_tokenizer(CharTokenizer.train(['ab']), 'small')


def killed(code, ready, delay):
    "Run Python code, kill it without warning `delay` seconds after `ready()` holds."
    child = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    try:
        while not ready():
            assert child.poll() is None, 'the writer stopped by itself'
            time.sleep(.002)
        time.sleep(delay)
        assert child.poll() is None, 'the writer stopped by itself'
    finally: child.kill(); child.wait()


def test_kill_while_replacing_leaves_one_file_or_the_other(tmp_path):
    path = tmp_path/'x.tok'
    code = f'''
from llm_from_scratch.data import TokenFile
for version in range(1, 10**6):
    with TokenFile.create({str(path)!r}, vocab_size=10**6) as file:
        for _ in range(20 + version % 7): file.append([version] * 1000)
'''
    seen, rng = set(), random.Random(0)
    for round in range(6):
        before = path.stat().st_mtime_ns if path.exists() else 0
        def ready():                                                  # a new file, of this version at least
            if not path.exists() or path.stat().st_mtime_ns == before: return False
            with TokenFile.open(path) as file: return file.ids[0] > round % 3
        killed(code, ready, rng.random() / 20)
        with TokenFile.open(path, verify=True) as file:
            versions = set(file.ids.tolist())
            assert len(versions) == 1 and len(file) == 20 + min(versions) % 7
            seen |= versions
    assert len(seen) > 1                                              # it was killed at different moments


def test_kill_while_extending_keeps_what_was_there(tmp_path):
    path = tmp_path/'x.tok'
    with TokenFile.create(path, vocab_size=1000) as file: file.append([0] * 100)
    code = f'''
from llm_from_scratch.data import TokenFile
while True:
    with TokenFile.extend({str(path)!r}) as file:
        n = file.n_documents
        for i in range(3): file.append([(n + i) % 1000] * 100)
'''
    rng, length = random.Random(1), 1
    for _ in range(4):
        before = path.stat().st_size
        killed(code, lambda: path.stat().st_size > before, rng.random() / 20)
        with TokenFile.open(path, verify=True) as file:
            assert len(file) % 3 == 1 and len(file) > length
            assert all((ids == i % 1000).all() and len(ids) == 100 for i, ids in enumerate(file))
            length = len(file)


def test_truncation_at_every_byte_is_named(small):
    whole = small.read_bytes()
    for n in range(len(whole)):
        small.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='small.tok is (truncated inside its (header|ids|document offsets)|not a token file)') as error: TokenFile.open(small)
        expected = 'not a token' if n == 0 else 'header' if n < HEADER_SIZE else 'its ids' if n < HEADER_SIZE + 24 else 'its document offsets'
        assert expected in str(error.value), n
    small.write_bytes(whole + b'\0')
    with pytest.raises(ValueError, match=f'longer than its header says: {len(whole) + 1} bytes, expected {len(whole)}'): TokenFile.open(small)


def test_every_flipped_bit_is_found_and_located(small):
    whole = small.read_bytes()
    ids, offsets = HEADER_SIZE, HEADER_SIZE + 24                      # 9 ids of 2 bytes, padded to 24
    for bit in range(8 * len(whole)):
        at = bit // 8
        small.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit % 8]) + whole[at + 1:])
        with pytest.raises(ValueError) as error: TokenFile.open(small, verify=True)
        part = 'not a token file' if at < 8 else 'version' if at < 12 else 'header' if at < ids else 'ids part' if at < offsets else 'document offsets part'
        assert part in str(error.value), (bit, str(error.value))
        if at < ids:
            with pytest.raises(ValueError): TokenFile.open(small)     # the header is checked every time


def test_extending_a_damaged_file_is_refused(small):
    broken = bytearray(small.read_bytes()); broken[HEADER_SIZE] ^= 1
    small.write_bytes(broken)
    with pytest.raises(ValueError, match='its ids part'):
        with TokenFile.extend(small) as file: file.append([1])
    assert small.read_bytes() == broken and list(small.parent.iterdir()) == [small]


def test_an_exception_or_a_full_disk_keeps_the_old_file(small, monkeypatch):
    whole = small.read_bytes()
    for use in TokenFile.extend(small), TokenFile.create(small, vocab_size=9):
        with pytest.raises(KeyboardInterrupt):
            with use as file: file.append([1, 2]); raise KeyboardInterrupt
        assert small.read_bytes() == whole and list(small.parent.iterdir()) == [small]
    def full(handle): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        with TokenFile.extend(small) as file: file.append([1, 2])
    assert small.read_bytes() == whole and list(small.parent.iterdir()) == [small]


@pytest.mark.skipif(sys.platform == 'win32', reason='there is no such limit on Windows')
def test_a_really_full_disk(tmp_path):
    path = tmp_path/'x.tok'
    with TokenFile.create(path, vocab_size=10) as file: file.append([1] * 1000)
    whole = path.read_bytes()
    code = f'''
import resource, signal
from llm_from_scratch.data import TokenFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with TokenFile.extend({str(path)!r}) as file:
        while True: file.append([2] * 1000)
except OSError as e: print("stopped:", type(e).__name__)
'''
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.stdout == 'stopped: OSError\n', out.stderr
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_data_is_on_the_disk_before_the_name_is(small, monkeypatch):
    "The order of events: all bytes written, then fsync, then the new name, then fsync of the folder."
    events, real = [], os.replace
    fsync = os.fsync
    def note_fsync(handle): events.append(('fsync', os.fstat(handle).st_size)); fsync(handle)
    def note_replace(a, b): events.append(('replace', Path(a).stat().st_size)); real(a, b)
    monkeypatch.setattr(os, 'fsync', note_fsync); monkeypatch.setattr(os, 'replace', note_replace)
    with TokenFile.extend(small) as file: file.append([1, 2, 3, 4, 5])
    size = small.stat().st_size
    assert events[:2] == [('fsync', size), ('replace', size)]
    if os.name == 'posix': assert [kind for kind, _ in events] == ['fsync', 'replace', 'fsync']


def test_the_old_file_can_be_read_while_a_new_one_takes_its_place(small):
    if os.name == 'nt': pytest.skip('Windows does not replace a file that is mapped')
    with TokenFile.open(small) as old:
        with TokenFile.create(small, vocab_size=9) as file: file.append([7] * 5)
        assert old.ids.tolist() == [1, 2, 299, 5, 5, 5, 5, 5, 5]
        with TokenFile.open(small) as new: assert new.ids.tolist() == [7] * 5


def forge(path, body, **fields):
    header = TokenHeader(**{**dict(itemsize=2, vocab_size=300, n_tokens=4, n_documents=1, fingerprint=bytes(32), ids_crc=zlib.crc32(body[:8]), offsets_crc=zlib.crc32(body[8:])), **fields})
    path.write_bytes(header.pack() + body)


@pytest.mark.parametrize('fields, offsets, words', [
    (dict(itemsize=3), (0, 4), 'ids of 3 bytes, expected 2 or 4'), (dict(n_tokens=2**60), (0, 4), 'truncated'), (dict(n_documents=2**61), (0, 4), 'truncated'),
    (dict(n_documents=2), (0, 9, 4), 'document offsets'), (dict(), (1, 4), 'document offsets'), (dict(), (0, 5), 'document offsets'),
    (dict(), (0, 4), None)])
def test_a_forged_header_is_not_believed(tmp_path, fields, offsets, words):
    path = tmp_path/'x.tok'
    forge(path, struct.pack('<4H', 1, 2, 3, 4) + struct.pack(f'<{len(offsets)}q', *offsets), **fields)
    with contextlib.nullcontext() if words is None else pytest.raises(ValueError, match=words): TokenFile.open(path, verify=True).close()


def test_ids_beyond_the_vocabulary_of_a_forged_file(tmp_path):
    path = tmp_path/'x.tok'
    forge(path, struct.pack('<4H', 1, 2, 300, 4) + struct.pack('<2q', 0, 4))
    with pytest.raises(ValueError, match='token id 300 at position 2'): TokenFile.open(path, verify=True)


def test_another_version_is_named(small):
    data = bytearray(small.read_bytes()); data[8] = 2
    small.write_bytes(data)
    with pytest.raises(ValueError, match='version 2 of the token file format; this library reads version 1'): TokenFile.open(small)


@pytest.mark.parametrize('content', [b'', b'hello', b'\x93NUMPY\x01\x00' + bytes(200), MAGIC.replace(b'\r\n', b'\n') + bytes(200), 'ein Text ' * 50])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path/'x.tok'
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match='x.tok is not a token file: it starts with'): TokenFile.open(path)
    with pytest.raises(FileNotFoundError): TokenFile.open(tmp_path/'missing.tok')


def test_a_failed_open_holds_nothing(small):
    broken = bytearray(small.read_bytes()); broken[-1] ^= 1
    small.write_bytes(broken)
    with pytest.raises(ValueError): TokenFile.open(small, verify=True)
    small.unlink()                                                    # on Windows this fails while something maps the file
    assert not small.exists()
