"Chapter 14, mixtures of experts: layers and whole models equal to transformers in values and gradients, balance, costs, and what is refused."
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shapes import unchecked
from torch import nn
from torch.nn import functional as F

from llm_from_scratch.architectures import (EXPERT_ACTIVATIONS, ExpertLinear, Experts, MixtureOfExperts, Router, Routing, balance_loss, balanced, clamped_swiglu, expert_load,
                                            routings, within_capacity)
from llm_from_scratch.attention import Cache
from llm_from_scratch.blocks import init_weights
from llm_from_scratch.costs import count_parameters, estimate_memory, flops_per_token
from llm_from_scratch.data import BatchLoader
from llm_from_scratch.gpt import GPT, GPTConfig, blueprint
from llm_from_scratch.optim import Muon, param_groups
from llm_from_scratch.positions import RopeScaling
from llm_from_scratch.tensors import undrawn
from llm_from_scratch.training import TrainConfig, Trainer, lm_loss
from llm_from_scratch.weight_maps import LLAMA_WEIGHTS, QWEN3_WEIGHTS, Weight, block_lines, export_weights, layer_lines, load_weights

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
D, F_, E, V, T = 16, 24, 8, 23, 20


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomized(module, size=0.2):
    generator = torch.Generator().manual_seed(0)
    for t in module.state_dict().values(): t.copy_(torch.randn(t.shape, generator=generator) * size)
    return module.eval()


# Layers -----------------------------------------------------------------------------------------------------------

SPLIT = {'experts.gate_up_proj': 'experts.gate.weight experts.up.weight', 'experts.down_proj': 'experts.down.weight', 'gate.weight': 'router.linear.weight'}
SHARED = {f'{there}.{name}_proj.weight': f'shared.{name}.weight' for there in ('shared_experts', 'shared_expert') for name in ('gate', 'up', 'down')}
NAMES = {**SPLIT, **SHARED, 'gate.e_score_correction_bias': 'router.selection_bias', 'shared_expert_gate.weight': 'shared_gate.weight',
         'router.weight': 'router.linear.weight', 'router.bias': 'router.linear.bias', 'experts.gate_up_proj_bias': 'experts.gate.bias experts.up.bias', 'experts.down_proj_bias': 'experts.down.bias'}
LAYERS = {       # theirs: module of transformers, class, configuration; then our options
    'Qwen3-MoE': ('qwen3_moe', 'Qwen3MoeSparseMoeBlock', dict(num_experts=E, norm_topk_prob=True, num_experts_per_tok=3), dict(top_k=3)),
    'Qwen3-MoE, not normalized': ('qwen3_moe', 'Qwen3MoeSparseMoeBlock', dict(num_experts=E, norm_topk_prob=False, num_experts_per_tok=2), dict(normalize=False)),
    'Mixtral': ('mixtral', 'MixtralSparseMoeBlock', dict(num_local_experts=E, num_experts_per_tok=2), {}),
    'gpt-oss': ('gpt_oss', 'GptOssMLP', dict(num_local_experts=E, num_experts_per_tok=4), dict(top_k=4, bias=True, router_bias=True, activation='swiglu_clamped')),
    'DeepSeek-V3': ('deepseek_v3', 'DeepseekV3MoE', dict(n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5),
                    dict(top_k=3, scores='sigmoid', selection_bias=True, n_groups=4, top_groups=2, scale=2.5, shared=2 * F_)),
    'DeepSeek-V3, not normalized': ('deepseek_v3', 'DeepseekV3MoE', dict(n_routed_experts=E, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, norm_topk_prob=False, routed_scaling_factor=0.5),
                                    dict(scores='sigmoid', normalize=False, selection_bias=True, n_groups=2, top_groups=1, scale=0.5, shared=F_)),
    'Qwen3-Next': ('qwen3_next', 'Qwen3NextSparseMoeBlock', dict(num_experts=E, num_experts_per_tok=2, norm_topk_prob=True, shared_expert_intermediate_size=12), dict(shared=12, shared_gate=True)),
}


