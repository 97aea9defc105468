#!/usr/bin/env python3
"""Prepare a notebook for the book: drop set-up cells, strip nbdev's directives, link symbols to their definitions.

Quarto runs this file as an `ipynb-filters` script (notebook JSON on stdin, filtered JSON on stdout, in the notebook's
folder); the embedded builder imports it. `python tools/nbfilter.py --symbols` writes the symbol index. Only the
standard library is used, because Quarto may run it with any Python."""

from __future__ import annotations

import ast
import html
import json
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator

from safe import closed, outside_code, printable

DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)(\s+[^:]*)?$")       # `#| export`; cell options have a colon
DROPPED = {"default_exp", "hide"}                            # cells that no reader sees
PUBLIC = {"export", "exports"}                               # cells whose names are the library's interface
DEFINES = PUBLIC | {"exporti"}                               # cells whose names it has
LIBRARY = "llm_from_scratch"
MAGIC = re.compile(r"^(\s*)[%!].*$", re.M)                   # `%timeit f()`
PAGE = re.compile(r"^\d\d_\w+$")                             # chapters; appendix notebooks define names too

Cell = dict[str, Any]


@dataclass
class Symbol:
    "A public name, the cell that defines it, and the pages that speak of it."

    name: str
    page: str                       # stem of the notebook
    anchor: str                     # id of the defining cell on its page
    doc: str = ""                   # first line of the docstring
    public: bool = True             # part of the library's interface, not only of its code
    used: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        "Where it is defined, seen from another notebook."
        return f"{self.page}.ipynb#{self.anchor}"


# Cells ------------------------------------------------------------------------------------------------------------

def read(path: Path) -> dict[str, Any]:
    "A notebook as JSON with printable characters only, to look at and not to change."
    return parsed(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=128)
def parsed(text: str) -> dict[str, Any]:
    return printable(json.loads(text))


def source(cell: Cell) -> str:
    "The text of a cell, which notebooks store as a string or as a list of lines."
    return "".join(cell["source"])


def directives(text: str) -> tuple[set[str], str]:
    "nbdev's bare directives among the first lines of a cell, and the cell without them."
    found, kept = set(), []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if not line.startswith("#|"):
            kept += lines[i:]
            break
        match = DIRECTIVE.match(line)
        if match:
            found.add(match[1])
        else:
            kept.append(line)
    return found, "\n".join(kept)


@lru_cache(maxsize=8192)
def definitions(text: str) -> tuple[tuple[str, str], ...]:
    "Each public name that a cell defines (functions, classes, constants), with its docstring; methods as `Class.method`."
    return tuple(_definitions(ast.parse(text)))


def _definitions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not node.name.startswith("_") and not grows(node):
                yield node.name, _first_line(node)
            for child in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(child, ast.FunctionDef) and not (node.name.startswith("_") or child.name.startswith("_")):
                    yield f"{node.name}.{child.name}", _first_line(child)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((t.id, "") for t in targets if isinstance(t, ast.Name) and t.id[:1].isupper())


def grows(node: ast.AST) -> bool:
    "Whether a class statement adds to the class of its own name: `class Trainer(Trainer):`."
    return any(isinstance(base, ast.Name) and base.id == node.name for base in getattr(node, "bases", []))


def _first_line(node: ast.AST) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]  # type: ignore[arg-type]


def anchor(cell: Cell) -> str:
    """A stable id for a code cell: the first name that an exported cell defines, else the id of the cell.

    The prefixes are chosen so that Quarto takes neither for one of its own kinds (`def-` would be a Definition)."""
    marks, text = directives(source(cell))
    if marks & DEFINES:
        for name, _ in definitions(text):
            return f"api-{name}"
    return f"cell-{cell.get('id', '')}"


# Symbols ----------------------------------------------------------------------------------------------------------

def notebooks(folder: Path) -> list[Path]:
    "The notebooks of a folder that the book lists (all of them where there is no book), in the order of their names."
    config = folder.resolve().parent / "_quarto.yml"
    listed = config.read_text(encoding="utf-8") if config.exists() else None
    return [p for p in sorted(folder.glob("*.ipynb")) if listed is None or f"{folder.resolve().name}/{p.name}" in listed]


def symbols(folder: Path) -> dict[str, Symbol]:
    "Every public name that the notebooks of `folder` export; the first definition wins."
    found: dict[str, Symbol] = {}
    for path in notebooks(folder):
        for cell in read(path)["cells"]:
            marks, text = directives(source(cell)) if cell["cell_type"] == "code" else (set(), "")
            if not marks & DEFINES:
                continue
            for name, doc in definitions(text):
                found.setdefault(name, Symbol(name, path.stem, anchor(cell), doc, bool(marks & PUBLIC)))
    return found


FENCE = re.compile(r"^\s*(`{3,}|~{3,}|\$\$)")
PLAIN = re.compile(r"(?<![`\[\w])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]{(])")


def link_symbols(text: str, names: dict[str, Symbol], prefix: str = "") -> str:
    "Turn `` `name` `` into a link to its defining cell, outside headings, links, code fences and raw blocks."
    lines, fence = [], ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            one_line = mark[1] == "$$" and line.count("$$") > 1
            fence = "" if fence or one_line else mark[1]
        elif not fence and not line.startswith(("#", "    ")) and "<" + "a " not in line:
            line = PLAIN.sub(lambda m: _link(m, names, prefix), line)
        lines.append(line)
    return "\n".join(lines)


def _link(match: re.Match[str], names: dict[str, Symbol], prefix: str) -> str:
    symbol = names.get(match[1])
    return f"[{match[0]}]({prefix}{symbol.address}){{.symbol}}" if symbol else match[0]


# The filter -------------------------------------------------------------------------------------------------------

