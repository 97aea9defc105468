#!/usr/bin/env python3
"""Build the book into `_site/`: HTML with search, EPUB and PDF.

With Quarto on PATH, Quarto does it; without, the embedded builder (pandoc, one Lua filter, pagefind, typst). Both read
`_quarto.yml` and give the same addresses. A second run redoes only what changed, and a run that fails leaves the last
good site as it was."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Iterator

import assets
from book import Book, BookError, busy, load_book
from ebook import build_epub, build_pdf
from pandoc import Workshop
from site_builder import build_site

ROOT = Path(__file__).resolve().parent.parent
DOWNLOADS = {"epub": build_epub, "pdf": build_pdf}
FORMATS = ("html", *DOWNLOADS)
PACKAGES = ("pypandoc_binary", "pagefind", "typst")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help="which forms to build, with commas between them (default: %(default)s)")
    parser.add_argument("--quarto", choices=("auto", "yes", "no"), default="auto", help="use Quarto where it is installed, always, or never")
    parser.add_argument("--draft", action="store_true", help="references that lead nowhere are warnings, not errors")
    parser.add_argument("--quiet", action="store_true", help="say only what went wrong")
    parser.add_argument("--output", default="_site", help="the folder to write, seen from the root of the book (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    chosen.formats = [name.strip() for name in chosen.formats.split(",") if name.strip()]
    unknown = set(chosen.formats) - set(FORMATS)
    if unknown or not chosen.formats:
        parser.error(f"--formats knows {', '.join(FORMATS)}, not {', '.join(sorted(unknown)) or 'nothing'}")
    return chosen


# What changed -----------------------------------------------------------------------------------------------------

def fingerprint(book: Book, formats: list[str]) -> str:
    "A hash of everything the book is made from; equal hashes mean that there is nothing to do."
    root, tools = book.root, Path(__file__).resolve().parent
    files = {root / page.file for page in book.pages} | {root / name for name in book.bibliography}
    files |= {root / "_quarto.yml", root / "settings.ini", *root.glob("nbs/*.ipynb"), *tools.glob("*.py"), tools / "book.lua", *tools.glob("theme/*"), *root.glob("nbs/images/*")}
    digest = hashlib.sha256(json.dumps([sorted(formats), assets.installed(), *map(installed_version, PACKAGES)]).encode())
    for file in sorted(path for path in files if path.is_file()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# The embedded builder ---------------------------------------------------------------------------------------------

def parsed_book(book: Book, draft: bool) -> Workshop:
    "Every page read; references that lead nowhere end the build, or are warnings in a draft."
    if draft:
        book.bibliography += [path.relative_to(book.root).as_posix() for path in sorted(book.root.glob(".work/*.bib"))]
    work = Workshop(book, book.root / ".cache" / "book")
    work.parse()
    problems = [f"{page} {sentence}" for page, _, sentence in work.problems()]
    if problems and not draft:
        raise BookError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""))
    for problem in problems:
        print(f"Warning: {problem}", file=sys.stderr)
    return work


def build_embedded(book: Book, formats: list[str], draft: bool, site: Path, search: bool = True) -> None:
    "Build beside the old site, then let the new one take its place; without `search` it keeps the old one's index."
    work = parsed_book(book, draft)
    with staging(book.root) as fresh, ThreadPoolExecutor() as pool:
        downloads = {f"{book.name}.{name}": pool.submit(make, work) for name, make in DOWNLOADS.items() if name in formats}
        build_site(work, fresh, downloads, search)
        if not search and (site / "pagefind").exists():
            os.replace(site / "pagefind", fresh / "pagefind")
        swap(fresh, site)
    work.prune()


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    "An empty folder for a site in the making; it is gone afterwards, whatever happens."
    fresh = root / ".cache" / f"site-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def swap(fresh: Path, site: Path) -> None:
    "Put the finished site in its place; the one before it is removed only then."
    old = fresh.with_name(fresh.name + "-old")
    shutil.rmtree(old, ignore_errors=True)
    if site.exists():
        os.replace(site, old)
    try:
        os.replace(fresh, site)
    except OSError:
        if old.exists():
            os.replace(old, site)
        raise
    shutil.rmtree(old, ignore_errors=True)


# Quarto -----------------------------------------------------------------------------------------------------------

def build_quarto(book: Book, formats: list[str], site: Path) -> None:
    "Let Quarto render the site; EPUB and PDF are the embedded builder's, which are the same with every Quarto."
    quarto = shutil.which("quarto")
    if not quarto:
        raise BookError("Quarto is not on PATH: install it, or leave out `--quarto yes` to use the embedded builder")
    work = parsed_book(book, draft=False) if formats != ["html"] else None
    downloads = {f"{book.name}.{name}": str(make(work)) for name, make in DOWNLOADS.items() if name in formats}
    environment = {**os.environ, "QUARTO_PYTHON": sys.executable, "BOOK_DOWNLOADS": json.dumps(downloads)}
    with staging(book.root) as fresh:
        done = subprocess.run([quarto, "render", "--to", "html", "--output-dir", str(fresh)], cwd=book.root, env=environment)
        if done.returncode or not (fresh / "index.html").exists():
            raise BookError("Quarto could not render the book (its reason stands above); the site is as it was")
        swap(fresh, site)


# The command ------------------------------------------------------------------------------------------------------

def build(root: Path, formats: list[str], quarto: str = "auto", draft: bool = False, output: str = "_site", search: bool = True) -> bool:
    "Build what changed; the answer is whether anything was done."
    book, site = load_book(root), root / output
    note = assets.ensure()
    if note:
        print(note, file=sys.stderr)
    use_quarto = quarto == "yes" or (quarto == "auto" and shutil.which("quarto") is not None)
    stamp, state = root / ".cache" / f"{site.name}.stamp", fingerprint(book, formats) + f" {use_quarto} {draft}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == state and (site / "index.html").exists():
        return False
    try:
        if use_quarto:
            build_quarto(book, formats, site)
        else:
            build_embedded(book, formats, draft, site, search)
    finally:
        busy("")
    stamp.write_text(state, encoding="utf-8")
    return True


def main(argv: list[str] | None = None) -> int:
    "Build, and end with where the book is or with one sentence that says what went wrong."
    chosen = parse_arguments(argv)
    start = time.perf_counter()
    try:
        changed = build(chosen.root, chosen.formats, chosen.quarto, chosen.draft, chosen.output)
    except BookError as error:
        print(f"The book was not built: {error}.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"The book was not built: {error.strerror or error} ({error.filename or 'no file named'}). "
              "Check the disk and who owns this folder, then run the same command again.", file=sys.stderr)
        return 1
    if not chosen.quiet:
        site = chosen.root / chosen.output
        print(f"The book is in {site}{'' if changed else ' and is up to date'} ({time.perf_counter() - start:.1f} s).")
        print(f"Open {site / 'index.html'} in a browser, or run `make serve` for the book with search.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