def parts_of(name, tensor, turns):
    "A tensor of transformers under our names; gpt-oss lets gate and up take turns, and transposes."
    targets = NAMES[name].split()
    if turns and name in ('experts.gate_up_proj', 'experts.down_proj'): tensor = tensor.mT
    if len(targets) == 1: return {targets[0]: tensor}
    return dict(zip(targets, (tensor[:, ::2], tensor[:, 1::2]) if turns else tensor.chunk(2, 1)))


@pytest.mark.parametrize('kind', LAYERS)
def test_against_hf_layer(hf, kind):
    module, name, settings, options = LAYERS[kind]
    modeling = getattr(getattr(hf.models, module), f'modeling_{module}')
    width = 'intermediate_size' if module in ('mixtral', 'gpt_oss') else 'moe_intermediate_size'
    config = {'qwen3_moe': 'Qwen3MoeConfig', 'mixtral': 'MixtralConfig', 'gpt_oss': 'GptOssConfig', 'deepseek_v3': 'DeepseekV3Config', 'qwen3_next': 'Qwen3NextConfig'}[module]
    theirs = randomized(getattr(modeling, name)(getattr(hf, config)(hidden_size=D, **{width: F_}, **settings)), 1.5 if kind == 'gpt-oss' else 0.4)
    ours, turns = MixtureOfExperts(D, F_, n_experts=E, **options), module == 'gpt_oss'
    ours.load_state_dict({k: t for name, tensor in theirs.state_dict().items() for k, t in parts_of(name, tensor, turns).items()})
    x = normal(2, 15, D, seed=1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a), theirs(b)
    expected = expected[0] if turns else expected
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    slope = normal(*y.shape, seed=2)
    y.backward(slope), expected.backward(slope)
    found = {k: t for name, p in theirs.named_parameters() for k, t in parts_of(name, p.grad, turns).items()}
    found['x'] = b.grad
    for k, p in [*ours.named_parameters(), ('x', a)]:
        assert found[k].any(), k
        torch.testing.assert_close(p.grad, found[k], rtol=1e-5, atol=1e-5 * float(found[k].abs().max()), msg=lambda m: f'{k}: {m}')
    if turns:                                                  # the limits were met
        h = x @ ours.experts.up.weight[0].T
        assert (h.abs() > 7).any()


