"Chapter 14: linear attention, the gated delta rule and gated attention against transformers' Qwen3-Next, and one form of the rule against the others."
import random

import pytest
import torch
from caches import check_cache
from hypothesis import given, settings, strategies as st
from shapes import unchecked

from llm_from_scratch.architectures import CausalConv, GatedDeltaNet, delta_rule_chunked, delta_rule_recurrent
from llm_from_scratch.attention import Cache
from llm_from_scratch.generation import Sampler, SimpleCache, generate
from llm_from_scratch.gpt import GPT, GPTConfig, blueprint
from llm_from_scratch.weight_maps import QWEN3_NEXT_WEIGHTS, export_weights, load_weights

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')

V, T, D = 29, 24, 16
DELTA = dict(n_key_heads=2, n_value_heads=4, d_key=6, d_value=5)
HYBRID = dict(vocab_size=V, context_length=T, d_model=D, n_layers=4, n_heads=4, n_kv_heads=2, d_head=8, d_ff=24, positions='rope', rope_fraction=0.5, norm='rmsnorm', norm_eps=1e-6, norm_offset=1.0,
              feed_forward='swiglu', bias=False, tie_embeddings=False, qk_norm=True, layers=({'mixer': 'gated_delta'},) * 3 + ({},), options={'attention': {'gated': True}, 'gated_delta': DELTA})

EXPERTS = dict(HYBRID, feed_forward='moe', options=HYBRID['options'] | {'moe': dict(n_experts=6, top_k=2, shared=10, shared_gate=True)},
               layers=({'mixer': 'gated_delta'}, {'mixer': 'gated_delta', 'feed_forward': 'swiglu'}, {'mixer': 'gated_delta'}, {}))


def published(tensors):
    "As checkpoints have them: each expert by itself, where transformers stacks them."
    tensors = dict(tensors)
    for name in [name for name in tensors if '.mlp.experts.' in name]:
        stacked, end = tensors.pop(name), name.rpartition('.')[0]
        parts = dict(zip(('gate', 'up'), stacked.chunk(2, 1))) if 'gate_up' in name else {'down': stacked}
        tensors |= {f'{end}.{e}.{kind}_proj.weight': part[e] for kind, part in parts.items() for e in range(len(stacked))}
    return tensors


def theirs_of(**changes):
    transformers = pytest.importorskip('transformers', reason='the judge is an extra: dev')
    transformers.logging.set_verbosity_error()
    config = transformers.Qwen3NextConfig(**dict(
        vocab_size=V, hidden_size=D, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=24, max_position_embeddings=T, tie_word_embeddings=False,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5, mlp_only_layers=[0, 1, 2, 3], num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=10, attn_implementation='eager',
        rope_parameters={'rope_type': 'default', 'rope_theta': 10_000.0, 'partial_rotary_factor': 0.5}) | changes)
    made, generator = transformers.Qwen3NextForCausalLM(config).eval(), torch.Generator().manual_seed(0)
    for p in made.parameters(): p.data = torch.randn(p.shape, generator=generator) * 0.3
    return made


@pytest.fixture(scope='module', params=['dense', 'experts'])
def pair(request):
    "Qwen3-Next of transformers, small, with random weights; and ours with the same."
    theirs, ours = (theirs_of(), GPT(GPTConfig(**HYBRID))) if request.param == 'dense' else (theirs_of(mlp_only_layers=[1]), GPT(GPTConfig(**EXPERTS)))
    with torch.no_grad():
        for p in ours.parameters(): p.fill_(float('nan'))
    load_weights(ours, published(theirs.state_dict()), QWEN3_NEXT_WEIGHTS)
    return theirs, ours


def inputs_of(B, H, T, d, dv, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    def draw(*shape): return torch.randn(*shape, generator=generator, dtype=dtype)
    k = torch.nn.functional.normalize(draw(B, H, T, d), dim=-1)
    return draw(B, H, T, d), k, draw(B, H, T, dv), -draw(B, H, T).exp(), draw(B, H, T).sigmoid(), draw(B, H, d, dv)


def quadratic(q, k, v, log_decay, beta, state):
    "No chunks and no state in between: a matrix of T × T, as attention has one."
    T, total = q.shape[2], log_decay.cumsum(-1)[..., None]
    decay = (total - total.mT).tril().exp().tril()
    ties = (beta[..., None] * decay * (k @ k.mT)).tril(-1) + torch.eye(T, dtype=q.dtype)
    written = torch.linalg.inv(ties) @ (beta[..., None] * (v - total.exp() * (k @ state)))
    return total.exp() * (q @ state) + (decay * (q @ k.mT)) @ written


# ---- the rule ----

@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(1, 6), st.integers(1, 23), st.booleans(), st.integers(0, 9))
def test_recurrent_chunked_and_quadratic_are_one(B, H, T, d, dv, chunk, fresh, seed):
    *given, state = inputs_of(B, H, T, d, dv, seed)
    if fresh: state = torch.zeros_like(state)
    y, after = delta_rule_recurrent(*given, None if fresh else state)
    z, later = delta_rule_chunked(*given, None if fresh else state, chunk)
    torch.testing.assert_close((z, later), (y, after), rtol=0, atol=1e-9)
    torch.testing.assert_close(quadratic(*given, state), y, rtol=0, atol=1e-9)


