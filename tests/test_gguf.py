"GGUF: block types bit for bit as in the package gguf, files of strangers, models and tokenizers as llama.cpp runs them."
import json
import os
import random
import struct
import tracemalloc
import urllib.request
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from shapes import unchecked

from llm_from_scratch.bpe import GPT4_PATTERN, BPETokenizer
from llm_from_scratch.gguf import (PRETOKENIZERS, TYPES, GGUFFile, SparseTokenizer, config_from_gguf, config_to_gguf, dequantize, model_from_gguf, quantize, read_gguf,
                                   tokenizer_from_gguf, tokenizer_to_gguf, write_gguf, write_gguf_tensors)
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.positions import RopeScaling
from llm_from_scratch.weight_maps import META_WEIGHTS, load_weights
from llm_from_scratch.formats import read_llama2c

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
WRITABLE = [name for name, kind in TYPES.items() if kind.write]
MODERN = dict(norm='rmsnorm', positions='rope', feed_forward='swiglu', bias=False, n_kv_heads=2)
FAMILIES = {'llama': dict(MODERN, rope_base=5e5), 'interleaved': dict(MODERN, rope_layout='interleaved', tie_embeddings=False), 'qwen2': dict(MODERN, qkv_bias=True, d_ff=96),
            'qwen3': dict(MODERN, qk_norm=True, norm_eps=1e-6, d_head=32), 'gpt2': dict(), 'linear': dict(MODERN, rope_scaling=RopeScaling('linear', 2.0)),
            'llama3': dict(MODERN, rope_base=5e5, rope_scaling=RopeScaling('llama3', 8.0, 8_192))}


@pytest.fixture(autouse=True)
def shapes_are_checked_once(request):
    "The checks of shapes cost more than the work; the round trips of Llama keep them."
    if request.node.name.startswith('test_a_model_comes_back[llama'): yield
    else:
        with unchecked(): yield


@pytest.fixture(scope='module')
def gguf(): return pytest.importorskip('gguf', reason='the judge is an extra: formats')


@pytest.fixture(scope='module')
def llama_cpp(): return pytest.importorskip('xllamacpp', reason='the judge is an extra: formats')


def model(**options):
    "A small model whose weights matter: matrices of size 1/√D would leave all logits near zero."
    made = GPT(GPTConfig(**{**dict(vocab_size=300, context_length=64, d_model=64, n_layers=2, n_heads=4), **options}), generator=torch.Generator().manual_seed(0))
    for i, p in enumerate(made.parameters()): p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * (0.2 if p.ndim > 1 else 0.1) + (p.ndim == 1)
    return made.eval()


def same_bits(a, b): return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