def test_sorting_equals_a_loop_for_any_loads():
    experts = randomized(Experts(5, D, F_, bias=True))
    for seed, k in ((0, 1), (1, 3), (2, 5)):
        x, weights = normal(11, D, seed=seed), normal(11, k, seed=seed + 9)
        chosen = torch.rand(11, 5, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k]
        if k == 1: chosen = chosen.clamp(max=2)                # experts without a token
        def one(token, e): return experts.down.weight[e] @ (F.silu(experts.gate.weight[e] @ token + experts.gate.bias[e]) * (experts.up.weight[e] @ token + experts.up.bias[e])) + experts.down.bias[e]
        expected = torch.stack([sum(w * one(token, e) for w, e in zip(ws, es)) for token, ws, es in zip(x, weights, chosen)])
        torch.testing.assert_close(experts(x, chosen, weights), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_not_chosen_learns_nothing():
    experts = randomized(Experts(4, D, F_, bias=True))
    experts(normal(6, D), torch.tensor([[0, 2]] * 6), torch.ones(6, 2)).square().sum().backward()
    for p in experts.parameters(): assert not p.grad[[1, 3]].any() and p.grad[0].any() and p.grad[2].any()


def test_half_precision_chooses_in_single():
    layer = randomized(MixtureOfExperts(D, F_, n_experts=E)).to(torch.bfloat16)
    x = normal(30, D).bfloat16()
    with routings(layer) as seen: y = layer(x)
    assert isinstance(seen[0][1], Routing)
    assert y.dtype == torch.bfloat16 and seen[0][1].weights.dtype == torch.float32
    exact = randomized(MixtureOfExperts(D, F_, n_experts=E))(x.float())
    assert (y - exact).norm() < 0.05 * exact.norm()
    with torch.autocast('cpu', torch.bfloat16): mixed = randomized(MixtureOfExperts(D, F_, n_experts=E))(x.float())
    assert mixed.dtype == torch.float32 and (mixed - exact).norm() < 0.05 * exact.norm()


def test_weights_that_underflow_stay_finite():
    router = Router(1, 4, 2, scores='sigmoid')
    with torch.no_grad(): router.linear.weight.fill_(1.0)
    router.linear.bias = None
    assert router(torch.full((1, 1), -200.0)).weights.isfinite().all()


# Whole models -----------------------------------------------------------------------------------------------------

QWEN3_MOE_WEIGHTS = (                           # as files are published: a tensor for each matrix of each expert
    *(replace(line, optional=line.optional or '.mlp.' in line.source) for line in QWEN3_WEIGHTS),
    Weight('model.layers.{i}.mlp.gate.weight', 'blocks.{i}.feed_forward.router.linear.weight', optional=True),
    *(Weight(f'model.layers.{{i}}.mlp.experts.{{e}}.{name}_proj.weight', f'blocks.{{i}}.feed_forward.experts.{name}.weight', optional=True) for name in ('gate', 'up', 'down')),
)

GPT_OSS_WEIGHTS = (                             # stacked; gate and up take turns, row by row
    *(line for line in LLAMA_WEIGHTS if '.mlp.' not in line.source),
    Weight('model.layers.{i}.self_attn.sinks', 'blocks.{i}.attention.sinks'),
    *block_lines('model.layers', {'mlp.router': 'feed_forward.router.linear'}, bias=True),
    *(Weight(f'model.layers.{{i}}.mlp.experts.gate_up_proj{there}', f'blocks.{{i}}.feed_forward.experts.gate.{kind} blocks.{{i}}.feed_forward.experts.up.{kind}',
             transpose=kind == 'weight', groups='ff_width', stacked=True) for there, kind in (('', 'weight'), ('_bias', 'bias'))),
    Weight('model.layers.{i}.mlp.experts.down_proj', 'blocks.{i}.feed_forward.experts.down.weight', transpose=True, stacked=True),
    Weight('model.layers.{i}.mlp.experts.down_proj_bias', 'blocks.{i}.feed_forward.experts.down.bias', stacked=True),
)

BASIC = dict(vocab_size=V, hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=T, num_hidden_layers=4,
             bos_token_id=0, eos_token_id=0)
MODERN = dict(vocab_size=V, context_length=T, d_model=D, n_layers=4, n_heads=4, n_kv_heads=2, d_head=8, positions='rope', norm='rmsnorm', tie_embeddings=False, feed_forward='moe', d_ff=F_)
YARN = dict(factor=8.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0, truncate=False)

QWEN3 = GPTConfig(**MODERN, bias=False, norm_eps=1e-6, qk_norm=True, rope_base=500.0, options={'moe': dict(n_experts=E, top_k=3)}, layers=({}, {'feed_forward': 'swiglu', 'd_ff': 20}, {}, {}))
GPT_OSS = GPTConfig(**MODERN, bias=True, norm_eps=1e-5, sinks=True, rope_base=20.0, layers=({'window': 4}, {}),
                    rope_scaling=RopeScaling('yarn', 8.0, 64, truncate=False), options={'moe': dict(n_experts=E, top_k=3, router_bias=True, activation='swiglu_clamped')})


def qwen3_moe(hf):
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**BASIC, intermediate_size=20, moe_intermediate_size=F_, num_experts=E, num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[1],
                                                    rope_parameters={'rope_type': 'default', 'rope_theta': 500.0}))


def gpt_oss(hf):
    return hf.GptOssForCausalLM(hf.GptOssConfig(**BASIC, intermediate_size=F_, num_local_experts=E, num_experts_per_tok=3, sliding_window=4,
                                                rope_parameters={'rope_type': 'yarn', 'rope_theta': 20.0, **YARN}, attn_implementation='eager'))