@pytest.mark.parametrize('T', [1, 7, 64, 130])
def test_rule_against_transformers_qwen3_next(T):
    theirs = pytest.importorskip('transformers.models.qwen3_next.modeling_qwen3_next', reason='the judge is an extra: dev')
    q, k, v, g, beta, state = inputs_of(2, 3, T, 8, 6, dtype=torch.float32)
    there = [x.transpose(1, 2) for x in (q, k, v, g, beta)]
    for f, kin in ((delta_rule_recurrent, theirs.torch_recurrent_gated_delta_rule), (delta_rule_chunked, theirs.torch_chunk_gated_delta_rule)):
        y, after = kin(*there, initial_state=state, output_final_state=True)
        torch.testing.assert_close(f(q * 8**-0.5, k, v, g, beta, state), (y.transpose(1, 2), after), rtol=1e-4, atol=1e-5)


# ---- the convolution ----

@pytest.mark.parametrize('width, bias', [(4, True), (3, False), (1, False)])
def test_convolution_against_torch_nn(width, bias):
    ours, theirs, x = CausalConv(6, width, bias), torch.nn.Conv1d(6, 6, width, groups=6, padding=width - 1, bias=bias), torch.randn(2, 9, 6)
    torch.testing.assert_close(ours(x), x)                                     # as it starts, it passes everything on
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x.mT)[..., :9].mT)
    state = {}
    torch.testing.assert_close(torch.cat([ours(x[:, a:b], state=state) for a, b in ((0, 1), (1, 2), (2, 7), (7, 9))], 1), ours(x))
    assert state['conv'].shape == (2, width - 1, 6)


@pytest.mark.parametrize('seed', range(10))
def test_convolution_skips_padding_wherever_it_is(seed):
    draw, conv, state = random.Random(seed), CausalConv(3, 4), {}
    torch.nn.init.normal_(conv.weight)
    rows = torch.randn(2, 8, 3)
    alone, done = conv(rows), [0, 0]
    while min(done) < 8:
        takes = [draw.randint(0, 8 - n) for n in done]
        T = max(takes) + draw.randint(0, 2)
        if not T: continue
        x, at = torch.full((2, T, 3), 100.0), torch.full((2, T), -1)
        for b, n in enumerate(takes):
            columns = sorted(draw.sample(range(T), n))
            x[b, columns], at[b, columns] = rows[b, done[b] : done[b] + n], torch.arange(done[b], done[b] + n)
        y = conv(x, at, state)
        for b, n in enumerate(takes):
            torch.testing.assert_close(y[b, at[b] >= 0], alone[b, done[b] : done[b] + n])
            done[b] += n


# ---- the layers, and the whole model ----

def test_layers_against_transformers_qwen3_next(pair):
    "Outputs and gradients of one gated DeltaNet and of one gated attention."
    theirs, ours = pair
    x, at = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1)), torch.arange(9)
    blocked = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)[None, None]
    def delta(x): return theirs.model.layers[1].linear_attn(x)
    def attention(x): return theirs.model.layers[3].self_attn(x, theirs.model.rotary_emb(x, at[None]), blocked)[0]
    for layer, kin in ((1, delta), (3, attention)):
        results = []
        for f in (lambda x: ours.blocks[layer].attention(x, at), kin):
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_against_hf_qwen3_next(pair):
    "The whole model: logits, the loss, every gradient; and its weights in both directions."
    theirs, ours = pair
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4)
    for y in (expected, ours(ids)): torch.nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    state, graded = published(theirs.state_dict()), GPT(ours.config)
    back = export_weights(ours, QWEN3_NEXT_WEIGHTS)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    load_weights(graded, published({k: p.grad for k, p in theirs.named_parameters()}), QWEN3_NEXT_WEIGHTS)
    for (name, p), wanted in zip(ours.named_parameters(), graded.parameters()): torch.testing.assert_close(p.grad, wanted, rtol=1e-3, atol=1e-4, msg=lambda m: f'{name}: {m}')
    for model in pair: model.zero_grad()


