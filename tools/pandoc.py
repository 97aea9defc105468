"""Run pandoc on the pages of the book, and remember every result by the content it was made from.

One run reads a page and writes it as HTML, for the site and the EPUB, and in typst's language, for the PDF, with marks where
the rest of the book has a say: what a reference is called and where it leads, and how a citation reads. So a page is made
again only when it changed itself; the marks are filled in here."""

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
from typing import Any, Callable, Iterator

from book import Book, BookError, Page, busy
from cells import page_markdown
from highlight import colored
from labels import NAMED
from nbfilter import Symbol, symbols

HERE = Path(__file__).resolve().parent
FILTER = HERE / "book.lua"
CODE = [hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in ("cells.py", "highlight.py", "nbfilter.py", "pandoc.py", "safe.py")]    # what runs, whatever is saved meanwhile
READER = "markdown+lists_without_preceding_blankline+mark"
NAMES = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section", "lst": "Listing"}
HTML = ("-t", "html5", "--mathml", "--wrap=none", "--syntax-highlighting=none")
KINDS = tuple(f"{kind}-" for kind in NAMES)
MARK = re.compile("\ue000(-?)([\\w-]+)\ue001")
EITHER = re.compile("\ue002([^\ue002-\ue004]*)\ue003([^\ue002-\ue004]*)\ue004")          # what the site shows, and the EPUB in its place
PAPER_LINK = re.compile(r'#link\((?:"([^":#]+\.(?:ipynb|qmd|md))(?:#([^"]*))?"|<([^>\n]+)>)\)')
ADDRESS = re.compile(r'(?<= href=")([^":#]*)(?:#([^"]*))?(?=")')
REFERENCES = re.compile(r'<div id="refs"[^>]*>\s*</div>|#block\[\s*\] <refs>')