# Blocks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', TYPES)
def test_dequantize_against_gguf(gguf, name):
    size, rng = TYPES[name].size, np.random.default_rng(0)
    data = rng.integers(0, 256, (40_000 // size, 3 * size), dtype=np.uint8)        # more blocks than are read at once, where they are small
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                            # some scales are infinite or NaN
        assert same_bits(dequantize(data, name), gguf.dequantize(data, gguf.GGMLQuantizationType[name]))
    assert dequantize(data[None], name).shape == (1, len(data), 3 * TYPES[name].block)


numbers = st.floats(-60_000, 60_000, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -2.5, 127.5])


@pytest.mark.parametrize('name', WRITABLE)
@settings(max_examples=12)
@given(x=arrays(np.float32, (3, 64), elements=numbers))
@example(x=np.zeros((3, 64), np.float32))
@example(x=np.full((3, 64), -3.0, np.float32))
@example(x=np.tile(np.arange(-8, 8, 0.25, dtype=np.float32), (3, 1)))               # halves, and two largest ones
def test_quantize_against_gguf(gguf, name, x):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = gguf.quantize(x, gguf.GGMLQuantizationType[name])
        assert same_bits(quantize(x, name), theirs)
    assert quantize(x, name).shape == (3, 64 // TYPES[name].block * TYPES[name].size)


def test_more_blocks_than_are_quantized_at_once(gguf):
    x = np.random.default_rng(0).normal(size=(600, 1024)).astype(np.float32)
    assert same_bits(quantize(x, 'Q4_1'), gguf.quantize(x, gguf.GGMLQuantizationType.Q4_1))
    assert same_bits(dequantize(quantize(x, 'Q4_1'), 'Q4_1'), gguf.dequantize(quantize(x, 'Q4_1'), gguf.GGMLQuantizationType.Q4_1))


def test_a_block_by_hand():
    block = struct.pack('<ee', 0.5, -1.0) + bytes([0x3A] + 15 * [0xF0])
    assert dequantize(np.frombuffer(block, np.uint8), 'Q4_1').tolist() == [4.0] + 15 * [-1.0] + [0.5] + 15 * [6.5]


def test_what_cannot_be_blocks_is_refused():
    x = np.zeros((2, 33))
    with pytest.raises(ValueError, match=r'\(33,\), expected rows of blocks of 32'): quantize(x, 'Q8_0')
    with pytest.raises(ValueError, match='writes no Q4_K: expected one of F32, F16, Q8_0'): quantize(np.zeros(256), 'Q4_K')
    with pytest.raises(ValueError, match="unknown type 'Q3': expected one of F32"): quantize(x, 'Q3')
    with pytest.raises(ValueError, match='70000 does not fit into 16 bits'): quantize(np.full(32, 7e4), 'F16')
    with pytest.raises(ValueError, match='does not fit into 16 bits'): quantize(np.full(32, 1e7), 'Q8_0')
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match='must be finite'): quantize(np.full(32, bad), 'F32')
    with pytest.raises(ValueError, match=r'a multiple of 34 in each, got uint8 of shape \(2, 33\)'): dequantize(np.zeros((2, 33), np.uint8), 'Q8_0')
    with pytest.raises(ValueError, match='rows of bytes'): dequantize(np.zeros((2, 34)), 'Q8_0')


# Files ------------------------------------------------------------------------------------------------------------

VALUES = {'u8': np.uint8(200), 'i8': np.int8(-100), 'u16': np.uint16(60_000), 'i16': np.int16(-30_000), 'u32': np.uint32(4_000_000_000), 'i32': np.int32(-2_000_000_000),
          'f32': np.float32(0.1), 'bool': np.bool_(True), 'text': 'été\n', 'u64': np.uint64(2**64 - 1), 'i64': np.int64(-2**63), 'f64': np.float64(0.1),
          'texts': ['a', '', 'ü'], 'numbers': np.array([1, -2], np.int16), 'bools': [True, False], 'empty': [], 'nested': [[1, 2], [3]], 'words': [['a'], ['b', 'c']]}


def small(path, **metadata):
    tensors = {'a': torch.arange(64.0).reshape(2, 32), 'b': torch.ones(3), 'c': torch.full((2, 2, 32), -1.0)}
    write_gguf_tensors(path, {'k': 1, **metadata}, tensors, {'a': 'Q8_0', 'b': 'F32', 'c': 'F16'})
    return tensors


def plain(value): return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def test_all_types_of_values_come_back(tmp_path):
    small(path := tmp_path/'v.gguf', **VALUES)
    read = GGUFFile(path).metadata
    assert read == {'k': 1, **{key: plain(value) for key, value in VALUES.items()}}
    assert [type(read[key]) for key in ('u8', 'f32', 'bool', 'text')] == [int, float, bool, str]


def test_values_and_tensors_against_gguf(gguf, tmp_path):
    tensors = small(path := tmp_path/'v.gguf', **{key: value for key, value in VALUES.items() if key not in ('nested', 'words', 'empty')})
    theirs = gguf.GGUFReader(path)
    assert {key: field.contents() for key, field in theirs.fields.items() if not key.startswith('GGUF.')} == {
        'k': 1, **{key: plain(value) for key, value in VALUES.items() if key not in ('nested', 'words', 'empty')}}
    kinds = {'u8': 'UINT8', 'i16': 'INT16', 'k': 'UINT32', 'f32': 'FLOAT32', 'f64': 'FLOAT64', 'bool': 'BOOL', 'u64': 'UINT64'}
    assert {key: theirs.fields[key].types[0].name for key in kinds} == kinds
    file = GGUFFile(path)
    for tensor in theirs.tensors:
        assert same_bits(tensor.data, file.stored(tensor.name)) and tuple(reversed(tensor.shape.tolist())) == file.entries[tensor.name].shape
        assert torch.equal(file[tensor.name], tensors[tensor.name]) or tensor.name == 'a'
    assert (file['a'] - tensors['a']).abs().max() < 0.25


@pytest.mark.parametrize('alignment', [8, 64])
def test_alignment_and_version_2(tmp_path, alignment):
    tensors = small(path := tmp_path/'v.gguf', **{'general.alignment': alignment})
    path.write_bytes(path.read_bytes().replace(struct.pack('<4sI', b'GGUF', 3), struct.pack('<4sI', b'GGUF', 2)))
    file = GGUFFile(path)
    assert all(entry.start % alignment == 0 for entry in file.entries.values()) and torch.equal(file['c'], tensors['c'])
    assert [*file] == ['a', 'b', 'c'] and len(file) == 3 and repr(file) == "GGUFFile('v.gguf': 2 keys, 3 tensors)"


def test_tensors_are_read_when_asked_for(tmp_path):
    "A file of 8 GiB, nearly all of it a hole, opens at once, and its small tensor is read."
    path = tmp_path/'large.gguf'
    head = (b'GGUF' + struct.pack('<IQQ', 3, 2, 0) + struct.pack('<Q1sIQIQ', 1, b'x', 1, 2**31, 0, 32) + struct.pack('<Q1sIQIQ', 1, b'y', 1, 2, 0, 0))
    path.write_bytes(head + bytes(-len(head) % 32) + struct.pack('<ff', 1.5, 2.5))
    try: os.truncate(path, 2**33 + 4096)
    except OSError: pytest.skip('this file system has no room for a hole of 8 GiB')
    tracemalloc.start()
    file = GGUFFile(path)
    assert file['y'].tolist() == [1.5, 2.5] and file.entries['x'].n_bytes == 2**33 and tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def head(n_tensors=0, n_keys=0, magic=b'GGUF', version=3): return magic + struct.pack('<IQQ', version, n_tensors, n_keys)
def text(data): return struct.pack('<Q', len(data)) + data
def key(name, kind, data): return text(name) + struct.pack('<I', kind) + data
def tensor(name, shape, number, start): return text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, number, start)
def deep(n): return b''.join(struct.pack('<IQ', 9, 1) for _ in range(n))