MODELS = {'Qwen3-MoE': (qwen3_moe, QWEN3, QWEN3_MOE_WEIGHTS), 'gpt-oss': (gpt_oss, GPT_OSS, GPT_OSS_WEIGHTS)}


@pytest.fixture(scope='module', params=MODELS)
def pair(request, hf, tmp_path_factory):
    make, config, lines = MODELS[request.param]
    theirs, folder = randomized(make(hf)), tmp_path_factory.mktemp('published')
    hf.logging.disable_progress_bar()
    theirs.save_pretrained(folder)                             # under the names of published files
    published, ours = load_file(folder/'model.safetensors'), GPT(config).eval()
    with torch.no_grad():
        for p in ours.parameters(): p.fill_(float('nan'))
    load_weights(ours, published, lines)
    return ours, theirs, published, lines


def test_against_hf_model(pair):
    ours, theirs, published, lines = pair
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours(ids[:, :-1], ids[:, 1:]).backward()
    theirs(ids, labels=ids).loss.backward()
    slopes = ours.token_embedding.weight.grad, theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5 * float(slopes[1].abs().max()))
    for a, b in zip((ours.blocks[2].feed_forward.experts.down.weight.grad, ours.blocks[0].feed_forward.router.linear.weight.grad),
                    (theirs.model.layers[2].mlp.experts.down_proj.grad, next(theirs.model.layers[0].mlp.children()).weight.grad
                     if 'router' in dict(theirs.model.layers[0].mlp.named_children()) else theirs.model.layers[0].mlp.gate.weight.grad)):
        torch.testing.assert_close(a, b.mT if a.shape != b.shape else b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    back = export_weights(ours, lines)
    assert back.keys() == published.keys() and all(torch.equal(back[name], published[name]) for name in back)
    assert GPTConfig.from_json(ours.config.to_json()) == ours.config


def test_cached_equals_uncached(pair):
    ours, theirs, *_ = pair
    ids, cache = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2)), Cache()
    with torch.no_grad(), unchecked():
        whole = ours(ids)
        steps = [ours(ids[:, a:b], positions=torch.arange(a, b), cache=cache) for a, b in ((0, 7), *((t, t + 1) for t in range(7, T)))]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
        torch.testing.assert_close(whole, theirs(ids).logits, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_yarn_without_rounding_is_another():
    ids = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(2))
    other = GPT(replace(GPT_OSS, rope_scaling=replace(GPT_OSS.rope_scaling, truncate=True)))
    same = GPT(GPT_OSS)
    same.load_state_dict(randomized(other).state_dict())
    assert not torch.allclose(same.eval()(ids), other(ids))


def test_saved_and_read_again(tmp_path):
    config = GPTConfig(**MODERN, bias=False, options={'moe': dict(n_experts=4, scores='sigmoid', selection_bias=True, shared=8, shared_gate=True)})
    model, ids = randomized(GPT(config)), torch.tensor([[1, 2, 3]])
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == config and torch.equal(again(ids), model(ids))
    assert again.blocks[0].feed_forward.router.selection_bias.any()                     # a buffer is saved as well


# Drawn, counted, trained --------------------------------------------------------------------------------------------

def small(**options): return GPTConfig(**{**MODERN, 'n_layers': 2}, bias=True, options={'moe': {'n_experts': 4, **options}})


def test_experts_start_as_gpt2s_matrices_do():
    layer = nn.ModuleDict({'moe': MixtureOfExperts(64, 96, n_experts=6, bias=True)})
    init_weights(layer, n_layers=8, generator=torch.Generator().manual_seed(0))
    for name, p in layer.named_parameters():
        if name.endswith('bias'): assert not p.any()
        else:
            expected = 0.02 / 4 if 'down' in name else 0.02
            assert abs(p.std() / expected - 1) < 5 / (2 * p.numel())**0.5, name
    experts = layer['moe'].experts.up.weight
    assert not torch.equal(experts[0], experts[1])


