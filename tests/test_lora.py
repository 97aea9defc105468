"Chapter 21: an adapter is the change that it says, merges and unmerges exactly, is read and written as `peft` does, is refused where it does not fit, and rows of a batch keep theirs apart."
import json
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from small import LLAMA, model as small, random, randomized, some_ids
from torch import nn

from llm_from_scratch.costs import estimate_memory, flops_per_token
from llm_from_scratch.data import BatchLoader
from llm_from_scratch.gpt import GPT, GPTConfig, blueprint
from llm_from_scratch.lora import (
    AdapterBank, LoRAConfig, LoRALinear, add_lora, load_adapter, lora_layers, merge, plus_product, remove_lora, save_adapter, shared_copy, unmerge)
from llm_from_scratch.quantization import Scheme, quantize_model
from llm_from_scratch.training import TrainConfig, Trainer, make_optimizers

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
QWEN = {**LLAMA, 'n_kv_heads': 2, 'qk_norm': True, 'd_head': 4, 'norm_eps': 1e-6}
KINDS = {'llama': LLAMA, 'qwen': QWEN, 'gpt2': {}, 'interleaved': {**LLAMA, 'rope_layout': 'interleaved', 'n_kv_heads': 2}}
WAYS = {'lora': LoRAConfig(3, 6.0), 'rslora': LoRAConfig(4, 5.0, rslora=True), 'dora': LoRAConfig(2, 3.0, dora=True)}
CASES = [*((kind, 'lora') for kind in KINDS), ('llama', 'rslora'), ('interleaved', 'dora')]


def base(kind='llama', dtype=torch.float64): return randomized(small(**KINDS[kind])).to(dtype)


def filled(model, seed=1):
    "The model with other numbers than zero in every adapter."
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for p in (layer.A, layer.B): p.data = (torch.randn(p.shape, generator=generator) * 0.3).to(p)
        if layer.magnitude is not None: layer.magnitude.data *= 0.5 + torch.rand(len(layer.magnitude), generator=generator).to(layer.magnitude)
    return model.eval()


def adapted(kind='llama', way='lora', **options): return filled(add_lora(base(kind), LoRAConfig(**{**vars(WAYS[way]), **options})))


def logits(model):
    with torch.no_grad(): return model(some_ids())


# The layer --------------------------------------------------------------------------------------------------------

@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(shape=st.lists(st.integers(1, 4), max_size=3), D=st.integers(1, 7), F=st.integers(1, 7), r=st.integers(1, 3), scale=st.floats(-3, 3))
def test_the_fused_sum_is_the_sum(shape, D, F, r, scale):
    y, x, A, B = random(0, (*shape, F), (*shape, D), (r, D), (F, r))
    torch.testing.assert_close(plus_product(y, x, A, B, scale), y + scale * (x @ A.T @ B.T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('way', WAYS)
def test_a_layer_is_one_with_changed_weights_gradients_too(way, bias):
    layer = LoRALinear(nn.Linear(6, 5, bias=bias).double(), WAYS[way])
    for p in (layer.A, layer.B, layer.magnitude):
        if p is not None: p.data = torch.rand_like(p) + 0.5
    x, weights = random(0, (7, 6), (7, 5))
    A, B, m = (None if p is None else p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.magnitude))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole = layer.base.weight + layer.config.scale * B @ A
    if m is not None: whole = whole * (m / whole.norm(dim=1).detach())[:, None]
    expected = nn.functional.linear(theirs, whole, layer.base.bias)
    found = layer(mine)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.weight.detach(), whole.detach())
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(mine, theirs), (layer.A, A), (layer.B, B)] + ([(layer.magnitude, m)] if m is not None else [])
    for one, two in pairs: torch.testing.assert_close(one.grad, two.grad)
    assert layer.base.weight.grad is None and not layer.base.weight.requires_grad


@pytest.mark.parametrize(('kind', 'way'), CASES)
def test_a_new_adapter_changes_nothing(kind, way):
    model = base(kind)
    before = logits(model)
    torch.testing.assert_close(logits(add_lora(model, WAYS[way])), before, rtol=1e-9 if way == 'dora' else 0, atol=1e-9 if way == 'dora' else 0)