@dataclass
class Parsed:
    "A page as pandoc sees it: its HTML and its typst with marks, what it defines and what it refers to."

    page: Page
    body: str
    paper: str
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
        context = {"number_depth": self.book.number_depth, "up": page.up(), "place": placed(self.book, page),
                   "pictures": self.pictures.relative_to(self.book.root).as_posix()}
        path = self.remembered(self.page_key(page), "page.html", lambda: colored(self._read(page, context, *HTML, f"--lua-filter={FILTER}")))
        facts, _, body = path.read_text(encoding="utf-8").partition("\n")
        found = json.loads(facts)
        return Parsed(page, body, found["paper"], dict(found["labels"] or {}), list(found["headings"]), list(found["cited"]), json.loads(found["cites"]), list(found["twice"]))

    def page_key(self, page: Page) -> str:
        "What a page is made from: its file, its place in the book, and the addresses of the names that it mentions."
        checksum, quoted = summary((self.book.root / page.file).read_bytes())
        linked = {name: self.names[name].address for name in quoted if name in self.names}
        return self.key(checksum, linked, placed(self.book, page), self.book.number_depth)

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

    def metadata(self) -> dict[str, Any]:
        "What pandoc knows of the sources, in its own form: nothing of it is read as Markdown."
        return {"bibliography": words(list(self.bibliography())), "link-citations": {"t": "MetaBool", "c": True}, "lang": words(self.book.lang)}

    # Putting pages together ---------------------------------------------------------------------------------------

    @cached_property
    def cited(self) -> dict[str, Any]:
        "Each citation of the book as a block of one document, since only all of them together tell works of one year apart."
        blocks = [block for parsed in self.parsed for block in parsed.cites["blocks"]]
        return {**self.parsed[0].cites, "meta": self.metadata(), "blocks": list(map(json.loads, dict.fromkeys(map(json.dumps, blocks))))}

    def _citations(self, to: tuple[str, ...], each: str, entries: str) -> tuple[dict[str, str], str]:
        "Each citation in a format, by what it is, and the list of references, which begins with `entries`."
        path = self.remembered(self.key(self.cited, self.bibliography(), to), "citations", lambda: run_pandoc(
            ["-f", "json", *to, "--citeproc"], {}, json.dumps(self.cited), "the citations", self.book.root))
        shown, start, rest = path.read_text(encoding="utf-8").partition(entries)
        return dict(zip(map(json.dumps, self.cited["blocks"]), re.findall(each, shown, re.M))), (start + rest).rstrip()

    @cached_property
    def citations(self) -> tuple[dict[str, str], str]:
        return self._citations(HTML, "^<p>(.*)</p>$", '<div id="refs"')

    @cached_property
    def paper_citations(self) -> tuple[dict[str, str], str]:
        return self._citations(("-t", "typst-citations", "--wrap=none"), "^(.+)$", "#block[")

    def called(self, label: str, short: str = "") -> str:
        "What a reference says: \"Section 3.2\", or the words of a heading without a number; in a draft it may lead nowhere."
        target = self.refs.get(label)
        if not target:
            return f"?{label}"
        return ("" if short or not target["kind"] else NAMES.get(target["kind"], target["kind"]) + "\u00a0") + target["number"]

    def _marked(self, text: str, parsed: Parsed, cites: dict[str, str], written: Callable[[str], str] = str) -> str:
        return MARK.sub(lambda m: cites[json.dumps(parsed.cites["blocks"][int(m[2])])] if m[2].isdigit() else written(self.called(m[2], m[1])), text)

    def _target(self, page: Page, path: str, place: str) -> str | None:
        "The page that a link leads to, where it leads to one of the book."
        if path:
            return self.stems.get(posixpath.normpath(posixpath.join(page.file.parent.as_posix(), path)))
        return self.references_page if place.startswith("ref-") else self.refs.get(place, {}).get("page")

    def place_on_paper(self, stem: str, place: str) -> str:
        "The label of a place on a page, or of its title: there names that other pages may have too begin with that of the page."
        target = next(parsed for parsed in self.parsed if parsed.page.stem == stem)
        place = place or next((h["id"] for h in target.headings), "")
        return next((name for name in (f"{target.page.file.stem}-{place}", place) if f"<{name}>" in target.paper), "")

    def body(self, parsed: Parsed, site: bool = True) -> str:
        "The body of one page as HTML, for the site or the EPUB, its marks and addresses filled in."
        page, (cites, entries) = parsed.page, self.citations

        def address(match: re.Match[str]) -> str:
            stem = self._target(page, match[1], match[2] or "")
            return page.way(stem, match[2] or "") if stem else match[0]

        text, found = parsed.body, 1
        while found:
            text, found = EITHER.subn(r"\1" if site else r"\2", text)
        text = REFERENCES.sub(lambda _: entries if page.stem == self.references_page else "", text)
        return ADDRESS.sub(address, self._marked(text, parsed, cites))

    def paper(self, parsed: Parsed) -> str:
        "One page in typst's language, its marks and links filled in; in code, labels read as in prose."
        page, (cites, entries) = parsed.page, self.paper_citations

        def link(match: re.Match[str]) -> str:
            stem = self._target(page, match[1] or "", place := match[2] or match[3] or "")
            if stem and match[1]:
                place = self.place_on_paper(stem, place)
            return f"#link(<{place}>)" if stem and place else "#" if place.startswith((*KINDS, "ref-")) else match[0]

        text = REFERENCES.sub(lambda _: entries, parsed.paper)
        text = NAMED.sub(lambda match: self.called(match[1]) if match[1] in self.refs else match[0], text)
        return self._marked(PAPER_LINK.sub(link, text), parsed, cites, lambda words: re.sub(r"([!-/:-@[-`{-~])", r"\\\1", words))

    def in_parts(self) -> Iterator[tuple[str, Parsed]]:
        "The pages, each behind the title of the part that it opens, or behind nothing."
        for before, parsed in zip([None, *self.parsed], self.parsed):
            yield parsed.page.part if not before or before.page.part != parsed.page.part else "", parsed

    @cached_property
    def stems(self) -> dict[str, str]:
        return {page.file.as_posix(): page.stem for page in self.book.pages}


@lru_cache(maxsize=128)
def summary(source: bytes) -> tuple[str, set[str]]:
    "The checksum of the source of a page, and what it has in backticks."
    return hashlib.sha256(source).hexdigest(), {name.decode() for name in re.findall(rb"`([A-Za-z_][\w.]*)", source)}


def placed(book: Book, page: Page) -> dict[str, str]:
    "The place of a page in the book, as attributes of the div around it."
    facts = {"number": page.number, "page": page.stem, "appendix": "true" * page.appendix}
    return {key: value for key, value in facts.items() if value or key == "number"}


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
