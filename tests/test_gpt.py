"Chapter 9 beyond its chapter: counts, memory, compilation."
import copy, math, os, pickle
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from shapes import unchecked
from torch.nn import functional as F

from llm_from_scratch.attention import Cache
from llm_from_scratch.blocks import FEED_FORWARDS, NORMS, ORDERS
from llm_from_scratch.bpe import EMBEDDED, load_tokenizer, model_folder
from llm_from_scratch.costs import count_parameters, memory_over_time
from llm_from_scratch.files import PositiveInt
from llm_from_scratch.gpt import GPT, MIXERS, PRESETS, GPTConfig, TiedHead, blueprint, chunked_cross_entropy, model_card
from llm_from_scratch.positions import POSITIONS, RopeScaling
from llm_from_scratch.storyland import stories
from llm_from_scratch.tensors import Embedding

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
LLAMA = dict(positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def model(**options):
    "A tiny model whose biases and norms are not what they start as."
    config = GPTConfig(**{**dict(vocab_size=23, context_length=12, d_model=16, n_layers=2, n_heads=4), **options})
    made = GPT(config, generator=seeded())
    for p in made.parameters(): p.data += 0.1 * torch.randn(p.shape, generator=seeded(p.numel()))
    return made


def some_ids(vocab_size=23, shape=(2, 9), seed=1): return torch.randint(vocab_size, shape, generator=seeded(seed))


# ---- the configuration ----

choices = st.fixed_dictionaries(dict(
    vocab_size=st.integers(1, 99), context_length=st.integers(1, 99), d_model=st.sampled_from([8, 16, 48]), n_layers=st.integers(1, 3), n_heads=st.sampled_from([2, 4]),
    n_kv_heads=st.sampled_from([None, 1, 2]), d_head=st.sampled_from([None, 6]), d_ff=st.sampled_from([None, 5]), norm=st.sampled_from(sorted(NORMS)),
    norm_order=st.sampled_from(sorted(ORDERS)), feed_forward=st.sampled_from(sorted(FEED_FORWARDS)), positions=st.sampled_from(sorted(POSITIONS)), bias=st.booleans(),
    tie_embeddings=st.booleans(), qk_norm=st.booleans(), sinks=st.booleans(), rope_scaling=st.sampled_from([None, ('linear', 2.0), ('yarn', 4.0, 16)])))


@settings(max_examples=25)
@given(choices)
def test_any_configuration_survives_json_pickle_and_counting(choice):
    scaling = choice.pop('rope_scaling')
    config = GPTConfig(**choice, rope_scaling=scaling and RopeScaling(*scaling))
    assert GPTConfig.from_json(config.to_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config and copy.deepcopy(config) == config
    with torch.device('meta'), unchecked(): made = GPT(config)
    assert sum(p.numel() for p in made.parameters()) == sum(count_parameters(blueprint(config)).values())


@pytest.mark.parametrize('bad, words', [
    (dict(n_layer=2), "'n_layer': did you mean 'n_layers'"), (dict(tie_embedding=True), "did you mean 'tie_embeddings'"), (dict(zzz=1), 'expected one of vocab_size'),
    (dict(vocab_size=0), 'vocab_size must be .* got 0'), (dict(n_layers=True), 'n_layers must be a whole number'), (dict(n_heads=3), 'multiple of n_heads'),
    (dict(n_kv_heads=3), 'n_kv_heads must divide n_heads, got 3 and 4'), (dict(norm='batch'), "norm must be one of layernorm, rmsnorm.*, got 'batch'"),
    (dict(feed_forward='mixture'), "feed_forward must be one of .* got 'mixture'"), (dict(positions='rotary'), "positions must be one of .* got 'rotary'"), (dict(backend='cuda'), "backend must be one of .* got 'cuda'"),
    (dict(norm_order='both'), "norm_order must be one of .* got 'both'"), (dict(rope_layout='full'), "rope_layout must be 'half' or 'interleaved', got 'full'"), (dict(dropout=1.0), r'dropout must be a number in \[0, 1\)'),
    (dict(d_model=12, positions='rope'), 'd_head must be even, got 3'), (dict(softcap=0.0), 'softcap must be a number above 0'), (dict(window=0), 'window must be')])
def test_impossible_configurations(bad, words):
    good = dict(vocab_size=8, context_length=8, d_model=16, n_layers=2, n_heads=4)
    with pytest.raises(ValueError, match=words), unchecked(): GPTConfig(**{**good, **bad})


def test_exceptions_of_layers_survive_json():
    slow = RopeScaling('linear', 2.0)
    config = GPTConfig(8, 8, 16, 2, 4, positions='rope', rope_scaling=RopeScaling('yarn', 4.0, 8), layers=({'rope_scaling': slow, 'window': 3}, {}))
    again = GPTConfig.from_json(config.to_json())
    assert again == config and again.layer(0).rope_scaling == slow and isinstance(again.layers[0]['rope_scaling'], RopeScaling)
    with pytest.raises(ValueError, match="no field 'widow': did you mean 'window'"): GPTConfig.from_json(config.to_json().replace('"window": 3', '"widow": 3'))
    with pytest.raises(ValueError, match="no field 'factr': did you mean 'factor'"): GPTConfig.from_json(config.to_json().replace('"factor": 2.0', '"factr": 2.0'))


def test_frozen_and_open_widths():
    config = PRESETS['nano']
    with pytest.raises(AttributeError): config.d_model = 3
    assert replace(config, d_model=128).head_width == 32 and replace(config, d_model=128).ff_width > config.ff_width
    with pytest.raises(ValueError, match='JSON object'): GPTConfig.from_json('[1]')


def test_options_of_a_part_are_those_that_its_signature_declares(monkeypatch):
    def experts(d_model, d_ff, *, bias, n_experts: PositiveInt = 2, balance=0.5): return FEED_FORWARDS['gelu'](d_model, d_ff, bias=bias)
    def gliding(c, layer, scheme, *, span: PositiveInt, slow: bool = False): spans.append((span, slow)); return MIXERS['attention'](c, layer, scheme)
    spans, small = [], dict(vocab_size=8, context_length=8, d_model=16, n_layers=2, n_heads=4)
    monkeypatch.setitem(FEED_FORWARDS, 'experts', experts)
    monkeypatch.setitem(MIXERS, 'gliding', gliding)
    given = {'experts': {'n_experts': np.int64(3), 'balance': np.float32(1)}, 'gliding': {'span': np.int64(5)}}
    made = GPTConfig(**small, options=given, mixer='gliding')
    assert repr(made.options) == "{'experts': {'n_experts': 3, 'balance': 1.0}, 'gliding': {'span': 5}}" and GPTConfig.from_json(made.to_json()) == made
    GPT(made)
    assert spans == [(5, False)] * 2 and type(given['gliding']['span']) is np.int64             # the caller's own stays as it was
    for options, words in [({'experts': {'n_expert': 3}}, "no option of 'experts', 'n_expert': did you mean 'n_experts'"), ({'experts': {'n_experts': 0}}, "n_experts of 'experts' must be a whole number of at least 1, got 0"),
                           ({'experts': {'d_ff': 3}}, "no option of 'experts', 'd_ff'"), ({'gliding': {'slow': 'no'}}, "slow of 'gliding' must be True or False"), ({'swiglu': {'dropout': 1.5}}, "dropout of 'swiglu' must be")]:
        with pytest.raises(ValueError, match=words): GPTConfig(**small, options=options)


# ---- the model ----

def test_tied_head_is_one_tensor_wherever_it_goes():
    tied, untied = model(), model(tie_embeddings=False)
    assert isinstance(tied.head, TiedHead) and 'head.weight' not in tied.state_dict() and 'head.weight' in untied.state_dict()
    for moved in (copy.deepcopy(tied), copy.deepcopy(tied).double(), pickle.loads(pickle.dumps(tied))):
        assert moved.head.weight is moved.token_embedding.weight and moved.head.weight is not tied.head.weight
    with torch.device('meta'): empty = GPT(tied.config)
    empty.load_state_dict(tied.state_dict(), assign=True)
    assert empty.head.weight is empty.token_embedding.weight
    assert torch.equal(empty(some_ids()), tied(some_ids()))


def test_a_tied_model_may_be_given_another_embedding(tmp_path):
    tied, before = model(), some_ids()
    tied.token_embedding = Embedding(31, 16, generator=seeded(5))
    tied.config = replace(tied.config, vocab_size=31)
    assert tied.head.weight is tied.token_embedding.weight and tied(before).shape[-1] == 31
    tied(before, before).backward()
    assert tied.token_embedding.weight.grad[before.max() + 1:].abs().min() > 0                  # through the head, not only through the ids
    assert count_parameters(tied)['token embedding'] == 31 * 16 and count_parameters(tied)['head'] == 0
    tied.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path)(before), tied.eval()(before))


