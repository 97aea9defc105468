"""Files: written whole or not at all, through links and into pipes, with the user's permissions; checksums; configurations as JSON."""
import hashlib, json, math, os, stat, subprocess, sys, threading, zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from shapes import unchecked

from llm_from_scratch.bpe import BPETokenizer
from llm_from_scratch.data import TokenFile
from llm_from_scratch.files import (BelowOne, Config, NonNegativeFloat, NonNegativeInt, OneOf, PositiveInt, PositiveShare, check_checksum, check_fields, checked, checksum, digest,
                                    file_checksum, parse_json, read_json, replacing, revived, write_text)
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
