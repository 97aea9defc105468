"""How long a page takes to read: 200 words and 12 lines of visible code a minute, the core path and "Going deeper" apart.

The core path of a chapter is everything before `## Going deeper`, and that section ends at the next of its level: troubles,
exercises and recap behind it belong to neither. What is folded away does not count: code of figures, hints, solutions; nor
does a cell that no reader sees. Only the standard library is used, because Quarto may run this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Iterable

from nbfilter import DROPPED, Cell, directives, parsed, source

WORDS_A_MINUTE, LINES_A_MINUTE = 200, 12
WORD = re.compile(r"\S*?[^\W_]\S*")
FORMULA = 10                                                 # a displayed formula takes as long as so many words
DEEPER = re.compile(r"^## Going deeper[ \t]*(?:\{[^}\n]*\})?[ \t]*$", re.M)
SECTION, GUARD = re.compile(r"^(?=## )", re.M), "\0"
FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})[^\n]*\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.M | re.S)
FOLDED = re.compile(r"^(?P<colons>:{3,}) *\{[^}\n]*collapse=\"true\".*?^(?P=colons)[ \t]*$", re.M | re.S)
NO_WORDS = [(re.compile(r"<!--.*?-->", re.S), " "), (FOLDED, " "), (re.compile(r"\$\$.*?\$\$", re.S), " formula" * FORMULA),
            (re.compile(r"\$[^$\n]+\$"), "formula"), (re.compile(r"\]\([^)\s]*\)"), "]"), (re.compile(r"\{[#.][^}\n]*\}"), " ")]


@dataclass
class Length:
    "What there is to read in a part of a page."

    words: int = 0
    lines: int = 0                  # of visible code

    @property
    def minutes(self) -> int:
        return max(1, round(self.words / WORDS_A_MINUTE + self.lines / LINES_A_MINUTE))

    def add(self, words: int, lines: int) -> None:
        self.words, self.lines = self.words + words, self.lines + lines


def lengths(cells: Iterable[Cell]) -> tuple[Length, Length | None]:
    "The core path of a notebook, and what goes deeper, where there is a section of that name."
    core, deeper = Length(), None
    now: Length = core
    for cell in cells:
        if cell["cell_type"] == "code":
            now.add(*code_length(cell))
            continue
        for part in SECTION.split(FENCE.sub(_guarded, source(cell))):
            if DEEPER.match(part) and deeper is None:
                now = deeper = Length()
            elif part.startswith("## ") and deeper is not None:
                now = Length()
            now.add(*prose_length(part.replace(GUARD, "")))
    return core, deeper


@lru_cache(maxsize=128)
def notebook_lengths(text: str) -> tuple[Length, Length | None]:
    "The lengths of a notebook, from the text of its file."
    return lengths(parsed(text)["cells"])


def _guarded(fence: re.Match[str]) -> str:
    "A block of code in which no line looks like a heading."
    return re.sub(r"^(?=## )", GUARD, fence[0], flags=re.M)


def prose_length(text: str) -> tuple[int, int]:
    "Words and lines of code of some Markdown."
    lines = sum(len(code_lines(m["code"])) for m in FENCE.finditer(text))
    text = FENCE.sub(" ", text)
    for pattern, instead in NO_WORDS:
        text = pattern.sub(instead, text)
    return len(WORD.findall(text)), lines


def code_length(cell: Cell) -> tuple[int, int]:
    "Words that a code cell shows, its captions included, and its visible lines."
    marks, text = directives(source(cell))
    options = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.*)$", text, re.M))
    if marks & DROPPED or options.get("include") == "false":
        return 0, 0
    words = sum(prose_length(options.get(name, ""))[0] for name in ("fig-cap", "tbl-cap"))
    words += sum(prose_length("".join(out["data"]["text/markdown"]))[0] for out in outputs(cell) if "text/markdown" in out.get("data", {}))
    shown = options.get("echo") != "false" and options.get("code-fold", "false") == "false"
    return words, len(code_lines(text)) if shown else 0


def outputs(cell: Cell) -> list[dict[str, Any]]:
    return cell.get("outputs", [])


def code_lines(text: str) -> list[str]:
    "The lines of some code that hold anything, without cell options."
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#|")]


def spoken(minutes: int) -> str:
    "Minutes as one says them: no false precision."
    rounded = minutes if minutes < 10 else 5 * round(minutes / 5)
    return f"{rounded} minute{'s' if rounded != 1 else ''}"
