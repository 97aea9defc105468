"`attention` beside the bare call of PyTorch's kernel that it ends in: `rows(quick)` is what `make bench` runs."
import time
from functools import partial

import torch
from torch.nn import functional as F

from llm_from_scratch.attention import attention

SHAPES = [  # what the heads are those of, B, H, K, T, d
    ('1 M parameters, T = 256', 8, 4, 4, 256, 32), ('124 M parameters, T = 1024', 1, 12, 12, 1024, 64), ('grouped heads, T = 512', 2, 12, 4, 512, 64), ('one new token after 1023', 1, 12, 4, 1, 64)]


def bare(q, k, v):
    "The call alone, as one would write it for these shapes."
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])


def timed(f, times):
    start = time.perf_counter()
    for _ in range(times): f()
    return (time.perf_counter() - start) / times


def heads(n, B, T, d):
    "As they come out of a projection: heads beside each other in memory."
    return torch.randn(B, T, n, d).transpose(1, 2)


@torch.no_grad()
def row(name, B, H, K, T, d, quick):
    "One shape, forward, ours and the bare call in turn."
    S = 1024 if T == 1 else T
    q, k, v = heads(H, B, T, d), heads(K, B, S, d), heads(K, B, S, d)
    ours, peer = partial(attention, q, k, v, causal=True), partial(bare, q, k, v)
    torch.testing.assert_close(ours(), peer())
    times = max(1, int(0.02 / timed(peer, 3)))                       # calls in one measurement
    pairs = [(timed(ours, times), timed(peer, times)) for _ in range(5 if quick else 31)]
    return {'name': f'attention, {name}', 'what': f'forward, causal, float32, {B} × {H} heads ({K} of keys and values) × {T} queries × {S} keys × {d}',
            'ours': [a for a, _ in pairs], 'peer': [b for _, b in pairs], 'peer_name': 'the bare F.scaled_dot_product_attention', 'unit': 'M scores/s', 'work': B * H * T * S / 1e6,
            'target': 'at least 0.95 × the speed of the bare call', 'ratio_limit': 1 / 0.95}


def rows(quick: bool) -> list[dict]:
    "One row per shape."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return [row(*shape, quick) for shape in SHAPES]
