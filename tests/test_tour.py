"The tour's short GPT: what each part does, and that it computes what the library's GPT computes."
import pytest
import torch
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.weight_maps import TOUR_WEIGHTS, export_weights, load_weights
from llm_from_scratch.tour import SelfAttention, TinyBlock, TinyGPT, batch, sample, train
from functools import cache

SHAPE = dict(vocab_size=11, context_length=16, d_model=24, n_layers=2, n_heads=3)
TEXT = torch.arange(11).repeat(40)                    # 0, 1, …, 10, again and again


def tiny(seed=0):
    torch.manual_seed(seed)
    return TinyGPT(**SHAPE)


@cache
def trained():
    "A model that has learned to count, and its losses."
    model = tiny()
    losses = [loss for _, loss in train(model, TEXT, 150, rows=4, generator=torch.Generator().manual_seed(0))]
    return model, losses


def library(model):
    twin = GPT(GPTConfig(**SHAPE, feed_forward='gelu'))
    load_weights(twin, model.state_dict(), TOUR_WEIGHTS)
    return twin


def test_against_the_library_on_trained_weights():
    model, _ = trained()
    ids = torch.randint(11, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): torch.testing.assert_close(library(model)(ids), model(ids), atol=1e-4, rtol=1e-4)


def test_the_library_goes_back_into_the_tour():
    model, _ = trained()
    weights = export_weights(library(model), TOUR_WEIGHTS)
    other = tiny(1)
    other.load_state_dict({'head.weight': weights['token_embedding.weight'], **weights})
    for name, tensor in model.state_dict().items(): assert torch.equal(other.state_dict()[name], tensor), name


def test_gradients_agree_with_the_library():
    model, _ = trained()
    twin = library(model)
    ids = TEXT[:17][None]
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    twin(ids[:, :-1], ids[:, 1:]).backward()
    torch.testing.assert_close(twin.token_embedding.weight.grad, model.token_embedding.weight.grad, atol=1e-5, rtol=1e-4)


def test_it_learns_to_count_and_says_so():
    model, losses = trained()
    assert losses[0] > 2.2 and losses[-1] < 0.3
    assert sample(model, [3], 9, temperature=0) == [3, 4, 5, 6, 7, 8, 9, 10, 0, 1]
    assert model.head.weight is model.token_embedding.weight


def test_attention_against_torch():
    torch.manual_seed(0)
    ours, x = SelfAttention(24, 3), torch.randn(2, 7, 24)
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = ours.output.weight, ours.output.bias
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=future, need_weights=False)[0])


def test_a_block_only_adds_to_the_stream():
    block, x = TinyBlock(24, 3), torch.randn(2, 7, 24)
    silent = TinyBlock(24, 3)
    for layer in (silent.attention.output, silent.mlp[2]):
        for p in layer.parameters(): torch.nn.init.zeros_(p)
    assert torch.equal(silent(x), x) and not torch.allclose(block(x), x)


def test_no_position_sees_a_later_one():
    model, _ = trained()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    changed = torch.tensor([[1, 2, 3, 9, 9]])
    with torch.no_grad(): assert torch.equal(model(ids)[:, :3], model(changed)[:, :3])


def test_a_batch_is_the_text_and_the_text_shifted_by_one():
    inputs, targets = batch(TEXT, 5, 16, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (5, 16)
    assert torch.equal((inputs + 1) % 11, targets) and len({*inputs[:, 0].tolist()}) > 1


class Fixed(torch.nn.Module):
    "The same probabilities, whatever comes in."
    context_length = 4

    def __init__(self, *p):
        super().__init__()
        self.logits = torch.tensor(p).log()

    def forward(self, ids): return self.logits.expand(1, ids.shape[1], -1)


def test_pieces_begin_where_they_may():
    starts = torch.tensor([5, 300, 430])                       # the last one is too near the end
    inputs, _ = batch(TEXT, 50, 16, starts=starts)
    assert {*inputs[:, 0].tolist()} == {5 % 11, 300 % 11}


def test_sampling_follows_the_probabilities_and_its_generator():
    model = Fixed(0.5, 0.5, 0.0)
    drawn = sample(model, [0], 2000, generator=torch.Generator().manual_seed(0))[1:]
    assert set(drawn) == {0, 1} and abs(sum(drawn) / 2000 - 0.5) < 0.06
    assert drawn == sample(model, [0], 2000, generator=torch.Generator().manual_seed(0))[1:]
    cold = sample(Fixed(0.8, 0.2), [0], 500, temperature=0.5, generator=torch.Generator().manual_seed(0))[1:]
    assert abs(sum(cold) / 500 - 0.04 / 0.68) < 0.04           # p² over the sum of p²


def test_the_context_slides():
    model, _ = trained()
    assert sample(model, [0], 40, temperature=0, context_length=16)[-1] == 40 % 11


@pytest.mark.parametrize('call, words', [
    (lambda: TinyGPT(11, 16, d_model=24, n_heads=5), 'n_heads must divide d_model, got 5 and 24'),
    (lambda: tiny()(torch.zeros(1, 17, dtype=torch.long)), '17 tokens are longer than the context of 16'),
    (lambda: sample(tiny(), [], 3), 'at least one token'),
    (lambda: batch(TEXT[:16], 2, 16), '16 tokens are too few'),
])
def test_what_cannot_be_is_said(call, words):
    with pytest.raises(ValueError, match=words): call()