def test_the_scale_is_alpha_over_the_rank_or_its_root():
    assert LoRAConfig(16, 8).scale == 0.5 and LoRAConfig(16, 8, rslora=True).scale == 2


@pytest.mark.parametrize('wrong', [{'rank': 0}, {'alpha': 0}, {'alpha': float('nan')}, {'dropout': 1.0}, {'targets': 'blocks'}])
def test_a_config_is_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): LoRAConfig(**wrong)


def test_a_rank_beyond_the_layer_is_refused():
    with pytest.raises(ValueError, match='rank 4 at most, got rank=5'): LoRALinear(nn.Linear(4, 9), LoRAConfig(5))


def test_dropout_is_of_the_adapter_alone_and_only_in_training():
    layer = LoRALinear(nn.Linear(50, 4), LoRAConfig(2, dropout=0.5))
    x = torch.ones(3, 50)
    assert layer(x).equal(layer.base(x))                                   # B is zero: what is left does not drop
    nn.init.ones_(layer.B)
    assert not layer(x).equal(layer(x)) and layer.eval()(x).equal(layer(x))


def test_a_seed_gives_the_same_adapter():
    one, two, other = (add_lora(base(), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    for name, layer in lora_layers(one).items():
        assert layer.A.equal(two.get_submodule(name).A) and not layer.A.equal(other.get_submodule(name).A)
        assert layer.A.abs().max() <= layer.base.in_features ** -0.5 and layer.A.std() > 0 and not layer.B.any()


def test_it_runs_under_autocast_and_on_bfloat16():
    model = add_lora(base(dtype=torch.float32))
    with torch.autocast('cpu', torch.bfloat16): model(some_ids(), some_ids()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    half = filled(add_lora(base(dtype=torch.bfloat16)))
    assert half.blocks[0].attention.query.A.dtype == torch.bfloat16 and logits(half).isfinite().all()


# Which layers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('targets', 'n'), [(['blocks.*'], 14), (['*.query', '*.value'], 4), (['blocks.0.*'], 7), (['blocks.1.feed_forward.down'], 1), (['*.attention.*', '*.query'], 8)])
def test_patterns_choose_layers(targets, n):
    model = add_lora(base(), LoRAConfig(2, targets=targets))
    assert len(lora_layers(model)) == n
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learns) == 2 * n and all(name.endswith(('.A', '.B')) for name in learns)


def test_what_names_nothing_is_refused_and_changes_nothing():
    model = base()
    with pytest.raises(ValueError, match=r"no linear layer is called '\*\.q_proj'.*blocks\.0\.attention\.query"): add_lora(model, LoRAConfig(targets=['*.query', '*.q_proj']))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match='adapters already: blocks.0.attention.query'): add_lora(add_lora(model))


def test_costs_are_counted():
    plain, model = base(), add_lora(base(), LoRAConfig(2))
    extra = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops_per_token(model, 5, training=False) - flops_per_token(plain, 5, training=False) == 2 * extra
    assert estimate_memory(model, 2, 5).gradients == 8 * extra
    assert flops_per_token(merge(model), 5) == flops_per_token(plain, 5)
    assert all(p.is_meta for p in add_lora(blueprint(GPTConfig(20, 16, 8, 1, 2))).parameters())


# Training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('way', ['lora', 'dora'])
def test_only_the_adapter_learns(way):
    model = add_lora(base(dtype=torch.float32), WAYS[way])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(steps=4, batch_size=2, lr=0.01, precision='float32')
    Trainer(model, config, BatchLoader(torch.arange(99).numpy() % 23, 8, 2)).fit()
    for name, p in model.named_parameters(): assert p.equal(before[name]) == (not p.requires_grad), name


def test_the_optimizer_holds_no_frozen_weight():
    model = add_lora(base())
    held = {id(p) for o in make_optimizers(model, TrainConfig(steps=1)) for group in o.param_groups for p in group['params']}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


# Merging ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('kind', 'way'), CASES)
def test_merged_equals_apart_and_unmerged_is_the_original(kind, way):
    model = adapted(kind, way)
    weights = {name: (layer.base.weight, layer.base.weight.clone()) for name, layer in lora_layers(model).items()}
    apart = logits(model)
    assert (logits(base(kind)) - apart).abs().max() > 0.01
    torch.testing.assert_close(logits(merge(model)), apart, rtol=1e-9, atol=1e-9)
    assert logits(unmerge(model)).equal(apart)
    for name, layer in lora_layers(model).items(): assert layer.base.weight is weights[name][0] and layer.base.weight.equal(weights[name][1])


@settings(max_examples=15)
@given(scale=st.floats(1e-6, 1e6), times=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_unmerging_is_exact_for_any_size_of_the_change(scale, times, dtype):
    layer = LoRALinear(nn.Linear(5, 4, dtype=dtype), LoRAConfig(2, alpha=scale))
    nn.init.normal_(layer.B)
    model, before = nn.ModuleDict({'up': layer}), layer.base.weight.clone()
    for _ in range(times): unmerge(merge(model))
    assert layer.base.weight.equal(before)


def test_a_merged_model_is_an_ordinary_model(tmp_path):
    model = adapted()
    apart = logits(model)
    remove_lora(merge(model)).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path)).double(), apart, rtol=1e-4, atol=1e-4)
    plain = adapted()
    assert logits(remove_lora(plain)).equal(logits(base()))


