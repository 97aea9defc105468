"""A notebook as Markdown for pandoc, the way Quarto writes it: cell options become attributes, outputs become divs."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from book import Book, BookError, Page, read_notebook
from nbfilter import Cell, Symbol, filter_notebook, link_symbols, source
from safe import CODE, outside_code

REMOTE = re.compile(r"<img\b[^>]*?\bsrc=[\"']?((?:https?:)?//[^\s\"'>]+)|!\[[^\]]*\]\(<?(https?://[^\s>)]+)", re.I)
EQUATION = re.compile(r"(\$\$(?:(?!\$\$).)+\$\$)\s*\{#(eq-[\w-]+)\}", re.S)         # Quarto's form of a labelled equation
IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}


def page_markdown(book: Book, page: Page, names: dict[str, Symbol], files: Path) -> str:
    "One page of the book as Markdown. Pictures are written into `files`, each named by its content."
    if not page.is_notebook:
        prefix = "" if page.file.parent.name == "nbs" else "nbs/"
        return local(spanned(link_symbols(book.read(page), names, prefix)), page.file.as_posix())
    notebook = filter_notebook(read_notebook(book.root, page.file), names)
    return "\n\n".join(_cell(cell, page, files) for cell in notebook["cells"]) + "\n"


def _cell(cell: Cell, page: Page, files: Path) -> str:
    if cell["cell_type"] == "code":
        return code_cell(cell, page, files)
    return local(spanned(attached(cell, files)), place(cell, page)) if cell["cell_type"] == "markdown" else ""


def spanned(text: str) -> str:
    "Labelled equations as spans, which the filter finds without a look at every word."
    return outside_code(text, lambda part: EQUATION.sub(r"[\1]{#\2}", part))


def place(cell: Cell, page: Page) -> str:
    return f"{page.file.as_posix()}, cell {cell.get('id', '').removeprefix('cell-')},"


def local(text: str, where: str) -> str:
    "The text, if all its pictures lie with the book."
    found = REMOTE.search(CODE.sub(lambda code: code[0] if "{=html}" in code[0] else "", text))
    if found:
        raise BookError(f"{where} shows {found[1] or found[2]}: keep the picture beside the page, under `images`, and show that")
    return text


def attached(cell: Cell, files: Path) -> str:
    "The text of a cell; what was pasted into it lies with the other pictures."
    text = source(cell)
    for name, data in cell.get("attachments", {}).items():
        mime = next((m for m in IMAGES if m in data), None)
        if mime:
            text = text.replace(f"attachment:{name}", f"pictures/{_picture(data[mime], IMAGES[mime], files)}")
    return text


# Code cells -------------------------------------------------------------------------------------------------------

def options(text: str) -> tuple[dict[str, Any], str]:
    "The `#| key: value` lines that open a cell, and the code below them."
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    found = yaml.safe_load("\n".join(line[2:].strip() for line in lines[:end])) or {}
    return found, "\n".join(lines[end:]).strip("\n")


def code_cell(cell: Cell, page: Page, files: Path) -> str:
    "A div with the code and what it put out; a labelled output becomes a figure or a table."
    try:
        opts, code = options(source(cell))
    except yaml.YAMLError:
        raise BookError(f"{page.file.as_posix()}: the `#|` lines of cell {cell['id']} are not valid options: "
                        "write `#| key: value`, with quotes around text that has a colon") from None
    if opts.get("include") is False:
        return ""
    shown = [_shown_code(code, opts)] if code and opts.get("echo", True) else []
    outs = [] if opts.get("output") is False else [local(out, place(cell, page)) for out in _outputs(cell, opts, files)]
    if not shown and not outs:
        return ""
    return _div(f"#{cell['id']} .cell{_fold(opts)}", *shown, *_labelled(opts, outs))


def _shown_code(code: str, opts: dict[str, Any]) -> str:
    label = f"#{opts['lst-label']} " if "lst-label" in opts else ""
    caption = _attribute("lst-cap", opts.get("lst-cap"))
    return _fence(code, f"{label}.python .cell-code{caption}")


def _fold(opts: dict[str, Any]) -> str:
    fold = opts.get("code-fold", False)
    if fold is False:
        return ""
    return f' code-fold="{str(fold).lower()}"' + _attribute("code-summary", opts.get("code-summary", "Code"))


def _attribute(name: str, value: Any) -> str:
    if value is None:
        return ""
    quoted = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f' {name}="{quoted}"'


def _labelled(opts: dict[str, Any], outs: list[str]) -> list[str]:
    "Wrap the outputs of a labelled cell in a figure or a table with its caption."
    label = str(opts.get("label", ""))
    kind = label.partition("-")[0]
    if kind not in ("fig", "tbl") or not outs:
        return outs
    parts = opts.get(f"{kind}-subcap") or []
    if parts:
        outs = [_div(f"#{label}-{i}", out, str(cap)) for i, (out, cap) in enumerate(zip(outs, parts), 1)]
    columns = _attribute("layout-ncol", opts.get("layout-ncol"))
    return [_div(f"#{label}{columns}", *outs, str(opts.get(f"{kind}-cap", "")))]


def _div(attributes: str, *blocks: str) -> str:
    body = "\n\n".join(blocks)
    colons = ":" * (3 + max((len(m) - 2 for m in re.findall(r"^:{3,}", body, re.M)), default=0))
    return f"{colons} {{{attributes}}}\n\n{body}\n\n{colons}"


def _fence(text: str, attributes: str) -> str:
    ticks = "`" * max(4, 1 + max((len(m) for m in re.findall(r"`+", text)), default=0))
    return f"{ticks}{f' {{{attributes}}}' if attributes else ''}\n{text.rstrip()}\n{ticks}"


# Outputs ----------------------------------------------------------------------------------------------------------

def _outputs(cell: Cell, opts: dict[str, Any], files: Path) -> list[str]:
    outs = cell.get("outputs", [])
    has_picture = any(mime in out.get("data", {}) for out in outs for mime in IMAGES)
    alts = opts.get("fig-alt")
    written = []
    for i, out in enumerate(outs):
        if has_picture and set(out.get("data", {})) == {"text/plain"}:
            continue                                            # the repr of what drew the picture
        alt = alts[min(i, len(alts) - 1)] if isinstance(alts, list) else alts
        written.append(_output(out, str(alt or ""), opts, files))
    return written


def _output(out: dict[str, Any], alt: str, opts: dict[str, Any], files: Path) -> str:
    "One stored output as Markdown."
    if out["output_type"] == "stream":
        text = "".join(out["text"])
        return text if opts.get("output") == "asis" else _div(f".cell-output .cell-output-{out['name']}", _fence(text, ""))
    if out["output_type"] == "error":
        return _div(".cell-output .cell-output-error", _fence("\n".join(out["traceback"]), ""))
    return _div(".cell-output .cell-output-display", _display(out["data"], alt, files))


def _display(data: dict[str, Any], alt: str, files: Path) -> str:
    "The richest form of a displayed value that every format of the book can hold."
    for mime, ending in IMAGES.items():
        if mime in data:
            name = _picture(data[mime], ending, files)
            return f"![](pictures/{name}){{{_attribute('fig-alt', alt or None)} .output-picture}}"
    for mime in ("text/markdown", "text/latex"):
        if mime in data:
            return "".join(data[mime])
    return _fence("".join(data.get("text/plain", "")), "")


def _picture(value: str | list[str], ending: str, files: Path) -> str:
    "Write a picture under the hash of its bytes and return the name."
    text = "".join(value)
    content = text.encode() if ending == "svg" else base64.b64decode(text)
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.{ending}"
    files.mkdir(parents=True, exist_ok=True)
    if not (files / name).exists():
        (files / name).write_bytes(content)
    return name
