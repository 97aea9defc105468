"""The embedded builder's website: a template, a table of contents, previous and next, and a search index around each page."""

from __future__ import annotations

import html
import posixpath
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any, Iterator
from urllib.parse import unquote

from book import Book, BookError, Page, busy
from finish import finish
from pandoc import HERE, Parsed, Workshop
from terms import write_terms

THEME = HERE / "theme"
MARK = '<p class="mark"><button type="button" class="button mark-read" aria-pressed="false" hidden>I have read this</button></p>\n'
CODE_IN_SEARCH = '<pre data-pagefind-weight="0.2"'           # a word in a sentence counts for more than one in code
ASSETS = ("book.css", "site.css", "theme.js", "site.js", "favicon.svg")


def build_site(work: Workshop, site: Path, downloads: dict[str, Future[Path]], search: bool) -> None:
    "Write the whole site into the empty folder `site`; the index is made from plain pages while they are finished."
    (site / "assets").mkdir()
    for name in ASSETS:
        shutil.copyfile(THEME / name, site / "assets" / name)
    with TemporaryDirectory(dir=work.cache) as folder:
        plain = Path(folder)
        write_pages(work, plain, site, list(map(Path, downloads)))
        with index_for_search(plain, site) if search else nullcontext():
            for name, file in downloads.items():
                shutil.copyfile(file.result(), site / name)
            busy("Finishing the pages")
            finish(site, work.book.root, work.cache / "katex.json", plain)
            write_terms(site)
            busy("Finishing the index for search")


def write_pages(work: Workshop, plain: Path, site: Path, downloads: list[Path]) -> None:
    "Write each page in its frame into `plain`, and the pictures that it shows into `site`."
    template = Template((THEME / "page.html").read_text(encoding="utf-8"))
    for parsed in work.parsed:
        body = re.sub("<pre(?=[ >])", CODE_IN_SEARCH, work.body(parsed))
        for folder in (plain, site):
            (folder / parsed.page.url).parent.mkdir(parents=True, exist_ok=True)
        (plain / parsed.page.url).write_text(template.substitute(page_values(work, parsed, body, downloads)), encoding="utf-8")
        for name, origin in pictures(work, parsed.page, body):
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, site / name)


# One page ---------------------------------------------------------------------------------------------------------

def page_values(work: Workshop, parsed: Parsed, body: str, downloads: list[Path]) -> dict[str, str]:
    "What the template asks for."
    book, page = work.book, parsed.page
    before, after = neighbours(work, page)
    return {
        "lang": book.lang, "up": page.up(), "body": body, "book": html.escape(book.title), "author": html.escape(", ".join(book.authors)),
        "title": html.escape(book.title if page.is_index else f"{numbered(parsed)} · {book.title}"),
        "mark": MARK * page.is_notebook, "sidebar": sidebar(work, page, downloads), "toc": contents(parsed, book.toc_depth),
        "turn": turn(page, before, "prev", "Previous") + turn(page, after, "next", "Next"),
        "rel": rel(page, before, "prev") + rel(page, after, "next"), "footer": footer(book),
    }


def numbered(parsed: Parsed) -> str:
    page = parsed.page
    return f"{'Appendix ' * (page.appendix and bool(page.number))}{page.number} {parsed.title}".strip()


def neighbours(work: Workshop, page: Page) -> tuple[Parsed | None, Parsed | None]:
    place = work.book.pages.index(page)
    before = work.parsed[place - 1] if place else None
    return before, work.parsed[place + 1] if place + 1 < len(work.parsed) else None


def turn(page: Page, other: Parsed | None, direction: str, word: str) -> str:
    if other is None:
        return ""
    return f'<a rel="{direction}" href="{page.up()}{other.page.url}"><small>{word}</small>{html.escape(numbered(other))}</a>\n'


def rel(page: Page, other: Parsed | None, direction: str) -> str:
    return f'<link rel="{direction}" href="{page.up()}{other.page.url}">\n' if other else ""


def footer(book: Book) -> str:
    address = book.settings.get("git_url", "")
    source = f' · <a href="{html.escape(address)}">Source</a>' if address else ""
    return f"<p>{html.escape(book.title)}: text under CC BY 4.0, code under Apache 2.0{source}</p>"


# Contents ---------------------------------------------------------------------------------------------------------