ROOM = bytes(4096)
HOSTILE = {
    'nothing': (b'', 'empty'), 'cut in the magic': (b'GG', 'the beginning should take 4 bytes, but the file ends after 2'),
    'another file': (b'PK\x03\x04' + ROOM, r"begins with b'PK\\x03\\x04', expected b'GGUF'"), 'version 1': (head(version=1), 'has version 1, expected 2 or 3'),
    'version 4': (head(version=4), 'version 4'), 'big endian': (head(version=0x03000000), 'version 50331648 and is big endian'),
    'many keys': (head(n_keys=2**60), f'announces {2**60} keys, but only 0 bytes follow'), 'many tensors': (head(n_tensors=2**63) + ROOM, f'announces {2**63} tensors'),
    'as many as fit hardly': (head(n_tensors=200) + ROOM, 'announces 200 tensors'),
    'long key': (head(n_keys=1) + struct.pack('<Q', 2**62) + ROOM, f'announces {2**62} bytes of text'),
    'long text': (head(n_keys=1) + key(b'k', 8, struct.pack('<Q', 2**40)) + ROOM, "the key 'k': at byte 37 it announces 1099511627776 bytes of text"),
    'long array': (head(n_keys=1) + key(b'k', 9, struct.pack('<IQ', 5, 2**40)) + ROOM, "the key 'k': .* announces 1099511627776 values of an array"),
    'long array of texts': (head(n_keys=1) + key(b'k', 9, struct.pack('<IQ', 8, 1000)) + ROOM, 'announces 1000 values of an array'),
    'array of unknown values': (head(n_keys=1) + key(b'k', 9, struct.pack('<IQ', 77, 3)) + ROOM, 'a value has type 77, expected 0 to 12'),
    'arrays without end': (head(n_keys=1) + key(b'k', 9, deep(200)), 'arrays within arrays: expected at most 8'),
    'unknown value': (head(n_keys=1) + key(b'k', 13, ROOM), 'a value has type 13, expected 0 to 12'), 'neither true nor false': (head(n_keys=1) + key(b'k', 7, b'\x02') + ROOM, 'truth value is 2, expected 0 or 1'),
    'cut in a value': (head(n_keys=1) + key(b'k', 10, b'\0\0\0\0'), 'a number should take 8 bytes, but the file ends after 4'),
    'a key twice': (head(n_keys=2) + 2*key(b'k', 0, b'\1'), "has the key 'k' twice"), 'key not UTF-8': (head(n_keys=1) + key(b'\xff', 0, b'\1') + ROOM, 'text at byte 24 is not UTF-8'),
    'text not UTF-8': (head(n_keys=1) + key(b'k', 8, text(b'\xc3')), "the key 'k': the text at byte 37 is not UTF-8"),
    'alignment 0': (head(n_keys=1) + key(b'general.alignment', 4, bytes(4)), 'general.alignment is 0, expected a power of two'),
    'alignment 12': (head(n_keys=1) + key(b'general.alignment', 4, struct.pack('<I', 12)), 'alignment is 12'), 'alignment is a text': (head(n_keys=1) + key(b'general.alignment', 8, text(b'32')), "alignment is '32'"),
    'no dimension': (head(1) + tensor(b't', (), 0, 0) + ROOM, "the tensor 't': it has 0 dimensions, expected 1 to 4"), 'five dimensions': (head(1) + tensor(b't', (1,)*5, 0, 0) + ROOM, 'has 5 dimensions'),
    'empty tensor': (head(1) + tensor(b't', (4, 0), 0, 0) + ROOM, r'its shape is \(0, 4\), expected at least 1'), 'unknown type': (head(1) + tensor(b't', (32,), 16, 0) + ROOM, r'has type 16, expected one of 0 \(F32\)'),
    'half a block': (head(1) + tensor(b't', (33,), 8, 0) + ROOM, 'expected rows of blocks of 32'), 'not aligned': (head(1) + tensor(b't', (1,), 0, 4) + ROOM, 'begins at 4, expected a multiple of 32'),
    'beyond the end': (head(1) + tensor(b't', (2000,), 0, 0) + ROOM, "'t' ends at 8000, but the file has 4"), 'starts beyond the end': (head(1) + tensor(b't', (1,), 0, 2**60) + ROOM, f'ends at {2**60 + 4}'),
    'more than a file holds': (head(1) + tensor(b't', (2**40, 2**40, 2**40, 2**40), 0, 0) + ROOM, f'ends at {2**162}'),
    'overlapping': (head(2) + tensor(b's', (32,), 0, 0) + tensor(b't', (1,), 0, 64) + ROOM, "'t' begins at 64, but 's' ends at 128"),
    'the same place': (head(2) + tensor(b's', (1,), 0, 32) + tensor(b't', (1,), 0, 32) + ROOM, "'t' begins at 32, but 's' ends at 36"),
    'a tensor twice': (head(2) + 2*tensor(b't', (1,), 0, 0) + ROOM, "has the tensor 't' twice"),
}