def test_merging_twice_or_into_four_bits_is_refused():
    model = merge(adapted())
    weights = model.blocks[0].attention.query.base.weight
    with pytest.raises(ValueError, match='merged already: blocks.0.attention.query'): merge(model)
    assert model.blocks[0].attention.query.base.weight is weights
    unmerge(model)
    with pytest.raises(ValueError, match='not merged'): unmerge(model)
    four = filled(add_lora(quantize_model(base(dtype=torch.float32), Scheme(4, 16, 'nf4'), skip=('head', 'up'))))
    with pytest.raises(ValueError, match='quantized'): merge(four)
    assert not any(layer.is_merged for layer in lora_layers(four).values())
    for refused in (merge, unmerge, remove_lora):
        with pytest.raises(ValueError, match='no adapter'): refused(base())


# Files, and peft --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('kind', 'way'), CASES)
def test_what_is_saved_is_loaded(tmp_path, kind, way):
    options = {'targets': ['*.down', '*.output', '*.up']} if kind == 'gpt2' else {}
    model = adapted(kind, way, dropout=0.1, **options)
    save_adapter(model, tmp_path)
    again = load_adapter(base(kind), tmp_path).eval()
    assert logits(again).equal(logits(model))
    one, two = (next(iter(lora_layers(m).values())).config for m in (model, again))
    assert (one.scale, one.rank, one.dropout, one.dora) == (two.scale, two.rank, two.dropout, two.dora)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {name for name, p in model.named_parameters() if p.requires_grad}


def opened_by_peft(model, original, folder):
    "The base model and the adapter as files, opened by the two libraries."
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    original.to_hf(folder/'base')
    save_adapter(model, folder/'adapter')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder/'base', dtype=torch.float64)
    return peft.PeftModel.from_pretrained(theirs, folder/'adapter', autocast_adapter_dtype=False).eval()


@pytest.mark.parametrize(('kind', 'way'), CASES)
def test_against_peft(tmp_path, kind, way):
    options = {'targets': ['*.down', '*.output', '*.up']} if kind == 'gpt2' else {}
    model = adapted(kind, way, **options)
    theirs = opened_by_peft(model, base(kind), tmp_path)
    with torch.no_grad(): torch.testing.assert_close(theirs(some_ids()).logits, logits(model), rtol=1e-6, atol=1e-6)
    theirs.save_pretrained(tmp_path/'back')                                # as peft writes it
    assert logits(load_adapter(base(kind), tmp_path/'back').eval()).equal(logits(model))


