"""Training adapters beside `peft` on `transformers`: tokens a second, and the memory of a step.

Both sides have the same Llama with the same weights in float32, adapters of rank 8 on all linear layers of the blocks with the same
first numbers, the same batch and AdamW, in one process and in turn. A step is forward, backward and update. Before anything is timed,
three steps must give the same losses. `memory_mb` is what a step of ours allocates at most beside the weights, `peer_memory_mb` what
the peer's does. `rows(quick)` is what `make bench` runs.
"""
import os, tempfile, warnings

import torch
from torch.nn import functional as F

from bench_gpt import SIZES, T, alternate, theirs
from llm_from_scratch.costs import memory_over_time
from llm_from_scratch.gpt import GPT
from llm_from_scratch.lora import LoRAConfig, add_lora, load_adapter, save_adapter

os.environ.setdefault('KINETO_LOG_LEVEL', '99')            # the profiler is quiet
RUNS = {'1 M': 15, '10 M': 9, '124 M': 5}


def adapters(size):
    "Ours and the peer's with the same weights and adapters, and a batch."
    import peft
    V, D, L, H, B, _ = SIZES[size]
    torch.manual_seed(0)
    peer = theirs('Llama', V, D, L, H)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(f'{folder}/base')
        ours = GPT.from_hf(f'{folder}/base')
        save_adapter(add_lora(ours, LoRAConfig(8, 16.0), generator=torch.Generator().manual_seed(0)), f'{folder}/adapter')
        ours = load_adapter(GPT.from_hf(f'{folder}/base'), f'{folder}/adapter')
        peer = peft.PeftModel.from_pretrained(peer, f'{folder}/adapter', is_trainable=True)
    return ours.train(), peer.train(), torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def stepper(model, loss):
    "One step; its loss."
    learns = [p for p in model.parameters() if p.requires_grad]
    made = torch.optim.AdamW(learns, lr=1e-3, weight_decay=0.0, fused=True)

    def step():
        found = loss()
        found.backward()
        made.step()
        made.zero_grad(set_to_none=True)
        return float(found)
    return step, sum(p.numel() for p in learns)


def peak(step):
    "The most that a step allocates beside what was there, in MB."
    return max(memory_over_time(step)) / 1e6


def row(size, quick):
    "Tokens a second at one size."
    name = f'LoRA, {size}'
    try: ours, peer, ids = adapters(size)
    except ImportError as e: return {'name': name, 'skipped': f'no peer to compare with: {e}'}
    if quick: ids = ids[:2]
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    (we, n), (they, m) = stepper(ours, lambda: ours(ids, targets)), stepper(peer, lambda: peer(ids, labels=ids, use_cache=False).loss)
    assert n == m, (n, m)
    for _ in range(3): assert abs(we() - they()) < 1e-4
    seconds = alternate(we, they, 3 if quick else RUNS[size])
    return {'name': name, 'what': f'forward, backward and update of {n:,} parameters of adapters of rank 8, {len(ids)} × {T} tokens, float32', 'ours': seconds[0], 'peer': seconds[1],
            'peer_name': 'peft + transformers', 'unit': 'tokens/s', 'work': ids.numel(), 'trained': n, 'memory_mb': peak(we), 'peer_memory_mb': peak(they),
            'target': 'at least 1.0 × the tokens/s of peft + transformers', 'ratio_limit': 1.0}


def rows(quick: bool) -> list[dict]:
    "One row for each size."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count() or 1)
    return [row(size, quick) for size in (['1 M'] if quick else SIZES)]