def test_a_model_that_is_not_what_its_configuration_says_is_not_saved(tmp_path):
    tied = model()
    tied.save_pretrained(tmp_path)
    good = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    tied.token_embedding = Embedding(31, 16)
    with pytest.raises(ValueError, match=r'token_embedding.weight has shape \(31, 16\), expected \(23, 16\)'): tied.save_pretrained(tmp_path)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == good


@pytest.mark.parametrize('dtype', [torch.uint8, torch.uint16, torch.int16, torch.int32])
@pytest.mark.parametrize('options', [{}, dict(head_bias=True, tie_embeddings=False)])
def test_token_ids_of_any_whole_numbers(dtype, options):
    made, ids = model(**options), some_ids()
    assert torch.equal(made(ids.to(dtype)), made(ids)) and torch.equal(made(ids, ids.to(dtype)), made(ids, ids))
    with pytest.raises(ValueError, match='target 23 is outside the vocabulary'): made(ids, torch.full_like(ids, 23).to(dtype))
    with pytest.raises(ValueError, match='token 23 is outside the vocabulary'): made(torch.full_like(ids, 23).to(dtype))


def test_state_dict_names_are_what_they_were():
    assert list(model(n_layers=1, **LLAMA, n_kv_heads=2, tie_embeddings=False).state_dict()) == [
        'token_embedding.weight', 'blocks.0.attention_norm.weight', 'blocks.0.attention.query.weight', 'blocks.0.attention.key.weight', 'blocks.0.attention.value.weight',
        'blocks.0.attention.output.weight', 'blocks.0.feed_forward_norm.weight', 'blocks.0.feed_forward.gate.weight', 'blocks.0.feed_forward.up.weight',
        'blocks.0.feed_forward.down.weight', 'norm.weight', 'head.weight']


