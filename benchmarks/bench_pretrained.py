"""A real assistant beside `transformers` and llama.cpp: load time, tokens a second, peak memory. `rows(quick)` is what `make bench` runs.

SmolLM2-135M-Instruct from its GGUF file (`make weights`). `transformers` gets the same weights as a folder that we write, in
float32, and must write the same tokens; llama.cpp (`xllamacpp`) reads the GGUF file itself and computes with its four bits, so
its tokens may differ. Every measurement is a process of its own, ours and the peer's in turn, so that peak memory is each one's.
"""
import json, os, statistics, subprocess, sys, tempfile, textwrap
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW = 'Once upon a time there was a cat who', 48

HEAD = '''
import json, os, resource, sys, time
prompt, new, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def tell(loaded, spent, ids):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    if os.path.exists("/proc/self/status"):                 # Linux counts what the parent process held before
        peak = min(peak, *(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmHWM")), peak)
    print(json.dumps({"load": loaded, "write": spent, "ids": ids, "peak": peak}))
'''
OURS = HEAD + '''
import torch; torch.set_num_threads(os.cpu_count() or 1)
from llm_from_scratch.bpe import load_tokenizer
from llm_from_scratch.generation import Sampler, generate
from llm_from_scratch.gpt import GPT
start = time.perf_counter()
model, pieces = GPT.from_pretrained(path), load_tokenizer(path)
loaded = time.perf_counter() - start
ids = pieces.encode(prompt)
generate(model, [ids], 2, Sampler(temperature=0))
start = time.perf_counter()
found, = generate(model, [ids], new, Sampler(temperature=0))
tell(loaded, time.perf_counter() - start, found)
'''
TRANSFORMERS = HEAD + '''
import torch; torch.set_num_threads(os.cpu_count() or 1)
import transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
loaded = time.perf_counter() - start
ids = torch.tensor([json.loads(os.environ["BENCH_IDS"])])
def write(n):
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
write(2)
start = time.perf_counter()
found = write(new)
tell(loaded, time.perf_counter() - start, found)
'''
LLAMA_CPP = HEAD + '''
import xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers, p.verbosity, p.warmup, p.fit_params = path, 512, 1, 0, -1, False, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = os.cpu_count() or 1
start = time.perf_counter()
server = xllamacpp.Server(p)
loaded = time.perf_counter() - start
def write(n):
    return server.handle_completions({"prompt": json.loads(os.environ["BENCH_IDS"]), "n_predict": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False})
write(2)
start = time.perf_counter()
write(new)
tell(loaded, time.perf_counter() - start, None)
'''


def measured(code, path, new, ids):
    "What one process needed: seconds to load, seconds to write, peak memory in MB."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'BENCH_IDS': json.dumps(ids)}
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code), PROMPT, str(new), str(path)], env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turn(paths, new, runs, ids):
    "Measurements of each program, in an order that changes every time."
    codes, found = {'ours': OURS, 'transformers': TRANSFORMERS, 'llama.cpp': LLAMA_CPP}, {who: [] for who in paths}
    for i in range(runs):
        for who in [*paths][::-1 if i % 2 else 1]: found[who].append(measured(codes[who], paths[who], new, ids))
    if 'transformers' in found and found['ours'][0]['ids'] != found['transformers'][0]['ids']:
        raise AssertionError(f"ours wrote {found['ours'][0]['ids'][:8]} …, transformers {found['transformers'][0]['ids'][:8]} …")
    return found


def each(found, what): return [one[what] for one in found]


def rows(quick: bool) -> list[dict]:
    "Three rows for each peer."
    from llm_from_scratch.bpe import gguf_file, load_tokenizer
    from llm_from_scratch.gpt import GPT
    from llm_from_scratch.hub import pull
    name, new, runs = 'SmolLM2-135M', 8 if quick else NEW, 1 if quick else 5
    try: pull('smollm2')
    except OSError as e: return [{'name': name, 'skipped': f'its weights cannot be had here: {e}'}]
    path, found_rows = gguf_file('smollm2'), []
    ids = load_tokenizer('smollm2').encode(PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        paths = {'ours': path, **({'transformers': folder} if find_spec('transformers') else {}), **({'llama.cpp': path} if find_spec('xllamacpp') else {})}
        if 'transformers' in paths: GPT.from_pretrained('smollm2').to_hf(folder, model_type='llama')
        found = in_turn(paths, new, runs, ids)
    for peer in [who for who in found if who != 'ours']:
        them, us = found[peer], found['ours']
        what = 'in float32' if peer == 'transformers' else 'which computes in four bits'
        load, speed, memory = {'transformers': (15, 1.0, 1.5), 'llama.cpp': (100, 0.1, 12)}[peer]
        found_rows += [
            {'name': f'load, beside {peer}', 'what': f'SmolLM2-135M from its file, ready to write, beside {peer}, {what}', 'ours': each(us, 'load'), 'peer': each(them, 'load'), 'peer_name': peer, 'unit': 'models/s', 'work': 1,
             'target': f'at most {load} × the seconds of {peer}', 'ratio_limit': load},
            {'name': f'writing, beside {peer}', 'what': f'{new} greedy tokens of SmolLM2-135M, batch 1, beside {peer}, {what}', 'ours': each(us, 'write'), 'peer': each(them, 'write'), 'peer_name': peer, 'unit': 'tokens/s', 'work': new,
             'target': f'at least {speed} × the tokens/s of {peer}', 'ratio_limit': 1 / speed},
            {'name': f'memory, beside {peer}', 'what': f'peak memory of a process that loads SmolLM2-135M and writes, beside {peer}, {what}', 'memory_mb': statistics.median(each(us, 'peak')),
             'peer_memory_mb': statistics.median(each(them, 'peak')), 'memory_limit_mb': memory * statistics.median(each(them, 'peak')), 'target': f'at most {memory} × the memory of {peer}'}]
    return found_rows or [{'name': name, 'skipped': 'no peer to compare with: transformers and xllamacpp are not installed'}]
