"""A server of a tiny model with random weights, and what it must answer: `python tests/tiny_server.py PORT FOLDER`.

Where FOLDER holds `jobs.json`, each job is first written by `generate`, alone, into `alone.json`. The address is printed."""
import json
import sys
from pathlib import Path

import torch

try: import resource
except ImportError: resource = None               # Windows

from llm_from_scratch.api import Limits
from llm_from_scratch.bpe import BPETokenizer
from llm_from_scratch.generation import Sampler, generate, row_seeds
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.pretrained import ChatTemplate
from llm_from_scratch.serving import ModelRegistry, ServedModel, Server

END = '<|endoftext|>'
TEMPLATE = '{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}'
PAGES = 512


def served():
    "Bytes as tokens, so that an answer is cut inside of characters; every weight is large, so that it depends on all it has read."
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, context_length=2304, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False))
    for p in model.parameters(): p.data = torch.randn_like(p) * .3
    tokenizer = BPETokenizer({bytes([i]): i for i in range(256)}, special_tokens={END: 256})
    return ServedModel.of('tiny', model.eval(), tokenizer, ChatTemplate(TEMPLATE))


def alone(model, job):
    "The text of a request by itself, without a server and without an engine."
    ids = model.template.encode(model.tokenizer, job['messages']) if 'messages' in job else [*model.start, *model.tokenizer.encode(job['prompt'])]
    ends = model.template.end_tokens(model.tokenizer, model.end_tokens) if 'messages' in job else model.end_tokens
    sampler = Sampler(temperature=job.get('temperature', 1.), top_p=job.get('top_p', 1.))
    (new,) = generate(model.model, [ids], job['max_tokens'], sampler, seed=row_seeds(job['seed'], 1), end_tokens=ends, stop=job.get('stop', ()), tokenizer=model.tokenizer)
    text = model.tokenizer.decode([i for i in new if i not in ends])
    whole = text
    for stop in job.get('stop', ()): text = text.partition(stop)[0]
    reason = 'stop' if text != whole or new[-1] in ends else 'length'
    return {'text': text, 'n': len(new), 'reason': reason, 'bytes': [i for i in new if i not in ends]}


if __name__ == '__main__':
    torch.set_num_threads(1)
    if resource is not None: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))       # who asks for more, fails alone
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    model = served()
    if (folder/'jobs.json').exists():
        found = [alone(model, job) for job in json.loads((folder/'jobs.json').read_text(encoding='utf-8'))]
        (folder/'alone.json').write_text(json.dumps(found), encoding='utf-8')
    registry = ModelRegistry(Limits(queue=400, max_tokens=2048, body_seconds=5., seconds=60., grace=1.), n_pages=PAGES, page_size=16, max_running=64)
    registry.add('tiny', lambda: model)
    registry.host('tiny')
    server = Server(registry, port=port)
    print(server.url, flush=True)
    server.run()
