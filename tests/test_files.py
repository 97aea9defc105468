"""Files: written whole or not at all, through links and into pipes, with the user's permissions; checksums; configurations as JSON."""
import hashlib, json, math, os, stat, subprocess, sys, threading, zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st
from shapes import unchecked

from llm_from_scratch import files
from llm_from_scratch.bpe import BPETokenizer, load_tokenizer, model_folder
from llm_from_scratch.data import TokenFile
from llm_from_scratch.files import (BelowOne, Config, NonNegativeFloat, NonNegativeInt, OneOf, PositiveInt, PositiveShare, alone_in, check_checksum, check_fields, checked, checksum,
                                    digest, file_checksum, finish_replacing, is_occupied, json_text, parse_json, read_json, reading, replacing, replacing_together, revived, write_text)
from llm_from_scratch.generation import Sampler
from llm_from_scratch.gpt import GPTConfig
from llm_from_scratch.positions import RopeScaling
from llm_from_scratch.text import CharTokenizer, SpacedWordTokenizer, WordTokenizer
from llm_from_scratch.training import TrainConfig

posix = pytest.mark.skipif(os.name != 'posix', reason='links, pipes and permissions of POSIX')


def mode(path): return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    "Sets the umask, and puts it back."
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def token_file(path):
    with TokenFile.create(path, vocab_size=9) as file: file.append([1, 2, 3])


WRITERS = {'text': lambda path: write_text(path, 'x'), 'chars': lambda path: CharTokenizer.train(['abc']).save(path), 'words': lambda path: WordTokenizer.train(['a b']).save(path),
           'bpe': lambda path: BPETokenizer.train('low lower', 258).save(path), 'hf': lambda path: BPETokenizer.train('low lower', 258).to_hf(path),
           'hf words': lambda path: SpacedWordTokenizer.train(['a b']).to_hf(path), 'tokens': token_file}
each_writer = pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)


# Atomic writes ----------------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'t.json'
    write_text(path, 'old')
    with pytest.raises(UnicodeEncodeError): write_text(path, 'half \ud800')
    monkeypatch.setattr(os, 'fsync', lambda handle: (_ for _ in ()).throw(OSError('no space left')))
    with pytest.raises(OSError, match='no space'): write_text(path, 'new')
    assert path.read_text(encoding='utf-8') == 'old' and os.listdir(tmp_path) == ['t.json']


def test_what_is_written_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    done = []
    for name in ('fsync', 'replace'): monkeypatch.setattr(os, name, lambda *a, name=name, do=getattr(os, name): (done.append(name), do(*a)))
    write_text(tmp_path/'t.txt', 'x')
    assert done == ['fsync', 'replace', 'fsync']                   # the bytes, the name, the folder


@posix
@each_writer
@pytest.mark.parametrize('mask', [0o022, 0o027, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask, write, mask):
    umask(mask)
    write(tmp_path/'new')
    assert mode(tmp_path/'new') == 0o666 & ~mask


@posix
def test_a_file_that_was_there_keeps_its_permissions(tmp_path, umask):
    path = tmp_path/'secret'
    path.write_text('old'); path.chmod(0o600)
    write_text(path, 'new')
    assert mode(path) == 0o600 and path.read_text() == 'new'


@posix
@each_writer
def test_a_link_is_written_through(tmp_path, write):
    (tmp_path/'there').mkdir()
    target, link, chain = tmp_path/'there'/'file', tmp_path/'link', tmp_path/'chain'
    target.write_text('old'); link.symlink_to('there/file'); chain.symlink_to(link)
    write(chain)
    assert chain.is_symlink() and link.is_symlink() and not target.is_symlink() and target.read_bytes() not in (b'old', b'')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['chain', 'link', 'there'] and os.listdir(tmp_path/'there') == ['file']


@posix
def test_a_link_to_nothing_makes_what_it_names(tmp_path):
    (tmp_path/'link').symlink_to('later')
    write_text(tmp_path/'link', 'x')
    assert (tmp_path/'link').is_symlink() and (tmp_path/'later').read_text() == 'x'


@posix
@each_writer
def test_a_pipe_is_written_into_and_stays_one(tmp_path, write):
    write(tmp_path/'file')
    os.mkfifo(pipe := tmp_path/'pipe')
    said = []
    reader = threading.Thread(target=lambda: said.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe)
    reader.join(20)
    assert said == [(tmp_path/'file').read_bytes()] and stat.S_ISFIFO(pipe.stat().st_mode) and sorted(os.listdir(tmp_path)) == ['file', 'pipe']


@posix
def test_nothing_reaches_a_pipe_if_the_writer_fails(tmp_path):
    os.mkfifo(pipe := tmp_path/'pipe')
    with pytest.raises(ZeroDivisionError), replacing(pipe) as file:     # nobody reads: opening it would wait
        file.write(b'x'); raise ZeroDivisionError
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@posix
@each_writer
def test_a_device_is_written_into_and_stays_one(write):
    before = os.stat('/dev/null')
    write('/dev/null')
    assert os.stat('/dev/null').st_ino == before.st_ino and stat.S_ISCHR(os.stat('/dev/null').st_mode)


@posix
def test_standard_output_is_a_path_too():
    code = 'from llm_from_scratch.files import write_text; write_text("/dev/stdout", "said")'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True).stdout == 'said'


