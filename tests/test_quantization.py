"Chapter 17: codes against torchao, bitsandbytes and gguf, GPTQ against all codes, layers against dense ones, files whole or refused."
import copy
import itertools
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from small import LLAMA, model as tiny, randomized, some_ids

from llm_from_scratch.costs import flops_per_token
from llm_from_scratch.gguf import GGUFFile, dequantize, write_gguf
from llm_from_scratch.gpt import GPT
from llm_from_scratch.quantization import (
    GRIDS, METHODS, SCHEMES, Codes, GGUFLinear, Int4Linear, QuantizedEmbedding, QuantizedLinear, Scheme, awq, dequantize_weight, fake_quantize, gptq, int8_product, load_quantized,
    model_bytes, open_gguf, prepack, quantize_model, quantize_weight, save_quantized, second_moments, _int4_of_blocks)

INPUTS, ROOT = [], Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')
ALL = [Scheme(bits, group, grid) for bits in (2, 3, 4, 8) for group in (None, 5) for grid in ('symmetric', 'affine')] + [SCHEMES['nf4'], SCHEMES['mxfp4'], SCHEMES['int4'], SCHEMES['int2']]


def drawn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(weight, scheme): return dequantize_weight(quantize_weight(weight, scheme), scheme, weight.shape[1])


def error(delta, moment): return float(((delta @ moment) * delta).sum())


def matrix(module): return module.weight.detach()


@pytest.fixture(scope='module')
def storyland(): return GPT.from_pretrained('storyland')


