"""What the server costs over its engine, and how long clients wait at several loads: `rows(quick)` is what `make bench` runs.

Overhead: the same requests, all there from the start, once in the engine alone and once over HTTP as streams, in turn and with the
same options. The clients are a process of their own, so that only the server shares Python with the engine.

Latency: requests arrive at random at a share of what the server can carry (measured first), each on a connection of its own. The
time to first token is counted from the moment at which the request is sent.
"""
import asyncio, gc, json, multiprocessing, os, random, time

import torch

from llm_from_scratch.api import Limits
from llm_from_scratch.engine import Engine
from llm_from_scratch.generation import Sampler
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.serving import ModelRegistry, ServedModel, Server

#        V       D    F      L   H  K  new tokens  runs
SIZES = {'1 M': (1_024, 128, 344, 4, 4, 2, 64, 7), '10 M': (4_096, 320, 864, 6, 5, 5, 64, 5), '124 M': (32_000, 768, 2_048, 12, 12, 4, 32, 3)}
REQUESTS, PROMPT, MOST = 16, 32, 1.05
LOADS = (0.3, 0.6, 0.9)


class Numbers:
    "A tokenizer whose texts are the ids."

    special_tokens: dict = {}

    def __init__(self, vocab_size): self.vocab_size = vocab_size

    def encode(self, text): return [int(word) for word in text.split()]

    def decode(self, ids): return ''.join(f' {int(i)}' for i in ids)


def model(V, D, F, L, H, K):
    "A Llama-shaped model with random weights."
    return GPT(GPTConfig(V, 512, d_model=D, d_ff=F, n_layers=L, n_heads=H, n_kv_heads=K, positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False),
               generator=torch.Generator().manual_seed(0)).eval()


# The clients: a process of their own -------------------------------------------------------------------------------

async def stream(port, body, wait=0.0):
    "The times at which a request was sent and its events came, on this machine's clock."
    await asyncio.sleep(wait)
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
    came, last = [], b''
    async for line in reader:
        if not line.startswith(b'data: '): continue
        last = line
        if line.startswith(b'data: {'): came.append(time.perf_counter())
    writer.close()
    if not last.startswith(b'data: [DONE]'): raise RuntimeError(f'a stream was cut: {last[:200]!r}')
    return sent, came


def clients(pipe):
    "Sends what comes through the pipe, all at once or each after its wait, and answers with the times."
    while (asked := pipe.recv()) is not None:
        port, bodies, waits = asked
        async def everything(): return await asyncio.gather(*(stream(port, body, wait) for body, wait in zip(bodies, waits)))
        pipe.send(asyncio.run(everything()))


class Clients:
    "That process."

    def __enter__(self):
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=clients, args=(other,), daemon=True)
        self.process.start()
        return self

    def __call__(self, port, bodies, waits=None):
        self.pipe.send((port, bodies, waits or [0.0] * len(bodies)))
        return self.pipe.recv()

    def __exit__(self, *_):
        self.pipe.send(None)
        self.process.join()


# What is measured --------------------------------------------------------------------------------------------------

def prompts_of(V):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, V, (REQUESTS, PROMPT), generator=generator).tolist()


def overhead(name, served, new_tokens, runs, quick):
    "Seconds over HTTP beside those of the engine alone."
    if quick: new_tokens, runs = 8, 2
    options = dict(n_pages=256, page_size=16, prefix_cache=False)
    prompts = prompts_of(served.tokenizer.vocab_size)
    registry = ModelRegistry(Limits(), **options)
    registry.add('model', lambda: served)
    engine = Engine(served.model, served.tokenizer, **options)
    bodies = [json.dumps({'model': 'model', 'prompt': p, 'max_tokens': new_tokens, 'temperature': 0, 'stream': True}).encode() for p in prompts]

    def alone():
        start = time.perf_counter()
        for p in prompts: engine.submit(p, new_tokens, Sampler(temperature=0), end_tokens=served.end_tokens)
        engine.run()
        return time.perf_counter() - start

    ours, peer = [], []
    with Server(registry, port=0) as server, Clients() as ask:
        def over_http():
            start = time.perf_counter()
            ask(server.port, bodies)
            return time.perf_counter() - start
        for i in range(runs + 1):
            for measure, seconds in ((over_http, ours), (alone, peer))[:: 1 if i % 2 else -1]: seconds.append(measure())
    return {'name': f'serving, {name}', 'what': f'{REQUESTS} streams of {new_tokens} greedy tokens over HTTP, prompts of {PROMPT}, float32, beside the engine alone', 'ours': ours[1:], 'peer': peer[1:],
            'peer_name': 'the engine alone', 'unit': 'tokens/s', 'work': REQUESTS * new_tokens, 'target': f'at most {MOST} × the time of the engine', 'ratio_limit': MOST}


def percentile(numbers, p): return sorted(numbers)[min(len(numbers) - 1, int(len(numbers) * p / 100))]


def latency(load, n, tokens, quick):
    "Times to first token, and between tokens, at a share of what the server can carry."
    registry = ModelRegistry(n_pages=1024, max_running=16)
    registry.add('storyland', lambda: ServedModel.open('storyland', device='cpu'))
    body = json.dumps({'model': 'storyland', 'prompt': 'Once upon a time', 'max_tokens': tokens, 'stream': True}).encode()
    with Server(registry, port=0) as server, Clients() as ask:
        ask(server.port, [body])
        start = time.perf_counter()
        ask(server.port, [body] * 48)                          # three batches: what the server can carry
        rate = load * 48 / (time.perf_counter() - start)
        coin, at, waits = random.Random(1), 0.0, []
        for _ in range(n):
            at += coin.expovariate(rate)
            waits.append(at)
        told = ask(server.port, [body] * n, waits)
    first = [came[0] - sent for sent, came in told]
    between = [b - a for _, came in told for a, b in zip(came, came[1:])]
    found = {f'{what}_p{p}': percentile(x, p) for what, x in (('first', first), ('between', between)) for p in (50, 99)}
    return {'name': f'serving, load {load}', 'what': f'time to first token of {n} streams of at most {tokens} tokens of storyland, arriving at random at {load} of what the server can carry, 16 in a pass; p99 {found["first_p99"] * 1e3:.0f} ms, '
            f'between tokens p50 {found["between_p50"] * 1e3:.1f} ms, p99 {found["between_p99"] * 1e3:.1f} ms', 'ours': first, **found, 'target': 'a median below half a second', 'limit_s': 0.5}


def rows(quick: bool) -> list[dict]:
    "Overhead at each size, then latency at each load."
    torch.set_num_threads(os.cpu_count() or 1)
    found = []
    for name in ('1 M',) if quick else SIZES:
        *shape, new_tokens, runs = SIZES[name]
        found.append(overhead(name, ServedModel('model', model(*shape), Numbers(shape[0])), new_tokens, runs, quick))
        gc.collect()
    if not quick:
        try: found.append(overhead('SmolLM2', ServedModel.open('smollm2', 'model', device='cpu'), 32, 3, quick))
        except (OSError, ValueError) as e: found.append({'name': 'serving, SmolLM2', 'skipped': f'its weights are not here: {e}'})
        gc.collect()
    for load in (0.3,) if quick else LOADS: found.append(latency(load, 8 if quick else 200, 8 if quick else 64, quick))
    return found