@pytest.mark.parametrize('data, told', HOSTILE.values(), ids=HOSTILE)
def test_files_that_lie_are_refused(tmp_path, data, told):
    (tmp_path/'liar.gguf').write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=told) as error: GGUFFile(tmp_path/'liar.gguf')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 'liar.gguf is not a GGUF file: ' in str(error.value) and peak < 1 << 20


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp('whole')/'m.gguf'
    tokenizer = BPETokenizer.train('low lower lowest', 262, ['<|endoftext|>'])
    write_gguf(GPT(GPTConfig(vocab_size=264, context_length=8, d_model=32, n_layers=1, n_heads=2, **MODERN)), path, tokenizer, type='Q4_0')
    return path


@settings(max_examples=30)
@given(data=st.data())
def test_a_damaged_file_reads_or_is_refused(whole, data):
    damaged = bytearray(whole.read_bytes())
    tensors = GGUFFile(whole)._start
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, tensors) | st.integers(0, 700))
        damaged[at:at + 1] = data.draw(st.sampled_from([b'\0', b'\xff', b'\x7f', b'']) | st.binary(min_size=1, max_size=9))
    path = whole.parent/'damaged.gguf'
    path.write_bytes(damaged[:data.draw(st.none() | st.integers(0, len(damaged)))])
    try: file = GGUFFile(path)
    except ValueError as e: assert 'damaged.gguf is not a GGUF file: ' in str(e)
    else:
        for name in file: assert file[name].shape == file.entries[name].shape
        try:
            read_gguf(path)
        except ValueError as e: assert 'damaged.gguf is not a model that this library can read: ' in str(e)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    small(path := tmp_path/'m.gguf')
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the tensor 'b': weights must be finite"): write_gguf_tensors(path, {}, {'a': torch.ones(2), 'b': torch.tensor([np.nan])}, {'a': 'F32', 'b': 'F32'})
    with pytest.raises(ValueError, match="the key 'x': expected a text, a number.* got None"): write_gguf_tensors(path, {'x': None}, {}, {})
    with pytest.raises(ValueError, match="the key 'x': expected values of one type"): write_gguf_tensors(path, {'x': [1, 'a']}, {}, {})
    with pytest.raises(ValueError, match="the key 'x': GGUF has no complex128"): write_gguf_tensors(path, {'x': np.complex128(1)}, {}, {})
    with pytest.raises(ValueError, match="the tensor 'a'.*expected rows of blocks of 32"): write_gguf_tensors(path, {}, {'a': torch.ones(3)}, {'a': 'Q8_0'})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['m.gguf']


# Models -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', FAMILIES.values(), ids=FAMILIES)
def test_a_model_comes_back(tmp_path, options):
    made = model(**options)
    write_gguf(made, path := tmp_path/'m.gguf', type='F32', metadata={'general.name': 'small', 'tokenizer.chat_template': '{{ x }}'})
    back, tokenizer, metadata = read_gguf(path)
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back(ids), made(ids), rtol=1e-4, atol=1e-4)
    assert tokenizer is None and metadata['general.name'] == 'small' and metadata['tokenizer.chat_template'] == '{{ x }}' and not back.training
    assert (back.config.rope_layout == 'interleaved') == (metadata['general.architecture'] == 'llama')
    write_gguf(back, again := tmp_path/'again.gguf', type='F32', metadata=metadata)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize('name', ['F16', 'Q8_0', 'Q4_1', 'Q4_0'])