def test_a_folder_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(IsADirectoryError, match=tmp_path.name), replacing(tmp_path): pytest.fail('the block ran')


def test_long_names_and_missing_folders(tmp_path):
    write_text(tmp_path/('é' * 120), 'x')
    with pytest.raises(FileNotFoundError): write_text(tmp_path/'no'/'x', 'x')
    assert len(os.listdir(tmp_path)) == 1


# Locks ------------------------------------------------------------------------------------------------------------

def in_another_process(folder, wish='pass'):
    code = f'import os; from llm_from_scratch.files import alone_in\nwith alone_in({str(folder)!r}): print("in", flush=True); {wish}'
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)


def test_another_process_is_kept_out_until_we_leave(tmp_path):
    with alone_in(tmp_path/'run'), alone_in(tmp_path/'run'):
        done = in_another_process(tmp_path/'run')
        assert done.stdout == '' and done.stderr.endswith(f"BlockingIOError: {tmp_path/'run'} is in use by another process\n")
        assert not is_occupied(tmp_path/'run')                     # by others
    assert in_another_process(tmp_path/'run').stdout == 'in\n'


def test_a_lock_dies_with_its_process_and_the_file_it_leaves_means_nothing(tmp_path):
    assert in_another_process(tmp_path, 'os._exit(9)').returncode == 9 and (tmp_path/'.lock').exists()
    assert not is_occupied(tmp_path) and not is_occupied(tmp_path/'none')
    with open(tmp_path/'.lock', 'ab') as other:                    # as another process would have it
        assert files._take(other) and is_occupied(tmp_path)
    with alone_in(tmp_path): pass
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path): raise ZeroDivisionError
    with alone_in(tmp_path): pass


@posix
def test_a_file_system_without_locks_lets_everybody_in(tmp_path, monkeypatch):
    import errno, fcntl
    def unknown(*_): raise OSError(errno.ENOLCK, 'no locks available')
    monkeypatch.setattr(fcntl, 'flock', unknown)
    with alone_in(tmp_path): assert in_another_process(tmp_path).stdout == 'in\n' and not is_occupied(tmp_path)
@posix
def test_a_hard_link_is_a_backup_that_stays(tmp_path):
    (tmp_path/'a').write_text('old'); os.link(tmp_path/'a', tmp_path/'backup')
    write_text(tmp_path/'a', 'new')
    assert ((tmp_path/'a').read_text(), (tmp_path/'backup').read_text()) == ('new', 'old')


@posix
def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path/'file').write_text('x'); (tmp_path/'loop').symlink_to('loop'); (tmp_path/'link').symlink_to('no/where')
    for name in 'none/x', 'file/x', 'loop', 'link', 'x' * 300:
        with pytest.raises(OSError) as raised: write_text(tmp_path/name, 'new')
        assert (raised.value.filename, raised.value.filename2) == (str(tmp_path/name), None)
    assert (tmp_path/'loop').is_symlink() and sorted(os.listdir(tmp_path)) == ['file', 'link', 'loop']


