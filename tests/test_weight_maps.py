"The appendix on weight maps: equal to transformers in value and gradient, maps that do not fit."
from dataclasses import replace

import pytest
import torch
from shapes import unchecked
from small import LLAMA, model, randomized, some_ids

from llm_from_scratch.positions import RopeScaling
from llm_from_scratch.weight_maps import GPT2_WEIGHTS, LLAMA_WEIGHTS, Weight, block_lines, export_weights, layer_lines, load_weights

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')


def gpt2_of(hf, layers=2):
    return randomized(hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=23, n_positions=12, n_embd=16, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0,
                                                       resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)))


def agree(ours, theirs, lines):
    load_weights(ours, theirs.state_dict(), lines)
    ids = some_ids()
    a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    ours(ids[:, :-1], ids[:, 1:]).backward()
    theirs(ids, labels=ids).loss.backward()
    torch.testing.assert_close(ours.token_embedding.weight.grad, theirs.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)


def test_against_hf_gpt2(hf): agree(model(), gpt2_of(hf), GPT2_WEIGHTS)


@pytest.mark.parametrize('n_kv_heads, tied, scaling', [(4, False, None), (2, True, None), (1, False, None),
                                                       (2, False, RopeScaling('llama3', 8.0, 16)), (4, True, RopeScaling('linear', 2.0))])
def test_against_hf_llama(hf, n_kv_heads, tied, scaling):
    rope = {'rope_type': 'default', 'rope_theta': 500.0}
    if scaling: rope |= {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling and scaling.kind == 'llama3': rope |= {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
    theirs = randomized(hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=n_kv_heads, intermediate_size=24, rms_norm_eps=1e-5,
        max_position_embeddings=12, tie_word_embeddings=tied, rope_parameters=rope, bos_token_id=0, eos_token_id=0)))
    agree(model(**LLAMA, n_kv_heads=n_kv_heads, d_ff=24, tie_embeddings=tied, rope_base=500.0, rope_scaling=scaling), theirs, LLAMA_WEIGHTS)


def test_each_tensor_is_used_exactly_once(hf):
    state, made = gpt2_of(hf).state_dict(), model()
    before = {name: p.clone() for name, p in made.state_dict().items()}

    def load(tensors, lines=GPT2_WEIGHTS): load_weights(made, tensors, lines)
    with pytest.raises(ValueError, match='lacks: transformer.h.1.ln_1.bias'): load({k: v for k, v in state.items() if k != 'transformer.h.1.ln_1.bias'})
    with pytest.raises(ValueError, match='no line for: extra'): load({**state, 'extra': torch.zeros(1)})
    with pytest.raises(ValueError, match='no line for: transformer.h.2'): load(gpt2_of(hf, 3).state_dict())
    with pytest.raises(ValueError, match='wpe.weight has shape'): load({**state, 'transformer.wpe.weight': torch.zeros(13, 16)})
    with pytest.raises(ValueError, match='not its embedding'): load({**state, 'lm_head.weight': torch.zeros(23, 16)})
    without = {k: v for k, v in state.items() if k != 'transformer.wpe.weight'}
    with pytest.raises(ValueError, match='nothing fills: position_embedding.weight'): load(without, [line for line in GPT2_WEIGHTS if 'wpe' not in line.source])
    with pytest.raises(ValueError, match='fills again: norm.weight'): load({**state, 'again': torch.zeros(16)}, [*GPT2_WEIGHTS, Weight('again', 'norm.weight')])
    with pytest.raises(ValueError, match='two lines'): load(state, [*GPT2_WEIGHTS, GPT2_WEIGHTS[0]])
    with pytest.raises(ValueError, match=r'x.\{e\} has shape \(1, 3\), but what it fills, norm.weight, has \(16,\)'): load({**state, 'x.0': torch.zeros(3)}, [*GPT2_WEIGHTS, Weight('x.{e}', 'norm.weight')])
    with pytest.raises(ValueError, match='this model has no: nowhere'): load({**state, 'x': torch.zeros(1)}, [*GPT2_WEIGHTS, Weight('x', 'nowhere')])
    assert all(torch.equal(p, before[name]) for name, p in made.state_dict().items())          # nothing was copied before all was checked
    load({k: v for k, v in state.items() if k != 'lm_head.weight'})                            # a tied head may be left out


def test_an_untied_head_must_be_given(hf):
    state = gpt2_of(hf).state_dict()
    state['lm_head.weight'] = torch.randn(23, 16)
    untied = model(tie_embeddings=False)
    load_weights(untied, state, GPT2_WEIGHTS)
    assert torch.equal(untied.head.weight, state['lm_head.weight'])
    del state['lm_head.weight']
    with pytest.raises(ValueError, match='lacks: lm_head.weight'): load_weights(untied, state, GPT2_WEIGHTS)


@pytest.mark.parametrize('groups, order', [
    (1, 'qqqqqqqqkkkkvvvv'), (2, 'qqqqkkvvqqqqkkvv'), ('kv_heads', 'qqqqkkvvqqqqkkvv'), ('n_heads', 'qqkvqqkvqqkvqqkv')])
def test_the_rows_of_a_fused_matrix_are_taken_in_the_order_that_is_said(groups, order):
    made = model(**LLAMA, n_kv_heads=2, d_head=2, n_layers=1)
    line = Weight('fused', 'blocks.0.attention.query.weight blocks.0.attention.key.weight blocks.0.attention.value.weight', groups=groups)
    lines = [*(Weight(name, name) for name in made.state_dict() if name not in line.targets), line]
    tensors = export_weights(made, lines)
    numbers = {letter: iter(made.state_dict()[target]) for letter, target in zip('qkv', line.targets.split(), strict=True)}
    assert torch.equal(tensors['fused'], torch.stack([next(numbers[letter]) for letter in order]))
    other = model(**LLAMA, n_kv_heads=2, d_head=2, n_layers=1)
    for p in other.parameters(): p.data.zero_()
    load_weights(other, tensors, lines)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), made.state_dict().values(), strict=True))


def test_a_fused_matrix_without_an_order_is_refused():
    for make in (lambda: Weight('qkv', 'a b c'), lambda: layer_lines('qkv', 'a b c'), lambda: block_lines('h', {'qkv': 'a b c'}, bias=True)):
        with pytest.raises(ValueError, match='in which order are its rows'): make()
    with pytest.raises(ValueError, match="groups must be a whole number of at least 1 or 'n_heads' or 'kv_heads' or 'ff_width' or 'n_key_heads' or None, got 'heads'"), unchecked(): Weight('qkv', 'a b c', groups='heads')
    with pytest.raises(ValueError, match='3 groups'): load_weights(made := model(), {**export_weights(made, GPT2_WEIGHTS)}, [replace(line, groups=3) if line.groups else line for line in GPT2_WEIGHTS])