def test_weights_are_drawn_once():
    a, b = (GPT(small(), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    torch.manual_seed(0)
    GPT(small(), generator=torch.Generator().manual_seed(5))
    with undrawn(): ExpertLinear(3, 4, 5, bias=True)
    assert torch.initial_seed() == 0 and torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))   # torch's own generator was not asked
    limits = ExpertLinear(3, 4, 50).weight.abs().amax((1, 2))
    assert ((0.45 < limits) & (limits <= 0.5)).all()


def test_flops_count_active_experts_only():
    few, many, more = (blueprint(small(n_experts=n, top_k=k)) for n, k in ((4, 2), (16, 2), (16, 3)))
    def work(model): return flops_per_token(model, 0, training=False) // 2
    assert work(many) - work(few) == 2 * 12 * D                                       # rows of the router, two layers
    assert work(more) - work(many) == 2 * 3 * F_ * D                                  # one more expert
    parameters = [count_parameters(model)['feed-forward'] for model in (few, many)]
    assert parameters[1] - parameters[0] == 2 * 12 * (D + 3 * F_ * D + 2 * F_ + D)
    assert MixtureOfExperts(D, F_, shared=5, shared_gate=True).multiplied() == 8 * D + 2 * 3 * D * F_ + 3 * 5 * D + D


def test_memory_is_estimated_without_numbers():
    model = blueprint(small())
    with unchecked(): found = estimate_memory(model, 2, 8)
    assert found.parameters == 4 * sum(p.numel() for p in model.parameters()) and found.activations > 2 * 8 * 2 * 2 * F_ * 4   # at least k hidden vectors per token and layer


def test_balance_loss_against_hf(hf):
    judge = hf.models.qwen3_moe.modeling_qwen3_moe.load_balancing_loss_func
    for k in (1, 2, 3):
        logits = normal(40, E, seed=k).requires_grad_()
        scores = logits.softmax(-1)
        ours, theirs = balance_loss(scores, scores.topk(k).indices), judge((logits,), E, k) / k       # theirs: shares with the sum k
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)))
    everywhere, one = torch.full((8, 4), 0.25), torch.eye(4)[[0] * 8]
    assert balance_loss(everywhere, torch.arange(8)[:, None] % 4) == 1 and balance_loss(one, torch.zeros(8, 1, dtype=torch.int64)) == 4
    assert balance_loss(3 * everywhere, torch.arange(8)[:, None] % 4) == 1              # sigmoid scores sum to anything


def test_the_selection_bias_moves_the_choice_and_not_the_weights():
    router, x = randomized(Router(D, 4, 2, scores='sigmoid', selection_bias=True)), normal(50, D)
    router.selection_bias.copy_(torch.tensor([9.0, 0, 0, -9]))
    routing = router(x)
    assert expert_load(routing.chosen, 4).tolist()[::3] == [50, 0]
    plain = router.linear(x).sigmoid().gather(1, routing.chosen)
    torch.testing.assert_close(routing.weights, plain / plain.sum(1, keepdim=True))
    router.selection_bias.zero_()
    router.move_bias(torch.tensor([[0, 1], [0, 1], [0, 2]]), 0.25)                     # loads 3, 2, 1, 0; mean 1.5
    assert router.selection_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]


def test_trained_with_balance():
    tokens = np.random.default_rng(0).integers(V, size=600)
    def largest(**how):
        "The largest share of an expert after training, where expert 0 was everybody's favorite."
        model = GPT(replace(small(selection_bias=True, router_bias=True), n_layers=1), generator=torch.Generator().manual_seed(0))
        router = model.blocks[0].feed_forward.router
        with torch.no_grad(): router.linear.bias[0] = 0.3
        config = TrainConfig(steps=30, batch_size=8, lr=0.005, precision='float32', save_seconds=None)
        Trainer(model, config, BatchLoader(tokens, T, 8), loss=balanced(lm_loss, **how)).fit()
        with torch.no_grad(), routings(model) as seen: model(torch.tensor(tokens[:20 * T].reshape(-1, T)))
        return float(expert_load(seen[0][1].chosen, 4).max() / seen[0][1].chosen.numel())
    with unchecked(): alone, loss, bias = largest(auxiliary=0.0), largest(auxiliary=0.5), largest(auxiliary=0.0, bias_step=0.005)
    assert alone > 0.4 > 0.35 > max(loss, bias), (alone, loss, bias)