# Codes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scheme', ALL, ids=str)
def test_every_code_is_the_nearest_of_its_grid(scheme):
    "Against a search over all numbers of the grid, each by itself."
    weight = drawn(3, 40)
    codes, scales, zeros = quantize_weight(weight, scheme)
    g = scheme.group or 40
    assert codes.shape == (3, -(-40 // g) * g) and scales.shape == (3, -(-40 // g))
    def each(x): return x.float().repeat_interleave(g, 1)[:, :40, None]
    numbers = each(scales) * (scheme.levels - (0 if zeros is None else each(zeros)))               # (3, 40, levels): those of its own group
    best = (numbers - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((there_and_back(weight, scheme) - weight).abs(), best, atol=1e-5, rtol=0)


@given(st.integers(2, 8), st.sampled_from([None, 1, 7, 16]), st.sampled_from(['symmetric', 'affine']), st.integers(0, 99), st.floats(1e-6, 1e6))
@settings(max_examples=40)
def test_no_weight_moves_by_more_than_half_a_step(bits, group, grid, seed, size):
    with unchecked():
        scheme, weight = Scheme(bits, group, grid), size * drawn(2, 23, seed=seed)
        found = quantize_weight(weight, scheme)
        back = dequantize_weight(found, scheme, 23)
    steps = found.scales.repeat_interleave(group or 23, 1)[:, :23]
    assert ((back - weight).abs() <= steps * (0.5 if grid == 'symmetric' else 1.0) * 1.001).all()


@pytest.mark.parametrize('scheme', ALL, ids=str)
def test_zero_stays_zero_and_rounding_twice_is_rounding_once(scheme):
    weight = drawn(4, 37)
    weight[1] = 0
    weight[:, 5] = 0
    back = there_and_back(weight, scheme)
    assert (back[1] == 0).all() and (back[:, 5] == 0).all()
    again = dequantize_weight(quantize_weight(weight, scheme)._replace(), scheme, 37)
    assert torch.equal(again, back)


def test_scales_by_hand_and_the_convention_of_torchao():
    found = quantize_weight(torch.tensor([[0.9, -0.4, 0.5]]), Scheme(8))
    assert abs(float(found.scales) - 0.9 / 127.5) < 1e-8
    assert found.codes[0, 0] == 255
    affine = quantize_weight(torch.tensor([[0.9, -0.4, 0.5]]), Scheme(4, grid='affine'))
    assert affine.codes.tolist() == [[15, 0, 11]] and affine.zeros.tolist() == [[5]]


def test_padding_never_widens_a_range():
    "Rows of 33 in groups of 32: the last weight is alone with 31 zeros."
    weight = drawn(2, 33).abs() + 1
    for grid in ('symmetric', 'affine'):
        back = there_and_back(weight, Scheme(8, 32, grid))
        assert ((back - weight).abs() < 0.02).all()


@pytest.mark.parametrize('wrong', [{'bits': 1}, {'bits': 9}, {'group': 0}, {'grid': 'nf5'}, {'scale_bits': 8}, {'bit': 4}])
def test_impossible_schemes_are_refused(wrong):
    with pytest.raises(ValueError), unchecked(): Scheme(**wrong)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match='finite'): quantize_weight(torch.tensor([[1.0, float('nan')]]), Scheme(8))
    for grid in ('nf4', 'mxfp4'):
        with pytest.raises(ValueError, match='4 bits'): quantize_weight(drawn(2, 32), Scheme(3, 32, grid))


# Peers ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def torchao(monkeypatch):
    "The peer, from a folder of its own; nothing of it is left, because transformers imports torchao wherever it is."
    monkeypatch.syspath_prepend(str(ROOT/'.cache'/'peers'))
    before = {*sys.modules}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield pytest.importorskip('torchao.quantization', reason='it is not here: pip install --no-deps --target .cache/peers torchao')
    for name in {*sys.modules} - before:
        if name.partition('.')[0] == 'torchao': del sys.modules[name]


@pytest.mark.long(5)
def test_against_torchao_int8_weight_only(torchao):
    "Codes, scales and outputs; its scale is the largest of a row over 127.5."
    layer, x = torch.nn.Linear(64, 48, bias=False), drawn(5, 64, seed=1)
    layer.weight.data = drawn(48, 64)
    ours, both = QuantizedLinear.from_weight(matrix(layer).clone(), Scheme(8)), torch.nn.Sequential(layer)
    torchao.quantize_(both, torchao.Int8WeightOnlyConfig())
    theirs = both[0].weight
    data = theirs.qdata if hasattr(theirs, 'qdata') else theirs.tensor_impl.int_data
    scale = theirs.scale if hasattr(theirs, 'scale') else theirs.tensor_impl.scale
    assert (data == ours.codes).float().mean() > 0.997 and (data.int() - ours.codes.int()).abs().max() <= 1
    torch.testing.assert_close(scale.flatten().float(), ours.scales[:, 0], atol=0, rtol=1e-5)
    torch.testing.assert_close(both(x), ours(x), atol=float(ours.scales.max() * x.abs().max()), rtol=1e-3)       # one code may differ by one


def test_against_bitsandbytes_nf4(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda f=None, **_: f or (lambda g: g))           # it would load the compiler when imported, for seconds
    bnb = pytest.importorskip('bitsandbytes.functional', reason='the judge is an extra: dev')
    weight, scheme = drawn(24, 128), SCHEMES['nf4']
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type='nf4')
    torch.testing.assert_close(there_and_back(weight, scheme), bnb.dequantize_4bit(packed, state), atol=1e-6, rtol=1e-5)
    codes = quantize_weight(weight, scheme).codes
    pairs = packed.flatten().view(torch.uint8)
    theirs = torch.stack([pairs >> 4, pairs & 15], -1).flatten()
    assert theirs.equal(codes.flatten())
    torch.testing.assert_close(state.code.float(), scheme.levels, atol=1e-6, rtol=0)


def test_against_gguf_mxfp4():
    gguf = pytest.importorskip('gguf', reason='the judge is an extra: dev')
    weight, kind = drawn(16, 96), gguf.GGMLQuantizationType.MXFP4
    theirs = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
    torch.testing.assert_close(there_and_back(weight, SCHEMES['mxfp4']), torch.from_numpy(theirs), atol=0, rtol=0)


# Layers -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scheme', ALL, ids=str)
def test_a_layer_is_its_dequantized_matrix(scheme):
    weight, bias, x = drawn(17, 40), drawn(17, seed=1), drawn(2, 3, 40, seed=2)
    layer = QuantizedLinear.from_weight(weight, scheme, bias)
    assert torch.equal(layer.weight, there_and_back(weight, scheme))
    torch.testing.assert_close(layer(x), x @ layer.weight.T + bias, atol=1e-4, rtol=1e-4)
    with torch.no_grad(): torch.testing.assert_close(layer(x), x @ layer.weight.T + bias, atol=1e-4, rtol=1e-4)
    some = torch.tensor([3, 3, 16])
    assert torch.equal(layer.rows(some), layer.weight[some]) and torch.equal(layer.rows(slice(2, 9)), layer.weight[2:9])


def test_codes_take_the_bytes_they_should():
    for bits in range(2, 9):
        layer = QuantizedLinear.from_weight(drawn(16, 64), Scheme(bits, 32, scale_bits=16))
        assert layer.codes.nbytes == 16 * 64 * bits // 8
        assert 8 * model_bytes(layer) / (16 * 64) == layer.scheme.bits_per_weight


def test_gradients_pass_through_to_the_inputs():
    layer = QuantizedLinear.from_weight(drawn(9, 12), Scheme(8))
    x = drawn(4, 12).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1), atol=1e-4, rtol=1e-4)