def test_types_of_tensors(gguf, tmp_path, name):
    made = model(**MODERN, d_ff=80)
    write_gguf(made, path := tmp_path/'m.gguf', type=name)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types['output_norm.weight'] == types['blk.1.ffn_norm.weight'] == 'F32' and types['token_embd.weight'] == types['blk.0.attn_q.weight'] == name
    assert types['blk.0.ffn_down.weight'] == 'F16'                                  # its rows of 80 are not whole blocks
    stored = dict(model_from_gguf(GGUFFile(path)).state_dict())
    assert np.array_equal(stored['blocks.0.feed_forward.up.weight'], dequantize(quantize(made.blocks[0].feed_forward.up.weight.detach().numpy(), name), name))


REFUSED = {'window': dict(MODERN, window=4), 'half rotary': dict(MODERN, rope_fraction=0.5), 'post': dict(MODERN, norm_order='post'), 'mixed': dict(norm='rmsnorm'), 'softcap': dict(MODERN, logit_softcap=30.0),
           'bias': dict(MODERN, bias=True), 'yarn': dict(MODERN, rope_scaling=RopeScaling('yarn', 4.0, 16)), 'qk eps': dict(MODERN, qk_norm=True, qk_norm_eps=1e-3), 'layers': dict(MODERN, layers=[{'rope_base': 3.0}])}


@pytest.mark.parametrize('options', REFUSED.values(), ids=REFUSED)
def test_what_gguf_cannot_say_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match='has no place for|frequencies are scaled'): write_gguf(model(**options), tmp_path/'m.gguf')
    assert not os.listdir(tmp_path)


def keys(**more): return {**config_to_gguf(GPTConfig(vocab_size=300, context_length=64, d_model=64, n_layers=2, n_heads=4, **MODERN)), **{f'llama.{key.replace("__", ".")}': value for key, value in more.items()}}


def test_keys_that_would_change_the_model_are_refused():
    assert config_from_gguf(keys(), 300, True).d_model == 64
    for more, told in [(dict(attention__sliding_window=8), 'reads no models with: llama.attention.sliding_window=8'), (dict(rope__dimension_count=8), 'llama.rope.dimension_count=8'),
                       (dict(attention__value_length=8), 'value_length=8'), (dict(expert_count=8), 'expert_count=8'), (dict(vocab_size=5), 'vocab_size=5'), (dict(rope__scaling__type='yarn'), "'yarn', expected 'linear'"),
                       (dict(block_count='two'), 'n_layers must be a whole number'), (dict(attention__head_count=[4, 4]), 'n_heads must be'), (dict(embedding_length=0), 'd_model must be')]:
        with pytest.raises(ValueError, match=told): config_from_gguf(keys(**more), 300, True)
    with pytest.raises(ValueError, match='it lacks: llama.block_count'): config_from_gguf({key: value for key, value in keys().items() if key != 'llama.block_count'}, 300, True)
    for name in (None, 'mamba', ['llama']):
        with pytest.raises((ValueError, TypeError), match='unknown architecture|unhashable'): config_from_gguf({'general.architecture': name}, 300, True)
    assert config_from_gguf(keys(rope__scaling__type='none'), 300, True).rope_scaling is None
    with pytest.raises(ValueError, match='other factors than Llama 3'): config_from_gguf(keys(), 300, True, torch.tensor([1.0] * 4 + [3.0, 5.0, 7.0, 8.0]))
    with pytest.raises(ValueError, match='has 3 factors, expected 8'): config_from_gguf(keys(), 300, True, torch.ones(3))


def test_metadata_and_tensors_that_disagree(tmp_path):
    "Without the memory that the metadata ask for."
    path, made = tmp_path/'m.gguf', model(**MODERN)
    write_gguf(made, path)
    file = GGUFFile(path)
    tensors = {name: file[name] for name in file}
    for more in (dict(block_count=10**9), dict(feed_forward_length=10**12), dict(attention__key_length=10**12, rope__dimension_count=10**12, attention__value_length=10**12), dict(block_count=1), dict(feed_forward_length=64)):
        changed = {f'llama.{key.replace("__", ".")}': np.uint64(value) for key, value in more.items()}
        write_gguf_tensors(path, {**file.metadata, **changed}, tensors, dict.fromkeys(tensors, 'F32'))
        with pytest.raises(ValueError, match='m.gguf is not a model that this library can read: .*ask for another number'): read_gguf(path)
    write_gguf_tensors(path, file.metadata, {**tensors, 'extra': torch.ones(1)}, dict.fromkeys([*tensors, 'extra'], 'F32'))
    with pytest.raises(ValueError, match='another number'): read_gguf(path)
    del tensors['token_embd.weight']
    write_gguf_tensors(path, file.metadata, tensors, dict.fromkeys(tensors, 'F32'))
    with pytest.raises(ValueError, match='it lacks: token_embd.weight'): read_gguf(path)
    write_gguf_tensors(path, {**file.metadata, 'general.architecture': ['llama']}, {'token_embd.weight': torch.ones(2, 2)}, {'token_embd.weight': 'F32'})
    with pytest.raises(ValueError, match='m.gguf is not a model that this library can read'): read_gguf(path)
    with pytest.raises(ValueError, match="type must be one of F32, F16.*got 'Q4_K'"): write_gguf(made, path, type='Q4_K')


