"""The whole book as one document: EPUB and PDF."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from book import BookError, busy
from card import PICTURE
from pandoc import FILTER, HERE, Workshop, joined, run_pandoc, words

THEME = HERE / "theme"


def metadata(work: Workshop) -> dict[str, Any]:
    book = work.book
    syntax = (THEME / "python.sublime-syntax").read_text(encoding="utf-8")
    typst = {"t": "MetaMap", "c": {"title": literal(book.title), "authors": {"t": "MetaList", "c": [literal(name) for name in book.authors]}, "syntax": literal(syntax)}}
    front = {"front": words(f"/{PICTURE.as_posix()}")} if (book.root / PICTURE).exists() else {}
    facts = {"title": book.title, "subtitle": book.subtitle, "author": book.authors, "description": book.description,
             "rights": "Text: CC BY 4.0. Code: Apache 2.0.", "identifier": book.name}
    return work.metadata(**{key: words(value) for key, value in facts.items() if value}, literal=typst, **front)


def literal(text: str) -> dict[str, Any]:
    "A string as typst's code writes it, with its quotes."
    return {"t": "MetaInlines", "c": [{"t": "RawInline", "c": ["typst", json.dumps(text, ensure_ascii=False)]}]}


def write(work: Workshop, ending: str, theme: list[str], *args: str) -> Path:
    "Run pandoc over the whole book unless a result made from the same content is there."
    book = work.book
    meta = metadata(work)
    context = {"mode": "book", "number_depth": book.number_depth, "pictures": work.pictures.relative_to(book.root).as_posix(),
               "first_ids": {p.page.file.as_posix(): next((h["id"] for h in p.headings), "") for p in work.parsed}}
    styles = [(THEME / name).read_text(encoding="utf-8") for name in theme]
    images = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sorted(book.root.glob("nbs/images/*")) if path.is_file()]
    key = work.key([work.page_key(page) for page in book.pages], meta, context, styles, images, work.bibliography(), args)

    def make() -> bytes:
        "The whole book as one document: every page inside its div, in reading order."
        document = joined(work.trees, meta)
        busy(f"Writing the {ending}")
        fresh = work.cache / f"{key}.part.{ending}"
        run_pandoc(["-f", "json", "-s", f"--lua-filter={FILTER}", *args, "-o", str(fresh)], context, json.dumps(document), "the whole book", book.root)
        result = fresh.read_bytes()
        fresh.unlink()
        return result
    return work.remembered(key, ending, make)


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
        busy("Setting the pdf")
        target.write_bytes(compile_typst(source, work.book.root))
    return target


def compile_typst(source: Path, root: Path) -> bytes:
    import typst
    try:
        return typst.compile(str(source), root=str(root), pdf_standards=[])
    except RuntimeError as error:
        raise BookError(f"typst cannot set the PDF: {' '.join(str(error).split())[:300]}") from None