def test_wrong_widths_and_parts_are_refused():
    layer = QuantizedLinear.from_weight(drawn(9, 12), Scheme(4, 4))
    with pytest.raises(ValueError, match='size 12'): layer(torch.zeros(2, 11))
    with pytest.raises(ValueError, match='expected'): QuantizedLinear(Scheme(4, 4), 20, layer.codes, layer.scales)
    with pytest.raises(ValueError, match='expected'): QuantizedLinear(Scheme(4, 6), 12, layer.codes, layer.scales)


@pytest.mark.skipif(not hasattr(torch.ops.aten, '_weight_int4pack_mm_for_cpu'), reason='this torch has no product for four bits')
@pytest.mark.parametrize('grid', ['symmetric', 'affine'])
@pytest.mark.parametrize('group', [32, 64])
def test_prepacked_four_bits_equal_the_dequantized_matrix(grid, group):
    "To 2 % of the largest output: some processors multiply in bfloat16."
    weight, x = drawn(64, 128), drawn(5, 128, seed=1)
    net = torch.nn.Sequential(QuantizedLinear.from_weight(weight, Scheme(4, group, grid), drawn(64, seed=3)))
    expected = net(x)
    assert isinstance(prepack(net)[0], Int4Linear)
    assert (net(x) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.skipif(not hasattr(torch, '_weight_int8pack_mm'), reason='this torch has no product for eight bits')
def test_prepacked_eight_bits_equal_the_layer():
    weight, x = drawn(48, 128), drawn(2, 3, 128, seed=1)
    net = torch.nn.Sequential(QuantizedLinear.from_weight(weight, Scheme(8), drawn(48, seed=2)))
    expected = net(x)
    assert prepack(net)[0].fast and (net(x) - expected).abs().max() < 0.01 * expected.abs().max()
    leaf = x.clone().requires_grad_()                                           # gradients take the exact way
    assert torch.equal(net(leaf), expected)


# Models -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tied', [True, False])
def test_a_quantized_model_is_the_model_with_rounded_matrices(tied):
    model = randomized(tiny(**LLAMA, tie_embeddings=tied))
    rounded = copy.deepcopy(model)
    names = [name for name, m in rounded.named_modules() if isinstance(m, torch.nn.Linear)] + ['token_embedding'] * tied
    for name in names:
        part = rounded.get_submodule(name)
        part.weight.data = there_and_back(part.weight.data, SCHEMES['int4'])
    quantized = quantize_model(model, 'int4')
    ids = some_ids()
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids), rounded(ids), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(quantized(ids, targets=ids), rounded(ids, targets=ids), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, torch.nn.Linear) for m in quantized.modules())
    assert isinstance(quantized.token_embedding, QuantizedEmbedding) == tied


def test_a_tied_table_is_stored_once_and_ids_are_checked(storyland):
    model = quantize_model(copy.deepcopy(storyland), 'int8')
    assert not any(p.ndim == 2 for p in model.parameters())
    with pytest.raises(ValueError, match='between 0 and 447'): model.token_embedding(torch.tensor([448]))
    twin = copy.deepcopy(model)
    assert twin.token_embedding._head[0] is twin.head


def test_skipped_parts_stay_and_a_second_call_takes_the_rest(storyland):
    model = quantize_model(copy.deepcopy(storyland), 'int3', skip=['head', 'blocks.1', 'key'])
    assert type(model.head).__name__ == 'TiedHead' and not isinstance(model.blocks[1].feed_forward.up, QuantizedLinear)
    assert not isinstance(model.blocks[0].attention.key, QuantizedLinear) and isinstance(model.blocks[0].attention.query, QuantizedLinear)
    model = quantize_model(model, 'int8')
    assert model.head.scheme == Scheme(8) and model.blocks[0].attention.query.scheme == SCHEMES['int3']


