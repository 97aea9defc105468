"The appendix on families: each is read as it was published and as transformers writes it today, and what we write transformers opens; the logits are equal."
import json

import pytest
import safetensors.torch
import torch
from shapes import unchecked

from llm_from_scratch.gpt import GPT
from llm_from_scratch.pretrained import FAMILIES, config_from_hf, config_to_hf
from llm_from_scratch.weight_maps import load_weights

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')


def randomized(module):
    torch.manual_seed(0)
    for p in module.parameters(): p.data = torch.randn_like(p) * 0.3
    return module.eval()


BASIC = dict(vocab_size=23, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24, max_position_embeddings=20, bos_token_id=0, eos_token_id=0, pad_token_id=0)
YARN = dict(rope_type='yarn', factor=2.0, original_max_position_embeddings=10)
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=10)
DEFAULT = {'rope_type': 'default'}

# As they are published, in old words and new: each must mean to us what it means to transformers.
PUBLISHED = {
    'GPT-2 of 2019': dict(model_type='gpt2', vocab_size=23, n_positions=20, n_ctx=20, n_embd=16, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0, activation_function='gelu_new', layer_norm_epsilon=1e-5, attn_pdrop=0.1),
    'GPT-2, wider': dict(model_type='gpt2', vocab_size=23, n_positions=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, n_inner=24, activation_function='relu', tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    'Llama 2': dict(BASIC, model_type='llama', rms_norm_eps=1e-5, rope_scaling=None, pretraining_tp=1, tie_word_embeddings=False),
    'Llama 3.2': dict(BASIC, model_type='llama', num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True, attention_bias=False, mlp_bias=False),
    'Llama, linear': dict(BASIC, model_type='llama', rope_scaling={'type': 'linear', 'factor': 2.0}),
    'Llama, YaRN': dict(BASIC, model_type='llama', rope_theta=500.0, rope_scaling=dict(YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=1.2)),
    'Llama, YaRN from its own length': dict(BASIC, model_type='llama', rope_theta=50.0, rope_scaling={'rope_type': 'yarn', 'factor': 2.0}),
    'Llama with biases, new words': dict(BASIC, model_type='llama', num_key_value_heads=1, attention_bias=True, mlp_bias=True, hidden_act='gelu', rope_parameters=dict(DEFAULT, rope_theta=300.0)),
    'Mistral 7B v0.1': dict(BASIC, model_type='mistral', num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4),
    'Mistral 7B v0.3': dict(BASIC, model_type='mistral', num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None),
    'Qwen2.5': dict(BASIC, model_type='qwen2', num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=4, max_window_layers=2, use_sliding_window=False, tie_word_embeddings=True),
    'Qwen2, late windows': dict(BASIC, model_type='qwen2', num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=4, max_window_layers=2, use_sliding_window=True),
    'Qwen3': dict(BASIC, model_type='qwen3', num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, attention_bias=True, layer_types=['full_attention'] * 4, use_sliding_window=False, sliding_window=None, max_window_layers=28),
    'SmolLM3': dict(BASIC, model_type='smollm3', num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=5e6, tie_word_embeddings=True),
    'SmolLM3, with windows': dict(BASIC, model_type='smollm3', num_key_value_heads=2, no_rope_layers=[0, 1, 1, 0], layer_types=['sliding_attention', 'full_attention', 'full_attention', 'sliding_attention'], use_sliding_window=True, sliding_window=4),
    'Gemma 3 1B of 2025': dict(BASIC, model_type='gemma3_text', num_hidden_layers=7, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e6, rope_local_base_freq=100.0, rope_scaling=None, sliding_window=4, sliding_window_pattern=6,
                               query_pre_attn_scalar=8, hidden_activation='gelu_pytorch_tanh', attn_logit_softcapping=None, final_logit_softcapping=None),
    'Gemma 3 4B, scaled': dict(BASIC, model_type='gemma3_text', num_key_value_heads=2, head_dim=8, rope_scaling={'rope_type': 'linear', 'factor': 8.0}, sliding_window=4, sliding_window_pattern=2, query_pre_attn_scalar=5, final_logit_softcapping=3.0),
    'OLMo 2': dict(BASIC, model_type='olmo2', num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=500.0),
    'OLMo 3, YaRN in open layers': dict(BASIC, model_type='olmo3', num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=500.0, sliding_window=4, rope_scaling=dict(YARN, attention_factor=1.2)),
    'OLMo 3, new words': dict(BASIC, model_type='olmo3', layer_types=['full_attention', 'sliding_attention'] * 2, sliding_window=4, rope_parameters={'sliding_attention': dict(DEFAULT, rope_theta=100.0), 'full_attention': dict(YARN, rope_theta=700.0)}),
    'Qwen3-MoE': dict(BASIC, model_type='qwen3_moe', num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True, decoder_sparse_step=1,
                      mlp_only_layers=[], use_sliding_window=False, sliding_window=None, max_window_layers=48, router_aux_loss_coef=0.001),
    'Qwen3-MoE, some layers dense': dict(BASIC, model_type='qwen3_moe', num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[3]),
    'gpt-oss': dict(BASIC, model_type='gpt_oss', num_key_value_heads=2, head_dim=8, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, rope_theta=150000, attention_bias=True, swiglu_limit=7.0, rms_norm_eps=1e-5,
                    rope_scaling={'rope_type': 'yarn', 'factor': 4.0, 'beta_fast': 32.0, 'beta_slow': 1.0, 'truncate': False, 'original_max_position_embeddings': 10}),
    'DeepSeek V3': dict(BASIC, model_type='deepseek_v3', q_lora_rank=8, kv_lora_rank=6, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=2,
                        moe_intermediate_size=8, routed_scaling_factor=2.5, scoring_func='sigmoid', topk_method='noaux_tc', norm_topk_prob=True, num_nextn_predict_layers=0, rope_theta=500.0,
                        rope_scaling={'type': 'yarn', 'factor': 4.0, 'mscale': 1.0, 'mscale_all_dim': 1.0, 'beta_fast': 32, 'beta_slow': 1, 'original_max_position_embeddings': 8}),
    'DeepSeek V3, half': dict(BASIC, model_type='deepseek_v3', q_lora_rank=8, kv_lora_rank=6, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3, first_k_dense_replace=0, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                              moe_intermediate_size=8, rope_interleave=False, num_nextn_predict_layers=0),
    'Qwen3-Next': dict(BASIC, model_type='qwen3_next', num_key_value_heads=2, head_dim=8, partial_rotary_factor=0.5, rope_theta=1e4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5, linear_conv_kernel_dim=4,
                       full_attention_interval=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[0]),
}
for said in PUBLISHED.values():
    if said['model_type'] != 'gpt2': said.setdefault('num_key_value_heads', 4)


def published(hf, name):
    said = json.loads(json.dumps(PUBLISHED[name]))
    theirs = randomized(hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**said), attn_implementation='eager', experts_implementation='eager'))
    for name, bias in theirs.named_buffers():
        if name.endswith('correction_bias'): bias.copy_(torch.linspace(-0.4, 0.4, len(bias)))     # else it would choose as if it were not there
    return said, theirs, torch.arange(40).remainder(23).view(2, 20)