def test_routers_are_heard_only_inside_and_in_training():
    model, batch = GPT(small()), (torch.tensor([[1, 2, 3]]),) * 2
    with routings(model) as seen: model(*batch)
    model(*batch)
    assert len(seen) == 2
    with pytest.raises(RuntimeError, match='stop'), routings(model): raise RuntimeError('stop')
    assert not any(m._forward_hooks for m in model.modules())
    assert balanced(lm_loss, auxiliary=9.0)(model.eval(), batch) == model(*batch)
    with pytest.raises(ValueError, match='no router ran'): balanced(lm_loss)(GPT(replace(small(), feed_forward='swiglu', options={})), batch)


def test_optimizers_know_stacks():
    model = GPT(small())
    groups = {group['name']: {id(p) for p in group['params']} for group in param_groups(model)}
    experts = model.blocks[0].feed_forward.experts
    assert id(experts.up.weight) in groups['matrices'] and id(experts.up.bias) in groups['vectors']
    stack, slope = nn.Parameter(normal(3, 6, 4)), normal(3, 6, 4, seed=1)
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    for p, grad in [(stack, slope), *zip(alone, slope)]: p.grad = grad.clone()
    for params in ([stack], alone): Muon(params, lr=0.1, ns_dtype='float32').step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))


def test_capacity_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    for n, k, factor in ((30, 2, 1.0), (17, 1, 0.75), (5, 3, 0.5)):
        chosen = torch.rand(n, 6, generator=generator).argsort(1)[:, :k]
        places, capacity, expected = [0] * 6, -(-int(4 * factor * n * k) // 24), []
        for e in chosen.flatten().tolist():
            expected.append(places[e] < capacity)
            places[e] += 1
        assert within_capacity(chosen, 6, factor).flatten().tolist() == expected and not all(expected)
    with pytest.raises(ValueError, match='must be positive, got 0'): within_capacity(chosen, 6, 0.0)


# Refused ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options, message', [
    (dict(n_experts=4, top_k=5), 'top_k must be between 1 and 4, the experts that a token may choose from, got 5'),
    (dict(n_experts=8, n_groups=4, top_groups=1, top_k=3), 'top_k must be between 1 and 2'),
    (dict(n_experts=8, n_groups=3), 'n_groups must divide n_experts, got 3 and 8'),
    (dict(n_experts=8, n_groups=2, top_groups=3), 'top_groups must be between 1 and n_groups = 2, got 3'),
    (dict(shared_gate=True), 'needs a shared expert, got shared=0'),
    (dict(n_experts=0), "n_experts of 'moe'"),
    (dict(scores='relu'), "scores of 'moe'"),
    (dict(activation='gelu'), "activation of 'moe'"),
    (dict(experts=3), "no option of 'moe'"),
])
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message): GPT(small(**options))


def test_clamped_swiglu_keeps_within_its_limits():
    g, u = torch.tensor([100.0, -100.0, 7.0]), torch.tensor([100.0, 100.0, -100.0])
    torch.testing.assert_close(clamped_swiglu(g, u), torch.tensor([7 * torch.sigmoid(torch.tensor(7 * 1.702)) * 8, 0.0, -6 * 7 * torch.sigmoid(torch.tensor(7 * 1.702))]))
    assert EXPERT_ACTIVATIONS['swiglu_clamped'] is clamped_swiglu and layer_lines('a', 'b')[0].targets == 'b.weight'