def test_work_is_counted_as_before(storyland):
    before = flops_per_token(storyland, 64, training=False)
    assert flops_per_token(quantize_model(copy.deepcopy(storyland), 'int4'), 64, training=False) == before


def test_unknown_names_and_missing_inputs_are_refused(storyland):
    for wrong in ({'scheme': 'int5'}, {'method': 'best'}, {'method': 'gptq'}):
        with pytest.raises(ValueError): quantize_model(storyland, **wrong)
    assert isinstance(storyland.blocks[0].attention.query, torch.nn.Linear)


@pytest.mark.parametrize(('scheme', 'tied'), [('int8', True), ('int3', False), ('nf4', True), ('mxfp4', False), ('int2', True), ('int2', False)])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, scheme, tied):
    model = quantize_model(randomized(tiny(bias=True, tie_embeddings=tied)), scheme, method='awq', calibration=some_ids()[:, :8])
    save_quantized(model, tmp_path / 'small')
    back = load_quantized(tmp_path / 'small')
    assert not back.training and torch.equal(back(some_ids()), model(some_ids()))
    assert back.config == model.config


def test_files_that_are_not_whole_are_refused(tmp_path):
    model, path = quantize_model(randomized(tiny()), 'int8'), tmp_path / 'm'
    save_quantized(model, path)
    whole = path.read_bytes()
    tensors = safetensors.torch.load(whole)
    with safetensors.safe_open(path, 'pt') as file: marks = file.metadata()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError): load_quantized(path)
    cases = [({**tensors}, {}), ({**tensors}, {**marks, 'layers': '{}'}), ({k: t for k, t in tensors.items() if k != 'head.scales'}, marks),
             ({**tensors, 'head.codes': tensors['head.codes'][:5]}, marks), ({**tensors, 'more': torch.zeros(1)}, marks),
             ({**tensors}, {**marks, 'layers': marks['layers'].replace('"head"', '"tail"')}), ({**tensors, 'norm.weight': torch.zeros(3)}, marks)]
    for parts, said in cases:
        path.write_bytes(safetensors.torch.save(parts, said))
        with pytest.raises(ValueError): load_quantized(path)


def test_what_cannot_be_saved_is_refused_and_leaves_the_file(tmp_path, storyland):
    path = tmp_path / 'm'
    path.write_text('before')
    with pytest.raises(ValueError, match='no quantized layer'): save_quantized(storyland, path)
    packed = prepack(quantize_model(copy.deepcopy(storyland), 'int4'))
    if any(isinstance(m, Int4Linear) for m in packed.modules()):
        with pytest.raises(ValueError, match='not be saved'): save_quantized(packed, path)
    assert path.read_text() == 'before'


# GPTQ, AWQ, training ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scheme', ALL, ids=str)
def test_gptq_with_an_identity_hessian_is_rounding_to_nearest(scheme):
    weight = drawn(5, 40)
    for ours, nearest in zip(gptq(weight, 3 * torch.eye(40), scheme), quantize_weight(weight, scheme)):
        assert ours is nearest is None or torch.equal(ours, nearest)


def test_gptq_by_hand_on_two_weights():
    moment = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]])
    found = gptq(torch.tensor([[0.6, 0.6, 3.5]]), moment, Scheme(3), damping=0)
    assert dequantize_weight(found, Scheme(3), 3)[0, :2].tolist() == [1, 0]


def test_gptq_against_all_codes_of_a_tiny_matrix():
    "Never below the best of 4⁵ codes, below rounding to nearest on average, and half of the time the best."
    every, gains = torch.tensor([*itertools.product(range(4), repeat=5)], dtype=torch.uint8), []
    for seed in range(25):
        weight, x, scheme = drawn(1, 5, seed=seed), drawn(40, 2, seed=100 + seed) @ drawn(2, 5, seed=200 + seed), Scheme(2)
        moment = x.T @ x + 2 * torch.eye(5)
        near = quantize_weight(weight, scheme)
        deltas = scheme.levels[every.int()] * near.scales - weight
        best = float(((deltas @ moment) * deltas).sum(1).min())
        nearest, ours = (error(dequantize_weight(found, scheme, 5) - weight, moment) for found in (near, gptq(weight, moment, scheme, damping=0)))
        assert best <= ours + 1e-3
        gains.append((nearest, ours, best))
    nearest, ours, best = np.mean(gains, 0)
    assert best < ours < nearest and ours - best < 0.6 * (nearest - best)