def filter_notebook(notebook: dict[str, Any], names: dict[str, Symbol]) -> dict[str, Any]:
    "The notebook as the book shows it."
    cells = [_filter_cell(cell, names) for cell in notebook["cells"]]
    return {**notebook, "cells": [cell for cell in cells if cell is not None]}


def _filter_cell(cell: Cell, names: dict[str, Symbol]) -> Cell | None:
    if cell["cell_type"] == "markdown":
        return {**cell, "source": link_symbols(source(cell), names).splitlines(True)}
    if cell["cell_type"] != "code":
        return cell
    marks, text = directives(source(cell))
    if marks & DROPPED:
        return None
    outputs = [_filter_output(out, names) for out in cell.get("outputs", [])]
    return {**cell, "id": anchor(cell), "source": _with_alt(text, outputs).splitlines(True), "outputs": outputs}


def _with_alt(text: str, outputs: list[dict[str, Any]]) -> str:
    "The code of a cell; a drawing that has a title of its own, and no alt text in the cell, gets it as alt text."
    own = drawing_title(outputs)
    return f"#| fig-alt: {json.dumps(own, ensure_ascii=False)}\n{text}" if own and "#| fig-alt:" not in text else text


def drawing_title(outputs: list[dict[str, Any]]) -> str:
    "What the first drawing among some outputs says of itself in its `<title>`."
    drawings = ("".join(out.get("data", {}).get("image/svg+xml", "")) for out in outputs)
    titles = (re.search(r"<title>(.*?)</title>", svg, re.S) for svg in drawings)
    return next((html.unescape(title[1]).strip() for title in titles if title), "")


def _filter_output(out: dict[str, Any], names: dict[str, Symbol]) -> dict[str, Any]:
    "Sentences made by code link their symbols like those typed."
    data = out.get("data", {})
    if "text/html" in data and "text/markdown" not in data:          # as raw HTML: for text/html Quarto asks a CDN for jquery
        text = closed("".join(data["text/html"]))
        fence = "`" * max(6, 1 + max(map(len, re.findall("`+", text)), default=0))
        return {**out, "data": {"text/markdown": [f"{fence}{{=html}}\n", *text.splitlines(True), f"\n{fence}\n"]}}
    if "text/markdown" not in data:
        return out
    text = link_symbols(outside_code("".join(data["text/markdown"]), _without_headings), names)
    return {**out, "data": {**data, "text/markdown": text.splitlines(True)}}


def _without_headings(text: str) -> str:
    "A heading in an output is no section of the book."
    return re.sub(r"^#{1,6} +(.+?)(?: +#+)?(?: *\{[^}]*\})?$", r"**\1**", text, flags=re.M)


# The symbol index -------------------------------------------------------------------------------------------------

def uses(cells: list[Cell]) -> tuple[set[str], set[str]]:
    "What the code of a notebook imports from the library, and the attributes that it asks of anything but a module."
    nodes: list[ast.AST] = []
    for text in (MAGIC.sub(r"\1pass", source(c)) for c in cells if c["cell_type"] == "code"):
        with suppress(SyntaxError):                          # a cell of another language
            nodes += ast.walk(ast.parse(text))
    imported = {a.name for n in nodes if isinstance(n, ast.ImportFrom) and f"{n.module}.".startswith(f"{LIBRARY}.") for a in n.names}
    modules = {a.asname or a.name.partition(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return imported, {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", None) not in modules}


def count_uses(names: dict[str, Symbol], folder: Path) -> None:
    """Note for each symbol the notebooks that import it, other than its own.

    A method is used where its class is imported and it is named; `forward` is run by calling the module."""
    for path in notebooks(folder):
        imported, attributes = uses(read(path)["cells"])
        for symbol in names.values():
            owner, _, method = symbol.name.partition(".")
            if path.stem != symbol.page and owner in imported and method in attributes | {"", "forward"}:
                symbol.used.append(path.stem)


def symbol_index(folder: Path) -> str:
    "The page that lists every public name: what it is, where it is defined, where it is used."
    names = symbols(folder)
    count_uses(names, folder)
    entries = [_entry(s) for s in sorted(names.values(), key=lambda s: s.name.lower()) if s.public]
    return "\n".join([
        "# Symbol index {#sec-symbols}", "",
        "<!-- Written by tools/nbfilter.py (its option symbols); do not edit. -->", "",
        "Every public name of the library: what it does, the chapter that builds it, and the chapters that use it.", "",
        "::: {.symbol-index}", "", *entries, ":::", ""])


def _entry(symbol: Symbol) -> str:
    place = f"[{_page_name(symbol.page)}]({symbol.page}.ipynb#{symbol.anchor})"
    used = ", ".join(f"[{_page_name(page)}]({page}.ipynb)" for page in symbol.used)
    doc = re.sub(r"(?<=[^.!?])$", ".", symbol.doc) + " " if symbol.doc else ""
    return f"[`{symbol.name}`]({symbol.page}.ipynb#{symbol.anchor})\n:   {doc}[Built in {place}{'; used in ' + used if used else ''}.]{{.symbol-place}}\n"


def _page_name(page: str) -> str:
    return f"chapter {int(page[:2])}" if PAGE.match(page) else f"“{page}”"


def main(argv: list[str]) -> int:
    "Filter stdin to stdout, or write the symbol index."
    if not argv:
        notebook = filter_notebook(parsed(sys.stdin.read()), symbols(Path.cwd()))
        sys.stdout.buffer.write(json.dumps(notebook).encode())
        return 0
    if argv == ["--symbols"]:
        folder = Path(__file__).resolve().parent.parent / "nbs"
        (folder / "symbols.qmd").write_text(symbol_index(folder), encoding="utf-8")
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
