"Pretrained weights: folders that transformers opens and that it wrote, damaged ones, the model that comes with the library."
import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from small import LLAMA, model, randomized, some_ids

from llm_from_scratch.architectures import ARCHITECTURES
from llm_from_scratch.bpe import BPETokenizer, load_tokenizer, model_folder
from llm_from_scratch.generation import Sampler, stream
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.positions import RopeScaling
from llm_from_scratch.pretrained import SafetensorsFile, config_from_hf, config_to_hf, read_shards
from llm_from_scratch.storyland import stories
from llm_from_scratch.text import CharTokenizer, SpacedWordTokenizer
from llm_from_scratch.weight_maps import QWEN3_WEIGHTS, export_weights

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')


# Folders of transformers ------------------------------------------------------------------------------------------

END = '<|endoftext|>'
QWEN3 = dict(positions='rope', norm='rmsnorm', norm_eps=1e-6, feed_forward='swiglu', bias=False, qk_norm=True, n_kv_heads=2)
SAID = 'Once there was a cat.\nThen the cat had a "hat".'


def words_and_model(**options):
    words = SpacedWordTokenizer.train([SAID], special_tokens=[END])
    return words, randomized(model(**{**QWEN3, 'vocab_size': words.vocab_size, 'context_length': 20, **options}))


@pytest.fixture
def saved(tmp_path):
    words, made = words_and_model()
    made.to_hf(tmp_path, words)
    return tmp_path


def opened(hf, folder):
    hf.logging.disable_progress_bar()
    theirs, notes = hf.Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()), notes
    return theirs.eval()