@pytest.mark.parametrize('scheme', [SCHEMES['int2'], SCHEMES['nf4']], ids=str)
def test_methods_that_see_inputs_err_less_on_them(storyland, scheme):
    ids = torch.randint(448, (4, 128), generator=torch.Generator().manual_seed(0))
    layers = {name: m for name, m in storyland.named_modules() if name in ('blocks.1.attention.query', 'blocks.1.attention.output', 'blocks.1.feed_forward.down')}
    assert len(layers) == 3
    moments = second_moments(storyland, layers, ids)
    for name, layer in layers.items():
        weight, moment = matrix(layer), moments[name]
        near = error(there_and_back(weight, scheme) - weight, moment)
        assert error(dequantize_weight(gptq(weight, moment, scheme), scheme, weight.shape[1]) - weight, moment) < near
        codes, smooth = awq(weight, moment, scheme)
        assert error(dequantize_weight(codes, scheme, weight.shape[1]) * smooth - weight, moment) <= near * 1.0001


@pytest.mark.parametrize('scheme', ['int8', 'int4'])
def test_a_layer_with_factors_gives_the_outputs_of_its_rows(scheme):
    "AWQ's factors belong to the weights that `rows` gives, and to the inputs of the int8 product."
    weight, x, scheme = drawn(16, 32), drawn(50, 32, seed=1) * torch.logspace(-1, 1, 32), SCHEMES[scheme]
    codes, smooth = awq(weight, x.T @ x, scheme)
    layer = QuantizedLinear.from_codes(codes, scheme, 32, smooth=smooth)
    assert (layer.weight - weight).norm() < 0.3 * weight.norm() and smooth.std() > 0.1
    torch.testing.assert_close(layer(x), x @ (dequantize_weight(codes, scheme, 32) * smooth).T, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, atol=1e-3, rtol=1e-4)


def test_second_moments_are_those_of_the_inputs():
    model, seen = randomized(tiny()), []
    layer = model.blocks[1].feed_forward.up
    with layer.register_forward_pre_hook(lambda m, args: seen.append(args[0])): found = second_moments(model, {'up': layer}, some_ids())
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(found['up'], x.T @ x, atol=1e-4, rtol=1e-4)
    assert not layer._forward_pre_hooks


def test_inputs_that_are_always_zero_do_no_harm():
    weight, x = drawn(6, 10), drawn(30, 10)
    x[:, 3] = 0
    for method in METHODS.values():
        codes, smooth = method(weight, x.T @ x, Scheme(4))
        back = dequantize_weight(codes, Scheme(4), 10) * (1 if smooth is None else smooth)
        assert back.isfinite().all() and (back - weight).abs().max() < 2
        codes, smooth = method(weight, torch.zeros(10, 10), Scheme(4))
        assert (dequantize_weight(codes, Scheme(4), 10) - weight).abs().max() < 1


def test_a_wrong_hessian_is_refused():
    with pytest.raises(ValueError, match='shape'), unchecked(): gptq(drawn(2, 5), torch.eye(4), Scheme(4))
    with pytest.raises(ValueError, match='damping'): gptq(drawn(2, 5), torch.eye(5), Scheme(4), damping=-1.0)


def test_fake_quantize_rounds_forward_and_is_straight_through_backward():
    weight, factor = drawn(4, 32).requires_grad_(), drawn(4, 32, seed=1)
    rounded = fake_quantize(weight, 'int3')
    torch.testing.assert_close(rounded, there_and_back(weight.detach(), SCHEMES['int3']), atol=1e-6, rtol=1e-5)
    (rounded * factor).sum().backward()
    assert torch.equal(weight.grad, factor)


# GGUF -------------------------------------------------------------------------------------------------------------

WIDE = dict(vocab_size=64, context_length=16, d_model=64, n_layers=2, n_heads=4, d_ff=96)


