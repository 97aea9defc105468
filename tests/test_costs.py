"What a model costs, asked of the model: published counts, torch's own count of operations, the allocator, parts that nobody has thought of."
from dataclasses import replace

import pytest
import torch
from shapes import unchecked
from torch import nn

from llm_from_scratch.blocks import FEED_FORWARDS
from llm_from_scratch.costs import Ledger, MemoryEstimate, count_parameters, estimate_memory, flops_per_token, memory_over_time, trace_step
from llm_from_scratch.gpt import GPT, PRESETS, GPTConfig, blueprint, model_card

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
PUBLISHED = {'gpt2': 124_439_808, 'gpt2-medium': 354_823_168, 'gpt2-large': 774_030_080, 'gpt2-xl': 1_557_611_200, 'llama-260k': 260_032,
             'llama-1.1b': 1_100_048_384, 'llama-2-7b': 6_738_415_616, 'llama-3-8b': 8_030_261_248, 'llama-3.2-1b': 1_235_814_400}


def tokens(config, rows): return torch.randint(config.vocab_size, (rows, config.context_length), generator=torch.Generator().manual_seed(0))


def measured(config, rows, micro=None):
    "The most that the allocator gives out over two steps."
    def train():
        made = GPT(config)
        optimizer, ids = torch.optim.AdamW(made.parameters(), fused=True), tokens(config, rows)
        with unchecked():
            for _ in range(2):
                for part in ids.split(micro or rows): made(part, part).backward()
                optimizer.step()
                optimizer.zero_grad()
    return max(memory_over_time(train))


@pytest.mark.parametrize('name', sorted(PRESETS))
def test_counts_of_presets(name):
    made = blueprint(PRESETS[name])
    count = sum(p.numel() for p in made.parameters())
    assert count == sum(count_parameters(made).values()) == PUBLISHED.get(name, count)


def test_parts_by_name():
    made = nn.ModuleDict({'token_embedding': nn.Embedding(5, 3), 'blocks': nn.ModuleList([nn.ModuleDict({'attention': nn.Linear(3, 3), 'feed_forward': nn.Linear(3, 4), 'feed_forward_norm': nn.LayerNorm(3)})] * 1), 'norm': nn.LayerNorm(3)})
    assert count_parameters(made) == {'token embedding': 15, 'attention': 12, 'feed-forward': 16, 'norms': 12}


@pytest.mark.parametrize('name', ['nano', 'small', 'gpt2', 'llama-1.1b', 'llama-260k'])
def test_flops_against_torch(name):
    from torch.utils.flop_counter import FlopCounterMode
    config, T = replace(PRESETS[name], n_layers=min(3, PRESETS[name].n_layers)), 128
    plan, made, ids = blueprint(config), blueprint(replace(config, backend='manual')), torch.zeros(2, T, dtype=torch.long, device='meta')
    with FlopCounterMode(display=False) as training: made(ids, ids).backward()
    with FlopCounterMode(display=False) as forward: made(ids)
    assert abs(training.get_total_flops() / ids.numel() / flops_per_token(plan, T) - 1) < 0.01
    assert abs(forward.get_total_flops() / ids.numel() / flops_per_token(plan, T, training=False) - 1) < 0.01


@pytest.mark.parametrize('config, batch_size', [
    (PRESETS['nano'], 4), (PRESETS['tiny'], 8), (PRESETS['llama-260k'], 4), (GPTConfig(20_000, 128, 256, 2, 4), 1), (replace(PRESETS['nano'], dropout=.1), 4),
    (replace(PRESETS['tiny'], tie_embeddings=False, vocab_size=8_192), 4), (replace(PRESETS['nano'], backend='manual'), 4), (replace(PRESETS['nano'], window=20), 4)])
def test_memory_against_the_allocator(config, batch_size):
    peak, estimate = measured(config, batch_size), estimate_memory(blueprint(config), batch_size, config.context_length)
    assert isinstance(estimate, MemoryEstimate) and abs(estimate.training / peak - 1) < 0.05
    assert estimate.inference == estimate.parameters + estimate.cache
    assert estimate.cache == 2 * config.n_layers * config.kv_heads * config.head_width * batch_size * min(config.context_length, config.window or config.context_length) * 4


def test_memory_of_gradient_accumulation():
    config = PRESETS['nano']
    made, ids = GPT(config), tokens(config, 2)
    with unchecked(): twice, once = (trace_step(made, (ids, ids), times=n) for n in (2, 1))
    size = 4 * sum(p.numel() for p in made.parameters())
    assert abs((3 * size + twice.peak) / measured(config, 8, 2) - 1) < 0.05
    assert abs((3 * size + once.peak) / measured(config, 2) - 1) < 0.05 and twice.peak > once.peak and twice.activations == once.activations