@pytest.mark.parametrize('options', [{}, dict(tie_embeddings=False), dict(rope_base=500.0, d_head=6), dict(n_kv_heads=4, d_ff=8, norm_eps=1e-3, qk_norm_eps=1e-3), dict(n_kv_heads=1, dropout=0.1)])
def test_against_hf_qwen3_both_ways(hf, tmp_path, options):
    words, made = words_and_model(**options)
    made.to_hf(tmp_path/'ours', words)
    assert sorted(p.name for p in (tmp_path/'ours').iterdir()) == ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    theirs, ids = opened(hf, tmp_path/'ours'), torch.tensor([words.encode(SAID)])
    theirs.save_pretrained(tmp_path/'theirs')
    with unchecked(), torch.no_grad():
        for folder in (tmp_path/'ours', tmp_path/'theirs'):
            again = GPT.from_pretrained(folder)
            assert torch.equal(again(ids), made(ids)) and not again.training
            assert all(torch.equal(p, made.state_dict()[name]) for name, p in again.state_dict().items())
        torch.testing.assert_close(made(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    first = (tmp_path/'ours'/'model.safetensors').read_bytes()
    again.to_hf(tmp_path/'ours', words)
    assert (tmp_path/'ours'/'model.safetensors').read_bytes() == first                           # a folder opened and saved is the same folder


def test_a_folder_of_our_own_is_no_folder_of_transformers(tmp_path):
    made = model()
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='names no model_type; `from_pretrained` opens it'): GPT.from_hf(tmp_path)


# Shards -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def sharded(tmp_path):
    words, made = words_and_model()
    made.to_hf(tmp_path, words, max_shard_size=4000)
    return tmp_path


def test_shards_are_read_by_both(hf, sharded):
    made, ids = words_and_model()[1], some_ids() % 10
    names = sorted(p.name for p in sharded.glob('*.safetensors'))
    assert len(names) > 2 and names[0] == f'model-00001-of-{len(names):05}.safetensors'
    assert all(sum(t.nbytes for t in SafetensorsFile(sharded/name).values()) <= 4000 for name in names)
    with unchecked(), torch.no_grad():
        assert torch.equal(GPT.from_hf(sharded)(ids), made(ids)) and torch.equal(GPT.from_pretrained(sharded)(ids), made(ids))
        torch.testing.assert_close(opened(hf, sharded)(ids).logits, made(ids), rtol=1e-4, atol=1e-4)
    theirs = opened(hf, sharded)
    theirs.save_pretrained(sharded/'theirs', max_shard_size='3KB')
    assert len([*(sharded/'theirs').glob('*.safetensors')]) > 2
    with unchecked(), torch.no_grad(): assert torch.equal(GPT.from_hf(sharded/'theirs')(ids), made(ids))


def test_shards_that_do_not_fit_their_index(sharded):
    index = sharded/'model.safetensors.index.json'
    whole = json.loads(index.read_text())
    where = whole['weight_map']
    names, first = sorted(set(where.values())), next(iter(where))

    def says(words, kind=ValueError, **change):
        index.write_text(json.dumps({**whole, 'weight_map': {k: v for k, v in {**where, **change}.items() if v}}))
        with pytest.raises(kind, match=words): read_shards(sharded)
    says('does not name: ' + first, **{first: ''})
    says('no shard has: nowhere', nowhere=names[0])
    says('names another shard for: ' + first, **{first: names[1]})
    says('has no model-9.safetensors, which model.safetensors.index.json names', FileNotFoundError, nowhere='model-9.safetensors')
    says('not names of files beside it: ../secret', nowhere='../secret')
    index.write_text(json.dumps(whole))
    (sharded/'twice.safetensors').write_bytes((sharded/names[0]).read_bytes())
    says(f'{first} is in {names[0]} and in twice', nowhere='twice.safetensors')
    for damage in ('{', '[]', '{}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(damage)
        with pytest.raises(ValueError, match='is not an index of shards'): read_shards(sharded)
    (sharded/names[0]).unlink(); index.write_text(json.dumps(whole))
    with pytest.raises(FileNotFoundError, match=names[0]): GPT.from_hf(sharded)


def test_shards_are_not_written_beside_a_whole_model(saved):
    with pytest.raises(ValueError, match='has a model.safetensors'): GPT.from_hf(saved).to_hf(saved, max_shard_size=9)
    with pytest.raises(ValueError, match='at least 1 byte'): GPT.from_hf(saved).to_hf(saved/'new', max_shard_size=0)


# safetensors ------------------------------------------------------------------------------------------------------

def packed(header, numbers=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + numbers


def entry(dtype='U8', shape=(2,), offsets=(0, 2), **more): return {'dtype': dtype, 'shape': [*shape], 'data_offsets': [*offsets], **more}


KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def test_against_safetensors_every_kind_of_number(tmp_path):
    tensors = {f'{kind}': torch.randint(0, 2, (3, 5)).to(kind) for kind in KINDS} | {'empty': torch.zeros(0, 4), 'one': torch.tensor(7.0), 'odd': torch.ones(3, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, tmp_path/'x', {'maker': 'me'})
    file, theirs = SafetensorsFile(tmp_path/'x'), safetensors.torch.load_file(tmp_path/'x')
    assert file.keys() == theirs.keys() and file.metadata == {'maker': 'me'} and len(file) == len(tensors)
    for name, t in theirs.items(): assert file[name].dtype == t.dtype and file[name].shape == t.shape and torch.equal(file[name].contiguous().view(-1).view(torch.uint8), t.contiguous().view(-1).view(torch.uint8))
    before = (tmp_path/'x').read_bytes()
    file['one'].add_(1)
    assert file['one'] == 8 and (tmp_path/'x').read_bytes() == before == (tmp_path/'x').read_bytes()                                # a private copy is written to


@pytest.mark.parametrize('data, words', [
    (b'', ''), (b'\0' * 7, 'begin with a header'), (b'\xff' * 16, 'begin with a header of 18,446'), (packed(b''), 'header of 0'), (packed(b'[]'), 'no JSON object'), (packed(b' {}'), 'no JSON object'), (packed(b'{'), ''), (packed(b'{"a": \xff}'), 'utf-8'),
    (packed(b'{"a":' * 9999 + b'1' + b'}' * 9999), ''), (packed({'a': 3}, b'ab'), ''), (packed({'a': {'dtype': 'U8'}}, b'ab'), ''), (packed({'a': entry('U4')}, b'ab'), "dtype 'U4', expected one of F64"), (packed({'a': entry(['U8'])}, b'ab'), ''),
    (packed({'a': entry(shape=(3,))}, b'ab'), 'a needs 3 bytes, its offsets give it 2'), (packed({'a': entry(shape=(1,))}, b'ab'), 'a needs 1 bytes, its offsets give it 2'), (packed({'a': entry('F32')}, b'ab'), 'a needs 8 bytes'), (packed({'a': entry(shape=(-2,))}, b'ab'), 'the shape of a'), (packed({'a': entry(shape=(-1, -2))}, b'ab'), 'the shape of a'),
    (packed({'a': entry(shape=(2.0,))}, b'ab'), 'the shape of a'), (packed({'a': entry(shape=(True, 2))}, b'ab'), 'the shape of a'), (packed({'a': entry(shape=(2**40,), offsets=(0, 2**40))}, b'ab'), 'end at byte'), (packed({'a': entry(shape=(2**62, 4), offsets=(0, 0))}), 'a needs'),
    (packed({'a': entry(offsets=(2, 0))}, b'ab'), 'a needs'), (packed({'a': entry(offsets=(-2, 0))}, b'ab'), 'the offsets of a'), (packed({'a': entry(offsets=(0, 1, 2))}, b'ab'), 'the offsets of a'), (packed({'a': entry(offsets=(1, 3))}, b'abc'), 'a begins at byte 1 of the numbers'),
    (packed({'a': entry(), 'b': entry()}, b'ab'), 'b begins at byte 0 of the numbers, where the tensor before it ends at 2'), (packed({'a': entry(), 'b': entry(offsets=(3, 5))}, b'abcde'), 'b begins at byte 3'), (packed({'a': entry()}, b'abc'), 'its tensors end at byte'),
    (packed({'a': entry(offsets=(0, 2))}, b'a'), 'its tensors end at byte'), (packed(b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', b'ab'), 'twice in one object: a'),
    (packed(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}', b'ab'), 'twice in one object: dtype'), (packed({'__metadata__': {'a': 3}}), '__metadata__'), (packed({'__metadata__': []}), '__metadata__')])
def test_hostile_headers_are_refused(tmp_path, data, words):
    (tmp_path/'x').write_bytes(data)
    with unchecked(), pytest.raises(ValueError, match=f'(?s)x is not a safetensors file: .*{words}'): SafetensorsFile(tmp_path/'x')


number = st.one_of(st.integers(-2, 12), st.sampled_from([2**63, 2**64, 1.0, True, None, '2']))
entries = st.fixed_dictionaries({'dtype': st.sampled_from(['U8', 'I16', 'F32', 'F64', 'X', 3]), 'shape': st.lists(number, max_size=3), 'data_offsets': st.lists(number, min_size=1, max_size=3)})
good = st.lists(st.tuples(st.sampled_from([('U8', 1), ('I16', 2), ('F32', 4)]), st.lists(st.integers(0, 3), max_size=2)), max_size=4)


@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('hostile')/'x'


def whatever_they_say(place, data):
    "The package and this reader open the same files, and find the same in them."
    place.write_bytes(data)
    try: theirs = safetensors.torch.load(data)
    except Exception: theirs = None
    with unchecked():
        try: ours = SafetensorsFile(place)
        except ValueError: ours = None
    if theirs is None or ours is None: return theirs, ours
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name].view(-1).view(torch.uint8), ours[name].reshape(-1).view(torch.uint8)) for name in ours if ours[name].numel())
    return theirs, ours


@settings(max_examples=60, deadline=None)
@given(header=st.dictionaries(st.sampled_from('abc'), entries, max_size=3), numbers=st.binary(max_size=24), padding=st.integers(0, 3))
def test_against_safetensors_on_headers_of_every_sort(place, header, numbers, padding):
    theirs, ours = whatever_they_say(place, packed(json.dumps(header).encode() + b' ' * padding, numbers))
    assert ours is None or theirs is not None                            # at least as strict


@settings(max_examples=40, deadline=None)
@given(good, st.randoms(use_true_random=False), st.integers(0, 3))
def test_against_safetensors_on_good_files(place, tensors, random, flips):
    header, at = {}, 0
    for i, ((dtype, width), shape) in enumerate(tensors):
        size = width * torch.Size(shape).numel()
        header[f't{i}'] = entry(dtype, shape, (at, at + size)); at += size
    keys = [*header]; random.shuffle(keys)                               # entries may come in any order
    data = bytearray(packed({key: header[key] for key in keys}, bytes(random.randrange(256) for _ in range(at))))
    theirs, ours = whatever_they_say(place, bytes(data))
    assert ours is not None and theirs is not None
    for _ in range(flips): data[random.randrange(len(data))] = random.randrange(256)
    theirs, ours = whatever_they_say(place, bytes(data))
    assert ours is None or theirs is not None


# Folders ----------------------------------------------------------------------------------------------------------

def test_transformers_writes_on_until_the_end_token(hf, saved):
    theirs, ours = opened(hf, saved), GPT.from_pretrained(saved)
    end = load_tokenizer(saved).special_tokens[END]
    with torch.no_grad():
        ours.token_embedding.weight[end] = theirs.get_input_embeddings().weight[end] = 0.0       # never the best
        long = theirs.generate(torch.tensor([[end]]), max_length=12, do_sample=False)
        assert long.shape == (1, 12)
        best = long[0, 1]
        assert theirs.generation_config.eos_token_id == theirs.generation_config.pad_token_id == end
        theirs.generation_config.eos_token_id = int(best)
        assert theirs.generate(torch.tensor([[end]]), max_length=12, do_sample=False).tolist() == [[end, int(best)]]
        ids = torch.tensor([[end]])
        with unchecked():
            while ids.shape[1] < 12: ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, long)


@pytest.mark.parametrize('text', [SAID, '', 'Once', ' a hat', 'Once  there', 'Once ', '\n', 'once', 'hat', 'Once\tthere', 'Oncé', 'Once\u0301', '\x00', 'a\u200bcat', '<|endoftext', '"" \'', 'Once\u00a0there',
                                  'Once\r\nthere', '\U0001f600', '中文', ' .', '. .', '\n"'])
def test_auto_tokenizer_makes_the_same_ids_or_refuses_too(hf, saved, text):
    ours, theirs = load_tokenizer(saved), hf.AutoTokenizer.from_pretrained(saved)
    try: ids = ours.encode(text)
    except ValueError:
        with pytest.raises(Exception, match='Missing .UNK. token'): theirs(text)
    else:
        assert theirs(text).input_ids == ids and theirs.decode(ids) == text
        assert theirs(END + text).input_ids == [ours.special_tokens[END], *ids] and theirs.decode(theirs(END + text).input_ids, skip_special_tokens=True) == text


def test_a_special_token_in_a_text_is_one_there_and_refused_here(hf, saved):
    ours, theirs = load_tokenizer(saved), hf.AutoTokenizer.from_pretrained(saved)
    assert theirs.eos_token == theirs.bos_token == theirs.pad_token == END and len(theirs) == ours.vocab_size
    assert theirs(END).input_ids == [ours.special_tokens[END]]
    for encode in (ours.encode, lambda text: theirs(text, split_special_tokens=True)):
        with pytest.raises(Exception, match='(?i)word'): encode(END)


def test_a_byte_pair_tokenizer_is_saved_as_well(hf, tmp_path):
    words = BPETokenizer.train(SAID, 260, [END])
    words_and_model(vocab_size=260)[1].to_hf(tmp_path, words)
    assert hf.AutoTokenizer.from_pretrained(tmp_path)('hat 中').input_ids == load_tokenizer(tmp_path).encode('hat 中') == words.encode('hat 中')


@pytest.mark.parametrize('options, names', [(dict(feed_forward='relu2'), "feed_forward='relu2'"), (dict(positions='learned'), "positions='learned'"), (dict(qk_norm=False), 'qk_norm=False'), (dict(bias=True), 'mlp_bias=True'),
                                            (dict(qk_norm_eps=1e-5), 'qk_norm_eps=1e-05'), (dict(rope_scaling=RopeScaling('ntk', 2.0)), "rope_type='ntk'"), (dict(layers=({'rope_base': 9.0}, {})), 'rope_base=9.0'),
                                            (dict(layers=({'window': 3}, {'window': 2})), 'window='), (dict(sinks=True), 'sinks=True'), (dict(qkv_bias=True), 'output_bias=False'), (dict(logit_scale=2.0), 'logit_scale=2.0')])
def test_what_qwen3_has_no_word_for_is_refused(tmp_path, options, names):
    words, made = words_and_model(**options)
    with pytest.raises(ValueError, match=f'(Qwen3ForCausalLM has no place for: .*)?{names}'): made.to_hf(tmp_path/'new', words, model_type='qwen3')
    assert not (tmp_path/'new').exists()


def test_tokenizers_that_others_cannot_read_are_refused(tmp_path):
    words, made = words_and_model()
    with pytest.raises(TypeError, match='got a CharTokenizer'): made.to_hf(tmp_path/'new', CharTokenizer.train([SAID]))
    with pytest.raises(ValueError, match="no special token '<end>': it has <.endoftext.>"): made.to_hf(tmp_path/'new', words, end='<end>')
    with pytest.raises(ValueError, match='vocabulary'): words_and_model(vocab_size=9)[1].to_hf(tmp_path/'new', words)
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('change, words', [
    (dict(model_type='qwen9'), "unknown model_type 'qwen9': expected one of gpt2, llama"), (dict(model_type=[]), 'unknown model_type'), (dict(hidden_act='relu6'), "hidden_act='relu6': expected one of silu"), (dict(hidden_act=[]), ''),
    (dict(rope_scaling={'rope_type': 'longrope', 'factor': 4.0}), "rope_type='longrope'"), (dict(rope_scaling={'type': 'dynamic', 'factor': 4.0}), "rope_type='dynamic'"), (dict(rope_scaling={'rope_type': 'yarn'}), 'factor'),
    (dict(rope_parameters={'rope_type': 'yarn', 'rope_theta': 9.0, 'factor': 2.0, 'mscale': 1.0}), 'mscale=1.0'), (dict(rope_parameters={'full_attention': {'rope_theta': 9.0}}), 'full_attention'), (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(layer_types=['full_attention']), '1 layer_types for 2 layers'), (dict(layer_types=['full_attention', 'mamba']), 'unknown layer_types: mamba'), (dict(layer_types=3), ''), (dict(num_hidden_layers=10**12), 'num_hidden_layers must be a whole number from 1'),
    (dict(hidden_size=0), 'd_model must'), (dict(num_key_value_heads=3), 'n_kv_heads')])
def test_configurations_that_this_library_cannot_follow(saved, change, words):
    path = saved/'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text(encoding='utf-8')), **change}), encoding='utf-8')
    with pytest.raises(ValueError, match=f'config.json is not the configuration of a model: .*{words}'): GPT.from_pretrained(saved)


def test_keys_that_must_be_there_and_keys_that_have_a_meaning_when_they_are_not():
    given = config_to_hf(GPTConfig(**{**dict(vocab_size=23, context_length=12, d_model=16, n_layers=2, n_heads=4), **QWEN3}), 'qwen3')
    assert config_from_hf({**given, 'transformers_version': '9'}) == config_from_hf(given)
    del given['rope_theta'], given['head_dim']
    assert (config_from_hf(given).rope_base, config_from_hf(given).d_head) == (10_000.0, 128)          # as in transformers
    assert config_from_hf({**given, 'head_dim': 4, 'rope_parameters': {'rope_theta': 7}}).rope_base == 7.0
    del given['hidden_size'], given['vocab_size']
    with pytest.raises(ValueError, match='it lacks: hidden_size, vocab_size'): config_from_hf(given)


def test_the_family_is_found():
    shape = dict(vocab_size=23, context_length=12, d_model=16, n_layers=2, n_heads=4)
    modern = dict(positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False)
    for more, kind in [({}, 'gpt2'), (modern, 'llama'), (dict(modern, window=3), 'mistral'), (dict(modern, qkv_bias=True), 'qwen2'), (dict(modern, qk_norm=True, norm_eps=1e-6), 'qwen3'), (dict(modern, layers=({}, {'positions': 'none'})), 'smollm3')]:
        assert config_to_hf(GPTConfig(**shape, **more))['model_type'] == kind
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel \(the nearest family\) has no place for: feed_forward='relu2'"): config_to_hf(GPTConfig(**shape, feed_forward='relu2'))
    with pytest.raises(ValueError, match="unknown model_type 'mamba': expected one of gpt2"): config_to_hf(GPTConfig(**shape), 'mamba')


def test_a_damaged_folder_is_noticed(saved):
    whole = {path.name: path.read_bytes() for path in saved.iterdir()}
    def with_change(name, old, new):
        for path, data in whole.items(): (saved/path).write_bytes(data)
        assert old in whole[name]
        (saved/name).write_bytes(whole[name].replace(old, new, 1))
    with_change('config.json', b'"rope_theta": 10000.0', b'"rope_theta": 20000.0')
    with pytest.raises(ValueError, match='were not saved together'): GPT.from_pretrained(saved)
    with_change('model.safetensors', b'layers.1.mlp.up_proj', b'layers.1.mlp.xp_proj')
    with unchecked(), pytest.raises(ValueError, match='were not saved together'): GPT.from_pretrained(saved)
    with_change('model.safetensors', whole['model.safetensors'][-40:], b'\0' * 40)
    with unchecked(), pytest.raises(ValueError, match='were not saved together'): GPT.from_pretrained(saved)
    with_change('tokenizer.json', b'" there"', b'" their"')
    with pytest.raises(ValueError, match='the checksum does not match'): load_tokenizer(saved)
    with_change('tokenizer.json', b'Isolated', b'Removed')
    with pytest.raises(ValueError, match='its pre_tokenizer is not what'): load_tokenizer(saved)
    with_change('tokenizer.json', b'"model": {', b'"modem": {')
    with pytest.raises(ValueError, match='tokenizer.json'): load_tokenizer(saved)


def test_a_checkpoint_that_does_not_fit_is_named(saved):
    import safetensors.torch
    tensors = safetensors.torch.load_file(saved/'model.safetensors')
    del tensors['model.layers.1.self_attn.q_norm.weight']
    safetensors.torch.save_file(tensors, saved/'model.safetensors')
    with pytest.raises(ValueError, match='model.safetensors: the checkpoint lacks: model.layers.1.self_attn.q_norm.weight'): GPT.from_pretrained(saved)


def test_half_precision_and_other_classes(hf, saved):
    class Mine(GPT): pass
    theirs = opened(hf, saved)
    theirs.half().save_pretrained(saved)
    made = Mine.from_pretrained(saved)
    assert type(made) is Mine and made.norm.weight.dtype == torch.float32
    assert all(torch.equal(t.half(), theirs.state_dict()[name]) for name, t in export_weights(made, QWEN3_WEIGHTS).items())


@pytest.fixture(scope='module')
def shipped(hf):
    folder = model_folder('storyland')
    return GPT.from_pretrained('storyland'), load_tokenizer('storyland'), opened(hf, folder), hf.AutoTokenizer.from_pretrained(folder)


def test_the_shipped_model_opens_in_transformers(hf, shipped):
    ours, words, theirs, peer = shipped
    end = words.special_tokens[END]
    assert type(theirs) is hf.Qwen3ForCausalLM and len(peer) == words.vocab_size == ours.config.vocab_size and peer.eos_token_id == end
    folder = model_folder('storyland')
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    assert sum(p.stat().st_size for p in folder.iterdir()) < 4e6
    with torch.no_grad(), unchecked():
        for story in stories(20, seed=5, split='test'):
            ids = words.encode(story.text)
            assert peer(story.text).input_ids == ids and peer.decode(ids) == words.decode(ids) == story.text
            rows = torch.tensor([[end, *ids]])
            torch.testing.assert_close(ours(rows), theirs(rows).logits, rtol=0, atol=1e-4)


def test_the_shipped_model_tells_the_same_stories_in_transformers(shipped):
    ours, words, theirs, peer = shipped
    end = words.special_tokens[END]
    for prompt in ('', next(iter(stories(1, seed=6, split='test'))).text[:60].rpartition(' ')[0]):
        ids = [end, *words.encode(prompt)]
        told = theirs.generate(torch.tensor([ids]), max_new_tokens=300, do_sample=False)[0].tolist()
        said = ''.join(stream(ours, words, prompt, 300, Sampler(temperature=0), start=[end], end_tokens=end))
        assert peer.decode(told, skip_special_tokens=True) == prompt + said and (told[-1] == end) == (len(told) < len(ids) + 300)
    assert told[-1] == end                                                                      # the last of them, at least, came to its end


@pytest.mark.parametrize('text', ['Once  upon', 'Once upon a time ', '\n', 'xyzzy', 'once', 'Once\tupon', 'Onc\u00e9', 'a\x00', '中', '\U0001f600', 'Once upon a time' + END[:-1], '``', '  ', 'ONCE'])
def test_hostile_text_is_refused_by_both_tokenizers(shipped, text):
    _, words, _, peer = shipped
    with pytest.raises(ValueError): words.encode(text)
    with pytest.raises(Exception, match='Missing .UNK. token'): peer(text)


def test_an_interleaved_model_is_written_in_halves_against_hf(hf, tmp_path):
    "Such as one from a GGUF file: the same logits there, and here when it is read back."
    ours = randomized(model(**LLAMA, n_kv_heads=2, rope_layout='interleaved', qkv_bias=True, tie_embeddings=False))
    ours.to_hf(tmp_path)
    theirs, again, ids = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), GPT.from_hf(tmp_path), some_ids()
    with unchecked(), torch.no_grad():
        expected = ours(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(ids), expected, rtol=1e-4, atol=1e-4)
        wrong = GPT(again.config)
        wrong.load_state_dict(ours.state_dict())
        assert (wrong(ids) - expected).abs().max() > 2e-3
    assert again.config.rope_layout == 'half' and ours.config.rope_layout == 'interleaved'
    with pytest.raises(ValueError, match="rope_layout='interleaved'"): model(**LLAMA, rope_layout='interleaved', qk_norm=True).to_hf(tmp_path/'other')


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_each_published_preset_goes_to_config_json_and_back(name):
    config = GPTConfig(**ARCHITECTURES[name])
    said = config_to_hf(config)
    back = config_from_hf(json.loads(json.dumps(said)))
    assert said['model_type'].replace('_', '').startswith(name.partition('-')[0].replace('gpt', 'gptoss').replace('olmo', 'olmo3')[:5])
    for i in {0, 1, config.n_layers - 1}: assert (back.layer(i).window, back.layer(i).mixer, back.layer(i).ff_width) == (config.layer(i).window, config.layer(i).mixer, config.layer(i).ff_width)
