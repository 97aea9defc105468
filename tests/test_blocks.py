"Chapter 8 beyond its chapter: peers, precision, autocast, compilation, orders, first weights, errors."
import math
from functools import partial

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from llm_from_scratch import blocks
from llm_from_scratch.attention import MultiHeadAttention
from llm_from_scratch.blocks import (ACTIVATIONS, NORMS, Block, FeedForward, GatedFeedForward, GeGLU, LayerNorm,
                                     RMSNorm, SwiGLU, init_weights, layer_norm, matched_width, rms_norm)
from llm_from_scratch.tensors import Embedding, seed_all

INPUTS = []
FEED_FORWARDS, ORDERS = ({name: part for name, part in table.items() if getattr(part, 'func', part).__module__ == blocks.__name__}      # later chapters add theirs
                         for table in (blocks.FEED_FORWARDS, blocks.ORDERS))
pytestmark = pytest.mark.usefixtures('one_thread')
PRECISION = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def one_seed():
    seed_all(0)


def assert_same(ours, theirs, tensors, tolerance):
    "Value and every gradient; the sine gives each output a slope of its own."
    results = []
    for f in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = f(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


# ---- norms ----

@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 40), st.sampled_from(list(PRECISION)), st.floats(-3, 3), st.sampled_from([1e-6, 1e-3, 1.0]), st.integers(0, 99))
def test_norms_against_torch_for_any_shape_and_scale(batch, width, dtype, log_scale, eps, seed):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(s, generator=g, dtype=dtype) for s in ((*batch, width), width, width))
    rms, ln = RMSNorm(width, eps).to(dtype), LayerNorm(width, eps).to(dtype)
    x = x * 10**log_scale
    rms_forms = [rms_norm, lambda x, w, eps: torch.func.functional_call(rms, {'weight': w}, x)]
    ln_forms = [layer_norm, lambda x, w, b, eps: torch.func.functional_call(ln, {'weight': w, 'bias': b}, x)]
    # Gradients in x are as large as 1/scale; compare them where they are of size one.
    for f in rms_forms: assert_same(lambda z, w: f(z * 10**log_scale, w, eps=eps), lambda z, w: F.rms_norm(z * 10**log_scale, (width,), w, eps), [x / 10**log_scale, w], 4 * PRECISION[dtype])
    if width <= 2 or log_scale < -2: return         # one number, or ±1 whatever x is: 0 / 0 but for eps, rounding decides
    for f in ln_forms: assert_same(lambda z, w, b: f(z * 10**log_scale, w, b, eps=eps), lambda z, w, b: F.layer_norm(z * 10**log_scale, (width,), w, b, eps), [x / 10**log_scale, w, b], 20 * PRECISION[dtype])


@pytest.mark.parametrize('dtype', PRECISION)
def test_rms_norm_learns_as_torch_does_where_either_side_is_frozen(dtype):
    x, w = torch.randn(3, 4, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    for x_learns, w_learns in ((True, True), (True, False), (False, True)):
        results = []
        for f in (lambda x, w: blocks._RMSNormFunction.apply(x, w, 1e-6), lambda x, w: F.rms_norm(x, (8,), w, 1e-6)):
            leaves = [x.clone().requires_grad_(x_learns), w.clone().requires_grad_(w_learns)]
            f(*leaves).cos().sum().backward()
            results.append([leaf.grad for leaf in leaves if leaf.grad is not None])
        assert len(results[0]) == x_learns + w_learns
        torch.testing.assert_close(*results, rtol=PRECISION[dtype], atol=PRECISION[dtype])


def test_slopes_of_slopes_of_the_rms_norm_layer():
    layer = RMSNorm(6).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)


def test_rms_norm_on_views_that_are_not_contiguous():
    layer, x = RMSNorm(8), torch.randn(8, 5, 3).transpose(0, 2)
    weight = torch.randn(3, 5, 8).transpose(0, 1).contiguous().transpose(0, 1)
    grads = []
    for f in (layer, lambda x: F.rms_norm(x, (8,), layer.weight, 1e-6)):
        leaf = x.detach().requires_grad_()
        grads.append(torch.autograd.grad((f(leaf) * weight).sum(), [leaf, layer.weight]))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('name', NORMS)