@pytest.mark.parametrize('backend', ['manual', 'sdpa'])
@pytest.mark.parametrize('positions', sorted(POSITIONS))
def test_no_logit_sees_the_future(positions, backend):
    made, ids = model(positions=positions, backend=backend, n_kv_heads=2), some_ids()
    before = made(ids)
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 23
        with unchecked(): difference = (made(changed) - before).abs().amax((0, 2))
        assert t == 0 or difference[:t].max() == 0
        assert (difference[t:] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('positions', ['rope', 'alibi'])
def test_no_logit_sees_the_future_with_flex(positions):
    made, ids = model(positions=positions, backend='flex'), some_ids()
    plain = model(positions=positions)
    with torch.no_grad():
        torch.testing.assert_close(made(ids), plain(ids), rtol=1e-4, atol=1e-5)
        changed = ids.clone()
        changed[:, 5] = (ids[:, 5] + 1) % 23
        assert torch.equal(made(changed)[:, :5], made(ids)[:, :5])


@pytest.mark.parametrize('options', [{}, LLAMA, {**LLAMA, 'n_kv_heads': 2, 'qk_norm': True}, dict(positions='alibi', norm_order='sandwich', tie_embeddings=False),
                                     dict(norm_order='post', softcap=5.0, sinks=True)])
def test_gradients_numerically_in_float64(options):
    made = model(vocab_size=7, context_length=5, d_model=8, n_heads=4, **options).double()
    ids = some_ids(7, (2, 5))
    names, values = zip(*made.named_parameters())

    def loss(*values): return torch.func.functional_call(made, dict(zip(names, values)), (ids[:, :-1], ids[:, 1:]))
    loss(*values)                                                            # with every shape checked
    with unchecked(): assert torch.autograd.gradcheck(loss, values, fast_mode=True, atol=1e-7)


def test_loss_is_that_of_the_logits():
    made, ids = model(**LLAMA), some_ids(shape=(3, 10))
    targets = ids[:, 1:].clone()
    targets[0, :4] = -100
    expected = F.cross_entropy(made(ids[:, :-1]).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(made(ids[:, :-1], targets), expected)


def test_cache_and_positions_continue_a_sequence():
    for options in ({}, LLAMA, dict(positions='alibi'), dict(positions='sinusoidal', window=3)):
        made, ids, cache = model(**options), some_ids(), Cache()
        parts = [made(ids[:, a:b], positions=torch.arange(a, b), cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
        torch.testing.assert_close(torch.cat(parts, 1), made(ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='which positions'): made(ids, cache=cache)


@pytest.mark.parametrize('ids, words', [(some_ids(shape=(1, 13)), '13 tokens .* context_length is 12'), (some_ids(shape=(1, 0)), 'both at least 1'),
                                        (some_ids() + 23, 'outside the vocabulary'), (some_ids() - 23, 'outside the vocabulary')])
def test_ids_that_do_not_fit(ids, words):
    for options in ({}, LLAMA):
        with pytest.raises(ValueError, match=words): model(**options)(ids)


def test_positions_beyond_the_context():
    for positions in (torch.arange(4, 13), torch.arange(-1, 8)):
        with pytest.raises(ValueError, match='positions must lie between 0 and 11'): model(**LLAMA)(some_ids(), positions=positions)
    with pytest.raises(ValueError, match='positions must lie between 0 and 11'): model(**LLAMA)(some_ids(), positions=torch.arange(-2, 7).expand(len(some_ids()), -1))


def test_dropout_only_in_training():
    made, ids = model(dropout=0.5), some_ids()
    assert not torch.equal(made(ids), made(ids))
    made.eval()
    assert torch.equal(made(ids), made(ids))


def test_untrained_loss():
    "ln V and half the variance of the logits, within three standard errors."
    for D in (64, 512):
        made = GPT(GPTConfig(600, 64, D, 2, 4, tie_embeddings=False), generator=seeded())
        ids, targets = some_ids(600, (24, 64)), some_ids(600, (24, 64), 2)
        with torch.no_grad(): losses = F.cross_entropy(made(ids).flatten(0, 1), targets.flatten(), reduction='none')
        assert abs(losses.mean() - math.log(600) - D * 0.02**2 / 2) < 3 * losses.std() / len(losses)**0.5


@pytest.mark.parametrize('options', [{}, LLAMA])
def test_a_batch_is_learned_by_heart(options):
    made, ids = GPT(GPTConfig(32, 12, 32, 2, 4, **options), generator=seeded()), some_ids(32, (4, 13))
    ids[:, 0] = torch.arange(4)                     # the first token says which row it is
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.0)
    with unchecked():
        for _ in range(80):
            loss = made(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05


def test_starts_alike_from_the_same_generator():
    a, b = (GPT(PRESETS['nano'], generator=seeded(5)) for _ in 'ab')
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_summary_and_diagram_name_every_part():
    for options in ({}, LLAMA, dict(norm_order='post'), dict(norm_order='sandwich', tie_embeddings=False), dict(norm_order='none', positions='none'), dict(norm_order='output'), dict(norm_order='parallel_shared')):
        made = model(**options)
        parts = [name for name, part in made.blocks[0].named_children() if not type(part).__name__ in ('Dropout', 'Identity')]
        for text in (made.summary(), made.diagram()):
            assert all(name in text for name in [*parts, 'token_embedding', 'norm', 'head'])
        assert made.diagram().count('⊕') == 2 and f'{sum(p.numel() for p in made.parameters()):,}' in made.summary()


@pytest.mark.slow
def test_compiled_is_the_same():
    for options in ({}, LLAMA):
        made, ids = model(**options), some_ids()
        made(ids[:, :-1], ids[:, 1:]).backward()
        expected = [p.grad.clone() for p in made.parameters()]
        made.zero_grad()
        compiled = torch.compile(made, fullgraph=True)
        loss = compiled(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.testing.assert_close(loss, made(ids[:, :-1], ids[:, 1:]))
        for p, grad in zip(made.parameters(), expected): torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


# ---- the chunked loss ----

@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 40), st.integers(0, 99), st.sampled_from(['both', 'hidden', 'weight']))
def test_chunked_loss_against_torch(n, d, rows, seed, learns):
    generator = seeded(seed)
    h, w = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, 11))
    targets = torch.randint(11, (n,), generator=generator).masked_fill(torch.rand(n, generator=generator) < 0.3, -100)
    targets[0] = 3
    inputs = [x.requires_grad_() for name, x in (('hidden', h), ('weight', w)) if learns in (name, 'both')]
    ours, theirs = chunked_cross_entropy(h, w, targets, rows=rows), F.cross_entropy(h @ w.T, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(2.5 * ours, inputs), torch.autograd.grad(2.5 * theirs, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_chunked_loss_with_extreme_scores_and_nothing_to_count():
    h, w = torch.tensor([[1e4], [-1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    targets = torch.tensor([0, 0])
    ours, theirs = chunked_cross_entropy(h, w, targets), F.cross_entropy(h @ w.T, targets)
    torch.testing.assert_close(ours, theirs)
    nothing = chunked_cross_entropy(h, w, torch.tensor([-100, -100]))
    assert nothing.isnan() and F.cross_entropy(h @ w.T, torch.tensor([-100, -100])).isnan()


@pytest.mark.parametrize('frozen', ['neither', 'table', 'hidden'])
def test_a_frozen_table_costs_no_product(frozen):
    "Logits, the gradient of the hidden states, and that of the table where it learns: three products or two."
    from torch.utils.flop_counter import FlopCounterMode
    h, w = torch.randn(6, 4, requires_grad=frozen != 'hidden'), torch.randn(9, 4, requires_grad=frozen != 'table')
    with FlopCounterMode(display=False) as counted: (2 * chunked_cross_entropy(h, w, torch.arange(6), rows=4)).backward()
    products = 2 if frozen == 'table' else 3
    assert counted.get_total_flops() == products * 2 * 6 * 9 * 4
    (2 * F.cross_entropy((a := h.detach().requires_grad_()) @ (b := w.detach().requires_grad_()).T, torch.arange(6))).backward()
    for mine, peers in ((h, a), (w, b)):
        if mine.requires_grad: torch.testing.assert_close(mine.grad, peers.grad)
        else: assert mine.grad is None


def test_chunked_loss_keeps_its_gradient_with_retain_graph():
    h, w = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    loss = chunked_cross_entropy(h, w, torch.arange(5))
    loss.backward(retain_graph=True)
    once = w.grad.clone()
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * once)


def test_chunked_loss_under_autocast_and_in_bfloat16():
    h, w, targets = torch.randn(40, 16, generator=seeded()), torch.randn(30, 16, generator=seeded(1)), torch.arange(40) % 30
    exact = chunked_cross_entropy(h, w, targets)
    for x in (h, w): x.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16): mixed = chunked_cross_entropy(h, w, targets, rows=7)
    mixed.backward()
    assert mixed.dtype == torch.float32 and w.grad.dtype == torch.float32 and 0 < abs(mixed - exact) < 0.05
    low = chunked_cross_entropy(h.bfloat16(), w.bfloat16(), targets, rows=7)
    assert abs(low - exact) < 0.05
    expected, = torch.autograd.grad(F.cross_entropy(h @ w.T, targets), w)
    assert (w.grad - expected).norm() < 0.02 * expected.norm()


def test_chunked_loss_never_holds_all_logits():
    h, w = torch.randn(1024, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.long)
    peak = max(memory_over_time(lambda: chunked_cross_entropy(h, w, targets, rows=64).backward()))
    assert peak < 0.25 * 1024 * 4096 * 4


@pytest.mark.parametrize('targets, error, words', [(torch.zeros(3), TypeError, 'float32'), (torch.full((3,), 9), ValueError, '9'), (torch.full((3,), -1), ValueError, '-1')])
def test_targets_that_do_not_fit(targets, error, words):
    with unchecked(), pytest.raises(error, match=words): chunked_cross_entropy(torch.zeros(3, 2), torch.zeros(9, 2), targets)


def one_layer(name): return replace(PRESETS[name], n_layers=1)   # the property above varies the number of layers


def test_every_preset_is_counted():
    for name in PRESETS:
        made = blueprint(one_layer(name))
        assert sum(p.numel() for p in made.parameters()) == sum(count_parameters(made).values()), name
        if made.config.tie_embeddings: assert made.head.multiplied() == made.token_embedding.weight.numel(), name


@pytest.mark.parametrize('name', ['nano', 'gpt2', 'llama-260k', 'llama-1.1b', 'llama-2-7b', 'llama-3.2-1b'])     # the others differ in size alone
def test_the_card_says_the_count(name):
    made = blueprint(one_layer(name))
    with unchecked(): card = model_card(made.config, length=64)
    assert f'{sum(p.numel() for p in made.parameters()):,}' in card


# ---- a model on disk ----

def test_the_generator_draws_every_weight():
    for positions in POSITIONS:
        config, made = GPTConfig(23, 12, 16, 2, 4, positions=positions), []
        for noise in range(2):
            torch.manual_seed(noise)
            made.append(GPT(config, generator=seeded(3)))
        assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in made))), positions
        table = getattr(made[0], 'position_embedding', None)
        assert (positions == 'learned') == hasattr(table, 'weight')
        if positions == 'learned': assert 0.01 < table.weight.std() < 0.03


@settings(max_examples=20)
@given(choices)
def test_what_is_saved_comes_back(tmp_path_factory, choice):
    choice.pop('rope_scaling')
    folder, made = tmp_path_factory.mktemp('models'), GPT(GPTConfig(**choice), generator=seeded())
    made.save_pretrained(folder/'new'/'folder')
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = GPT.from_pretrained(str(folder/'new'/'folder'), device='cpu')
    assert torch.equal(torch.get_rng_state(), before) and again.config == made.config and not again.training
    assert again.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), made.state_dict().values()))
    assert sorted(path.name for path in (folder/'new'/'folder').iterdir()) == ['config.json', 'model.safetensors']


