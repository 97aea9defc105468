"""The whole book as one document: the EPUB from the HTML of its pages, and the PDF from their typst."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import mimetypes
import re
import zipfile
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from string import Template
from typing import Any, Iterator
from urllib.parse import quote, unquote_to_bytes

from book import BookError, busy
from card import PICTURE
from labels import NAMED, PRE
from pandoc import HERE, Parsed, Workshop, run_pandoc, words
from site_builder import numbered, pictures

THEME = HERE / "theme"
RIGHTS = "Text: CC BY 4.0. Code: Apache 2.0."

# The EPUB ---------------------------------------------------------------------------------------------------------

DATA = re.compile(r'(?<= src=")data:(image/[\w+]+)(;base64)?,([^"]*)')


def framed(file: str, **values: str) -> str:
    return Template((THEME / file).read_text(encoding="utf-8")).substitute(values)


def build_epub(work: Workshop) -> Path:
    "The EPUB, with MathML and a table of contents two levels deep."
    files = dict(epub_files(work))
    key = work.key({name: hashlib.sha256(content).hexdigest() for name, content in files.items()}, work.book.authors, work.book.description, (THEME / "epub.opf").read_text(encoding="utf-8"))

    def make() -> bytes:
        busy("Writing the epub")
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as epub:
            epub.writestr("mimetype", "application/epub+zip")                # first, and as it is
            for name, content in {"META-INF/container.xml": (THEME / "container.xml").read_bytes(), "EPUB/content.opf": package(work, files).encode(), **{f"EPUB/{n}": c for n, c in files.items()}}.items():
                epub.writestr(name, content, zipfile.ZIP_DEFLATED)
        return target.getvalue()
    return work.remembered(key, "epub", make)


def epub_files(work: Workshop) -> Iterator[tuple[str, bytes]]:
    "Everything that a reader sees, in reading order, and the pictures; the contents and the style sheet last."
    book, contents, parts = work.book, [], count(1)

    def page(name: str, title: str, body: str) -> tuple[str, bytes]:
        return name, framed("epub.xhtml", lang=book.lang, title=html.escape(title), up="../" * name.count("/"), body=body).encode()

    author = html.escape(", ".join(book.authors))
    yield page("title_page.xhtml", book.title, f'<h1 class="title">{html.escape(book.title)}</h1>\n<p class="subtitle">{html.escape(book.subtitle)}</p>\n'
               f'<p class="author">{author}</p>\n<p class="rights">{RIGHTS}</p>')
    for part, parsed in work.in_parts():
        if part:
            name, title = f"part-{next(parts)}.xhtml", html.escape(part)
            contents.append(f'<li><a href="{name}">{title}</a></li>')
            yield page(name, part, f'<h1 class="part">{title}</h1>')
        body = work.body(parsed, site=False)
        body = PRE.sub(lambda block: NAMED.sub(lambda m: work.called(m[1]) if m[1] in work.refs else m[0], block[0]), body)
        body = re.sub(r'(?<= href=")([^":#]*)\.html(?=[#"])', r"\1.xhtml", body)
        for name, origin in pictures(work, parsed.page, body):
            yield name.as_posix(), origin.read_bytes()
        yield from (unpacked(*found) for found in DATA.findall(body))
        body = DATA.sub(lambda m: parsed.page.up() + unpacked(*m.groups())[0], body)
        contents.append(entries(parsed))
        yield page(f"{parsed.page.stem}.xhtml", parsed.title, body)
    yield page("nav.xhtml", book.title, f'<nav epub:type="toc" id="toc"><h1>{html.escape(book.title)}</h1>\n<ol>\n{chr(10).join(contents)}\n</ol></nav>')
    yield "epub.css", (THEME / "epub.css").read_bytes()


def unpacked(kind: str, coded: str | None, data: str) -> tuple[str, bytes]:
    "A name for a picture that stands in the text itself, and its bytes."
    content = unquote_to_bytes(html.unescape(data))
    content = base64.b64decode(content) if coded else content
    return f"pictures/{hashlib.sha256(content).hexdigest()[:16]}{mimetypes.guess_extension(kind)}", content


def entries(parsed: Parsed) -> str:
    "A page in the table of contents, with its sections."
    link = f'<a href="{parsed.page.stem}.xhtml">{html.escape(numbered(parsed))}</a>'
    inner = "".join(f'<li><a href="{parsed.page.stem}.xhtml#{h["id"]}">{html.escape(h["number"] + " " * bool(h["number"]) + h["text"])}</a></li>' for h in parsed.headings if h["level"] == 2)
    return f"<li>{link}{f'<ol>{inner}</ol>' if inner else ''}</li>"


def package(work: Workshop, files: dict[str, bytes]) -> str:
    book = work.book
    creators = "\n".join(f"<dc:creator>{html.escape(name)}</dc:creator>" for name in book.authors)
    items = [f'<item id="f{i}" href="{html.escape(quote(name))}" media-type="{"application/xhtml+xml" if name.endswith("xhtml") else mimetypes.guess_type(name)[0]}"{properties(name, content)} />'
             for i, (name, content) in enumerate(files.items())]
    spine = [f'<itemref idref="f{i}" />' for i, name in enumerate(files) if name.endswith("xhtml") and name != "nav.xhtml"]
    return framed("epub.opf", lang=book.lang, name=html.escape(book.name), title=html.escape(book.title), creators=creators, description=html.escape(book.description or book.title),
                          rights=RIGHTS, now=f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}", manifest="\n".join(items), spine="\n".join(spine))


def properties(name: str, content: bytes) -> str:
    return ' properties="nav"' if name == "nav.xhtml" else ' properties="mathml"' if name.endswith("xhtml") and b"<math" in content else ""


# The PDF ----------------------------------------------------------------------------------------------------------

def metadata(work: Workshop) -> dict[str, Any]:
    book = work.book
    syntax = (THEME / "python.sublime-syntax").read_text(encoding="utf-8")
    typst = {"t": "MetaMap", "c": {"title": literal(book.title), "authors": {"t": "MetaList", "c": [literal(name) for name in book.authors]}, "syntax": literal(syntax)}}
    front = {"front": words(f"/{PICTURE.as_posix()}")} if (book.root / PICTURE).exists() else {}
    facts = {"title": book.title, "subtitle": book.subtitle, "author": book.authors, "rights": RIGHTS}
    return {"lang": words(book.lang), **{key: words(value) for key, value in facts.items() if value}, "literal": typst, **front}


def literal(text: str) -> dict[str, Any]:
    "A string as typst's code writes it, with its quotes."
    return {"t": "MetaInlines", "c": [{"t": "RawInline", "c": ["typst", json.dumps(text, ensure_ascii=False)]}]}


def build_pdf(work: Workshop) -> Path:
    "The PDF, set by typst."
    book = work.book
    pages = [f"{f'#part({json.dumps(part, ensure_ascii=False)})' if part else ''}\n\n{work.paper(parsed)}" for part, parsed in work.in_parts()]
    text = re.sub(r"\b(times|dot)\.circle\b", r"\1.o", "\n".join(pages))         # typst's newer names
    document = json.dumps({"pandoc-api-version": work.cited["pandoc-api-version"], "meta": metadata(work), "blocks": [{"t": "RawBlock", "c": ["typst", text]}]})
    images = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sorted(book.root.glob("nbs/images/*")) if path.is_file()]
    key = work.key(document, images, (THEME / "print.typ").read_text(encoding="utf-8"))

    def make() -> bytes:
        busy("Setting the pdf")
        source = work.cache / f"{key}.typ"
        source.write_text(run_pandoc(["-f", "json", "-t", "typst", f"--template={THEME / 'print.typ'}"], {}, document, "the whole book", book.root), encoding="utf-8")
        return compile_typst(source, book.root)
    return work.remembered(key, "pdf", make)


def compile_typst(source: Path, root: Path) -> bytes:
    import typst
    try:
        return typst.compile(str(source), root=str(root), pdf_standards=[])
    except RuntimeError as error:
        raise BookError(f"typst cannot set the PDF: {' '.join(str(error).split())[:300]}") from None
