"""Tokens a second of `generate` beside `transformers.generate`: `rows(quick)` is what `make bench` runs.

Both sides have the same GPT-2-shaped model with the same random weights (ours are loaded through chapter 9's map), the
same prompt, a cache, batch 1 and greedy choice, in float32 on the CPU, in one process and in turn. They must write the
same tokens.
"""
import gc, os, time, warnings

import torch

from bench_gpt import theirs
from llm_from_scratch.generation import Sampler, generate
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.weight_maps import GPT2_WEIGHTS, load_weights

#        V       D    L   H   new tokens  runs  least tokens/s over the peer's
SIZES = {'1 M': (1_024, 128, 4, 4, 192, 9, 1.5), '10 M': (4_096, 320, 6, 5, 128, 9, 1.5), '124 M': (50_257, 768, 12, 12, 48, 7, 1.1)}
T, PROMPT = 256, 16


def pair(V, D, L, H):
    "Our model and the peer's, with the same weights."
    torch.manual_seed(0)
    peer = theirs('GPT-2', V, D, L, H).eval()
    ours = GPT(GPTConfig(V, T, D, L, H)).eval()
    load_weights(ours, peer.state_dict(), GPT2_WEIGHTS)
    return ours, peer


def writers(size, new_tokens):
    "Two functions that write the same tokens."
    V, D, L, H, *_ = SIZES[size]
    ours, peer = pair(V, D, L, H)
    prompt = torch.randint(1, V, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    fixed = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0)

    def we(): return generate(ours, prompt.tolist(), new_tokens, Sampler(temperature=0))[0]

    def they():
        with torch.inference_mode(): return peer.generate(prompt, attention_mask=torch.ones_like(prompt), **fixed)[0, PROMPT:].tolist()
    return we, they, sum(p.numel() for p in ours.parameters())


def timed(write):
    start = time.perf_counter()
    tokens = write()
    return time.perf_counter() - start, tokens


def alternate(we, they, runs):
    "Seconds of each, in turn; the order changes every time, and the first of each warms up."
    seconds, said = {we: [], they: []}, {}
    for i in range(runs + 1):
        for write in ((we, they), (they, we))[i % 2]:
            passed, said[write] = timed(write)
            seconds[write].append(passed)
        assert said[we] == said[they], f'ours wrote {said[we][:8]} …, the peer {said[they][:8]} …'
    return seconds[we][1:], seconds[they][1:]


def row(size, quick):
    "Tokens a second at one size."
    *_, new_tokens, runs, least = SIZES[size]
    if quick: new_tokens, runs = 24, 3
    name = f'generation, {size}'
    try: we, they, parameters = writers(size, new_tokens)
    except ImportError as e: return {'name': name, 'skipped': f'no peer to compare with: {e}'}
    ours, peer = alternate(we, they, runs)
    return {'name': name, 'what': f'{new_tokens} greedy tokens of a GPT-2-shaped model of {size} parameters after a prompt of {PROMPT}, batch 1, float32, simple cache',
            'ours': ours, 'peer': peer, 'peer_name': 'transformers.generate', 'unit': 'tokens/s', 'work': new_tokens, 'parameters': parameters,
            'target': f'at least {least} × the tokens/s of transformers', 'ratio_limit': 1 / least}


def rows(quick: bool) -> list[dict]:
    "One row for each size."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count() or 1)
    found = []
    for size in ('1 M',) if quick else SIZES:
        found.append(row(size, quick))
        gc.collect()
    return found