@posix
def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    def old(path):
        os.utime(path, (0, 0))
        return path
    left = [old(tmp_path/'.x.txt.00000001.tmp') for _ in [(tmp_path/'.x.txt.00000001.tmp').touch()]]
    (folder := tmp_path/'.new.00000002.tmp').mkdir(); (folder/'half').touch(); old(folder)
    (other := tmp_path/'.y.00000003.tmp').touch(); old(other)
    with replacing(tmp_path/'x.txt') as file, replacing_together(tmp_path) as beside:
        (beside/'z').touch()
        mine = old(next(p for p in tmp_path.glob('.x.txt.*.tmp')))
        old(beside)
        for n in 1, 2:
            write_text(tmp_path/'x.txt', str(n))
            with replacing_together(tmp_path) as more: (more/'w').touch()
        assert mine.exists() and beside.exists() and not left[0].exists() and not folder.exists() and other.exists()
        file.write(b'last')
    assert (tmp_path/'x.txt').read_text() == 'last' and sorted(os.listdir(tmp_path)) == ['.y.00000003.tmp', 'w', 'x.txt', 'z']


# Several files together -------------------------------------------------------------------------------------------

def write_both(folder, word):
    with replacing_together(folder) as beside:
        for name in 'ab': write_text(beside/name, word)


def test_several_files_take_their_places_together_or_not_at_all(tmp_path):
    folder = tmp_path/'deep'/'pair'
    with pytest.raises(ZeroDivisionError), replacing_together(folder): raise ZeroDivisionError
    assert not folder.exists()
    write_both(folder, 'old'); (folder/'mine').write_text('kept')
    with pytest.raises(ZeroDivisionError), replacing_together(folder) as beside:
        write_text(beside/'a', 'new'); raise ZeroDivisionError
    assert {path.name: path.read_text() for path in folder.iterdir()} == {'a': 'old', 'b': 'old', 'mine': 'kept'}
    write_both(folder, 'new')
    assert {path.name: path.read_text() for path in folder.iterdir()} == {'a': 'new', 'b': 'new', 'mine': 'kept'}
    (folder/'a').unlink(); (folder/'a').mkdir()
    with pytest.raises(IsADirectoryError): write_both(folder, 'third')
    assert (folder/'b').read_text() == 'new' and sorted(os.listdir(folder)) == ['a', 'b', 'mine']


@posix
def test_files_of_a_folder_keep_links_pipes_and_permissions(tmp_path):
    write_both(tmp_path, 'old')
    (tmp_path/'a').rename(tmp_path/'there'); (tmp_path/'a').symlink_to('there'); (tmp_path/'b').chmod(0o600)
    write_both(tmp_path, 'new')
    assert (tmp_path/'a').is_symlink() and (tmp_path/'there').read_text() == 'new' == (tmp_path/'b').read_text() and mode(tmp_path/'b') == 0o600
    assert sorted(os.listdir(tmp_path)) == ['a', 'b', 'there']


def killed_at(step, do):
    "Run `do` in a child that dies, with nothing cleaned up, at its call number `step` of the system; whether it lived to the end."
    child = os.fork()
    if child: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count = iter(range(1000))
    def dying(call):
        def called(*a, **k):
            if next(count) == step: os._exit(9)
            return call(*a, **k)
        return called
    for name in 'open', 'mkdir', 'rename', 'replace', 'unlink', 'rmdir', 'fsync': setattr(os, name, dying(getattr(os, name)))
    try: do(); os._exit(0)
    finally: os._exit(1)


@posix
def test_a_kill_between_any_two_steps_leaves_all_old_or_all_new(tmp_path):
    seen, lived, step = set(), False, 0
    while not lived:
        write_both(tmp_path, 'old')
        lived = killed_at(step, lambda: write_both(tmp_path, 'new'))
        finish_replacing(tmp_path)
        seen.add(words := tuple((tmp_path/name).read_text() for name in 'ab'))
        assert words in {('old', 'old'), ('new', 'new')} and not (tmp_path/'.complete').exists(), step
        step += 1
    assert len(seen) == 2 and step > 12


@posix
def test_readers_finish_what_a_kill_interrupted(tmp_path):
    "A token file, a tokenizer and the folder of a model: whichever is opened first."
    for reader in (lambda: TokenFile.open(tmp_path/'x.tok').close(), lambda: load_tokenizer(tmp_path/'tokenizer.json'), lambda: model_folder(tmp_path)):
        with replacing_together(tmp_path) as beside:
            token_file(beside/'x.tok'); BPETokenizer.train('low lower', 258).save(beside/'tokenizer.json')
        os.mkdir(tmp_path/'.complete')
        write_text(tmp_path/'.complete'/'note', 'new')
        reader()
        assert (tmp_path/'note').read_text() == 'new' and not (tmp_path/'.complete').exists()
        (tmp_path/'note').unlink()