def test_frozen_weights_have_no_gradients():
    made = blueprint(PRESETS['nano'])
    whole = estimate_memory(made, 2, 64)
    for p in made.blocks.parameters(): p.requires_grad_(False)
    some = estimate_memory(made, 2, 64)
    assert some.gradients == 4 * made.token_embedding.weight.numel() + 4 * made.norm.weight.numel() and some.optimizer == 2 * some.gradients
    assert some.parameters == whole.parameters and some.training < whole.training


class Experts(nn.Module):
    "The best of four for each token: what is computed decides the shapes."
    def __init__(self, d_model, d_ff, *, bias):
        super().__init__()
        self.router = nn.Linear(d_model, 4, bias=False)
        self.experts = nn.ModuleList(FEED_FORWARDS['swiglu'](d_model, d_ff, bias=bias) for _ in range(4))

    def forward(self, x):
        share, best = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = best == i
            if mine.any(): y[mine] = share[mine][:, None] * expert(x[mine])
        return y


@pytest.mark.parametrize('name, part, within', [('gated_anew', FEED_FORWARDS['swiglu'], .05), ('four_experts', Experts, .1)])
def test_parts_of_ones_own_are_counted_right(monkeypatch, name, part, within):
    monkeypatch.setitem(FEED_FORWARDS, name, part)
    config = replace(PRESETS['nano'], feed_forward=name, d_ff=200)
    with unchecked(): made = GPT(config, generator=torch.Generator().manual_seed(0))
    count = sum(p.numel() for p in made.parameters())
    assert sum(count_parameters(blueprint(config)).values()) == count and f'{count:,}' in (model_card(config) if part is not Experts else f'{count:,}')
    with unchecked(): estimate = estimate_memory(made, 4, config.context_length)
    assert estimate.parameters == 4 * count and abs(estimate.training / measured(config, 4) - 1) < within


class Normed(nn.Module):
    "A batch norm, whose buffers move with every forward pass, and dropout."
    def __init__(self, looks=False):
        super().__init__()
        self.table, self.norm, self.drop, self.head, self.looks = nn.Embedding(9, 6), nn.BatchNorm1d(6), nn.Dropout(.5), nn.Linear(6, 9), looks

    def forward(self, x, y):
        h = self.drop(self.norm(self.table(x).transpose(1, 2)).transpose(1, 2))
        if self.looks and h.sum().item() > 1e9: raise AssertionError
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


@pytest.mark.parametrize('looks', [False, True])
def test_nothing_of_the_model_moves(looks):
    "Neither where shapes suffice nor where the step is made with real numbers."
    made, ids = Normed(looks).eval(), torch.arange(12).view(3, 4) % 9
    before, random = {k: v.clone() for k, v in made.state_dict().items()}, torch.get_rng_state()
    trace = trace_step(made, (ids, ids))
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items()) and int(made.norm.num_batches_tracked) == 0
    assert all(p.grad is None for p in made.parameters()) and not made.training and not made.norm.training
    assert 0 < trace.activations <= trace.peak and (looks or torch.equal(random, torch.get_rng_state()))
    other = trace_step(Normed(not looks), (ids, ids))
    assert abs(other.activations / trace.activations - 1) < .1 and abs(other.peak / trace.peak - 1) < .1


def test_the_ledger_books_what_lives():
    a = torch.ones(100)
    with Ledger([a]) as ledger:
        b = a + 1; c = b.view(10, 10)
        assert ledger.bytes == 400
        b.add_(1); del b
        assert ledger.bytes == 400
        del c
    assert ledger.bytes == 0 and max(ledger.line) == 400


@pytest.mark.parametrize('batch_size, length', [(0, 4), (2, 0)])
def test_an_empty_batch_is_refused(batch_size, length):
    with pytest.raises(ValueError, match='at least one sequence of one token'): estimate_memory(blueprint(PRESETS['nano']), batch_size, length)


def test_tables_that_are_kept_for_later_stay_real():
    "What a walk without numbers leaves in a cache would be found by the next run with numbers."
    config = replace(PRESETS['llama-260k'], rope_base=12_345.0)
    estimate_memory(blueprint(config), 1, 8)
    with unchecked(): made = GPT(config)
    ids = tokens(config, 1)[:, :8]
    estimate_memory(made, 1, 8)
    with unchecked(): assert type(made(ids)) is torch.Tensor and made(ids, ids).item() > 0
