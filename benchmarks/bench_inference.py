"""A single stream beside `transformers`: tokens a second with growing and with static, compiled caches, and the share of the memory-bandwidth limit.

Both sides have the same model with the same weights in float32 (GPT-2 shapes with random weights, and SmolLM2 where it is), the same
prompt, batch 1 and greedy choice, in one process and in turn, and must write the same tokens. A compiled row compiles one step on both
sides: `generate` of transformers does so on a processor only if `_compile_all_devices` is set. `share_of_limit` is what our median
reaches of the tokens a second that the memory could deliver, bandwidth over bytes of weights and cache (chapter 16), measured in the
same process. All of it takes about six minutes: a compiled row that would not end in time says so. `rows(quick)` is what `make bench` runs.
"""
import os, shutil, statistics, tempfile, time, warnings
from functools import lru_cache

import torch

from bench_generation import PROMPT, SIZES, alternate, pair
from llm_from_scratch.generation import Sampler, SimpleCache, generate
from llm_from_scratch.inference import Roofline, StaticCache, Work

#               least, against the peer; runs; seconds that the two rows take, at most, on two cores
LEAST = {'1 M': 1.6, '10 M': 1.6, '124 M': 1.4, 'SmolLM2': 1.4}
RUNS = {'1 M': 9, '10 M': 9, '124 M': 5, 'SmolLM2': 5}
SECONDS = {'1 M': (10, 60), '10 M': (10, 70), '124 M': (40, 120), 'SmolLM2': (60, 200)}     # growing; compiled
LIMIT = 360
GREEDY = Sampler(temperature=0)


def theirs_of(peer, prompt, new, **options):
    row = torch.tensor([prompt])

    def they():
        with torch.inference_mode(): out = peer.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=True, **options)
        return out[0, len(prompt):].tolist()
    return they


def on_all_devices():
    "Settings with which the peer compiles its step here, too."
    from transformers import CompileConfig
    settings = CompileConfig(mode='default')
    settings._compile_all_devices = True
    return settings


def compiled_writer(model, prompt, new):
    "Greedy decoding with a static cache, whose step is compiled; the prompt is read without compiling."
    step = torch.compile(model, fullgraph=True)
    capacity = len(prompt) + new

    def we():
        cache, written = StaticCache(capacity), []
        ids, at = torch.tensor([prompt]), torch.arange(len(prompt))
        with torch.no_grad():
            logits = model(ids, positions=at, cache=cache)
            for t in range(len(prompt), capacity):
                written.append(int(logits[0, -1].argmax()))
                if len(written) < new: logits = step(torch.tensor([written[-1:]]), positions=torch.tensor([t]), cache=cache)
        return written
    return we


@lru_cache(maxsize=1)
def models(size):
    "Ours, the peer and a prompt; those of the last size are kept."
    if size != 'SmolLM2':
        V, D, L, H, *_ = SIZES[size]
        prompt = torch.randint(1, V, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
        return *pair(V, D, L, H), prompt
    import transformers
    from llm_from_scratch.bpe import load_tokenizer
    from llm_from_scratch.gpt import GPT
    ours, pieces = GPT.from_pretrained('smollm2').float().eval(), load_tokenizer('smollm2')
    with tempfile.TemporaryDirectory() as folder:
        ours.to_hf(folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return ours, peer, pieces.encode('Once upon a time there was a cat who')


def row(size, machine, quick, compiled=False):
    "Tokens a second at one size."
    new, runs = SIZES[size][4] if size in SIZES else 48, RUNS[size]
    if quick: new, runs = 24, 3
    name = f'inference, {size}{", compiled" if compiled else ""}'
    if compiled and not (shutil.which('c++') or shutil.which('g++')): return {'name': name, 'skipped': 'there is no C++ compiler here'}
    try: ours, peer, prompt = models(size)
    except (ImportError, OSError) as e: return {'name': name, 'skipped': f'not here: {e}'}
    if compiled: we, they, least = compiled_writer(ours, prompt, new), theirs_of(peer, prompt, new, cache_implementation='static', compile_config=on_all_devices()), 1.0
    else: we, they, least = lambda: generate(ours, [prompt], new, GREEDY, cache=SimpleCache)[0], theirs_of(peer, prompt, new), LEAST[size]
    mine, other = alternate(we, they, runs)
    limit = sum(machine.seconds(Work.of(ours, past=t)) for t in range(len(prompt), len(prompt) + new - 1))
    limit += machine.seconds(Work.of(ours, new=len(prompt)))
    return {'name': name, 'what': f'{new} greedy tokens, batch 1, float32, {"static cache, compiled step" if compiled else "growing cache"}, after a prompt of {len(prompt)}',
            'ours': mine, 'peer': other, 'peer_name': f'transformers.generate{", static cache, compiled" if compiled else ""}', 'unit': 'tokens/s', 'work': new,
            'parameters': sum(p.numel() for p in ours.parameters()), 'bandwidth_gb_s': machine.bandwidth / 1e9, 'share_of_limit': limit / statistics.median(mine),
            'target': f'at least {least} × the tokens/s of transformers', 'ratio_limit': 1 / least}


def plan(quick):
    "(size, compiled) of each row, and the seconds that it and all rows that must follow it may take."
    if quick: return [('1 M', False, 0)]
    must = [seconds for seconds, _ in SECONDS.values()]
    return [(size, compiled, SECONDS[size][compiled] + sum(must[i + 1:])) for i, size in enumerate(SECONDS) for compiled in (False, True)]


def rows(quick: bool) -> list[dict]:
    "One row for each size, and a compiled one."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count() or 1)
    start, machine, found = time.monotonic(), Roofline.measure(), []
    for size, compiled, needs in plan(quick):
        if compiled and time.monotonic() - start + needs > LIMIT: found.append({'name': f'inference, {size}, compiled', 'skipped': f'it would end after the {LIMIT} seconds that this benchmark may take'})
        else: found.append(row(size, machine, quick, compiled))
        torch.compiler.reset()
    models.cache_clear()
    return found
