"""The whole book as one document: EPUB and PDF."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from book import BookError
from card import PICTURE
from pandoc import FILTER, HERE, Parsed, Workshop, words

THEME = HERE / "theme"


def whole_book(work: Workshop) -> dict[str, Any]:
    "One syntax tree with every page inside its div, in reading order."
    first: Parsed = work.parsed[0]
    return {**first.ast, "meta": {}, "blocks": [block for parsed in work.parsed for block in parsed.ast["blocks"]]}


def metadata(work: Workshop) -> dict[str, Any]:
    book = work.book
    typst = {"t": "MetaMap", "c": {"title": literal(book.title), "authors": {"t": "MetaList", "c": [literal(name) for name in book.authors]}}}
    front = {"front": words(f"/{PICTURE.as_posix()}")} if (book.root / PICTURE).exists() else {}
    facts = {"title": book.title, "subtitle": book.subtitle, "author": book.authors, "description": book.description,
             "rights": "Text: CC BY 4.0. Code: Apache 2.0.", "identifier": book.name}
    return work.metadata(**{key: words(value) for key, value in facts.items() if value}, literal=typst, **front)


def literal(text: str) -> dict[str, Any]:
    "A string as typst's code writes it, with its quotes."
    return {"t": "MetaInlines", "c": [{"t": "RawInline", "c": ["typst", json.dumps(text, ensure_ascii=False)]}]}


def write(work: Workshop, ending: str, theme: list[str], *args: str) -> Path:
    "Run pandoc over the whole book unless a result made from the same content is there."
    document = {**whole_book(work), "meta": metadata(work)}
    facts = {**work.facts(), "mode": "book", "pictures": work.pictures.relative_to(work.book.root).as_posix(), "refs": work.refs}
    styles = [(THEME / name).read_text(encoding="utf-8") for name in theme] + [FILTER.read_text(encoding="utf-8")]
    key = work.key(ending, document, facts, styles, work.sources(), args)
    target, fresh = work.path(key, ending), work.path(key, f"part.{ending}")
    if not target.exists():
        work.run(["-f", "json", "-s", f"--lua-filter={FILTER}", *args, "-o", str(fresh)], work.context(key, **facts), json.dumps(document), "the whole book")
        fresh.replace(target)
    return target


def build_epub(work: Workshop) -> Path:
    "The EPUB, with MathML and a table of contents two levels deep."
    return write(work, "epub", ["epub.css"], "-t", "epub3", "--mathml", "--toc", "--toc-depth=2", "--split-level=1", f"--css={THEME / 'epub.css'}")


def build_pdf(work: Workshop) -> Path:
    "The PDF, set by typst."
    source = write(work, "typ", ["print.typ"], "-t", "typst-citations", "--syntax-highlighting=idiomatic", f"--template={THEME / 'print.typ'}")
    target = source.with_suffix(".pdf")
    if not target.exists():
        renamed = re.sub(r"\b(times|dot)\.circle\b", r"\1.o", source.read_text(encoding="utf-8"))    # typst's newer names
        source.write_text(renamed, encoding="utf-8")
        target.write_bytes(compile_typst(source, work.book.root))
    return target


def compile_typst(source: Path, root: Path) -> bytes:
    import typst
    try:
        return typst.compile(str(source), root=str(root), pdf_standards=[])
    except RuntimeError as error:
        raise BookError(f"typst cannot set the PDF: {' '.join(str(error).split())[:300]}") from None