@pytest.mark.parametrize('inside', [False, True])
def test_norms_keep_full_precision_under_autocast(name, inside):
    "Whether backward is called inside or outside of autocast."
    layer = NORMS[name](32)
    with torch.no_grad(): layer.weight.normal_()
    x, slope = torch.randn(4, 7, 32), torch.randn(4, 7, 32)
    def slopes(autocast):
        leaf = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = layer(leaf)
            if inside: return y.detach(), *torch.autograd.grad(y, [leaf, layer.weight], slope)
        return y.detach(), *torch.autograd.grad(y, [leaf, layer.weight], slope)
    torch.testing.assert_close(slopes(True), slopes(False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', NORMS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_norms_in_half_precision(name, dtype):
    layer, x = NORMS[name](32), 1e-3 * torch.randn(4, 32)
    expected = layer(x.to(dtype).float())
    half = layer.to(dtype)
    y = half(x.to(dtype).requires_grad_())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    y.float().sum().backward()
    assert half.weight.grad.isfinite().all()


@pytest.mark.parametrize('name', NORMS)
def test_a_constant_vector_and_an_empty_batch(name):
    layer = NORMS[name](8)
    for x in (torch.zeros(2, 8, requires_grad=True), torch.full((2, 8), 3.0, requires_grad=True)):
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
    empty = torch.zeros(0, 8, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, 8)


def test_norms_forget_scale_and_layer_norm_the_shift():
    x = torch.randn(5, 16, dtype=torch.float64)
    for f in (partial(layer_norm, eps=0.0), partial(rms_norm, eps=0.0)): torch.testing.assert_close(f(7 * x), f(x))
    torch.testing.assert_close(layer_norm(x + 3), layer_norm(x))
    assert not torch.allclose(rms_norm(x + 3), rms_norm(x))
    torch.testing.assert_close(layer_norm(x, eps=0.0).square().mean(-1), torch.ones(5).double())     # the biased variance
    torch.testing.assert_close(rms_norm(x, eps=0.0).square().mean(-1), torch.ones(5).double())


# ---- feed-forward ----

def test_matched_width_is_the_smallest_multiple_that_holds_enough():
    for d_model in range(1, 200):
        for multiple in (1, 8, 32, 256):
            width = matched_width(d_model, multiple)
            assert width % multiple == 0 and 3 * width >= 8 * d_model > 3 * (width - multiple)


@pytest.mark.parametrize('gated', [SwiGLU, GeGLU, partial(GatedFeedForward, activation='relu2')])
@pytest.mark.parametrize('bias', [True, False])
def test_gate_and_up_are_not_exchanged(gated, bias):
    layer, x = gated(8, 12, bias=bias), torch.randn(2, 3, 8)
    act = {SwiGLU: F.silu, GeGLU: F.gelu}.get(gated, lambda x: F.relu(x) ** 2)
    expected = F.linear(act(F.linear(x, layer.gate.weight, layer.gate.bias)) * F.linear(x, layer.up.weight, layer.up.bias), layer.down.weight, layer.down.bias)
    torch.testing.assert_close(layer(x), expected)
    assert [name for name, _ in layer.named_children()] == ['gate', 'up', 'down', 'dropout']


@pytest.mark.parametrize('name', FEED_FORWARDS)
def test_dropout_hits_hidden_features_in_training_only(name):
    layer, x = FEED_FORWARDS[name](8, 4000, bias=False, dropout=0.25), torch.randn(1, 8)
    seen = []
    layer.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer(x), layer.eval()(x), layer(x)
    dropped, kept, again = seen
    assert torch.equal(kept, again)
    alive = kept != 0
    share = (dropped[alive] == 0).float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / alive.sum()) ** 0.5
    torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / 0.75)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_slopes_of_activations_and_their_layers(name):
    layer = FEED_FORWARDS[name](4, 5).double()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(ACTIVATIONS[name], torch.linspace(-3, 3.1, 20, dtype=torch.float64, requires_grad=True))


# ---- blocks ----

def block(order='pre', norm='rmsnorm', feed_forward='swiglu', d_model=16, dropout=0.0):
    return Block(d_model, MultiHeadAttention(d_model, 4), FEED_FORWARDS[feed_forward](d_model, 24), lambda: NORMS[norm](d_model), order=order, dropout=dropout)


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('norm, feed_forward', [('layernorm', 'gelu'), ('rmsnorm', 'swiglu')])
def test_gradients_of_a_block_numerically(order, norm, feed_forward):
    b = Block(4, MultiHeadAttention(4, 2), FEED_FORWARDS[feed_forward](4, 4), lambda: NORMS[norm](4), order=order).double()
    x = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: b(x, torch.arange(2)), x)
    b(x, torch.arange(2)).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in b.parameters())


