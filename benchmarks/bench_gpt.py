"""Training steps of GPT-2 and Llama beside `transformers`: `rows(quick)` is what `make bench` runs.

Both sides have the same shape, ids, AdamW and precision and run in one process, in turn. Where a GPU is present, the same
steps are measured there in bfloat16, with the fraction of the device's peak.
"""
import gc, os, statistics, time, warnings
from pathlib import Path

import torch
from torch.nn import functional as F

from llm_from_scratch.costs import flops_per_token
from llm_from_scratch.gpt import GPT, GPTConfig, blueprint

LLAMA = dict(positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False)
#        V       D    L   H   batch  runs  (256 tokens each)
SIZES = {'1 M': (1_024, 128, 4, 4, 8, 9), '10 M': (4_096, 320, 6, 5, 8, 7), '124 M': (50_257, 768, 12, 12, 4, 5)}
T = 256
PEAKS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L4': 121e12, '4090': 165e12}        # dense bfloat16, FLOP/s


def hidden_width(D): return round(8 * D / 3 / 32) * 32


def ours(kind, V, D, L, H):
    "Our model of this shape."
    return GPT(GPTConfig(V, T, D, L, H, **({} if kind == 'GPT-2' else {**LLAMA, 'd_ff': hidden_width(D)})))


def theirs(kind, V, D, L, H):
    "The peer's model of this shape."
    import transformers
    transformers.logging.set_verbosity_error()
    none = dict(bos_token_id=0, eos_token_id=0)
    if kind == 'GPT-2':
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=H, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **none))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=hidden_width(D), num_hidden_layers=L, num_attention_heads=H, max_position_embeddings=T, tie_word_embeddings=True, **none))


def stepper(model, loss, device, mixed):
    "One training step: forward, backward, AdamW."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=mixed): value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value
    return step


def pair(kind, size, *, compiled=False, device='cpu', mixed=(False, False), batch=None):
    "Steps of ours and of the peer's, of the same work."
    V, D, L, H, B, _ = SIZES[size]
    ids = torch.randint(V, (batch or B, T), generator=torch.Generator().manual_seed(0)).to(device)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    a, b = ours(kind, V, D, L, H).to(device), theirs(kind, V, D, L, H).to(device)
    counts = [sum(p.numel() for p in m.parameters()) for m in (a, b)]
    assert counts[0] == counts[1], counts
    run_a, run_b = (torch.compile(m) if compiled else m for m in (a, b))
    return (stepper(a, lambda: run_a(ids, targets), device, mixed[0]),
            stepper(b, lambda: run_b(ids, labels=ids, use_cache=False).loss, device, mixed[1]), ids.numel(), a.config)


def timed(step, device='cpu'):
    if device == 'cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(a, b, runs, device='cpu'):
    "Seconds of each, in turn; the order changes every time, and the first two of each warm up."
    seconds = {a: [], b: []}
    for i in range(runs + 2):
        for step in ((a, b), (b, a))[i % 2]: seconds[step].append(timed(step, device))
    return seconds[a][2:], seconds[b][2:]


def row(kind, size, compiled, quick):
    "Tokens a second in float32 on the CPU."
    mode, limit = ('compiled', 1.0) if compiled else ('eager', 1.1)
    name = f'{kind}, {size}, {mode}'
    try: a, b, tokens, _ = pair(kind, size, compiled=compiled, batch=2 if quick else None)
    except ImportError as e: return {'name': name, 'skipped': f'no peer to compare with: {e}'}
    seconds = alternate(a, b, 5 if quick else SIZES[size][-1])
    return {'name': name, 'what': f'training steps of a {kind}-shaped model of {size} parameters on {tokens:,} tokens, float32, {mode}', 'ours': seconds[0], 'peer': seconds[1],
            'peer_name': f'transformers {mode}', 'unit': 'tokens/s', 'work': tokens, 'target': f'at least {limit} × the tokens/s of transformers', 'ratio_limit': 1 / limit}


def multiplies_bfloat16():
    "Whether this processor has instructions for products of bfloat16."
    try: flags = Path('/proc/cpuinfo').read_text()
    except OSError: return False
    return 'amx_bf16' in flags or 'avx512_bf16' in flags


def bfloat16_row(kind, size, runs, alike):
    "bfloat16 autocast beside the peer under the same autocast (`alike`), or in its float32 default."
    name = f'{kind}, {size}, bfloat16' + (' on both sides' if alike else '')
    if not multiplies_bfloat16(): return {'name': name, 'skipped': 'this processor has no instructions for bfloat16 products (neither AMX nor AVX512-BF16)'}
    a, b, tokens, _ = pair(kind, size, mixed=(True, alike))
    seconds = alternate(a, b, runs)
    limit = 1.05 if alike else 2
    return {'name': name, 'what': f'training steps under bfloat16 autocast, {kind}-shaped, {size} parameters', 'ours': seconds[0], 'peer': seconds[1],
            'peer_name': f"transformers eager, {'bfloat16' if alike else 'float32'}", 'unit': 'tokens/s', 'work': tokens,
            'target': f"at least {limit} × the tokens/s of transformers {'under the same autocast' if alike else 'in float32'}", 'ratio_limit': 1 / limit}


def cuda_row(kind):
    "124 M parameters in bfloat16 on a GPU, compiled, and how much of its peak that is."
    name = f'{kind}, 124 M, bfloat16 on a GPU'
    if not torch.cuda.is_available(): return {'name': name, 'skipped': 'no CUDA device here'}
    a, b, tokens, config = pair(kind, '124 M', compiled=True, device='cuda', mixed=(True, True), batch=64)
    seconds = alternate(a, b, 9, 'cuda')
    device = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAKS.items() if key in device), None)
    reached = tokens / statistics.median(seconds[0]) * flops_per_token(blueprint(config), T)
    share = f', {reached / peak:.0%} of the peak' if peak else ''
    return {'name': name, 'what': f'compiled training steps on {tokens:,} tokens on one {device}: {reached / 1e12:.0f} TFLOP/s{share}', 'ours': seconds[0], 'peer': seconds[1],
            'peer_name': 'transformers compiled, bfloat16', 'unit': 'tokens/s', 'work': tokens, 'target': 'at least 1.0 × the tokens/s of transformers', 'ratio_limit': 1.0}


def rows(quick: bool) -> list[dict]:
    "Eager and compiled in float32 for each shape and size, then bfloat16 and a GPU where there are any."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count() or 1)
    found = []
    for compiled in (False, True):
        for size in ('1 M',) if quick else SIZES:
            for kind in ('GPT-2', 'Llama'):
                if quick and compiled and kind == 'GPT-2': continue
                found.append(row(kind, size, compiled, quick))
                torch.compiler.reset()
                gc.collect()
    for kind in ('GPT-2', 'Llama'): found += [bfloat16_row(kind, size, 5, alike) for size in ('10 M', '124 M') for alike in (False, True)]
    return found + [cuda_row(kind) for kind in ('GPT-2', 'Llama')]