def test_saving_writes_the_same_bytes_and_reads_other_kinds_of_number(tmp_path):
    made = model()
    for name in 'ab': made.save_pretrained(tmp_path/name)
    assert all((tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes() for name in ('config.json', 'model.safetensors'))
    half = {name: t.half() for name, t in made.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path/'a'/'model.safetensors')                   # as another maker would: no checksum
    again = GPT.from_pretrained(tmp_path/'a')
    assert all(p.dtype == torch.float32 and torch.equal(p, half[name].float()) for name, p in again.state_dict().items())


def test_every_flipped_byte_of_the_numbers_is_noticed(tmp_path):
    GPT(GPTConfig(3, 2, 2, 1, 1)).save_pretrained(tmp_path)
    weights = tmp_path/'model.safetensors'
    whole = weights.read_bytes()
    head = 8 + int.from_bytes(whole[:8], 'little')
    for at in range(head, len(whole), 3):                            # in time, each of the four bytes of a number
        weights.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with unchecked(), pytest.raises(ValueError, match='model.safetensors or config.json is damaged'): GPT.from_pretrained(tmp_path)
    for n in range(0, len(whole), 13):
        weights.write_bytes(whole[:n])
        with unchecked(), pytest.raises(ValueError, match='model.safetensors is damaged'): GPT.from_pretrained(tmp_path)


def test_a_save_that_dies_between_two_files_leaves_the_old_model_or_the_new(tmp_path, monkeypatch):
    old, new, rename = GPT(GPTConfig(3, 2, 2, 1, 1)), GPT(GPTConfig(3, 2, 4, 1, 1)), os.replace
    kept = []
    for fatal in range(12):
        old.save_pretrained(tmp_path)
        left = [fatal]

        def dying(a, b):
            left[0] -= 1
            if left[0] < 0: raise SystemExit
            rename(a, b)
        with monkeypatch.context() as m, suppress(SystemExit):
            for name in 'rename', 'replace': m.setattr(os, name, dying)
            new.save_pretrained(tmp_path)
        found = GPT.from_pretrained(tmp_path)
        kept.append([old.config, new.config].index(found.config))
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 1                  # from one rename on, the new one


@pytest.mark.parametrize('change, words', [
    (lambda t: t.pop('norm.bias'), 'model.safetensors lacks: norm.bias'), (lambda t: t.update(more=torch.zeros(1)), 'no place in it .*: more'),
    (lambda t: t.update({'norm.weight': torch.zeros(15)}), r'norm.weight has shape \(15,\), expected \(16,\)')])
def test_tensors_that_do_not_fit(tmp_path, change, words):
    made = model()
    made.save_pretrained(tmp_path)
    tensors = dict(made.state_dict())
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match=words): GPT.from_pretrained(tmp_path)