def hf_gpt2_block():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block
    return GPT2Block(GPT2Config(n_embd=16, n_head=4, resid_pdrop=0.0, attn_pdrop=0.0, attn_implementation='eager'), layer_idx=0)


def test_a_block_against_hf_gpt2():
    theirs = hf_gpt2_block()
    ours = Block(16, MultiHeadAttention(16, 4, bias=True), FeedForward(16, activation='gelu_tanh'), lambda: LayerNorm(16))
    with torch.no_grad():
        for p in theirs.parameters(): p.normal_(0, 0.3)
        pairs = {ours.attention_norm: theirs.ln_1, ours.feed_forward_norm: theirs.ln_2}
        for mine, other in pairs.items(): mine.load_state_dict(other.state_dict())
        qkv = zip((ours.attention.query, ours.attention.key, ours.attention.value), theirs.attn.c_attn.weight.T.chunk(3), theirs.attn.c_attn.bias.chunk(3))
        for linear, w, b in (*qkv, *((m, o.weight.T, o.bias) for m, o in ((ours.attention.output, theirs.attn.c_proj), (ours.feed_forward.up, theirs.mlp.c_fc), (ours.feed_forward.down, theirs.mlp.c_proj)))):
            linear.weight.copy_(w), linear.bias.copy_(b)
    mask = torch.full((1, 1, 6, 6), -math.inf).triu(1)
    def peer(x):
        y = theirs(x, attention_mask=mask)
        return y[0] if isinstance(y, tuple) else y
    assert_same(lambda x: ours(x, torch.arange(6)), peer, [torch.randn(2, 6, 16)], 1e-5)