# Tokenizers -------------------------------------------------------------------------------------------------------

TRAINING = "Hello world don't DON'T we'll 12 123 1234 hello\n\n  world 漢字漢字 😀😀 été été !!! ... \r\n\r\n" * 5
PIECES = [*"aZé ß\n\r\t  12'st.,!?-—_$×€", "'s", "'S", "'LL", "'re", '²', '½', 'Ⅷ', '٣', '７', '\x1c', '\x1f', '\x85', '\xa0', '\u2028', '\u3000', '\u200b', '\u0301', 'ſ', "'ſ", 'K', '😀', '👩‍👩‍👧', '漢字', 'ひ', '한',
          '\x04', '\x0b', '\x0c', '  ', '\r\n', '\n\n', 'Hello', ' world', '<|endoftext|>', '\U000e0067', '\ufeff', 'ा', 'क', '12', '123', '!!', "'t", '\r\n\r\n']


def some_texts(n):
    pick = random.Random(0)
    return [''.join(pick.choices(PIECES, k=pick.randint(1, 60))) for _ in range(n)]


@cache
def trained(pattern):
    "A tokenizer with this pattern. Its merges have digits, spaces and line ends inside, so that the pattern decides how often they are used."
    texts = [TRAINING, *PIECES]
    merges = BPETokenizer.train(texts, 330, ['<|endoftext|>', '<|im_end|>'], pattern=r'[\s\S]{1,6}')
    return BPETokenizer(merges.vocab, pattern, merges.special_tokens)


def serve(llama_cpp, path, context=256):
    "llama.cpp with this file; sums and cached keys in 32 bits."
    p = llama_cpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.verbosity, p.n_gpu_layers = str(path), context, 1, -1, 0
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.warmup = p.fit_params = False
    p.cache_type_k = p.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama_cpp.Server(p)


def ids_of(server, text):
    request = urllib.request.Request(server.listening_address + '/tokenize', json.dumps({'content': text, 'parse_special': False, 'add_special': False}).encode(), {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request, timeout=60) as answer: return json.load(answer)['tokens']


@pytest.mark.parametrize('pre', {pattern: pre for pre, pattern in PRETOKENIZERS.items()}.values())     # one name for each pattern
def test_pretokenizers_against_llama_cpp(llama_cpp, tmp_path, pre):
    tokenizer, path = trained(PRETOKENIZERS[pre]), tmp_path/'t.gguf'
    told = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size) | {'tokenizer.ggml.pre': pre}
    write_gguf(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, context_length=64, d_model=32, n_layers=1, n_heads=2, **MODERN)), path, metadata=told)
    server, read = serve(llama_cpp, path), tokenizer_from_gguf(GGUFFile(path).metadata)
    for text in some_texts(15): assert ids_of(server, text) == read.encode(text) == tokenizer.encode(text)
    differing = {name for name, pattern in PRETOKENIZERS.items() if any(BPETokenizer(tokenizer.vocab, pattern).encode(text) != tokenizer.encode(text) for text in some_texts(15))}
    assert differing == {name for name, pattern in PRETOKENIZERS.items() if pattern != tokenizer.pattern}      # these texts tell all patterns apart


def test_a_tokenizer_comes_back():
    tokenizer = trained(PRETOKENIZERS['smollm'])
    found = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size + 3)
    assert found['tokenizer.ggml.pre'] == 'smollm' and found['tokenizer.ggml.tokens'][-1] == f'[PAD{tokenizer.vocab_size + 2}]' and found['tokenizer.ggml.eos_token_id'] == tokenizer.special_tokens['<|endoftext|>']
    back = tokenizer_from_gguf(found)
    assert back == tokenizer and back.vocab_size == tokenizer.vocab_size and back.special_tokens == tokenizer.special_tokens
    text = 'Hello 123<|im_end|>'
    assert back.encode(text) == tokenizer.encode(text) and back.encode(text, 'all')[-1] == tokenizer.special_tokens['<|im_end|>'] and back.decode(back.encode(text)) == text


def sparse():
    "A vocabulary without the bytes of é and the control character 4."
    found = tokenizer_to_gguf(trained(PRETOKENIZERS['gpt-2']), 330)
    tokens, types = found['tokenizer.ggml.tokens'], found['tokenizer.ggml.token_type'].copy()
    for b in (4, 0xC3, 0xA9): types[b], tokens[b] = 5, f'[gone{b}]'
    merges = [merge for merge in found['tokenizer.ggml.merges'] if not {*'ÃĤ©'} & {*merge}]
    made = {merge.replace(' ', '') for merge in merges}
    for i, token in enumerate(tokens):
        if types[i] == 1 and len(token) > 1 and token not in made: types[i] = 5
    return found | {'tokenizer.ggml.merges': merges, 'tokenizer.ggml.token_type': types}


