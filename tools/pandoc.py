"""Run pandoc on the pages of the book, and remember every result by the content it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from book import Book, BookError, Page
from cells import page_markdown
from nbfilter import Symbol, symbols

HERE = Path(__file__).resolve().parent
FILTER = HERE / "book.lua"
READER = "markdown+lists_without_preceding_blankline+mark"
KINDS = ("fig-", "tbl-", "eq-", "sec-", "lst-")


@dataclass
class Parsed:
    "A page as pandoc sees it, with what it defines and what it refers to."

    page: Page
    ast: dict[str, Any]
    labels: dict[str, dict[str, str]]
    headings: list[dict[str, Any]]
    cited: list[str]
    twice: list[str]            # labels that it defines more than once

    @property
    def title(self) -> str:
        return next((h["text"] for h in self.headings if h["level"] == 1), self.page.file.stem)


@dataclass
class Workshop:
    "The pages of a book, parsed, and a folder of results that are still good."

    book: Book
    cache: Path
    parsed: list[Parsed] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @property
    def pictures(self) -> Path:
        return self.cache / "pictures"

    # Results by content -------------------------------------------------------------------------------------------

    def key(self, *parts: Any) -> str:
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def path(self, key: str, ending: str) -> Path:
        self.cache.mkdir(parents=True, exist_ok=True)
        self.used.add(key)
        return self.cache / f"{key}.{ending}"

    def prune(self, days: float = 7) -> None:
        "Forget results that this build did not use and that no build has made for a while."
        for path in self.cache.glob("*.*"):
            if path.name.partition(".")[0] not in self.used and time.time() - path.stat().st_mtime > days * 86400:
                path.unlink()

    # Reading ------------------------------------------------------------------------------------------------------

    def parse(self) -> None:
        "Read every page, two at a time."
        self.pictures.mkdir(parents=True, exist_ok=True)
        try:
            names = symbols(self.book.root / "nbs")
        except SyntaxError as error:
            raise BookError(f"an exported cell is not Python: {error.text.strip() if error.text else error} ({error.msg}): correct it or take `#| export` out") from None
        with ThreadPoolExecutor(2) as pool:
            self.parsed = list(pool.map(lambda page: self._parse_page(page, names), self.book.pages))

    def _parse_page(self, page: Page, names: dict[str, Symbol]) -> Parsed:
        text, place = page_markdown(self.book, page, names, self.pictures), placed(self.book, page)
        key = self.key("parse", READER, text, place, FILTER.read_text(encoding="utf-8"), self.book.number_depth)
        ast, labels = self.path(key, "ast.json"), self.path(key, "labels.json")
        if not (ast.exists() and labels.exists()):
            context = self.context(key, mode="labels", labels=str(labels), place=place)
            result = self.run(["-f", READER, "-t", "json", f"--lua-filter={FILTER}"], context, text, page.file.as_posix())
            ast.write_text(result, encoding="utf-8")
        found = json.loads(labels.read_text(encoding="utf-8"))
        return Parsed(page, json.loads(ast.read_text(encoding="utf-8")), dict(found["labels"] or {}), list(found["headings"]), list(found["cited"]), list(found["twice"]))

    def context(self, key: str, **facts: Any) -> Path:
        path = self.path(key, "context.json")
        path.write_text(json.dumps({"number_depth": self.book.number_depth, **facts}), encoding="utf-8")
        return path

    # What the book knows ------------------------------------------------------------------------------------------

    @property
    def refs(self) -> dict[str, dict[str, str]]:
        "Every label of the book (headings without a kind are local to their page)."
        return {name: label for parsed in reversed(self.parsed) for name, label in parsed.labels.items() if name.startswith(KINDS)}

    @property
    def citations(self) -> list[str]:
        return sorted({name for parsed in self.parsed for name in parsed.cited} - set(self.refs))

    @property
    def references_page(self) -> str:
        "The page that holds the `#refs` div."
        return next((p.page.stem for p in self.parsed if '"refs"' in json.dumps(p.ast["blocks"])), "")

    def problems(self) -> list[tuple[str, str, str]]:
        "References that lead nowhere or to two places: the page, the name, and a sentence on what it is and how to mend it."
        refs, entries, found = self.refs, self.bibliography_keys(), []
        for parsed in self.parsed:
            stem = parsed.page.stem
            for name in sorted(set(parsed.cited)):
                if name.startswith(KINDS) and name not in refs:
                    found.append((stem, name, f"refers to @{name}, which no page defines: put the label on its target or take the reference out"))
                elif not name.startswith(KINDS) and name not in entries and name not in parsed.labels:
                    found.append((stem, name, f"cites @{name}, which is not in {', '.join(self.book.bibliography) or 'any bibliography'}: "
                                  "add the entry, or put the @ in code"))
            for name in parsed.labels:
                if name.startswith(KINDS) and (name in parsed.twice or refs[name]["page"] != stem):
                    found.append((stem, name, f"defines @{name} a second time, after {refs[name]['page']}: rename one of them"))
        return found

    def bibliography_keys(self) -> list[str]:
        text = "\n".join((self.book.root / f).read_text(encoding="utf-8") for f in self.book.bibliography if (self.book.root / f).exists())
        return re.findall(r"^\s*@\w+\s*\{\s*([^,\s]+)\s*,", text, re.M)

    # Writing ------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        "What the filter needs to know about the rest of the book."
        return {
            "pages": {p.file.as_posix(): p.stem for p in self.book.pages},
            "first_ids": {p.page.stem: next((h["id"] for h in p.headings), "") for p in self.parsed},
            "references": self.references_page,
        }

    def metadata(self, **more: Any) -> dict[str, Any]:
        "What pandoc knows of the book, in its own form: nothing of it is read as Markdown. Files are seen from the root of the book."
        files = [f for f in self.book.bibliography if (self.book.root / f).exists()]
        return {"bibliography": words(files), "link-citations": {"t": "MetaBool", "c": True}, "lang": words(self.book.lang),
                "nocite": {"t": "MetaInlines", "c": [citation(name) for name in self.citations]}, **more}

    def sources(self) -> list[str]:
        return [(self.book.root / f).read_text(encoding="utf-8") for f in self.book.bibliography if (self.book.root / f).exists()]

    def run(self, args: list[str], context: Path, text: str, where: str) -> str:
        return run_pandoc(args, context, text, where, self.book.root)

    def fragment(self, parsed: Parsed) -> str:
        "The body of one page as HTML."
        used = {name: ref for name, ref in self.refs.items() if name in parsed.cited}
        facts = {**self.facts(), "mode": "page", "up": parsed.page.up(), "refs": used}
        meta = self.metadata()
        bibliography = self.sources() if self.citations else []
        key = self.key("page", parsed.ast, facts, meta, bibliography, FILTER.read_text(encoding="utf-8"))
        result = self.path(key, "html")
        if not result.exists():
            args = ["-f", "json", "-t", "html5", "--mathml", f"--lua-filter={FILTER}", "--wrap=none"]
            text = self.run(args, self.context(key, **facts), json.dumps({**parsed.ast, "meta": meta}), parsed.page.file.as_posix())
            result.write_text(text, encoding="utf-8")
        return result.read_text(encoding="utf-8")


def placed(book: Book, page: Page) -> dict[str, str]:
    "The place of a page in the book, as attributes of the div that the filter puts around it."
    first = next(p for p in book.pages if p.part == page.part)
    facts = {"number": page.number, "page": page.stem, "appendix": "true" * page.appendix, "part": page.part * (page is first)}
    return {key: value for key, value in facts.items() if value or key == "number"}


def words(value: str | list[str]) -> dict[str, Any]:
    "A string, or several, as pandoc's metadata holds words: what looks like markup in them is none."
    if isinstance(value, list):
        return {"t": "MetaList", "c": [words(item) for item in value]}
    return {"t": "MetaInlines", "c": [{"t": "Str", "c": value}]}


def citation(name: str) -> dict[str, Any]:
    facts = {"citationId": name, "citationPrefix": [], "citationSuffix": [], "citationMode": {"t": "AuthorInText"}, "citationNoteNum": 0, "citationHash": 0}
    return {"t": "Cite", "c": [[facts], []]}


def run_pandoc(args: list[str], context: Path, text: str, where: str, root: Path) -> str:
    "Run pandoc on `text` in the folder of the book; what it complains of becomes one sentence."
    import pypandoc
    command = [pypandoc.get_pandoc_path(), *args]
    done = subprocess.run(command, input=text, text=True, encoding="utf-8", capture_output=True, cwd=root, env={**os.environ, "BOOK_CONTEXT": str(context)})
    if done.returncode:
        raise BookError(f"pandoc cannot read {where}: {' '.join(done.stderr.split()) or 'it gave no reason'}")
    return done.stdout