def test_a_post_norm_block_against_torch():
    theirs = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation='gelu', batch_first=True)
    ours = Block(16, MultiHeadAttention(16, 4, bias=True), FeedForward(16), lambda: LayerNorm(16), order='post')
    with torch.no_grad():
        for p in theirs.parameters(): p.normal_(0, 0.3)
        for linear, w, b in zip((ours.attention.query, ours.attention.key, ours.attention.value), theirs.self_attn.in_proj_weight.chunk(3), theirs.self_attn.in_proj_bias.chunk(3)):
            linear.weight.copy_(w), linear.bias.copy_(b)
    for mine, other in {ours.attention.output: theirs.self_attn.out_proj, ours.feed_forward.up: theirs.linear1, ours.feed_forward.down: theirs.linear2,
                        ours.attention_norm: theirs.norm1, ours.feed_forward_norm: theirs.norm2}.items(): mine.load_state_dict(other.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    assert_same(lambda x: ours(x, torch.arange(6)), lambda x: theirs(x, src_mask=mask, is_causal=True), [torch.randn(2, 6, 16)], 1e-5)
    theirs.norm_first, ours.order = True, 'pre'
    assert_same(lambda x: ours(x, torch.arange(6)), lambda x: theirs(x, src_mask=mask, is_causal=True), [torch.randn(2, 6, 16)], 1e-5)


def hf_block(module, kind, config, **options):
    "A decoder layer of transformers with random weights, and a function from x to what it gives."
    import importlib
    import transformers
    made = importlib.import_module(f'transformers.models.{module}.modeling_{module}')
    c = getattr(transformers, config)(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=24, max_position_embeddings=8, attn_implementation='eager', **options)
    layer = getattr(made, kind)(c, layer_idx=0)
    with torch.no_grad():
        for p in layer.parameters(): p.normal_(0, 0.3)
    rotary = getattr(made, kind.removesuffix('DecoderLayer').removesuffix('Layer') + 'RotaryEmbedding')(c)
    mask = torch.full((1, 1, 6, 6), -math.inf).triu(1)
    def peer(x):
        y = layer(x, attention_mask=mask, position_embeddings=rotary(x, torch.arange(6)[None]))
        return y[0] if isinstance(y, tuple) else y
    return layer, peer


def test_norms_after_the_branches_against_hf_olmo2():
    from llm_from_scratch.positions import Rope
    layer, peer = hf_block('olmo2', 'Olmo2DecoderLayer', 'Olmo2Config', rms_norm_eps=1e-6)
    layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()              # the order of norms is the question here
    ours = Block(16, MultiHeadAttention(16, 4, rotary=Rope(4)), SwiGLU(16, 24), lambda: RMSNorm(16), order='output')
    for name, other in dict(query='q_proj', key='k_proj', value='v_proj', output='o_proj').items():
        getattr(ours.attention, name).load_state_dict(getattr(layer.self_attn, other).state_dict())
    for name in ('gate', 'up', 'down'): getattr(ours.feed_forward, name).load_state_dict(getattr(layer.mlp, name + '_proj').state_dict())
    ours.attention_output_norm.load_state_dict(layer.post_attention_layernorm.state_dict())
    ours.feed_forward_output_norm.load_state_dict(layer.post_feedforward_layernorm.state_dict())
    assert_same(lambda x: ours(x, torch.arange(6)), peer, [torch.randn(2, 6, 16)], 1e-5)


@pytest.mark.parametrize('order', ['parallel', 'parallel_shared'])
def test_parallel_branches_against_hf_gpt_neox(order):
    from llm_from_scratch.positions import Rope
    layer, peer = hf_block('gpt_neox', 'GPTNeoXLayer', 'GPTNeoXConfig', use_parallel_residual=True, rotary_pct=1.0, attention_dropout=0.0, hidden_dropout=0.0)
    if order == 'parallel_shared': layer.post_attention_layernorm = layer.input_layernorm
    ours = Block(16, MultiHeadAttention(16, 4, bias=True, rotary=Rope(4)), FeedForward(16, 24), lambda: LayerNorm(16), order=order)
    w, b = (t.unflatten(0, (4, 3, 4)).transpose(0, 1).flatten(1, 2) for t in layer.attention.query_key_value.parameters())      # by head there
    with torch.no_grad():
        for linear, weight, bias in zip((ours.attention.query, ours.attention.key, ours.attention.value), w, b): linear.weight.copy_(weight), linear.bias.copy_(bias)
    pairs = [(ours.attention.output, layer.attention.dense), (ours.feed_forward.up, layer.mlp.dense_h_to_4h), (ours.feed_forward.down, layer.mlp.dense_4h_to_h),
             (ours.attention_norm, layer.input_layernorm), (ours.feed_forward_norm, layer.post_attention_layernorm)]
    for mine, other in pairs:
        if not isinstance(mine, nn.Identity): mine.load_state_dict(other.state_dict())
    assert_same(lambda x: ours(x, torch.arange(6)), peer, [torch.randn(2, 6, 16)], 1e-5)


class Recorder(nn.Module):
    "An attention that remembers what it was called with."
    def forward(self, x, positions, mask=None, cache=None):
        self.called = positions, mask, cache
        return torch.zeros_like(x)


def test_positions_mask_and_cache_reach_the_attention():
    recorder, cache = Recorder(), object()
    b = Block(16, recorder, FeedForward(16), lambda: LayerNorm(16))
    positions, mask = torch.arange(4), torch.ones(4, 4, dtype=torch.bool)
    b(torch.randn(2, 4, 16), positions, mask, cache)
    assert recorder.called[0] is positions and recorder.called[1] is mask and recorder.called[2] is cache


@pytest.mark.parametrize('order', ORDERS)
def test_dropout_of_a_block(order):
    "Dropping everything leaves the stream, normed where the order norms it; nothing is dropped in use."
    b, x, positions = block(order, dropout=1.0), torch.randn(2, 5, 16), torch.arange(5)
    expected = b.feed_forward_norm(b.attention_norm(x)) if order == 'post' else x
    torch.testing.assert_close(b(x, positions), expected)
    b.eval()
    plain = block(order)
    plain.load_state_dict(b.state_dict())
    assert torch.equal(b(x, positions), plain(x, positions))
    assert not torch.allclose(b(x, positions), expected)


def test_state_dict_names():
    parts = {'pre': 2, 'post': 2, 'sandwich': 4, 'output': 2, 'none': 0, 'parallel': 2, 'parallel_shared': 1}
    assert list(parts) == list(ORDERS)
    for order, n in parts.items():
        names = list(block(order).state_dict())
        assert sum('norm' in name for name in names) == n
        assert [name for name in names if 'norm' not in name] == [
            *(f'attention.{part}.weight' for part in ('query', 'key', 'value', 'output')), *(f'feed_forward.{part}.weight' for part in ('gate', 'up', 'down'))]
    assert len({id(p) for p in block('sandwich').parameters()}) == len(list(block('sandwich').parameters()))     # a fresh norm each time


@pytest.mark.slow
def test_a_block_compiles_whole_and_agrees():
    b, x, positions = block(), torch.randn(2, 5, 16), torch.arange(5)
    compiled = torch.compile(b, fullgraph=True)
    assert_same(lambda x: compiled(x, positions), lambda x: b(x, positions), [x], 1e-5)


# ---- first weights ----

def test_init_weights_scales_what_writes_into_the_stream():
    model = nn.ModuleDict({'embedding': Embedding(300, 64), 'blocks': nn.ModuleList(
        Block(64, MultiHeadAttention(64, 4, bias=True), feed_forward, lambda: LayerNorm(64)) for feed_forward in (FeedForward(64), SwiGLU(64, bias=True)))})
    init_weights(model, 18, std=0.05)
    for name, p in model.named_parameters():
        if 'norm' in name: continue
        if name.endswith('bias'): assert not p.any(), name
        else:
            expected = 0.05 / 6 if name.endswith(('output.weight', 'down.weight')) else 0.05
            assert abs(p.std() / expected - 1) < 5 / (2 * p.numel()) ** 0.5, name
            assert abs(p.mean()) < 5 * expected / p.numel() ** 0.5, name


def test_init_weights_takes_its_randomness_from_the_generator():
    a, b = block(), block()
    for model in (a, b): init_weights(model, 2, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    init_weights(b, 2, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(a.attention.query.weight, b.attention.query.weight)


# ---- errors ----

@pytest.mark.parametrize('wrong, message', [
    (lambda: LayerNorm(0), 'at least one feature, got 0'),
    (lambda: RMSNorm(4, eps=math.nan), 'eps must not be negative, got nan'),
    (lambda: LayerNorm(8)(torch.zeros(3, 7)), r'size 8, got shape \(3, 7\)'),
    (lambda: RMSNorm(8)(torch.zeros(9)), r'size 8, got shape \(9,\)'),
    (lambda: FeedForward(8, activation='tanh'), "unknown activation 'tanh'; known are gelu"),
    (lambda: GatedFeedForward(8, activation='Silu'), "unknown activation 'Silu'"),
    (lambda: FeedForward(8, 0), 'at least one input and one output'),
    (lambda: SwiGLU(8)(torch.zeros(2, 3, 9)), r'size 8, got shape \(2, 3, 9\)'),
    (lambda: FeedForward(8, dropout=1.5), 'got 1.5'),
    (lambda: matched_width(8, 0), 'got 8 and 0'),
    (lambda: block(order='Pre'), "unknown order 'Pre'; known are pre, post, sandwich, output, none, parallel, parallel_shared"),
    (lambda: block()(torch.zeros(1, 2, 15), torch.arange(2)), r'size 16, got shape \(1, 2, 15\)'),
    (lambda: init_weights(block(), -1), 'at least one layer, got -1'),
], ids=range(13))
def test_errors_say_what_they_got(wrong, message):
    with pytest.raises(ValueError, match=message): wrong()


def test_rms_norm_by_hand_is_as_exact_in_half_precision_as_the_module():
    x, weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16() * 3, torch.linspace(0.5, 2, 48).bfloat16()
    module = RMSNorm(48).bfloat16()
    with torch.no_grad(): module.weight.copy_(weight)
    exact = torch.nn.functional.rms_norm(x.double(), (48,), weight.double(), 1e-6)
    rounding = (exact.bfloat16().double() - exact).abs().max()
    for y in (rms_norm(x, weight), module(x)):
        assert y.dtype == torch.bfloat16 and (y - exact).abs().max() <= 2 * rounding


@pytest.mark.parametrize('parts', [dict(qk_norm=True), dict(norm_order='sandwich'), dict(norm_order='output')])
def test_under_autocast_every_norm_takes_the_fused_path(parts, recwarn):
    from llm_from_scratch.gpt import GPT, GPTConfig
    model = GPT(GPTConfig(23, 16, 32, 2, 4, norm='rmsnorm', positions='rope', bias=False, **parts))
    ids = torch.arange(16)[None]
    torch.set_warn_always(True)                  # else the first warning of a process is its last
    try:
        with torch.autocast('cpu', dtype=torch.bfloat16): model(ids, ids).backward()
    finally: torch.set_warn_always(False)
    assert not [str(w.message) for w in recwarn if 'fused' in str(w.message)]