@pytest.mark.parametrize('name', PUBLISHED)
def test_against_hf_every_family_both_ways(hf, tmp_path, name):
    said, theirs, ids = published(hf, name)
    theirs.save_pretrained(tmp_path/'theirs')
    with unchecked(), torch.no_grad():
        expected = theirs(ids).logits
        ours = GPT.from_hf(tmp_path/'theirs')                                                     # as transformers writes it today
        assert (ours(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
        kind, read = said['model_type'], config_from_hf(PUBLISHED[name])                          # as it was published
        assert config_to_hf(ours.config, kind) == config_to_hf(read, kind)
        ours.to_hf(tmp_path/'ours', model_type=kind)
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path/'ours', attn_implementation='eager', experts_implementation='eager').eval()
        assert type(again) is type(theirs) and torch.equal(again(ids).logits, expected)
        last = GPT.from_pretrained(tmp_path/'ours')
        assert torch.equal(last(ids), ours(ids)) and config_to_hf(last.config, kind) == config_to_hf(read, kind)


def test_every_family_is_tried(): assert {said['model_type'] for said in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize('name, change', [('Llama 3.2', dict(rope_theta=9000.0)), ('Llama 3.2', dict(rms_norm_eps=0.1)), ('Llama, YaRN', dict(rope_scaling=YARN)), ('Mistral 7B v0.1', dict(sliding_window=3)), ('SmolLM3', dict(no_rope_layer_interval=2)),
                                          ('Gemma 3 1B of 2025', dict(rope_local_base_freq=9.0)), ('Gemma 3 1B of 2025', dict(query_pre_attn_scalar=9)), ('Gemma 3 4B, scaled', dict(final_logit_softcapping=None)), ('OLMo 3, new words', dict(layer_types=['full_attention'] * 4))])
def test_a_field_that_differs_is_seen_in_the_logits_and_nowhere_else(hf, name, change):
    "What the opening of the chapter says; and each of these keys counts."
    said, theirs, ids = published(hf, name)
    other = GPT(config_from_hf({**PUBLISHED[name], **change})).eval()
    load_weights(other, theirs.state_dict(), FAMILIES[said['model_type']].lines)
    with unchecked(), torch.no_grad(): assert (other(ids) - theirs(ids).logits).abs().max() > 1e-3


def test_the_tensors_of_gpt2_as_published(hf, tmp_path):
    "No `transformer.` in front, the causal mask as a buffer, no head."
    said, theirs, ids = published(hf, 'GPT-2 of 2019')
    tensors = {name.removeprefix('transformer.'): p.clone() for name, p in theirs.state_dict().items() if name != 'lm_head.weight'}
    tensors |= {f'h.{i}.attn.bias': torch.ones(1, 1, 20, 20).tril() for i in range(3)}
    assert {'wte.weight', 'wpe.weight', 'h.0.ln_1.weight', 'h.0.attn.c_attn.weight', 'h.2.mlp.c_proj.bias', 'ln_f.bias', 'h.0.attn.bias'} < tensors.keys() and tensors['h.0.attn.c_attn.weight'].shape == (16, 48)
    safetensors.torch.save_file(tensors, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(said))
    with unchecked(), torch.no_grad(): torch.testing.assert_close(GPT.from_hf(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