# Checksums --------------------------------------------------------------------------------------------------------

def test_the_published_check_value():
    assert checksum(b'123456789') == 0xCBF43926 and checksum(b'') == 0
    check_checksum(0xCBF43926, 0xCBF43926, 'it')
    with pytest.raises(ValueError, match='it has checksum cbf43926, expected 00000001'): check_checksum(0xCBF43926, 1, 'it')


@given(st.lists(st.binary()))
def test_checksum_of_parts_against_zlib(parts):
    found = 0
    for part in parts: found = checksum(memoryview(part), found)
    assert found == zlib.crc32(b''.join(parts))


def test_checksum_of_a_file_of_several_blocks(tmp_path):
    data = os.urandom(3 << 20) + b'x'
    (tmp_path/'x').write_bytes(data)
    assert file_checksum(tmp_path/'x') == zlib.crc32(data)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_digest_against_hashlib(content):
    assert digest(content) == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == digest(dict(reversed(content.items())))


# Configurations ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Inner(Config):
    base: float = 1.0

@dataclass(frozen=True)
class Outer(Config):
    size: int
    rates: tuple[float, ...] = ()
    inner: Inner | None = None


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.integers(), st.lists(FINITE), st.none() | FINITE)
def test_a_configuration_comes_back(size, rates, base):
    outer = Outer(size, tuple(rates), None if base is None else Inner(base))
    assert Outer.from_json(outer.to_json()) == outer == Outer.from_dict(json.loads(outer.to_json()))


@pytest.mark.parametrize('text, words', [
    ('{"siz": 1}', "no field 'siz': did you mean 'size'"), ('{"size": 1, "inner": {"bas": 2}}', "no field 'bas': did you mean 'base'"), ('{"size": 1, "zzz": 2}', 'expected one of size, rates, inner'),
    ('[1]', 'expected a JSON object, got list'), ('3', 'got int'), ('null', 'got NoneType'), ('{', 'not JSON: '), ('', 'not JSON: '), ('[' * 100_000, 'not JSON: ')])
def test_what_is_no_configuration(text, words):
    with pytest.raises(ValueError, match=words): Outer.from_json(text)


def test_unknown_fields_are_refused_wherever_they_are_given():
    with pytest.raises(ValueError, match="did you mean 'size'"): Outer(siz=1)
    with pytest.raises(ValueError, match="has no part 'b': expected one of xyz"): check_fields(['xyz'], ['b'], 'no part')
    with pytest.raises(ValueError, match='expected a JSON object, got int'): revived(Outer, 3)
    check_fields([f.name for f in fields(Outer)], ['size', 'inner'])


@pytest.mark.parametrize('text', ['', '[]', '{"size": {}}', '{"size": [], "rates": 3}', '{"other": 1}', '{"size": 1e999}', '[' * 100_000])
def test_wrong_content_is_told_with_the_name_of_the_file(tmp_path, text):
    (tmp_path/'x.json').write_text(text)
    with pytest.raises(ValueError, match='x.json is not a size: '), reading(tmp_path/'x.json', 'a size'):
        int(read_json(tmp_path/'x.json')['size'] + 0)
    with pytest.raises(FileNotFoundError), reading('x', 'a size'): open(tmp_path/'none')


@example({'loss': float('nan'), 'ends': [float('-inf'), (1.0, float('inf'))]})
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9))
def test_json_is_json(content):
    def strict(word): raise ValueError(word)
    read = json.loads(json_text(content), parse_constant=strict)
    assert read == json.loads(json.dumps(content), parse_constant=lambda word: None)


@pytest.mark.parametrize('value, hint, kept', [
    (np.int64(3), int, 3), (np.uint16(3), NonNegativeInt, 3), (np.array(3), int, 3), (np.float32(.5), float, .5), (np.bool_(True), bool, True), (3, float, 3.0), (np.int8(3), float, 3.0), (None, int | None, None),
    (np.float64(.5), BelowOne, .5), ([np.int64(1), 2], Sequence[int], (1, 2)), (np.array([.5, 1]), tuple[float, float], (.5, 1.0)), ({np.int64(1): np.float32(2)}, Mapping[int, float], {1: 2.0}),
    (10**400, int, 10**400), ('a', Literal['a', 'b'], 'a'), ({'base': 2}, Inner, Inner(2.0)), (np.int64(2), Any, 2), ('x', Any, 'x')])
