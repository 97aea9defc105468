"""`llms.txt` and a Markdown copy of every page, for people and programs that read plain text."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from nbfilter import directives, source

XREF = re.compile(r"<a\b[^>]*href=\"[^\"]*#((?:fig|tbl|eq|sec|lst)-[\w-]+)\"[^>]*class=\"quarto-xref\"[^>]*>(.*?)</a>|"
                  r"<a\b[^>]*class=\"quarto-xref\"[^>]*href=\"[^\"]*#((?:fig|tbl|eq|sec|lst)-[\w-]+)\"[^>]*>(.*?)</a>", re.S)
HIDDEN = {"default_exp", "hide"}


def reference_texts(site: Path) -> dict[str, str]:
    "What each label is called on the site: `fig-bpe-speed` is \"Figure 3.2\"."
    found: dict[str, str] = {}
    for page in sorted(site.rglob("*.html")):
        for one, text, two, other in XREF.findall(page.read_text(encoding="utf-8")):
            found.setdefault(one or two, html.unescape(re.sub(r"<[^>]+>", "", text or other)))
    return found


def cell_markdown(cell: dict) -> str:
    "A cell as plain Markdown: prose as it is, code in a fence, printed text behind it."
    if cell["cell_type"] != "code":
        return source(cell)
    marks, text = directives(source(cell))
    if marks & HIDDEN or not text.strip():
        return ""
    caption = re.search(r"^#\| (?:fig|tbl)-cap: \"?(.*?)\"?$", text, re.M)
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#|")).strip()
    parts = [] if re.search(r"^#\| echo: false", text, re.M) else [f"```python\n{code}\n```"]
    parts += [f"```text\n{printed}\n```" if fenced else printed for printed, fenced in map(output_text, cell.get("outputs", [])) if printed]
    return "\n\n".join([*parts, *([f"*{caption[1]}*"] if caption else [])])


def output_text(out: dict) -> tuple[str, bool]:
    "The words of an output, and whether they belong in a fence; pictures have none."
    data = out.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip(), False
    if any(mime.startswith("image/") for mime in data):
        return "", False
    text = "".join(out.get("text", data.get("text/plain", out.get("traceback", ""))))
    return re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip(), True


def page_copy(path: Path, names: dict[str, str]) -> str:
    "The Markdown copy of one page, with references spelled out."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(filter(None, map(cell_markdown, json.loads(text)["cells"])))
    text = re.sub(r"(?<!\w)\[?@((?:fig|tbl|eq|sec|lst)-[\w-]+)\]?", lambda m: names.get(m[1], m[0]), text)
    text = re.sub(r"^(#+ .*?)\s*\{[#.][^}]*\}$", r"\1", text, flags=re.M)
    return re.sub(r"(\$\$)\s*\{#[^}]*\}", r"\1", text).strip() + "\n"


def write_copies(site: Path, root: Path, files: list[str], settings: dict[str, str]) -> None:
    "Write `page.md` beside every page, and `llms.txt` that lists them."
    names, lines = reference_texts(site), []
    for name in files:
        page = Path(name).with_suffix("")
        if not (site / page.with_suffix(".html")).exists():
            continue
        text = page_copy(root / name, names)
        (site / page.with_suffix(".md")).write_text(text, encoding="utf-8")
        title = re.search(r"^# (.+)$", text, re.M)
        lines.append(f"- [{title[1] if title else page.name}]({page.with_suffix('.md').as_posix()})")
    head = f"# {settings.get('title', 'The book')}\n\n> {settings.get('description', '')}\n\n## Pages\n\n"
    (site / "llms.txt").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
