"Tiny models with random weights, for tests that compare them with those of other programs."
import torch

from llm_from_scratch.gpt import GPT, GPTConfig

LLAMA = dict(positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False)


def model(**options):
    "A tiny model."
    return GPT(GPTConfig(**{**dict(vocab_size=23, context_length=12, d_model=16, n_layers=2, n_heads=4), **options}), generator=torch.Generator().manual_seed(0))


def some_ids(): return torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))


def randomized(module):
    "The module with all its parameters drawn, biases and gains too, so that no mistake hides behind a zero."
    torch.manual_seed(0)
    for p in module.parameters(): p.data = torch.randn_like(p) * 0.2
    return module.eval()


def random(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def with_gradients(f, tensors):
    "Value and gradients of a weighted sum of the outputs."
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]