def sidebar(work: Workshop, page: Page, downloads: list[Path]) -> str:
    "Parts and chapters; the part that is being read stands open, and on the front page all do."
    items = []
    for (part, appendix), group in groupby(work.parsed, key=lambda p: (p.page.part, p.page.appendix)):
        entries = list(group)
        links = "\n".join(sidebar_link(page, entry) for entry in entries)
        title = part or ("Appendices" if appendix else "")
        if not title:
            items.append(f"<ol>\n{links}\n</ol>")
        else:
            is_open = " open" if page.is_index or page in [entry.page for entry in entries] or not (appendix or page.part) else ""
            items.append(f"<details{is_open}>\n<summary>{html.escape(title)}</summary>\n<ol>\n{links}\n</ol>\n</details>")
    return "\n".join(items) + extras(work.book, page, downloads)


def sidebar_link(page: Page, entry: Parsed) -> str:
    current, inside = (' aria-current="page"', sections(entry)) if entry.page == page else ("", "")
    title = "Start here" if entry.page.is_index else entry.title
    number = f'<span class="n">{entry.page.number}</span>' if entry.page.number else ""
    return f'<li><a href="{page.up()}{entry.page.url}"{current}>{number}<span>{html.escape(title)}</span></a>{inside}</li>'


def sections(parsed: Parsed) -> str:
    "The sections of the page that is open, for screens without room for a list beside the text."
    entries = [toc_link(h) for h in parsed.headings if h["level"] == 2]
    return f'<ol class="here">{"".join(f"<li>{entry}</li>" for entry in entries)}</ol>' if entries else ""


def extras(book: Book, page: Page, downloads: list[Path]) -> str:
    "Links below the contents: the book in other forms, and its source."
    links = [f'<a href="{page.up()}{book.name}{file.suffix}" download>{file.suffix[1:].upper()}</a>' for file in downloads]
    links.append(f'<a href="{page.up()}llms.txt">llms.txt</a>')
    if book.settings.get("git_url"):
        links.append(f'<a href="{html.escape(book.settings["git_url"])}">Source</a>')
    return f'\n<div class="extras">{" ".join(links)}</div>'


def contents(parsed: Parsed, depth: int) -> str:
    "The list of the sections on this page, two levels deep; nothing for a page without sections."
    entries = [h for h in parsed.headings if 2 <= h["level"] <= min(depth, 3)]
    if not entries:
        return ""
    groups: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for entry in entries:
        if entry["level"] == 2 or not groups:
            groups.append((entry, []))
        else:
            groups[-1][1].append(entry)
    lines = [f"<li>{toc_link(top)}{toc_list(inner)}</li>" for top, inner in groups]
    return f'<nav class="toc" aria-labelledby="toc-title">\n<p id="toc-title">On this page</p>\n<ol>\n{chr(10).join(lines)}\n</ol>\n</nav>'


def toc_list(entries: list[dict[str, Any]]) -> str:
    return f'<ol>{"".join(f"<li>{toc_link(e)}</li>" for e in entries)}</ol>' if entries else ""


def toc_link(entry: dict[str, Any]) -> str:
    return f'<a href="#{entry["id"]}">{html.escape(entry["text"])}</a>'


# Files ------------------------------------------------------------------------------------------------------------

def pictures(work: Workshop, page: Page, body: str) -> Iterator[tuple[Path, Path]]:
    "Every local picture that a page shows: its place on the site, and where it lies; one that is not there is an error."
    for source in re.findall(r'<(?:img|source)\b[^>]*\bsrc(?:set)?="([^":]+)"', body):
        name = Path(posixpath.normpath(posixpath.join(page.file.parent.as_posix(), unquote(html.unescape(source)))))
        origin = work.pictures / name.name if name.parts[0] == "pictures" else work.book.root / name
        if not origin.exists():
            raise BookError(f"{page.file.as_posix()} shows {source}, which does not exist: add the picture or correct its address")
        yield name, origin


def search_command(pages: Path, site: Path) -> list[str]:
    "How pagefind reads the pages below one folder and writes their index for the site."
    return [sys.executable, "-m", "pagefind", "--site", str(pages), "--output-path", str(site / "pagefind"), "--exclude-selectors", ".katex-html, .equation-number, annotation, a.anchor"]


@contextmanager
def index_for_search(pages: Path, site: Path) -> Iterator[None]:
    "Let pagefind read the pages meanwhile, and wait for it at the end."
    with subprocess.Popen(search_command(pages, site), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace") as process:
        yield
        said = process.communicate()[0]
    if process.returncode:
        raise BookError(f"the search index could not be made ({said.strip().splitlines()[-1:]}): reinstall pagefind with `make book`")
