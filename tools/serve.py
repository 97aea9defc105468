#!/usr/bin/env python3
"""Build the book, show it on this machine, and rebuild what changed whenever a page or the theme is saved."""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from build import ROOT, build
from book import BookError
from finish import read_settings
from site_builder import search_command

SERVED = ".cache/served"                 # a site of its own: the one of `make book`, with EPUB and PDF, stays as it is
WATCHED = ("_quarto.yml", "settings.ini", "*.qmd", "*.bib", "nbs/*.ipynb", "nbs/*.qmd", "nbs/images/*", "tools/*.py", "tools/*.lua", "tools/theme/*")


class Handler(SimpleHTTPRequestHandler):
    "The files of the site, never from a cache, with the book's own page for what is missing."

    protocol_version = "HTTP/1.1"
    timeout = 30

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        "Say nothing: the terminal is for builds."

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        page = Path(self.directory) / "404.html"
        if code != 404 or not page.exists():
            super().send_error(code, message, explain)
            return
        base = read_settings(ROOT).get("doc_baseurl", "/")        # the published address; here the book lies at the root
        body = page.read_text(encoding="utf-8").replace(f'href="{base}', 'href="/').encode()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def open_server(site: Path, port: int) -> ThreadingHTTPServer:
    "A server on loopback at `port`, or at the next free one."
    for candidate in range(port, port + 100):
        try:
            return ThreadingHTTPServer(("127.0.0.1", candidate), functools.partial(Handler, directory=str(site)))
        except OSError:
            continue
    raise BookError(f"no port from {port} to {port + 99} is free: name another with `make serve args=\"--port 9000\"`")


def snapshot(root: Path) -> dict[Path, float]:
    "When each source of the book was last saved."
    files = {path for pattern in WATCHED for path in root.glob(pattern)}
    return {path: path.stat().st_mtime for path in files if path.is_file()}


def rebuild(root: Path, formats: list[str], index: subprocess.Popen[bytes] | None = None) -> subprocess.Popen[bytes] | None:
    "Build what changed, and only then, beside the next change, its index for search; a reference that leads nowhere is a warning."
    if index:
        index.kill()
        index.wait()
    start = time.perf_counter()
    try:
        if build(root, formats, quarto="no", draft=True, output=SERVED, search=False):
            print(f"Built in {time.perf_counter() - start:.1f} s.", flush=True)
    except (BookError, OSError) as error:
        print(f"Not built: {error}. The last good site is still shown.", file=sys.stderr, flush=True)
    site = root / SERVED
    return subprocess.Popen(search_command(site, site), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if site.exists() else None


def watch(root: Path, formats: list[str], seconds: float = 0.3, index: subprocess.Popen[bytes] | None = None) -> None:
    "Look again and again whether a source was saved."
    seen = snapshot(root)
    while True:
        time.sleep(seconds)
        now = snapshot(root)
        if now != seen:
            changed = [path.name for path in now if now[path] != seen.get(path)]
            print(f"{', '.join(sorted(changed)[:3]) or 'A file'} changed.", flush=True)
            seen = now
            index = rebuild(root, formats, index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="the first port to try (default: 8000)")
    parser.add_argument("--formats", default="html", help="which forms to keep up to date (default: html)")
    chosen = parser.parse_args()
    formats = chosen.formats.split(",")
    index = rebuild(ROOT, formats)
    try:
        server = open_server(ROOT / SERVED, chosen.port)
    except BookError as error:
        print(f"The book is not served: {error}.", file=sys.stderr)
        return 1
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"The book is at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends).", flush=True)
    try:
        watch(ROOT, formats, index=index)
    except KeyboardInterrupt:
        server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