@pytest.mark.parametrize(('kind', 'options'), [('Q8_0', LLAMA), ('Q4_1', LLAMA), ('F16', LLAMA), ('Q4_0', {'bias': True}), ('Q4_1', {**LLAMA, 'tie_embeddings': False})], ids=['llama', 'llama-4', 'llama-16', 'gpt2', 'untied'])
def test_blocks_of_a_file_give_the_logits_of_the_expanded_model(tmp_path, kind, options):
    model, path = randomized(tiny(**{**WIDE, **options})), tmp_path / 'm.gguf'
    write_gguf(model, path, type=kind)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    small, expanded = open_gguf(path), GPT.from_pretrained(path)
    with torch.no_grad(): torch.testing.assert_close(small(ids), expanded(ids), atol=1e-4, rtol=1e-4)
    n_blocks = sum(isinstance(m, GGUFLinear) for m in small.modules())
    assert n_blocks >= 7 if kind != 'F16' else n_blocks == 0
    if kind == 'F16': return
    assert model_bytes(small) < 0.7 * model_bytes(expanded)
    with pytest.raises(ValueError): save_quantized(small, path)
    fast = prepack(small)                                                       # close, and in the layouts of torch's products
    with torch.no_grad(): a, b = fast(ids), expanded(ids)
    assert (a - b).abs().max() < 0.1 * b.std()
    left = {type(m) for m in fast.modules() if isinstance(m, (GGUFLinear, Int4Linear, QuantizedLinear))}
    if kind == 'Q8_0': assert left == {QuantizedLinear}
    elif hasattr(torch.ops.aten, '_weight_int4pack_mm_for_cpu'):
        assert Int4Linear in left
        with pytest.raises(ValueError): save_quantized(fast, path)


def test_the_four_bit_parts_of_a_block_are_its_weights(tmp_path):
    for kind in ('Q4_0', 'Q4_1'):
        model, path = randomized(tiny(**WIDE, **LLAMA)), tmp_path / f'{kind}.gguf'
        write_gguf(model, path, type=kind)
        file = GGUFFile(path)
        stored = file.stored('blk.0.ffn_up.weight')
        layer = GGUFLinear(torch.from_numpy(np.array(stored)), kind)
        codes, scales, offsets = _int4_of_blocks(layer)
        each = codes.float().unflatten(1, (-1, 32)) - 8
        back = (each * scales[..., None] + offsets[..., None]).flatten(1)
        torch.testing.assert_close(back, torch.from_numpy(dequantize(stored, kind)), atol=1e-5, rtol=1e-4)


def test_blocks_of_another_size_are_refused():
    with pytest.raises(ValueError, match='multiple of 20'): GGUFLinear(torch.zeros(2, 21, dtype=torch.uint8), 'Q4_1')


@pytest.mark.slow
def test_smollm2_runs_from_its_blocks_and_says_the_same():
    from llm_from_scratch.bpe import gguf_file, load_tokenizer
    try: path = gguf_file('smollm2')
    except FileNotFoundError as e: pytest.skip(str(e))
    ids = torch.tensor([load_tokenizer('smollm2').encode('Once upon a time there was')])
    small = open_gguf(path)
    with torch.no_grad():
        blocks = small(ids)[0, -1]
        fast = prepack(small)(ids)[0, -1]
    assert blocks.argmax() == fast.argmax() and (fast - blocks).abs().max() < 0.2 * blocks.std()


def test_names_of_grids_methods_and_schemes_belong_together():
    assert {'symmetric', 'affine', 'nf4', 'mxfp4'} <= GRIDS.keys() and {'nearest', 'gptq', 'awq'} <= METHODS.keys()
    assert isinstance(quantize_weight(drawn(2, 64), SCHEMES['int4']), Codes)
    for scheme in SCHEMES.values(): assert len(scheme.levels) == 2 ** scheme.bits and (scheme.levels.diff() >= 0).all()


@pytest.mark.parametrize('width', [1, 2, 7, 8, 17, 31, 32, 33, 100])
@pytest.mark.parametrize('rows', [1, 5])
def test_torchs_int8_product_is_right_at_every_width(width, rows):
    "Left to itself, torch's kernel reads past the end of a row whose width is no multiple of its vectors: garbage, or a crash."
    generator = torch.Generator().manual_seed(width)
    x, codes = torch.randn(rows, width, generator=generator), torch.randint(-128, 128, (6, width), generator=generator, dtype=torch.int8)
    expected = x.double() @ codes.double().T
    torch.testing.assert_close(int8_product(x, codes, torch.ones(6)).double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
