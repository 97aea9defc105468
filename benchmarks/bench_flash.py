"Tiles in plain PyTorch beside the matrix, and our kernel beside PyTorch's where there is a GPU: `rows(quick)` is what `make bench` runs."
import time
from functools import partial

import torch
from torch.nn import functional as F

from llm_from_scratch.attention import attention
from llm_from_scratch.costs import Ledger
from llm_from_scratch.flash import flash_attention, triton_attention

SHAPES = [('T = 128', 4, 128), ('T = 512', 4, 512), ('T = 2048', 1, 2048), ('T = 4096', 1, 4096)]      # name, H, T


def timed(f, times=1):
    start = time.perf_counter()
    for _ in range(times): f()
    return (time.perf_counter() - start) / times


def training(f, *inputs):
    "Forward and backward."
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.autograd.grad(f(*leaves).sum(), leaves)


def megabytes(f, *inputs):
    with Ledger(inputs) as ledger: training(f, *inputs)
    return max(ledger.line) / 2**20


def row(name, H, T, quick):
    "Forward and backward, causal, with tiles and with the matrix in turn."
    inputs = torch.randn(3, 1, H, T, 64).unbind()
    tiles, matrix = partial(flash_attention, causal=True), partial(attention, causal=True, backend='manual')
    ours, peer = partial(training, tiles, *inputs), partial(training, matrix, *inputs)
    ours(), peer()
    pairs = [(timed(ours), timed(peer)) for _ in range(3 if quick else 15)]
    held, whole = megabytes(tiles, *inputs), megabytes(matrix, *inputs)
    return {'name': f'tiles in plain PyTorch, {name}', 'what': f'forward and backward, causal, float32, {H} heads × {T} × 64; the matrix holds {whole:.0f} MB',
            'ours': [a for a, _ in pairs], 'peer': [b for _, b in pairs], 'peer_name': 'attention with the matrix (manual)', 'unit': 'M scores/s', 'work': H * T * T / 1e6,
            'memory_mb': held, 'target': 'at most a third of the memory at 2,048 positions', 'memory_limit_mb': whole if T < 2048 else whole / 3}


def on_a_gpu(quick):
    "Our kernel and PyTorch's, in bfloat16."
    name = 'the Triton kernel, T = 4096'
    try: import triton
    except ImportError: return {'name': name, 'skipped': 'triton is not installed'}
    if not torch.cuda.is_available(): return {'name': name, 'skipped': 'no GPU here'}
    q, k, v = torch.randn(3, 4, 16, 4096, 64, device='cuda').bfloat16()
    seconds = {f: [t / 1e3 for t in triton.testing.do_bench(partial(f, q, k, v), rep=100 if quick else 1000, return_mode='all')]
               for f in (partial(triton_attention, causal=True), partial(F.scaled_dot_product_attention, is_causal=True))}
    ours, peer = seconds.values()
    return {'name': name, 'what': f'forward, causal, bfloat16, 4 × 16 heads × 4096 × 64, on {torch.cuda.get_device_name()}', 'ours': ours, 'peer': peer,
            'peer_name': 'F.scaled_dot_product_attention', 'unit': 'M scores/s', 'work': 4 * 16 * 4096**2 / 1e6, 'target': 'at most 4 × the time', 'ratio_limit': 4.0}


def rows(quick: bool) -> list[dict]:
    "One row per shape, and one for a GPU."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return [*(row(*shape, quick) for shape in SHAPES), on_a_gpu(quick)]