def test_folders_of_earlier_versions_are_read(tmp_path):
    made = model()
    made.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path/'model.safetensors', 'pt') as file: mark = file.metadata()
    assert mark.keys() == {'crc32', 'format'} and mark['format'] == 'pt'
    for marks in ({'crc32': mark['crc32']}, {'format': 'pt'}):                            # as this library wrote it, and as transformers does
        safetensors.torch.save_file(made.state_dict(), tmp_path/'model.safetensors', marks)
        again = GPT.from_pretrained(tmp_path)
        assert again.config == made.config and all(torch.equal(p, made.state_dict()[name]) for name, p in again.state_dict().items())
    safetensors.torch.save_file(made.state_dict(), tmp_path/'model.safetensors', {'crc32': '00000000'})
    with pytest.raises(ValueError, match='were not saved together'): GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize('text, words', [
    ('', ''), ('[]', 'expected a JSON object'), ('{}', ''), ('{"n_layer": 2}', "did you mean 'n_layers'"),
    ('{"vocab_size": 0, "context_length": 12, "d_model": 16, "n_layers": 2, "n_heads": 4}', 'vocab_size must be .* got 0'),
    ('{"vocab_size": 9, "context_length": 12, "d_model": 16, "n_layers": 2, "n_heads": 4, "norm_eps": 1' + '0' * 400 + '}', '')])