@pytest.mark.parametrize('pieces', [[1] * T, [7, 1, 1, 10, 5], [T]])
def test_cached_is_uncached_and_hf(pair, pieces):
    theirs, ours = pair
    ids, cache, start, found = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(3)), SimpleCache(), 0, []
    with torch.no_grad():
        for n in pieces:
            found.append(ours(ids[:, start : start + n], positions=torch.arange(start, start + n), cache=cache))
            start += n
        for expected in (ours(ids), theirs(ids).logits): torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
    held = sum(x[0].numel() for x in cache.state(0).values())
    assert held == ours.blocks[0].attention.cached_state() == 4 * 6 * 5 + (2 * 12 + 20) * 3 and ours.blocks[0].attention.cached_per_token() == 0


def tiny(**changes):
    model = GPT(GPTConfig(**{**HYBRID, **changes}), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p += torch.randn(p.shape, generator=generator) * 0.2
    return model.eval()


@settings(max_examples=6)
@given(st.data())
def test_ragged_rows_read_as_alone(data):
    "Pieces of any length, padding anywhere, rows repeated, moved and left out: each row is what it is alone."
    model = tiny().double()
    with unchecked(): check_cache(data.draw(st.sampled_from([Cache, SimpleCache])), model, data, V)


def test_generate_with_prompts_of_different_lengths():
    model, prompts = tiny(), [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9]]
    def written(rows): return [list(row) for row in generate(model, rows, 6, Sampler(temperature=0))]
    assert written(prompts) == [written([prompt])[0] for prompt in prompts] and len({*map(tuple, written(prompts))}) == 3


def test_what_a_state_cannot_do_is_refused():
    layer, x = GatedDeltaNet(8, 2), torch.randn(1, 3, 8)
    for cache in (Cache(), SimpleCache()):
        layer(x, cache=cache)
        with pytest.raises(ValueError, match=r'layer 0 keeps all that it has read mixed in one state \(conv, recurrent\)'): cache.forget(0, 1)
    with pytest.raises(ValueError, match='gated_delta takes no mask'): layer(x, mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match='n_key_heads must divide n_value_heads, got 2 and 3'): GatedDeltaNet(8, 2, 3)
    with pytest.raises(ValueError, match=r'expected positions of shape \(3,\) or \(1, 3\), got \(4,\)'), unchecked(): layer(x, torch.arange(4))
    with pytest.raises(ValueError, match='an empty sequence'): layer(x[:, :0])
    with pytest.raises(ValueError, match='a chunk holds at least 1 token, got 0'): delta_rule_chunked(*inputs_of(1, 1, 2, 2, 2), chunk=0)
    with pytest.raises(ValueError, match="no option of 'gated_delta', 'n_keys'"): GPTConfig(V, T, D, 4, 4, mixer='gated_delta', options={'gated_delta': {'n_keys': 2}})


def test_starts_alike_everywhere():
    "Nothing of the layer is drawn but its linear layers, so that a model is the work of its generator alone; without numbers it has the same shapes."
    torch.manual_seed(0)
    one = GPT(GPTConfig(**HYBRID), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    two, shapes = GPT(GPTConfig(**HYBRID), generator=torch.Generator().manual_seed(5)), blueprint(GPTConfig(**HYBRID))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters())) and all(a.is_meta and a.shape == b.shape for a, b in zip(shapes.parameters(), two.parameters()))
    rates = one.blocks[0].attention.log_rate.exp() * torch.nn.functional.softplus(one.blocks[0].attention.step_bias)
    assert rates.isfinite().all() and 1e-4 < rates.min() < 0.01 < 1 < rates.max() < 2


def test_half_precision_and_autocast():
    "The state stays in float32, whatever the layer computes in."
    layer, x, cache = GatedDeltaNet(16, 2, 4), torch.randn(2, 9, 16), Cache()
    exact = layer(x)
    with torch.autocast('cpu', torch.bfloat16): near = layer(x, cache=cache)
    half = layer.bfloat16()(x.bfloat16())
    assert cache.state(0)['recurrent'].dtype == torch.float32 and half.dtype == torch.bfloat16
    for y in (near, half): assert (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_costs_count_the_state():
    from llm_from_scratch.costs import flops_per_token
    layer = GatedDeltaNet(**dict(DELTA, d_model=D))
    assert layer.multiplied() == D * (24 + 20 + 20 + 4 + 4) + 20 * D + 44 * 4 + 3 * 4 * 6 * 5
    delta = GPT(GPTConfig(**{**HYBRID, 'layers': ({'mixer': 'gated_delta'},)}))
    assert flops_per_token(delta, 10) == flops_per_token(delta, 20)
