"Chapter 9: what other families differ in is configuration; each equals a tiny model of transformers with random weights, in both directions of its weight map."
import pytest
import torch
from shapes import unchecked

from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.weight_maps import Weight, export_weights, load_weights

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
V, T, D, L, H = 29, 12, 16, 4, 4
SEPARATE = {'self_attn.q_proj': 'attention.query', 'self_attn.k_proj': 'attention.key', 'self_attn.v_proj': 'attention.value', 'self_attn.o_proj': 'attention.output'}
GATED = {'mlp.gate_proj': 'feed_forward.gate', 'mlp.up_proj': 'feed_forward.up', 'mlp.down_proj': 'feed_forward.down'}
TWO = {'mlp.up_proj': 'feed_forward.up', 'mlp.down_proj': 'feed_forward.down'}
NORMS = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'feed_forward_norm'}
QK_NORMS = {'self_attn.q_norm': 'attention.query_norm', 'self_attn.k_norm': 'attention.key_norm'}
OUTPUT_NORMS = {'post_attention_layernorm': 'attention_output_norm', 'post_feedforward_layernorm': 'feed_forward_output_norm'}
SANDWICH = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'attention_output_norm',
            'pre_feedforward_layernorm': 'feed_forward_norm', 'post_feedforward_layernorm': 'feed_forward_output_norm'}
ENDS = {'model.embed_tokens': 'token_embedding', 'model.norm': 'norm', 'lm_head': 'head'}
FUSED = 'attention.query attention.key attention.value'

MODERN = dict(positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False, tie_embeddings=False, norm_eps=1e-6, d_ff=24)
LAYERED = dict(positions='rope', norm='layernorm', feed_forward='gelu', tie_embeddings=False, d_ff=24)
ROPE = {'rope_type': 'default', 'rope_theta': 10_000.0}
PARTIAL = {'rope_parameters': {**ROPE, 'partial_rotary_factor': 0.5}}
WIDE = dict(head_dim=8)
OWN_NORMS = dict(qk_norm=True, qk_norm_eps=1e-5, qk_norm_centered=True, qk_norm_heads=True)