def test_configurations_that_are_none(tmp_path, text, words):
    model().save_pretrained(tmp_path)
    (tmp_path/'config.json').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=f'config.json is not the configuration of a model: .*{words}'): GPT.from_pretrained(tmp_path)


def test_another_value_in_the_configuration_is_noticed(tmp_path):
    model(positions='rope').save_pretrained(tmp_path)
    path = tmp_path/'config.json'
    path.write_text(path.read_text(encoding='utf-8').replace('"rope_base": 10000.0', '"rope_base": 20000.0'), encoding='utf-8')
    with pytest.raises(ValueError, match='were not saved together'): GPT.from_pretrained(tmp_path)


def test_a_model_knows_its_tokenizer(tmp_path):
    "With another tokenizer beside it, every id would mean another word."
    from llm_from_scratch.bpe import BPETokenizer
    from llm_from_scratch.text import CharTokenizer
    for table, other in ((CharTokenizer.train(['abc']), CharTokenizer.train(['abd'])), (BPETokenizer.train('low lower', 258), BPETokenizer.train('new newer', 258))):
        model().save_pretrained(tmp_path, table)
        assert load_tokenizer(tmp_path).vocab_size == table.vocab_size
        GPT.from_pretrained(tmp_path)
        other.save(tmp_path/'tokenizer.json')
        with pytest.raises(ValueError, match=r'tokenizer.json is not the tokenizer that this model was saved with: its fingerprint is \w{8}, expected \w{8}'): GPT.from_pretrained(tmp_path)
    (tmp_path/'tokenizer.json').unlink()
    GPT.from_pretrained(tmp_path)                                                         # the weights alone
    other.save(tmp_path/'tokenizer.json'); model().save_pretrained(tmp_path)
    GPT.from_pretrained(tmp_path)                                                         # saved without one, as earlier versions did


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    old, new = model(), model(n_layers=1)
    old.save_pretrained(tmp_path)
    monkeypatch.setattr(safetensors.torch, 'save', lambda *_: (_ for _ in ()).throw(OSError('no space left')))
    with pytest.raises(OSError, match='no space'): new.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == old.config and len([*tmp_path.iterdir()]) == 2