def test_a_fused_matrix_has_no_place_for_one_of_its_parts(tmp_path):
    with pytest.raises(ValueError, match='no place for adapters of: blocks.0.attention.query'): save_adapter(adapted('gpt2', targets=['*.query']), tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapters_of_other_modules_keep_their_names(tmp_path):
    model = nn.ModuleDict({'up': nn.Linear(6, 4)})
    save_adapter(add_lora(model, LoRAConfig(2, targets=['up'])), tmp_path, base='somebody/model')
    said = json.loads((tmp_path/'adapter_config.json').read_text())
    assert said['target_modules'] == ['up'] and said['base_model_name_or_path'] == 'somebody/model' and said['r'] == 2
    with pytest.raises(ValueError, match='no adapter'): save_adapter(nn.Linear(2, 2), tmp_path)


def changed(said=None, tensors=None, raw=None):
    "A change of the files of an adapter."
    def change(folder):
        from safetensors.torch import load_file, save_file
        config, data = folder/'adapter_config.json', folder/'adapter_model.safetensors'
        if said: config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
        if raw: (folder/raw[0]).write_bytes(raw[1])
        if tensors: save_file(tensors(load_file(data)), data)
    return change


def without(end): return lambda t: {k: v for k, v in t.items() if not k.endswith(end)}


FIRST = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
HOSTILE = {
    'another kind': (changed({'peft_type': 'LOHA'}), 'LOHA'), 'biases': (changed({'bias': 'all'}), "bias='all'"),
    'a rank for each layer': (changed({'rank_pattern': {'q_proj': 4}}), 'rank_pattern'), 'whole modules': (changed({'modules_to_save': ['lm_head']}), 'modules_to_save'),
    'another rank': (changed({'r': 2}), 'needs'), 'no rank': (changed({'r': 'many'}), 'rank'), 'negative alpha': (changed({'lora_alpha': -1}), 'alpha'),
    'DoRA without magnitudes': (changed({'use_dora': True}), 'magnitude'), 'no JSON': (changed(raw=('adapter_config.json', b'{')), 'not JSON'),
    'a list': (changed(raw=('adapter_config.json', b'[]')), 'JSON object'), 'an empty object': (changed(raw=('adapter_config.json', b'{}')), 'lacks'),
    'no safetensors': (changed(raw=('adapter_model.safetensors', b'\x80\x04')), 'is not an adapter'), 'half an adapter': (changed(tensors=without('layers.1.mlp.up_proj.lora_B.weight')), 'blocks.1.feed_forward.up needs'),
    'nothing': (changed(tensors=lambda t: {}), 'no tensor'), 'an unknown layer': (changed(tensors=lambda t: {**t, FIRST.replace('layers.0', 'layers.9'): t[FIRST].clone()}), 'no place'),
    'an embedding': (changed(tensors=lambda t: {**t, 'base_model.model.model.embed_tokens.lora_A.weight': t[FIRST].clone()}), 'no linear layer'),
    'not finite': (changed(tensors=lambda t: {**t, FIRST: t[FIRST] * float('nan')}), 'not finite'), 'another width': (changed(tensors=lambda t: {**t, FIRST: t[FIRST][:, :5].clone()}), 'needs'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path, name):
    save_adapter(adapted(), tmp_path)
    change, words = HOSTILE[name]
    change(tmp_path)
    model = base()
    modules = [*model.modules()]
    with pytest.raises(ValueError, match=words): load_adapter(model, tmp_path)
    assert [*model.modules()] == modules and all(p.requires_grad for p in model.parameters())


def test_a_folder_without_an_adapter_and_a_model_with_one(tmp_path):
    with pytest.raises(FileNotFoundError): load_adapter(base(), tmp_path)
    save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match='already'): load_adapter(adapted(), tmp_path)


# Weights of four bits ---------------------------------------------------------------------------------------------

def test_qlora_against_bitsandbytes():
    functional = pytest.importorskip('bitsandbytes.functional')
    frozen = nn.Linear(64, 24, bias=False)
    codes, state = functional.quantize_4bit(frozen.weight.detach(), blocksize=64, quant_type='nf4')
    theirs = LoRALinear(nn.Linear(64, 24, bias=False), LoRAConfig(4))
    theirs.base.weight.data = functional.dequantize_4bit(codes, state)
    model = quantize_model(nn.ModuleDict({'up': frozen}), 'nf4')
    mine = add_lora(model, LoRAConfig(4, targets=['up']))['up']
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in (mine, theirs):
        torch.manual_seed(3)
        for p in (layer.A, layer.B): nn.init.normal_(p)
        given = x.clone().requires_grad_()
        (y := layer(given)).square().sum().backward()
        found.append((y.detach(), given.grad, layer.A.grad, layer.B.grad))
    for one, two in zip(*found): torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mine.base.weight, theirs.base.weight, rtol=0, atol=1e-6)