# family: transformers' class, its settings, ours, the parts of a layer, the ends of the model, where the layers are, fused rows in turns
FAMILIES = {
    'GPT-NeoX': ('GPTNeoX', dict(use_parallel_residual=True, rotary_pct=0.5, intermediate_size=24), dict(LAYERED, norm_order='parallel', rope_fraction=0.5),
                 {**NORMS, 'attention.query_key_value': FUSED, 'attention.dense': 'attention.output', 'mlp.dense_h_to_4h': 'feed_forward.up', 'mlp.dense_4h_to_h': 'feed_forward.down'},
                 {'gpt_neox.embed_in': 'token_embedding', 'gpt_neox.final_layer_norm': 'norm', 'embed_out': 'head', 'lm_head': 'head'}, 'gpt_neox.layers', 'n_heads'),
    'GPT-NeoX, one after the other': ('GPTNeoX', dict(use_parallel_residual=False, rotary_pct=1.0, intermediate_size=24), dict(LAYERED),
                 {**NORMS, 'attention.query_key_value': FUSED, 'attention.dense': 'attention.output', 'mlp.dense_h_to_4h': 'feed_forward.up', 'mlp.dense_4h_to_h': 'feed_forward.down'},
                 {'gpt_neox.embed_in': 'token_embedding', 'gpt_neox.final_layer_norm': 'norm', 'embed_out': 'head', 'lm_head': 'head'}, 'gpt_neox.layers', 'n_heads'),
    'Falcon 7B': ('Falcon', dict(multi_query=True, new_decoder_architecture=False, parallel_attn=True, bias=False, alibi=False, ffn_hidden_size=24, tie_word_embeddings=True),
                 dict(LAYERED, norm_order='parallel_shared', bias=False, norm_bias=True, n_kv_heads=1, tie_embeddings=True),
                 {'input_layernorm': 'attention_norm', 'self_attention.query_key_value': FUSED, 'self_attention.dense': 'attention.output',
                  'mlp.dense_h_to_4h': 'feed_forward.up', 'mlp.dense_4h_to_h': 'feed_forward.down'},
                 {'transformer.word_embeddings': 'token_embedding', 'transformer.ln_f': 'norm', 'lm_head': 'head'}, 'transformer.h', ''),
    'Falcon 40B': ('Falcon', dict(new_decoder_architecture=True, num_kv_heads=2, parallel_attn=True, bias=False, alibi=False, ffn_hidden_size=24, tie_word_embeddings=True),
                 dict(LAYERED, norm_order='parallel', bias=False, norm_bias=True, n_kv_heads=2, tie_embeddings=True),
                 {'ln_attn': 'attention_norm', 'ln_mlp': 'feed_forward_norm', 'self_attention.query_key_value': FUSED, 'self_attention.dense': 'attention.output',
                  'mlp.dense_h_to_4h': 'feed_forward.up', 'mlp.dense_4h_to_h': 'feed_forward.down'},
                 {'transformer.word_embeddings': 'token_embedding', 'transformer.ln_f': 'norm', 'lm_head': 'head'}, 'transformer.h', 'kv_heads'),
    'Phi-2': ('Phi', dict(intermediate_size=24, hidden_act='gelu_new', **PARTIAL), dict(LAYERED, feed_forward='gelu_tanh', norm_order='parallel_shared', rope_fraction=0.5, head_bias=True),
              {'input_layernorm': 'attention_norm', **{k: v for k, v in SEPARATE.items() if 'o_proj' not in k}, 'self_attn.dense': 'attention.output', 'mlp.fc1': 'feed_forward.up', 'mlp.fc2': 'feed_forward.down'},
              {'model.embed_tokens': 'token_embedding', 'model.final_layernorm': 'norm', 'lm_head': 'head'}, 'model.layers', ''),
    'GPT-J': ('GPTJ', dict(n_positions=T, n_embd=D, n_layer=L, n_head=H, rotary_dim=2, n_inner=24), dict(LAYERED, feed_forward='gelu_tanh', norm_order='parallel_shared', rope_layout='interleaved', rope_fraction=0.5,
                                                                                                      qkv_bias=False, output_bias=False, head_bias=True),
              {'ln_1': 'attention_norm', 'attn.q_proj': 'attention.query', 'attn.k_proj': 'attention.key', 'attn.v_proj': 'attention.value', 'attn.out_proj': 'attention.output',
               'mlp.fc_in': 'feed_forward.up', 'mlp.fc_out': 'feed_forward.down'},
              {'transformer.wte': 'token_embedding', 'transformer.ln_f': 'norm', 'lm_head': 'head'}, 'transformer.h', ''),
    'Qwen 2.5': ('Qwen2', {}, dict(MODERN, n_kv_heads=2, qkv_bias=True), {**NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'StableLM': ('StableLm', dict(num_key_value_heads=2, use_qkv_bias=True, layer_norm_eps=1e-5, **PARTIAL), dict(MODERN, norm='layernorm', norm_eps=1e-5, norm_bias=True, qkv_bias=True, n_kv_heads=2, rope_fraction=0.5),
                 {**NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'OLMo': ('Olmo', {}, dict(MODERN, norm='layernorm', norm_eps=1e-5, n_kv_heads=2), {**SEPARATE, **GATED}, {'model.embed_tokens': 'token_embedding', 'lm_head': 'head'}, 'model.layers', ''),
    'OLMo 2': ('Olmo2', {}, dict(MODERN, norm_order='output', qk_norm=True, qk_norm_full=True, qk_norm_eps=1e-5, norm_eps=1e-5, n_kv_heads=2), {**OUTPUT_NORMS, **QK_NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'OLMo 3': ('Olmo3', dict(sliding_window=4, rope_parameters={'sliding_attention': ROPE, 'full_attention': {'rope_type': 'default', 'rope_theta': 700.0}}, layer_types=['sliding_attention', 'full_attention'] * 2),
               dict(MODERN, norm_order='output', qk_norm=True, qk_norm_full=True, qk_norm_eps=1e-5, norm_eps=1e-5, n_kv_heads=2, layers=({'window': 4}, {'rope_base': 700.0})), {**OUTPUT_NORMS, **QK_NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'Gemma': ('Gemma', dict(WIDE, tie_word_embeddings=True), dict(MODERN, feed_forward='geglu_tanh', d_head=8, n_kv_heads=2, norm_offset=1.0, embedding_scale=4.0, tie_embeddings=True),
              {**NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'Gemma 2': ('Gemma2', dict(WIDE, sliding_window=4, query_pre_attn_scalar=5, attn_logit_softcapping=3.0, final_logit_softcapping=2.0, tie_word_embeddings=True,
                               layer_types=['sliding_attention', 'full_attention'] * 2),
                dict(MODERN, feed_forward='geglu_tanh', d_head=8, n_kv_heads=2, norm_order='sandwich', norm_offset=1.0, embedding_scale=4.0, tie_embeddings=True,
                     attention_scale=5**-0.5, softcap=3.0, logit_softcap=2.0, layers=({'window': 4}, {})), {**SANDWICH, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'Gemma 3': ('Gemma3', dict(WIDE, sliding_window=4, query_pre_attn_scalar=5, tie_word_embeddings=True, layer_types=['sliding_attention', 'full_attention'] * 2,
                               rope_parameters={'sliding_attention': ROPE, 'full_attention': {'rope_type': 'default', 'rope_theta': 700.0}}),
                dict(MODERN, feed_forward='geglu_tanh', d_head=8, n_kv_heads=2, norm_order='sandwich', norm_offset=1.0, embedding_scale=4.0, tie_embeddings=True, attention_scale=5**-0.5,
                     qk_norm=True, layers=({'window': 4}, {'rope_base': 700.0})), {**SANDWICH, **QK_NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'SmolLM3': ('SmolLM3', dict(no_rope_layers=[1, 1, 1, 0], rope_parameters=ROPE), dict(MODERN, n_kv_heads=2, layers=({}, {}, {}, {'positions': 'none'})), {**NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'Cohere': ('Cohere', dict(logit_scale=0.25, rope_parameters=ROPE, layer_norm_eps=1e-5, tie_word_embeddings=True), dict(MODERN, norm='layernorm', norm_eps=1e-5, n_kv_heads=2, norm_order='parallel_shared', rope_layout='interleaved',
                                                                            logit_scale=0.25, tie_embeddings=True),
               {'input_layernorm': 'attention_norm', **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'Cohere with QK-norm': ('Cohere', dict(use_qk_norm=True, logit_scale=0.25, rope_parameters=ROPE, layer_norm_eps=1e-5, tie_word_embeddings=True),
                            dict(MODERN, norm='layernorm', norm_eps=1e-5, n_kv_heads=2, norm_order='parallel_shared', rope_layout='interleaved', logit_scale=0.25, tie_embeddings=True, **OWN_NORMS),
                            {'input_layernorm': 'attention_norm', **SEPARATE, **GATED, **QK_NORMS}, ENDS, 'model.layers', ''),
    'StableLM with QK-norm': ('StableLm', dict(qk_layernorm=True, num_key_value_heads=2, use_qkv_bias=True, layer_norm_eps=1e-5, **PARTIAL),
                              dict(MODERN, norm='layernorm', norm_eps=1e-5, norm_bias=True, qkv_bias=True, n_kv_heads=2, rope_fraction=0.5, **OWN_NORMS),
                              {**NORMS, **SEPARATE, **GATED, 'self_attn.q_layernorm.norms.{e}': 'attention.query_norm', 'self_attn.k_layernorm.norms.{e}': 'attention.key_norm'}, ENDS, 'model.layers', ''),
    'Phi with QK-norm': ('Phi', dict(qk_layernorm=True, intermediate_size=24, hidden_act='gelu_new', **PARTIAL),
                         dict(LAYERED, feed_forward='gelu_tanh', norm_order='parallel_shared', rope_fraction=0.5, head_bias=True, qk_norm=True, qk_norm_eps=1e-5, qk_norm_centered=True, qk_norm_bias=True),
                         {'input_layernorm': 'attention_norm', **{k: v for k, v in SEPARATE.items() if 'o_proj' not in k}, 'self_attn.dense': 'attention.output', 'mlp.fc1': 'feed_forward.up',
                          'mlp.fc2': 'feed_forward.down', 'self_attn.q_layernorm': 'attention.query_norm', 'self_attn.k_layernorm': 'attention.key_norm'},
                         {'model.embed_tokens': 'token_embedding', 'model.final_layernorm': 'norm', 'lm_head': 'head'}, 'model.layers', ''),
    'OLMo, clipped': ('Olmo', dict(clip_qkv=0.3), dict(MODERN, norm='layernorm', norm_eps=1e-5, n_kv_heads=2, qkv_clip=0.3), {**SEPARATE, **GATED},
                      {'model.embed_tokens': 'token_embedding', 'lm_head': 'head'}, 'model.layers', ''),
    'Falcon with ALiBi': ('Falcon', dict(alibi=True, multi_query=False, new_decoder_architecture=False, parallel_attn=False, bias=True, ffn_hidden_size=24, tie_word_embeddings=True),
                          dict(LAYERED, positions='alibi_scaled', tie_embeddings=True),
                          {**NORMS, 'self_attention.query_key_value': FUSED, 'self_attention.dense': 'attention.output', 'mlp.dense_h_to_4h': 'feed_forward.up', 'mlp.dense_4h_to_h': 'feed_forward.down'},
                          {'transformer.word_embeddings': 'token_embedding', 'transformer.ln_f': 'norm', 'lm_head': 'head'}, 'transformer.h', 'n_heads'),
    'Nemotron': ('Nemotron', dict(norm_eps=1e-5, **PARTIAL), dict(LAYERED, feed_forward='relu2', bias=False, norm_bias=True, norm_offset=1.0, n_kv_heads=2, rope_fraction=0.5),
                 {**NORMS, **SEPARATE, **TWO}, ENDS, 'model.layers', ''),
    'Granite': ('Granite', dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=4.0),
                dict(MODERN, n_kv_heads=2, embedding_scale=3.0, attention_scale=0.2, residual_scale=0.3, logit_scale=0.25), {**NORMS, **SEPARATE, **GATED}, ENDS, 'model.layers', ''),
    'Phi-3': ('Phi3', {}, dict(MODERN, n_kv_heads=2, norm_eps=1e-5),
              {**NORMS, 'self_attn.qkv_proj': FUSED, 'self_attn.o_proj': 'attention.output', 'mlp.gate_up_proj': 'feed_forward.gate feed_forward.up', 'mlp.down_proj': 'feed_forward.down'}, ENDS, 'model.layers', ''),
}


def theirs_of(family):
    transformers = pytest.importorskip('transformers', reason='the judge is an extra: dev')
    transformers.logging.set_verbosity_error()
    kind, settings, ours, *_ = FAMILIES[family]
    name = {'Gemma3': 'Gemma3Text'}.get(kind, kind)
    basic = dict(vocab_size=V, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False, attention_dropout=0.0)
    if kind != 'GPTJ': basic |= dict(hidden_size=D, num_hidden_layers=L, num_attention_heads=H, max_position_embeddings=T)
    if kind != 'GPTJ' and ours['d_ff'] and 'ffn_hidden_size' not in settings: basic |= dict(intermediate_size=24)
    if 'n_kv_heads' in ours and kind != 'Falcon': basic |= dict(num_key_value_heads=ours['n_kv_heads'])
    config = getattr(transformers, name + 'Config')(**basic | settings)
    made = getattr(transformers, kind + 'ForCausalLM')(config)
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters(): p.data = torch.randn(p.shape, generator=generator) * 0.2
    return made.eval()


def lines_of(family, state):
    "Its weight map: the biases that the checkpoint has come by themselves."
    *_, parts, ends, layers, groups = FAMILIES[family]
    def kinds(there, here, turns=None):
        for kind in ('weight', 'bias'):
            if f'{there}.{kind}'.replace('{i}', '0').replace('{e}', '0') in state: yield Weight(f'{there}.{kind}', ' '.join(f'{t}.{kind}' for t in here.split()), groups=turns)
    lines = [line for there, here in ends.items() for line in kinds(there, here)]
    for there, here in parts.items(): lines += kinds(f'{layers}.{{i}}.{there}', ' '.join(f'blocks.{{i}}.{t}' for t in here.split()), (groups or 1) if ' ' in here else None)
    if FAMILIES[family][0] == 'Olmo': lines += [Weight('', 'norm.weight', constant=1.0), Weight('', 'blocks.{i}.attention_norm.weight blocks.{i}.feed_forward_norm.weight', constant=1.0)]
    return lines


@pytest.mark.parametrize('family', FAMILIES)
def test_against_transformers(family):
    theirs = theirs_of(family)
    state = theirs.state_dict()
    lines, ours = lines_of(family, state), GPT(GPTConfig(V, T, D, L, H, **FAMILIES[family][2]))
    with torch.no_grad():
        for p in ours.parameters(): p.fill_(float('nan'))
    load_weights(ours, state, lines)
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    with unchecked(), torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
        loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), loss, rtol=1e-4, atol=1e-5)
    back = export_weights(ours, lines)
    assert back.keys() == state.keys() - ({'lm_head.weight'} if ours.config.tie_embeddings else set())
    assert all(torch.equal(back[name], state[name]) for name in back)
    assert GPTConfig.from_json(ours.config.to_json()) == ours.config


class Experts(torch.nn.Module):
    "A part of a later chapter: of its experts, each token is multiplied with one."
    def __init__(self, d_model, d_ff, *, bias, n_experts=2):
        super().__init__()
        self.up = torch.nn.Parameter(torch.zeros(n_experts, d_ff, d_model))

    def multiplied(self): return self.up[0].numel()
    def forward(self, x): return x


@pytest.fixture
def experts(monkeypatch):
    from llm_from_scratch import gpt
    monkeypatch.setitem(gpt.FEED_FORWARDS, 'experts', Experts)


def test_a_part_of_ones_own_gets_its_options_and_is_counted(experts):
    from dataclasses import replace
    from llm_from_scratch.costs import count_parameters, flops_per_token
    from llm_from_scratch.gpt import blueprint
    config = GPTConfig(V, T, D, L, H, feed_forward='experts', d_ff=24, options={'experts': {'n_experts': 5}})
    assert GPT(config).blocks[0].feed_forward.up.shape == (5, 24, D)
    assert count_parameters(blueprint(config))['feed-forward'] == L * 5 * 24 * D
    more = replace(config, options={'experts': {'n_experts': 9}})
    assert flops_per_token(blueprint(more), T) == flops_per_token(blueprint(config), T) and sum(count_parameters(blueprint(more)).values()) > sum(count_parameters(blueprint(config)).values())
    some = replace(config, feed_forward='gelu', layers=({}, {'feed_forward': 'experts'}))
    assert [type(block.feed_forward).__name__ for block in GPT(some).blocks] == ['FeedForward', 'Experts'] * 2
    assert GPTConfig.from_json(some.to_json()) == some


def test_experts_are_stacked_and_taken_apart_again(experts):
    model = GPT(GPTConfig(V, T, D, 1, H, feed_forward='experts', d_ff=24, options={'experts': {'n_experts': 3}}, bias=False))
    lines = [Weight(name, name) for name in model.state_dict() if 'up' not in name] + [Weight('layers.{i}.experts.{e}.w', 'blocks.{i}.feed_forward.up', transpose=True)]
    given = {f'layers.0.experts.{e}.w': torch.randn(D, 24) for e in range(3)} | {name: p for name, p in model.state_dict().items() if 'up' not in name}
    load_weights(model, given, lines)
    assert torch.equal(model.blocks[0].feed_forward.up[2], given['layers.0.experts.2.w'].T)
    back = export_weights(model, lines)
    assert back.keys() == given.keys() and all(torch.equal(back[name], given[name]) for name in given)
    with pytest.raises(ValueError, match='lacks: layers.0.experts.0.w'): load_weights(model, {k: v for k, v in given.items() if 'experts' not in k}, lines)


def test_gpt2_as_it_is_published_and_as_transformers_names_it():
    from llm_from_scratch.weight_maps import GPT2_WEIGHTS
    model = GPT(GPTConfig(V, T, D, 2, H), generator=torch.Generator().manual_seed(0))
    named, bare = (export_weights(model, GPT2_WEIGHTS, prefix=prefix) for prefix in (True, False))
    assert 'transformer.h.1.attn.c_attn.weight' in named and 'h.1.attn.c_attn.weight' in bare and 'lm_head.weight' not in bare
    bare['h.0.attn.bias'] = torch.ones(1, 1, T, T).tril()                      # a buffer, of old files
    for tensors in (named, bare):
        other = GPT(model.config)
        load_weights(other, tensors, GPT2_WEIGHTS)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_a_map_that_cannot_hold_the_model_is_refused():
    from llm_from_scratch.weight_maps import GPT2_WEIGHTS
    model = GPT(GPTConfig(V, T, D, 2, H, qk_norm=True))
    with pytest.raises(ValueError, match='no line for: blocks.0.attention.key_norm.weight'): export_weights(model, GPT2_WEIGHTS)
    with pytest.raises(ValueError, match='the map says 2.0 for: norm.weight'): export_weights(model, [Weight('', 'norm.weight', constant=2.0)])


@pytest.mark.parametrize('bad, words', [
    (dict(layers=({'d_model': 8},)), "no exception for one layer, 'd_model': expected one of window"), (dict(layers=({'windw': 8},)), "did you mean 'window'"),
    (dict(layers=({'window': 0},)), 'window must be a whole number'), (dict(layers=({'positions': 'rope'},)), 'belong to the whole model: layer 0'),
    (dict(positions='rope', layers=({}, {'positions': 'learned'})), "layer 1 cannot have 'learned'"), (dict(options={'mo': {}}), "no part 'mo'"), (dict(mixer='mamba'), "mixer must be one of attention.* got 'mamba'"),
    (dict(head_bias=True), 'tied head has no bias'), (dict(qk_norm=1), 'qk_norm must be True or False, got 1'), (dict(logit_scale=0.0), 'logit_scale must be a number above 0'),
    (dict(residual_scale=float('nan')), 'residual_scale must be a number above 0, got nan'), (dict(norm_eps=-1.0), 'norm_eps must be a number of at least 0')])
def test_impossible_choices(bad, words):
    with unchecked(), pytest.raises(ValueError, match=words): GPTConfig(V, T, D, L, H, **bad)


def test_a_factor_without_effect_is_refused():
    with pytest.raises(ValueError, match='would have no effect'): GPT(GPTConfig(V, T, D, L, H, norm_order='sandwich', residual_scale=0.5))


@pytest.mark.parametrize('options', [dict(logit_scale=0.3), dict(logit_softcap=2.0), dict(head_bias=True, tie_embeddings=False)])
def test_loss_and_gradient_are_those_of_the_logits(options):
    model, ids = GPT(GPTConfig(V, T, D, 2, H, **options), generator=torch.Generator().manual_seed(0)), torch.arange(10)[None]
    targets = (ids + 1).masked_fill(ids < 3, -100)
    loss, expected = model(ids, targets), torch.nn.functional.cross_entropy(model(ids)[0], targets[0])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, model.token_embedding.weight)[0] for y in (loss, expected)))