def test_bytes_without_a_token_are_dropped_as_by_llama_cpp(llama_cpp, tmp_path):
    write_gguf(GPT(GPTConfig(vocab_size=330, context_length=64, d_model=32, n_layers=1, n_heads=2, **MODERN)), path := tmp_path/'t.gguf', metadata=sparse())
    server, tokenizer = serve(llama_cpp, path), tokenizer_from_gguf(GGUFFile(path).metadata)
    assert tokenizer.decode(tokenizer.encode('a\x04é b')) == 'a b'
    texts = some_texts(15)
    for text in texts: assert ids_of(server, text) == tokenizer.encode(text) == [*tokenizer.encode_iterable(text)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_sparse_tokenizer(tmp_path):
    import pickle
    tokenizer = tokenizer_from_gguf(sparse())
    again = pickle.loads(pickle.dumps(tokenizer))
    assert isinstance(again, SparseTokenizer) and again == tokenizer and again.vocab_size == tokenizer.vocab_size <= 330
    assert again.encode('Hello\x04') == tokenizer.encode('Hello')
    with pytest.raises(ValueError, match='lacks bytes'): tokenizer.save(tmp_path/'t.json')


def test_tokenizers_that_this_library_lacks():
    found = tokenizer_to_gguf(trained(PRETOKENIZERS['gpt-2']), 330)
    for key, value, told in [('model', 'bert', "'bert', expected 'gpt2' or 'llama'"), ('pre', 'viking', "'viking', expected one of gpt-2, smollm"), ('pre', None, 'its pre-tokenizer is None'),
                             ('token_type', [1, 1], '330 tokens, but 2 types'), ('merges', ['l o'], '1 merges do not make its tokens'), ('tokens', ['a'] * 330, 'more than one token: a'),
                             ('tokens', ['漢', *found['tokenizer.ggml.tokens'][1:]], "token 0 is not in GPT-2's alphabet, for it has: 漢")]:
        with pytest.raises(ValueError, match=told): tokenizer_from_gguf({**found, f'tokenizer.ggml.{key}': value})
    assert tokenizer_from_gguf({}) is None and tokenizer_from_gguf({'tokenizer.ggml.model': 'none'}) is None
    with pytest.raises(ValueError, match='knows no name for'): tokenizer_to_gguf(trained(GPT4_PATTERN), 330)
    with pytest.raises(ValueError, match="vocabulary of 3[0-9]+ is larger than the model's, 99|of 2[0-9]+ is larger than the model's, 99"): tokenizer_to_gguf(trained(PRETOKENIZERS['qwen2']), 99)
    with pytest.raises(ValueError, match='two tokens have the name: a'): tokenizer_to_gguf(BPETokenizer({bytes([b]): b for b in range(256)}, special_tokens={'a': 256}), 257)
    with pytest.raises(ValueError, match='expected a BPETokenizer'): tokenizer_to_gguf('gpt2', 300)


# llama.cpp --------------------------------------------------------------------------------------------------------

def judged(llama_cpp, path, prompt, n, vocab_size):
    "Its greedy tokens, and the log-probabilities of all tokens at each step."
    answer = serve(llama_cpp, path).handle_completions({'prompt': prompt, 'n_predict': n, 'temperature': 0, 'n_probs': vocab_size, 'ignore_eos': True})
    steps = answer['choices'][0]['logprobs']['content']
    table = torch.full((len(steps), vocab_size), -torch.inf)
    for t, step in enumerate(steps):
        for found in step['top_logprobs']: table[t, found['id']] = found['logprob']
    return [step['id'] for step in steps], table


def plain_vocabulary(n):
    "For models that only read ids: tokens that are ASCII, for llama.cpp reports no half of a character."
    return {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'gpt-2', 'tokenizer.ggml.tokens': [f't{i}' for i in range(n)], 'tokenizer.ggml.merges': ['a b'],
            'tokenizer.ggml.token_type': np.ones(n, np.int32), 'tokenizer.ggml.eos_token_id': n - 1}


def errors(llama_cpp, path, prompt, n=24):
    "The largest difference of log-probabilities above -8, and the share of equal greedy tokens, by our reading of the same file."
    ours = model_from_gguf(GGUFFile(path))
    written, theirs = judged(llama_cpp, path, prompt, n, ours.config.vocab_size)
    assert len(written) == n
    with torch.no_grad(): logits = ours(torch.tensor([prompt + written[:-1]]))[0, len(prompt) - 1:]
    found = logits.log_softmax(-1)
    return (found - theirs)[theirs > -8].abs().max().item(), (found.argmax(-1) == torch.tensor(written)).float().mean().item()


@pytest.mark.parametrize('options', FAMILIES.values(), ids=FAMILIES)
def test_architectures_against_llama_cpp(llama_cpp, tmp_path, options):
    write_gguf(model(**options), path := tmp_path/'m.gguf', type='F32', metadata=plain_vocabulary(300))
    error, agree = errors(llama_cpp, path, [5, 17, 200, 33, 8, 8, 120])
    assert error < (1e-3 if options else 1e-2) and agree == 1                        # GPT-2's GELU is a table of 16 bits there


@pytest.fixture(scope='module')
def storyteller(shared_data):
    config, tensors = read_llama2c(shared_data/'tinyllamas'/'stories260K.bin')
    load_weights(made := GPT(config), tensors, META_WEIGHTS)
    return made.eval()


@pytest.mark.parametrize('name, bound, least', [('F32', 1e-3, 1), ('F16', 0.1, 1), ('Q8_0', 1.0, 0.8), ('Q4_0', 1.5, 0.7)])
def test_a_real_model_against_llama_cpp(llama_cpp, storyteller, tmp_path, name, bound, least):
    "Files of 16 and 32 bits give the same text; with fewer bits llama.cpp rounds activations, too."
    write_gguf(storyteller, path := tmp_path/'m.gguf', type=name, metadata=plain_vocabulary(512))
    error, agree = errors(llama_cpp, path, [1], 40)
    assert error < bound and agree >= least


def read_pieces(path):
    data, at, found = path.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from('<fi', data, at)
        found.append((data[at + 8:at + 8 + length].decode(), score))
        at += 8 + length
    return found


def test_sentencepiece_against_llama_cpp(llama_cpp, storyteller, shared_data, tmp_path):
    pytest.importorskip('llm_from_scratch.tokenizer_files', reason='no SentencePiece in this version of the library')
    pieces = read_pieces(shared_data/'tinyllamas'/'tok512.bin')
    told = {'model': 'llama', 'tokens': ['<unk>', '<s>', '</s>', *(piece.replace(' ', '▁') for piece, _ in pieces[3:])], 'scores': np.array([score for _, score in pieces], np.float32),
            'token_type': np.array([2, 3, 3] + 256 * [6] + 253 * [1], np.int32), 'bos_token_id': 1, 'eos_token_id': 2}
    write_gguf(storyteller, path := tmp_path/'m.gguf', metadata={f'tokenizer.ggml.{key}': value for key, value in told.items()})
    made, tokenizer, _ = read_gguf(path)
    server = serve(llama_cpp, path)
    for text in some_texts(15): assert ids_of(server, text) == tokenizer.encode(text)
    ids = [1, *tokenizer.encode('Once upon a time')]
    with torch.no_grad():
        for _ in range(40): ids.append(made(torch.tensor([ids]))[0, -1].argmax().item())
    told = server.handle_completions({'prompt': 'Once upon a time', 'n_predict': 40, 'temperature': 0})['choices'][0]['text']
    assert tokenizer.decode(ids[1:]) == 'Once upon a time' + told and told.startswith(', there was a little girl named Lily.')


# SmolLM2 ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def smollm2():
    hub = pytest.importorskip('llm_from_scratch.hub', reason='no downloads in this version of the library')
    if not hub.is_pulled('smollm2'): pytest.skip('SmolLM2 is not in the cache: `llmfs pull smollm2` brings it')
    return hub.pulled_folder('smollm2')/hub.CATALOG['smollm2'].files[0].name


def test_an_assistant(smollm2, llama_cpp):
    made, tokenizer, metadata = read_gguf(smollm2)
    assert sum(p.numel() for p in made.parameters()) == 134_515_008 and made.config.n_layers == 30 and made.config.norm_eps == 1e-5
    assert '<|im_start|>' in metadata['tokenizer.chat_template'] and metadata['tokenizer.ggml.eos_token_id'] == tokenizer.special_tokens['<|im_end|>']
    ids, server = tokenizer.encode('The capital of France is'), serve(llama_cpp, smollm2)
    for text in some_texts(8): assert ids_of(server, text) == tokenizer.encode(text)
    answer = server.handle_completions({'prompt': ids, 'n_predict': 3, 'temperature': 0, 'n_probs': 40})['choices'][0]
    assert answer['text'].startswith(' Paris')
    steps = answer['logprobs']['content']
    with torch.no_grad(): found = made(torch.tensor([[*ids, *(step['id'] for step in steps[:-1])]]))[0, len(ids) - 1:].log_softmax(-1)
    assert tokenizer.decode([found[0].argmax().item()]) == ' Paris'
    assert max(abs(found[t, top['id']].item() - top['logprob']) for t, step in enumerate(steps) for top in step['top_logprobs'] if top['logprob'] > -5) < 0.5


def test_its_tensors_against_gguf(smollm2, gguf):
    file = GGUFFile(smollm2)
    for tensor in gguf.GGUFReader(smollm2).tensors[:13]: assert same_bits(file[tensor.name].numpy(), gguf.dequantize(tensor.data, tensor.tensor_type))
