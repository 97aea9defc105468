"""The library of the book *LLM from Scratch*: one module per chapter.

What most programs need can be imported from here: `from llm_from_scratch import GPT, Trainer, BPETokenizer, generate`.
A module is loaded when one of its names is asked for, so that the tokenizer still imports no torch.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .bpe import BPETokenizer, load_tokenizer
    from .constraints import Constraint
    from .data import BatchLoader, TokenFile
    from .evaluation import evaluate_text
    from .generation import Sampler, generate, stream
    from .gpt import GPT, GPTConfig
    from .storyland import stories
    from .training import TrainConfig, Trainer

_HOMES = {
    "bpe": ("BPETokenizer", "load_tokenizer"), "data": ("BatchLoader", "TokenFile"),
    "evaluation": ("evaluate_text",), "constraints": ("Constraint",), "generation": ("Sampler", "generate", "stream"),
    "gpt": ("GPT", "GPTConfig"), "storyland": ("stories",), "training": ("TrainConfig", "Trainer"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["BPETokenizer", "BatchLoader", "Constraint", "GPT", "GPTConfig", "Sampler", "TokenFile", "TrainConfig", "Trainer",
           "evaluate_text", "generate", "load_tokenizer", "stories", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]: return sorted([*globals(), *__all__])
