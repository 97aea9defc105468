"Models and servers for the tests of serving: a tiny GPT, and one that writes what it is told, when it is told."
import string, threading

import torch
from small import LLAMA

from llm_from_scratch.api import Limits
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.pretrained import ChatTemplate
from llm_from_scratch.serving import ModelRegistry, ServedModel, Server
from llm_from_scratch.text import CharTokenizer

END = '<|endoftext|>'
LETTERS = CharTokenizer.train([string.ascii_letters + string.digits + string.punctuation + ' \näß€'], [END])
V = LETTERS.vocab_size
TEMPLATE = ChatTemplate('''{% if tools %}{% for t in tools %}{{ t.function.name }}: {{ t.function.parameters | tojson }}
{% endfor %}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}''')


def tiny():
    "A small GPT with strong opinions, in float64: what runs beside a text changes only digits that decide nothing."
    model = GPT(GPTConfig(vocab_size=V, context_length=512, d_model=16, n_layers=2, n_heads=4, **LLAMA), generator=torch.Generator().manual_seed(2)).double()
    for p in model.parameters(): p.data *= 2
    return model.eval()


class Played(torch.nn.Module):
    "Stands in for a GPT: after `start` tokens it writes `script`, one token each time that `gate` lets it."

    def __init__(self, context_length=512):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = GPTConfig(vocab_size=V, context_length=context_length, d_model=8, n_layers=1, n_heads=1)
        self.script, self.start, self.poison, self.passes = [], 0, None, 0
        self.gate = None                                     # a semaphore: how many passes may still come

    def play(self, text, n_prompt=1, gate=None):
        self.script, self.start, self.gate = LETTERS.encode(text), n_prompt, gate
        return self

    def hidden(self, ids, *, positions, cache):
        if self.gate is not None: self.gate.acquire()
        self.passes += 1
        if self.poison is not None and (ids == self.poison).any(): raise RuntimeError('a secret of the inside')
        place = (positions - self.start + 1).clamp(min=0)
        ends = place >= len(self.script)
        script = torch.tensor([*self.script, 0])
        return torch.where(ends, LETTERS.special_tokens[END], script[place.clamp(max=len(self.script))])[..., None].double()

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., 0].long(), V).double() * 50


def registry_of(*models, limits=None, **options):
    "A registry of models; a template comes with each whose name does not begin with `bare`."
    registry = ModelRegistry(limits or Limits(), **{'n_pages': 256, 'page_size': 4, **options})
    for name, model in models:
        registry.add(name, lambda name=name, model=model: ServedModel.of(name, model, LETTERS, None if name.startswith('bare') else TEMPLATE))
    return registry


def served(*models, limits=None, key=None, **options):
    "A server for these models in a thread, on a port that was free."
    names = {k: options.pop(k) for k in ('host', 'allowed_hosts', 'insecure') if k in options}
    return Server(registry_of(*models, limits=limits, **options), port=0, api_key=key, **names)


def all_free(host):
    "Every page of a model's engine is free."
    pool = host.engine.cache.pool
    return pool.available == len(pool.users)


def closed(): return threading.Semaphore(0)