def test_dora_on_quantized_weights_begins_where_it_was():
    model = quantize_model(base(dtype=torch.float32), Scheme(4, 16, 'nf4'), skip=('head',))
    before = logits(model)
    torch.testing.assert_close(logits(add_lora(model, WAYS['dora'])), before, rtol=1e-4, atol=1e-4)


# Several adapters -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def several(tmp_path_factory):
    "A bank of three adapters of other ranks, scales and layers, and each of them alone."
    folder = tmp_path_factory.mktemp('adapters')
    ways = {'one': LoRAConfig(2, 3.0), 'two': LoRAConfig(4, 8.0, ['*.query', '*.down'], rslora=True), 'three': LoRAConfig(1, 5.0, ['blocks.1.*'])}
    alone = {name: filled(add_lora(base(), config), seed) for seed, (name, config) in enumerate(ways.items())}
    for name, model in alone.items(): save_adapter(model, folder/name)
    return AdapterBank(base(), {name: folder/name for name in ways}), {None: base(), **alone}


@settings(max_examples=8)
@given(names=st.lists(st.sampled_from([None, 'one', 'two', 'three']), min_size=1, max_size=6))
def test_rows_of_a_batch_get_what_they_would_get_alone(several, names):
    bank, alone = several
    ids = torch.randint(23, (len(names), 7), generator=torch.Generator().manual_seed(len(names)))
    with torch.no_grad():
        with bank.use(names): mixed = bank.model(ids)
        for row, ids_of_row, name in zip(mixed, ids, names): torch.testing.assert_close(row, alone[name](ids_of_row[None])[0], rtol=1e-9, atol=1e-9)


def test_outside_of_use_there_is_no_adapter(several):
    bank, alone = several
    plain = logits(alone[None])
    assert logits(bank.model).equal(plain)
    with pytest.raises(RuntimeError, match='stop'):
        with bank.use(['one', 'one']): raise RuntimeError('stop')
    assert logits(bank.model).equal(plain)
    with bank.use(['one', 'one']):
        with bank.use(['two', None]): pass
        torch.testing.assert_close(logits(bank.model), logits(alone['one']), rtol=1e-9, atol=1e-9)


def test_a_bank_refuses_what_it_cannot_do(several, tmp_path):
    bank, _ = several
    with pytest.raises(ValueError, match='no adapter: four'):
        with bank.use(['four']): pass
    with pytest.raises(ValueError, match='chosen for 3 rows, got 2'):
        with bank.use(['one', 'one', None]): bank.model(some_ids())
    save_adapter(adapted(way='dora'), tmp_path)
    with pytest.raises(ValueError, match='DoRA: heavy'): AdapterBank(base(), {'heavy': tmp_path})
    with pytest.raises(ValueError, match='already'): AdapterBank(adapted(), {})


def test_models_that_share_weights_change_apart(tmp_path):
    save_adapter(adapted(), tmp_path)
    original = base()
    before = logits(original)
    twin = load_adapter(shared_copy(original), tmp_path).eval()
    for name, layer in lora_layers(twin).items(): assert layer.base.weight.data_ptr() == original.get_submodule(name).weight.data_ptr()
    merge(twin)
    assert logits(original).equal(before) and not lora_layers(original)
    torch.testing.assert_close(logits(twin), logits(adapted()), rtol=1e-9, atol=1e-9)
    assert logits(deepcopy(twin)).equal(logits(twin))