def test_models_that_are_not_there(tmp_path, monkeypatch):
    for source in ('nowhere', tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError, match='nowhere.*expected a folder, or one of storyland'): GPT.from_pretrained(source)
    for missing in ('config.json', 'model.safetensors'):
        model().save_pretrained(tmp_path)
        (tmp_path/missing).unlink()
        with pytest.raises(FileNotFoundError, match=f'has no {missing}: a model is saved as'): GPT.from_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)                                                           # a name means the model of that name, a path a folder
    (tmp_path/'storyland').mkdir()
    assert not model_folder('storyland').samefile(tmp_path/'storyland') and model_folder('./storyland').samefile(tmp_path/'storyland')


def test_the_embedded_model_knows_its_world():
    for name in EMBEDDED:
        made, words = GPT.from_pretrained(name), load_tokenizer(name)
        assert made.config.vocab_size == words.vocab_size and sum(p.numel() for p in made.parameters()) <= 1_000_000
    made, words = GPT.from_pretrained('storyland'), load_tokenizer('storyland')
    end, above, n = words.special_tokens['<|endoftext|>'], 0.0, 0
    for story in stories(25, seed=77, split='test'):
        ids = words.encode(story.text)
        assert words.decode(ids) == story.text and len(ids) < made.config.context_length
        with torch.no_grad(), unchecked(): above += float(made(torch.tensor([[end, *ids]]), torch.tensor([[*ids, end]]))) * (len(ids) + 1) + story.log_probability
        n += len(ids) + 1
    assert 0.01 < above / n < 0.08
