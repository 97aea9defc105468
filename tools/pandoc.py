"""Run pandoc on the pages of the book, and remember every result by the content it was made from.

One run reads a page and writes its HTML, with marks where the rest of the book has a say: what a reference is called and
where it leads, and how a citation reads. So a page is made again only when it changed itself; the marks are filled in here."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import get_ident
from typing import Any, Callable

from book import Book, BookError, Page, busy
from cells import page_markdown
from highlight import colored
from nbfilter import Symbol, symbols

HERE = Path(__file__).resolve().parent
FILTER = HERE / "book.lua"
CODE = [hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in ("cells.py", "highlight.py", "nbfilter.py", "pandoc.py", "safe.py")]    # what runs, whatever is saved meanwhile
READER = "markdown+lists_without_preceding_blankline+mark"
NAMES = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section", "lst": "Listing"}
HTML = ("-t", "html5", "--mathml", "--wrap=none", "--syntax-highlighting=none")
KINDS = tuple(f"{kind}-" for kind in NAMES)
MARK = re.compile("\ue000(-?)([\\w-]+)\ue001")
ADDRESS = re.compile(r'(?<= href=")([^":#]*)(?:#([^"]*))?(?=")')
REFERENCES = re.compile(r'<div id="refs"[^>]*>\s*</div>')


@dataclass
class Parsed:
    "A page as pandoc sees it: its HTML with marks, what it defines and what it refers to."

    page: Page
    body: str
    labels: dict[str, dict[str, str]]
    headings: list[dict[str, Any]]
    cited: list[str]
    cites: dict[str, Any]       # a document of its citations, one a block, in the order of their marks
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
        text = json.dumps([CODE, FILTER.read_text(encoding="utf-8"), *parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def remembered(self, key: str, ending: str, make: Callable[[], str | bytes]) -> Path:
        "The file with a result, which is made where it is not there yet."
        path = self.cache / f"{key}.{ending}"
        self.used.add(key)
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            result, part = make(), path.with_suffix(f".{os.getpid()}-{get_ident()}.part")
            part.write_bytes(result if isinstance(result, bytes) else result.encode())
            part.replace(path)
        return path

    def prune(self, days: float = 7) -> None:
        "Forget results that this build did not use and that no build has made for a while."
        for path in self.cache.glob("*.*"):
            if path.name.partition(".")[0] not in self.used and time.time() - path.stat().st_mtime > days * 86400:
                path.unlink()

    # Reading ------------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> dict[str, Symbol]:
        try:
            return symbols(self.book.root / "nbs")
        except SyntaxError as error:
            raise BookError(f"an exported cell is not Python: {error.text.strip() if error.text else error} ({error.msg}): correct it or take `#| export` out") from None

    def parse(self) -> None:
        "Make the HTML of every page that changed, as many at a time as there are processors."
        self.pictures.mkdir(parents=True, exist_ok=True)
        assert self.names is not None                        # found once, before the threads ask for them
        self.parsed = self._each_page(self._parse_page, "Reading the pages")

    def _each_page(self, make: Callable[[Page], Any], words: str) -> list[Any]:
        results: list[Any] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for result in pool.map(make, self.book.pages):
                results.append(result)
                busy(f"{words}: {len(results)} of {len(self.book.pages)}")
        return results

    def _parse_page(self, page: Page) -> Parsed:
        context = {"mode": "page", "number_depth": self.book.number_depth, "up": page.up(), "place": placed(self.book, page)}
        path = self.remembered(self.page_key(page), "page.html", lambda: colored(self._read(page, context, *HTML, f"--lua-filter={FILTER}")))
        facts, _, body = path.read_text(encoding="utf-8").partition("\n")
        found = json.loads(facts)
        return Parsed(page, body, dict(found["labels"] or {}), list(found["headings"]), list(found["cited"]), json.loads(found["cites"]), list(found["twice"]))

    def page_key(self, page: Page) -> str:
        "What a page is made from: its file, its place in the book, and the addresses of the names that it mentions."
        checksum, quoted = summary((self.book.root / page.file).read_bytes())
        linked = {name: self.names[name].address for name in quoted if name in self.names}
        return self.key(checksum, linked, placed(self.book, page), self.book.number_depth)

    @cached_property
    def trees(self) -> list[dict[str, Any]]:
        "The syntax tree of every page, for the book in one file."
        return self._each_page(self._tree, "Reading the pages for the book in one file")

    def _tree(self, page: Page) -> dict[str, Any]:
        "The syntax tree of a page, inside the div that tells the filter its place."
        path = self.remembered(self.page_key(page), "tree.json", lambda: self._read(page, {}, "-t", "json"))
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {**tree, "blocks": [{"t": "Div", "c": [["", ["chapter"], list(placed(self.book, page).items())], tree["blocks"]]}]}

    def _read(self, page: Page, context: dict[str, Any], *args: str) -> str:
        text = page_markdown(self.book, page, self.names, self.pictures)
        return run_pandoc(["-f", READER, *args], context, text, page.file.as_posix(), self.book.root)

    # What the book knows ------------------------------------------------------------------------------------------

    @cached_property
    def refs(self) -> dict[str, dict[str, str]]:
        "Every label of the book (headings without a kind are local to their page)."
        return {name: label for parsed in reversed(self.parsed) for name, label in parsed.labels.items() if name.startswith(KINDS)}

    @cached_property
    def references_page(self) -> str:
        "The page that holds the `#refs` div."
        return next((p.page.stem for p in self.parsed if REFERENCES.search(p.body)), "")

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

    def bibliography(self) -> dict[str, str]:
        "The files of sources, seen from the root of the book, with what stands in them."
        return {name: (self.book.root / name).read_text(encoding="utf-8") for name in self.book.bibliography if (self.book.root / name).exists()}

    def bibliography_keys(self) -> list[str]:
        return re.findall(r"^\s*@\w+\s*\{\s*([^,\s]+)\s*,", "\n".join(self.bibliography().values()), re.M)

    def metadata(self, **more: Any) -> dict[str, Any]:
        "What pandoc knows of the book, in its own form: nothing of it is read as Markdown."
        return {"bibliography": words(list(self.bibliography())), "link-citations": {"t": "MetaBool", "c": True}, "lang": words(self.book.lang), **more}

    # Putting pages together ---------------------------------------------------------------------------------------

    @cached_property
    def citations(self) -> tuple[dict[str, str], str]:
        "Each citation of the book as HTML, by what it is, and the list of references. They are made in one run, since only all of them together tell works of one year apart."
        document = joined([parsed.cites for parsed in self.parsed], self.metadata())
        cites = list(dict.fromkeys(map(json.dumps, document["blocks"])))
        document["blocks"] = list(map(json.loads, cites))
        path = self.remembered(self.key(document, self.bibliography()), "citations.html", lambda: run_pandoc(
            ["-f", "json", *HTML, "--citeproc"], {}, json.dumps(document), "the citations", self.book.root))
        shown, start, entries = path.read_text(encoding="utf-8").partition('<div id="refs"')
        return dict(zip(cites, re.findall(r"^<p>(.*)</p>$", shown, re.M))), (start + entries).rstrip()

    def body(self, parsed: Parsed) -> str:
        "The body of one page as HTML, its marks and addresses filled in."
        page, (shown, entries) = parsed.page, self.citations

        def shown_as(match: re.Match[str]) -> str:
            if match[2].isdigit():
                return shown[json.dumps(parsed.cites["blocks"][int(match[2])])]
            target = self.refs.get(match[2])
            if not target:                                   # in a draft a reference may still lead nowhere
                return f"?{match[2]}"
            return ("" if match[1] or not target["kind"] else NAMES.get(target["kind"], target["kind"]) + "\u00a0") + target["number"]

        def address(match: re.Match[str]) -> str:
            path, place = match[1], match[2] or ""
            if path:
                stem = self.stems.get(posixpath.normpath(posixpath.join(page.file.parent.as_posix(), path)))
            else:
                stem = self.references_page if place.startswith("ref-") else self.refs.get(place, {}).get("page")
            return page.way(stem, place) if stem else match[0]

        text = REFERENCES.sub(lambda _: entries if page.stem == self.references_page else "", parsed.body)
        return ADDRESS.sub(address, MARK.sub(shown_as, text))

    @cached_property
    def stems(self) -> dict[str, str]:
        return {page.file.as_posix(): page.stem for page in self.book.pages}


@lru_cache(maxsize=128)
def summary(source: bytes) -> tuple[str, set[str]]:
    "The checksum of the source of a page, and what it has in backticks."
    return hashlib.sha256(source).hexdigest(), {name.decode() for name in re.findall(rb"`([A-Za-z_][\w.]*)", source)}


def placed(book: Book, page: Page) -> dict[str, str]:
    "The place of a page in the book, as attributes of the div around it."
    first = next(p for p in book.pages if p.part == page.part)
    facts = {"number": page.number, "page": page.stem, "appendix": "true" * page.appendix, "part": page.part * (page is first)}
    return {key: value for key, value in facts.items() if value or key == "number"}


def joined(documents: list[dict[str, Any]], meta: dict[str, Any]) -> dict[str, Any]:
    "Several syntax trees as one."
    return {**documents[0], "meta": meta, "blocks": [block for document in documents for block in document["blocks"]]}


def words(value: str | list[str]) -> dict[str, Any]:
    "A string, or several, as pandoc's metadata holds words: what looks like markup in them is none."
    if isinstance(value, list):
        return {"t": "MetaList", "c": [words(item) for item in value]}
    return {"t": "MetaInlines", "c": [{"t": "Str", "c": value}]}


def run_pandoc(args: list[str], context: dict[str, Any], text: str, where: str, root: Path) -> str:
    "Run pandoc on `text` in the folder of the book; what it complains of becomes one sentence."
    import pypandoc
    command = [pypandoc.get_pandoc_path(), *args, "+RTS", "-A8m", "-H1m", "-RTS"]          # a small heap: less memory to clear at each start
    done = subprocess.run(command, input=text, text=True, encoding="utf-8", capture_output=True, cwd=root, env={**os.environ, "BOOK_CONTEXT": json.dumps(context)})
    if done.returncode:
        raise BookError(f"pandoc cannot read {where}: {' '.join(done.stderr.split()) or 'it gave no reason'}")
    return done.stdout