def test_what_fits_is_kept_as_pythons_own(value, hint, kept):
    found = checked(value, hint, 'it')
    assert repr(found) == repr(kept)


@pytest.mark.parametrize('value, hint, words', [
    ('1', int, 'a whole number'), (1.0, int, 'a whole number'), (True, int, 'a whole number'), (None, int, 'a whole number'), (0, PositiveInt, 'a whole number of at least 1'), (True, float, 'a number'),
    (math.nan, float, 'a number'), (math.inf, float, 'a number'), (10**400, float, 'a number'), (np.float32('nan'), NonNegativeFloat, 'a number of at least 0'), (1, bool, 'True or False'), ('false', bool, 'True or False'),
    (1.0, BelowOne, r'a number in \[0, 1\)'), (0, PositiveShare, r'a number in \(0, 1\]'), ('c', Literal['a', 'b'], "'a' or 'b'"), ([], Annotated[str, OneOf({'x': 1})], 'one of x'), ('y', Annotated[str, OneOf({'x': 1})], 'one of x'),
    (-1, NonNegativeInt | None, 'a whole number of at least 0 or None'), ('12', Sequence[int], 'a list, each a whole number'), ([1, '2'], Sequence[int], 'a list, each a whole number'), ({1: 2}, Sequence[int], 'a list, each a whole number'),
    ((.5,), tuple[BelowOne, BelowOne], r'a list of 2: a number in \[0, 1\), a number in \[0, 1\)'), (3, Mapping[str, int], 'a dict'), (3, Inner, 'of type Inner'), (np.array([1, 2]), int, 'a whole number')])
def test_what_does_not_fit_is_named(value, hint, words):
    with pytest.raises(ValueError, match=f'^it must be {words}, got '): checked(value, hint, 'it')


def test_a_name_that_is_added_later_is_known():
    parts = {}
    with pytest.raises(ValueError): checked('new', Annotated[str, OneOf(parts)], 'part')
    parts['new'] = 1
    assert checked('new', Annotated[str, OneOf(parts)], 'part') == 'new'


def test_a_field_of_another_configuration_says_what_is_wrong_in_it():
    assert Outer(1, inner={'base': np.float64(2)}) == Outer(1, inner=Inner(2.0))
    with pytest.raises(ValueError, match="base must be a number, got 'x'"): Outer(1, inner={'base': 'x'})
    with pytest.raises(ValueError, match='inner must be of type Inner or None, got 3'): Outer(1, inner=3)


CONFIGURATIONS = [(GPTConfig, dict(vocab_size=9, context_length=8, d_model=8, n_layers=1, n_heads=2)), (TrainConfig, dict(steps=9)), (Sampler, {}), (RopeScaling, dict(kind='linear', factor=2.0))]


@pytest.mark.parametrize('kind, given', CONFIGURATIONS)
def test_every_field_of_every_configuration_is_checked_by_name(kind, given):
    for f in fields(kind):
        for wrong in (object(), [object()]):
            with pytest.raises(ValueError, match=f'^{f.name} must be '), unchecked(): kind(**{**given, f.name: wrong})


@pytest.mark.parametrize('kind, given', CONFIGURATIONS)
def test_numbers_of_numpy_make_the_same_configuration(kind, given):
    plainly = kind(**given)
    numbers = {f.name: value for f in fields(kind) if type(value := getattr(plainly, f.name)) in (bool, int, float)}
    with unchecked(): anew = kind(**{**given, **{name: np.array(value)[()] for name, value in numbers.items()}})
    assert anew == plainly and anew.to_json() == plainly.to_json() and len(numbers) > 2
    assert all(type(getattr(anew, name)) is type(value) for name, value in numbers.items())


def test_json_files(tmp_path):
    write_text(tmp_path/'x.json', '{"é": 1}')
    assert read_json(tmp_path/'x.json') == {'é': 1} == parse_json('{"é": 1}')
    (tmp_path/'x.json').write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ValueError): read_json(tmp_path/'x.json')
