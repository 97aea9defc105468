"""Writing with rounded weights: int8 beside our float32 at 124 M, SmolLM2 from its four-bit file beside `transformers` and llama.cpp, and what they take on disk and in memory. `rows(quick)` is what `make bench` runs.

At batch 1 a model reads every weight once per token, so bytes per weight are the limit. The model of 124 M has random weights in
the shape of GPT-2; both sides run in one process, in turn. SmolLM2 is `open_gguf` and `prepack` (four bits in torch's own
product, the head in int8); its peers are `transformers` in float32 and llama.cpp (`xllamacpp`) on the same file, all three in
turn, each measurement in a process of its own.
"""
import copy, gc, os, statistics, tempfile, time
from importlib.util import find_spec
from pathlib import Path

import torch

from llm_from_scratch.generation import Sampler, generate
from llm_from_scratch.gpt import GPT, PRESETS
from llm_from_scratch.quantization import model_bytes, open_gguf, prepack, quantize_model, save_quantized

PROMPT = [*range(1, 9)]
SMOLLM2 = '''
import torch; torch.set_num_threads(os.cpu_count() or 1)
from llm_from_scratch.generation import Sampler, generate
from llm_from_scratch.quantization import open_gguf, prepack
ids, start = json.loads(os.environ["BENCH_IDS"]), time.perf_counter()
model = prepack(open_gguf(path))
loaded = time.perf_counter() - start
generate(model, [ids], 2, Sampler(temperature=0))
start = time.perf_counter()
found, = generate(model, [ids], new, Sampler(temperature=0))
tell(loaded, time.perf_counter() - start, found)
'''


def seconds(model, new):
    "Seconds to write so many greedy tokens."
    start = time.perf_counter()
    generate(model, [PROMPT], new, Sampler(temperature=0))
    return time.perf_counter() - start


def megabytes_on_disk(model, folder):
    "Of the file that `save_quantized` writes."
    path = Path(folder)/'model.safetensors'
    save_quantized(model, path)
    return path.stat().st_size / 1e6


def beside_float32(quick):
    "int8 and prepacked int4 beside the same model in float32, in turn; bytes of int8 on disk and in memory."
    name, new, runs = ('nano', 4, 1) if quick else ('124 M', 32, 7)
    exact = GPT(PRESETS['nano' if quick else 'gpt2'], generator=torch.Generator().manual_seed(0)).eval()
    whole, found = model_bytes(exact) / 1e6, []
    def int8(model): return prepack(quantize_model(model, 'int8'))
    def int4(model): return prepack(quantize_model(quantize_model(model, 'int4', skip=['head']), 'int8'))
    for kind, make in (('int8', int8), ('int4', int4)):
        small, times = make(copy.deepcopy(exact)), {'ours': [], 'peer': []}
        for model in (small, exact): seconds(model, 2)
        for i in range(runs):
            for who, model in [('ours', small), ('peer', exact)][::-1 if i % 2 else 1]: times[who].append(seconds(model, new))
        head = ', head in int8' if kind == 'int4' else ''
        found.append({'name': f'{kind}, {name}', 'what': f'{new} greedy tokens, batch 1, random weights{head}', **times, 'peer_name': 'our float32', 'unit': 'tokens/s', 'work': new,
                      'target': 'at least 1.7 × our float32', 'ratio_limit': 1 / 1.7})
        if kind == 'int8':
            with tempfile.TemporaryDirectory() as folder: sizes = {'in memory': model_bytes(small) / 1e6, 'on disk': megabytes_on_disk(small, folder)}
            found += [{'name': f'int8, {name}, {where}', 'what': f'parameters and buffers {where}, beside float32', 'memory_mb': size, 'peer_memory_mb': whole, 'memory_limit_mb': 0.27 * whole,
                       'target': 'at most 27% of float32'} for where, size in sizes.items()]
        del small; gc.collect()
    return found


def smollm2(quick):
    "SmolLM2 from its four bits beside `transformers` in float32 and llama.cpp on the same file."
    import bench_pretrained as bench

    from llm_from_scratch.bpe import gguf_file, load_tokenizer
    from llm_from_scratch.hub import pull
    try: pull('smollm2')
    except OSError as e: return [{'name': 'SmolLM2-135M, Q4_1', 'skipped': f'its weights cannot be had here: {e}'}]
    path, new, runs, found = gguf_file('smollm2'), 8 if quick else bench.NEW, 1 if quick else 5, []
    ids = load_tokenizer('smollm2').encode(bench.PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        sides = {'ours': (bench.HEAD + SMOLLM2, path)}
        if find_spec('transformers'):
            GPT.from_pretrained('smollm2').to_hf(folder, model_type='llama')
            sides['transformers'] = bench.TRANSFORMERS, folder
        if find_spec('xllamacpp'): sides['llama.cpp'] = bench.LLAMA_CPP, path
        seen = {who: [] for who in sides}
        for i in range(runs):
            for who in [*sides][::-1 if i % 2 else 1]: seen[who].append(bench.measured(*sides[who], new, ids))
    def each(who, what): return [one[what] for one in seen[who]]
    def middle(who, what): return statistics.median(each(who, what))
    for peer, factor, on in (('transformers', 2, 'in float32'), ('llama.cpp', 0.5, 'on the same file')):
        if peer not in seen:
            found.append({'name': f'SmolLM2-135M, Q4_1, beside {peer}', 'skipped': f'{peer} is not installed'})
            continue
        most = middle(peer, 'peak') * (1 if peer == 'transformers' else 4)
        found += [{'name': f'SmolLM2-135M, Q4_1, beside {peer}', 'what': f'{new} greedy tokens, batch 1, {peer} {on}', 'ours': each('ours', 'write'), 'peer': each(peer, 'write'), 'peer_name': peer,
                   'unit': 'tokens/s', 'work': new, 'target': f'at least {factor} × {peer}', 'ratio_limit': 1 / factor},
                  {'name': f'memory, beside {peer}', 'what': f'peak memory of a process that opens the file and writes; {peer} {on}', 'memory_mb': middle('ours', 'peak'), 'peer_memory_mb': middle(peer, 'peak'),
                   'memory_limit_mb': most, 'target': f'at most {1 if peer == "transformers" else 4} × the memory of {peer}'}]
    in_file, in_float32 = path.stat().st_size / 1e6, 4 * 134_515_008 / 1e6
    kept = model_bytes(prepack(open_gguf(path))) / 1e6
    return [*found, {'name': 'SmolLM2-135M, Q4_1, kept', 'what': f'parameters and buffers of the model, prepacked, from a file of {in_file:.0f} MB, beside float32', 'memory_mb': kept,
                     'peer_memory_mb': in_float32, 'memory_limit_mb': in_float32 / 4, 'target': 'at most a quarter of float32'}]


def rows(quick: bool) -> list[dict]:
    "Speed and bytes of a random model of 124 M, and of SmolLM2 beside its peers."
    torch.set_num_threads(os.cpu_count() or 1)
    return [*beside_float32(quick), *smollm2(quick)]
