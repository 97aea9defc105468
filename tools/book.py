"""What the book is: `_quarto.yml` and `settings.ini`, read once, as plain data."""

from __future__ import annotations

import posixpath
import re
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator

import yaml

from finish import read_settings
from nbfilter import read, source
from safe import printable


class BookError(Exception):
    "Something a person has to put right: one sentence that names the cause and the remedy."


def busy(words: str) -> None:
    "Say on the terminal what is being done, in one line that the next one replaces."
    if sys.stderr.isatty():
        print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Page:
    "One file of the book and its place in it."

    file: Path                  # relative to the root of the project
    number: str = ""            # "3", "B", or nothing for an unnumbered page
    part: str = ""              # title of the part it belongs to
    appendix: bool = False

    @property
    def stem(self) -> str:
        "The address of the page without its ending: `nbs/03_bpe`."
        return self.file.with_suffix("").as_posix()

    @property
    def url(self) -> str:
        "The address of the page, the same as Quarto's."
        return self.stem + ".html"

    @property
    def is_index(self) -> bool:
        return self.stem == "index"

    @property
    def is_notebook(self) -> bool:
        return self.file.suffix == ".ipynb"

    def up(self) -> str:
        "The way from this page to the root of the site."
        return "../" * (len(self.file.parts) - 1)

    def way(self, stem: str, place: str) -> str:
        "The way from this page to a place on a page of the book."
        here = self.stem
        return f"#{place}" if stem == here else _way(here, stem) + (f"#{place}" if place else "")


@lru_cache(maxsize=8192)
def _way(here: str, stem: str) -> str:
    return posixpath.relpath(f"{stem}.html", posixpath.dirname(here) or ".")


@dataclass
class Book:
    "The whole book, in reading order."

    root: Path
    title: str
    pages: list[Page]
    subtitle: str = ""
    authors: list[str] = field(default_factory=list)
    description: str = ""
    bibliography: list[str] = field(default_factory=list)
    lang: str = "en"
    name: str = "book"          # file name of the EPUB and the PDF
    settings: dict[str, str] = field(default_factory=dict)
    number_depth: int = 3
    toc_depth: int = 3

    def read(self, page: Page) -> str:
        try:
            return printable((self.root / page.file).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise BookError(f"{page.file.as_posix()} is not UTF-8 from byte {error.start} on: save it again as UTF-8") from None


def load_book(root: Path) -> Book:
    "Read `_quarto.yml`; raise `BookError` where a file is missing or the shape is wrong."
    config = _yaml(root / "_quarto.yml")
    book = config.get("book") or {}
    if not book.get("chapters"):
        raise BookError("_quarto.yml lists no chapters: add them under `book: chapters:`")
    return Book(
        root=root.resolve(), title=str(book.get("title", "Untitled")), pages=list(_pages(root, book)), subtitle=str(book.get("subtitle", "")),
        authors=_listed(book.get("author")), description=str(book.get("description", "")),
        bibliography=_listed(config.get("bibliography")), lang=str(config.get("lang", "en")),
        name=str(book.get("output-file", "book")), settings=read_settings(root),
        number_depth=int(config.get("number-depth", 3)), toc_depth=int(config.get("toc-depth", 3)))


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise BookError(f"{path.name} is missing from {path.parent}: run this in a clone of the book") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise BookError(f"{path.name} is not valid YAML{f', line {where.line + 1}' if where else ''}: put that line right") from None


def _listed(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value] if value else []
    return [str(item["name"] if isinstance(item, dict) else item) for item in items]


def _pages(root: Path, book: dict[str, Any]) -> Iterator[Page]:
    "Chapters numbered 1, 2, ..., then appendices A, B, ...; pages marked `.unnumbered` keep no number."
    for key in ("chapters", "appendices"):
        count = 0
        for file, part in _entries(book.get(key) or [], ""):
            _must_exist(root, file)
            numbered = file.stem != "index" and not is_unnumbered(root, file)
            count += numbered
            number = "" if not numbered else str(count) if key == "chapters" else chr(64 + count)
            yield Page(file, number, part, key == "appendices")


def _entries(items: list[Any], part: str) -> Iterator[tuple[Path, str]]:
    for item in items:
        if isinstance(item, dict) and "part" in item:
            yield from _entries(item.get("chapters") or [], str(item["part"]))
        else:
            yield Path(item["file"] if isinstance(item, dict) else item), part


def _must_exist(root: Path, file: Path) -> None:
    if not (root / file).is_file():
        raise BookError(f"_quarto.yml lists {file.as_posix()}, which does not exist: write it or take the line out")


def read_notebook(root: Path, file: Path) -> dict[str, Any]:
    "A notebook as JSON."
    try:
        notebook = read(root / file)
    except ValueError as error:
        raise BookError(f"{file.as_posix()} is not a notebook ({error}): restore it from git or save it again") from None
    if not isinstance(notebook, dict) or "cells" not in notebook:
        kind = f"a notebook of format {notebook['nbformat']}" if isinstance(notebook, dict) and "nbformat" in notebook else "JSON, but no notebook"
        raise BookError(f"{file.as_posix()} is {kind}, and the book reads format 4: open it in Jupyter and save it")
    return notebook


def is_unnumbered(root: Path, file: Path) -> bool:
    "Whether the first heading of a page carries `.unnumbered` (or the short form `-`)."
    if file.suffix == ".ipynb":
        text = "\n".join(source(c) for c in read_notebook(root, file)["cells"] if c["cell_type"] == "markdown")
    else:
        text = (root / file).read_text(encoding="utf-8")
    title = re.search(r"^# .*$", text, re.M)
    return bool(title and re.search(r"\{[^}]*(\.unnumbered|\s-[\s}]|\{-)[^}]*\}?", title[0]))
