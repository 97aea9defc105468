"The appendix on other checkpoint formats: what TensorFlow and llama2.c wrote, and real weights."
import json
import os
import struct
import subprocess
import sys
import venv
from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import unchecked

from llm_from_scratch.formats import crc32c, read_gpt2, read_llama2c, read_tensorflow
from llm_from_scratch.gpt import GPT, PRESETS, GPTConfig
from llm_from_scratch.positions import interleaved_to_half
from llm_from_scratch.weight_maps import GPT2_TF_WEIGHTS, GPT2_WEIGHTS, META_WEIGHTS, export_weights, load_weights

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was "
         "too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do.")


def read_pieces(path):
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        _, length = struct.unpack_from('<fi', data, at)
        pieces.append(data[at + 8:at + 8 + length])
        at += 8 + length
    return pieces


def test_real_weights_tell_a_story(shared_data):
    folder = shared_data/'tinyllamas'
    config, tensors = read_llama2c(folder/'stories260K.bin')
    assert config == PRESETS['llama-260k']
    made = GPT(config)
    load_weights(made, tensors, META_WEIGHTS)
    ids, pieces = torch.tensor([[1]]), read_pieces(folder/'tok512.bin')
    with torch.no_grad(), unchecked():
        for _ in range(130): ids = torch.cat([ids, made(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    text = b''.join(b'\n' if pieces[i] == b'<0x0A>' else pieces[i] for i in ids[0, 1:].tolist()).decode().strip()
    assert text.startswith(STORY)
    # The same model through the other layout of rotary pairs: permuted weights, "half".
    for name, tensor in tensors.items():
        if name.endswith(('.wq.weight', '.wk.weight')): tensors[name] = interleaved_to_half(tensor, 8 if '.wq.' in name else 4)
    other = GPT(replace(config, rope_layout='half'))
    load_weights(other, tensors, META_WEIGHTS)
    torch.testing.assert_close(other(ids), made(ids), rtol=1e-4, atol=1e-4)


def llama2c_file(path, V=11, tied=True, cut=0):
    D, F_, L, H, K, T = 8, 12, 2, 4, 2, 6
    n = V * D + L * (2 * D + 2 * D * D + 2 * D * K * 2 + 3 * D * F_) + D + 2 * T * 1 + (0 if tied else V * D)
    numbers = np.random.default_rng(0).normal(size=n).astype('<f4').tobytes()
    path.write_bytes(struct.pack('<7i', D, F_, L, H, K, V if tied else -V, T) + numbers[:len(numbers) - cut])
    return numbers


def test_llama2c_files(tmp_path):
    path = tmp_path/'model.bin'
    for tied in (True, False):
        numbers = np.frombuffer(llama2c_file(path, tied=tied), '<f4')
        config, tensors = read_llama2c(path)
        assert config.tie_embeddings == tied and config.kv_heads == 2 and config.vocab_size == 11
        made = GPT(config)
        load_weights(made, tensors, META_WEIGHTS)
        assert made.token_embedding.weight.flatten().tolist() == numbers[:88].tolist()
        if not tied: assert made.head.weight.flatten().tolist() == numbers[-88:].tolist()
    llama2c_file(path, cut=4)
    with pytest.raises(ValueError, match='its header asks for'): read_llama2c(path)
    path.write_bytes(b'short')
    with pytest.raises(ValueError, match='no header'): read_llama2c(path)
    path.write_bytes(bytes(28))
    with pytest.raises(ValueError, match=f'{path.name} is not a checkpoint of llama2.c: vocab_size'): read_llama2c(path)


# TensorFlow -------------------------------------------------------------------------------------------------------

def crc(data):
    "CRC-32C bit by bit, as its polynomial says; masked as LevelDB's format asks."
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8): state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    state ^= 0xFFFFFFFF
    return ((state >> 15 | state << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(n):
    out = bytearray()
    while n > 127: out.append(n & 127 | 128); n >>= 7
    return bytes([*out, n])


def field(number, value): return varint(number << 3) + varint(value) if isinstance(value, int) else varint(number << 3 | 2) + varint(len(value)) + value


NUMBERS = {'float32': 1, 'float64': 2, 'int32': 3, 'uint8': 4, 'int16': 5, 'int8': 6, 'int64': 9, 'bool': 10, 'float16': 19}


def block(entries, restart=3):
    "Names that share beginnings with the one before, written out in full at every third."
    out, places, before = b'', [], b''
    for i, (name, value) in enumerate(entries):
        shared = 0
        if i % restart: shared = len(os.path.commonprefix([before, name]))
        else: places.append(len(out))
        out += varint(shared) + varint(len(name) - shared) + varint(len(value)) + name[shared:] + value
        before = name
    out += b''.join(struct.pack('<I', at) for at in places) + struct.pack('<I', len(places))
    return out + b'\0' + struct.pack('<I', crc(out + b'\0'))


def tf_checkpoint(path, tensors, shards=1, per_block=4, header=None, slices=()):
    "A checkpoint of TensorFlow from its description, by a writer that shares nothing with the reader."
    files, entries = [b''] * shards, [(b'', header or field(1, shards) + field(3, field(1, 1)))]
    for i, name in enumerate(sorted(tensors)):
        array = tensors[name]
        shape = b''.join(field(2, field(1, int(n)) if n else b'') for n in array.shape)
        data, shard = array.tobytes(), i % shards
        value = field(1, NUMBERS[str(array.dtype)]) + field(2, shape) + (field(3, shard) if shard else b'') + (field(4, len(files[shard])) if files[shard] else b'') + (field(5, len(data)) if data else b'')
        entries.append((name.encode(), value + varint(6 << 3 | 5) + struct.pack('<I', crc(data)) + (field(7, b'') if name in slices else b'')))
        files[shard] += data
    out, handles = b'', []
    for i in range(0, len(entries), per_block):
        part = block(entries[i:i + per_block])
        handles.append((entries[min(i + per_block, len(entries)) - 1][0], varint(len(out)) + varint(len(part) - 5)))
        out += part
    ends = []
    for part in (block([]), block(handles, restart=1)):
        ends.append(varint(len(out)) + varint(len(part) - 5)); out += part
    path.with_name(path.name + '.index').write_bytes(out + b''.join(ends).ljust(40, b'\0') + struct.pack('<Q', 0xDB4775248B80FB57))
    for i, data in enumerate(files): path.with_name(f'{path.name}.data-{i:05}-of-{shards:05}').write_bytes(data)


def some_tensors():
    generator = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]
    return {f'model/h{i}/{kind}': generator.integers(0, 2, shapes[i % 5]).astype(kind) for i, kind in enumerate(NUMBERS)} | {'model/h0': np.float32(generator.normal(size=(300,)))}


@pytest.mark.parametrize('shards, per_block', [(1, 100), (1, 1), (3, 4)])
def test_against_another_writer_of_tensorflows_format(tmp_path, shards, per_block):
    tf_checkpoint(tmp_path/'model.ckpt', given := some_tensors(), shards, per_block)
    found = read_tensorflow(tmp_path/'model.ckpt')
    assert found.keys() == given.keys()
    for name, array in given.items(): assert found[name].numpy().dtype == array.dtype and found[name].shape == array.shape and (found[name].numpy() == array).all()


def test_every_damaged_byte_of_the_index_is_noticed(tmp_path):
    "Or it changes nothing: only the rest of the foot and the list that nobody reads have no checksum of their own."
    tf_checkpoint(tmp_path/'m', given := {'b/x': np.arange(6, dtype=np.float32), 'b/y': np.arange(3, dtype=np.int32)})
    path, unnoticed = tmp_path/'m.index', []
    whole = path.read_bytes()
    with unchecked():
        for i in range(len(whole)):
            for new in {whole[i] ^ 1, whole[i] ^ 128, 0, 255} - {whole[i]}:
                path.write_bytes(whole[:i] + bytes([new]) + whole[i + 1:])
                try: found = read_tensorflow(tmp_path/'m')
                except (ValueError, FileNotFoundError): continue
                unnoticed.append(i)
                assert found.keys() == given.keys() and all((found[name].numpy() == given[name]).all() for name in given)
    assert len(set(unnoticed)) < 60


def test_checkpoints_of_tensorflow_that_are_refused(tmp_path):
    path, given = tmp_path/'m', {'a': np.arange(6, dtype=np.float32), 'b': np.arange(3, dtype=np.int32)}

    def says(words, kind=ValueError):
        with unchecked(), pytest.raises(kind, match=words): read_tensorflow(path)
    says('m.index', FileNotFoundError)
    tf_checkpoint(path, given)
    data, index = (tmp_path/'m.data-00000-of-00001'), (tmp_path/'m.index')
    numbers, table = data.read_bytes(), index.read_bytes()
    data.write_bytes(numbers[:3] + b'\x07' + numbers[4:]); says('a is damaged: its checksum')
    data.write_bytes(numbers[:-1]); says(r'b of shape \(3,\) has 12 bytes at 24, in a file of 35')
    data.write_bytes(b''); says('m is not a checkpoint')
    data.unlink(); says('m.data-00000-of-00001', FileNotFoundError)
    data.write_bytes(numbers)
    for cut in (0, 5, 47, len(table) // 2, len(table) - 1):
        index.write_bytes(table[:cut]); says('m.index is not an index of TensorFlow')
    tf_checkpoint(path, given, header=field(1, 1) + field(2, 1)); says('big-endian')
    tf_checkpoint(path, given, slices=['b']); says('b is stored in slices')


def gpt2_names(model):
    "A model's weights under OpenAI's names, written out by hand."
    p = {name: t.detach().numpy() for name, t in export_weights(model, GPT2_WEIGHTS).items()}
    found = {}
    for name, array in p.items():
        *scope, layer, kind = name.removeprefix('transformer.').replace('h.', 'h', 1).split('.') if '.h.' in name else ['', *name.removeprefix('transformer.').split('.')]
        there = '/'.join(['model', *filter(None, scope), layer])
        if layer in ('wte', 'wpe'): found[there] = array
        elif layer.startswith('ln'): found[f'{there}/{"g" if kind == "weight" else "b"}'] = array
        else: found[f'{there}/{"w" if kind == "weight" else "b"}'] = array[None] if kind == 'weight' else array
    return found


def tiny_gpt2(): return GPT(GPTConfig(23, 12, 16, 2, 4), generator=torch.Generator().manual_seed(0))


def write_gpt2(folder, names):
    tf_checkpoint(folder/'model.ckpt', names)
    (folder/'hparams.json').write_text(json.dumps({'n_vocab': 23, 'n_ctx': 12, 'n_embd': 16, 'n_head': 4, 'n_layer': 2}))


def same_as_tiny(folder):
    made, (config, tensors) = tiny_gpt2(), read_gpt2(folder)
    assert config == made.config
    other = GPT(config)
    with torch.no_grad():
        for p in other.parameters(): p.fill_(float('nan'))
    load_weights(other, tensors, GPT2_TF_WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), other.state_dict().values(), strict=True))
    assert export_weights(other, GPT2_TF_WEIGHTS).keys() == tensors.keys()


def test_gpt2_under_openais_names(tmp_path):
    names = gpt2_names(tiny_gpt2())
    assert {'model/wte', 'model/wpe', 'model/h0/attn/c_attn/w', 'model/h1/mlp/c_proj/b', 'model/h0/ln_1/g', 'model/ln_f/b'} < names.keys() and names['model/h0/attn/c_attn/w'].shape == (1, 16, 48)
    write_gpt2(tmp_path, names)
    same_as_tiny(tmp_path)
    (tmp_path/'hparams.json').write_text('{"n_vocab": 23}')
    with pytest.raises(ValueError, match='hparams.json is not a configuration of GPT-2'): read_gpt2(tmp_path)


def test_checksums_that_others_have_published():
    assert crc32c(b'\0' * 32) == 0x8A9136AA and crc32c(b'\xff' * 32) == 0x62A8AB43             # known values, RFC 3720


WRITE = """
import json, sys
import numpy as np, tensorflow as tf
v1 = tf.compat.v1; v1.disable_eager_execution()
given, path = dict(np.load(sys.argv[1])), sys.argv[2]
for name, array in given.items(): v1.get_variable(name, initializer=array)
with v1.Session() as session:
    session.run(v1.global_variables_initializer())
    v1.train.Saver().save(session, path, write_meta_graph=False)
"""


@pytest.mark.slow
def test_against_tensorflow(tmp_path):
    "The judge is not this repository's: TensorFlow itself writes the file, in an environment that is thrown away."
    venv.create(tmp_path/'venv', with_pip=True)
    python = tmp_path/'venv'/('Scripts' if os.name == 'nt' else 'bin')/'python'
    got = subprocess.run([python, '-m', 'pip', 'install', '-q', '--only-binary', ':all:', 'tensorflow-cpu'], capture_output=True, text=True)
    if got.returncode: pytest.skip(f'tensorflow-cpu cannot be installed here ({sys.version.split()[0]}): {got.stderr[-200:]}')
    names = gpt2_names(tiny_gpt2())
    np.savez(tmp_path/'given.npz', **names)
    done = subprocess.run([python, '-c', WRITE, tmp_path/'given.npz', tmp_path/'model.ckpt'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_tensorflow(tmp_path/'model.ckpt')
    assert found.keys() == names.keys() and all((found[name].numpy() == names[name]).all() for name in names)
    (tmp_path/'hparams.json').write_text(json.dumps({'n_vocab': 23, 'n_ctx': 12, 'n_embd': 16, 'n_head': 4, 'n_layer': 2}))
    same_as_tiny(tmp_path)
