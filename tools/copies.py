"""`llms.txt` and a Markdown copy of every page, for people and programs that read plain text.

A copy has the words of the site: references and citations as a reader sees them, each figure with its words, and the
sources it cites at its end."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from nbfilter import directives, drawing_title, read, source
from safe import outside_code

HIDDEN = {"default_exp", "hide"}
IMAGES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
CITED = re.compile(r'<span class="citation" data-cites="([^"]*)">((?:<span class="nocase">.*?</span>|.)*?)</span>(?!</a>)', re.S)
ENTRY = re.compile(r'<div id="ref-([^"]+)"[^>]*>(.*?)</div>\s*(?=<div id="ref-|</div>|$)', re.S)
CITATION = re.compile(r"\[[^\[\]\n]*(?<!\w)@[A-Za-z][\w:.-]*\w[^\[\]]*\](?!\()|(?<![\w@/`])@[A-Za-z][\w:.-]*\w")
KEY = re.compile(r"(?<!\w)@([A-Za-z][\w:.-]*\w)")


def plain(text: str) -> str:
    "The words of a piece of HTML on one line, with addresses as Markdown writes them."
    text = re.sub(r'<a\b[^>]*href="(https?:[^"]+)"[^>]*>(.*?)</a>', lambda m: f"<{m[1]}>" if m[1] == m[2] else f"[{m[2]}]({m[1]})", text, flags=re.S)
    text = re.sub(r"</?(?:em|i)>", "*", text)
    return " ".join(re.sub(r"&lt;(https?:\S+)&gt;", r"<\1>", html.unescape(re.sub(r"<(?!https?:)[^>]+>", "", text))).split())


# Cells ------------------------------------------------------------------------------------------------------------

def cell_markdown(cell: dict, pictures: Path) -> str:
    "A cell as plain Markdown: prose as it is, code in a fence, behind it what it printed and drew."
    if cell["cell_type"] != "code":
        return source(cell)
    marks, text = directives(source(cell))
    if marks & HIDDEN or not text.strip():
        return ""
    outputs = cell.get("outputs", [])
    caption, alt = _option(text, "(?:fig|tbl)-cap"), _option(text, "fig-alt") or drawing_title(outputs)
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#|")).strip()
    parts = [] if re.search(r"^#\| echo: false", text, re.M) else [f"```python\n{code}\n```"]
    parts += filter(None, (output_markdown(out, alt, pictures) for out in outputs))
    label = _option(text, "label")
    named = f"@{label}: " if caption and re.match(r"(?:fig|tbl)-", label) else ""
    return "\n\n".join([*parts, *([f"*{named}{caption}*"] if caption else [])])


def _option(text: str, name: str) -> str:
    found = re.search(rf"^#\| {name}: *\"?(.*?)\"?$", text, re.M)
    return found[1].replace('\\"', '"') if found else ""


def output_markdown(out: dict, alt: str, pictures: Path) -> str:
    "An output as Markdown: its words, or a link to its picture beside the page."
    data = out.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    for mime, ending in IMAGES.items():
        if mime in data:
            return f"![{alt}](../{pictures.name}/{picture(''.join(data[mime]), ending, pictures)})"
    text = "".join(out.get("text", data.get("text/plain", out.get("traceback", ""))))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def picture(text: str, ending: str, pictures: Path) -> str:
    "The name of a picture, which is the checksum of what it shows; it is written where the site lacks it."
    content = text.encode() if ending == "svg" else base64.b64decode(text)
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.{ending}"
    if not (pictures / name).exists():
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(content)
    return name


# Pages ------------------------------------------------------------------------------------------------------------

def cite(text: str, page: str) -> str:
    "Each citation as the page shows it; where it shows none, it stays as it is."
    shown = defaultdict(list)
    for keys, words in CITED.findall(page):
        shown[frozenset(keys.split())].append(plain(re.sub(r"</?a\b[^>]*>", "", words)))

    def words(match: re.Match[str]) -> str:
        known = shown.get(frozenset(KEY.findall(match[0])))
        return match[0] if not known else known.pop(0) if len(known) > 1 else known[0]
    return outside_code(text, lambda prose: CITATION.sub(words, prose))


TABLE = re.compile(r"^: (.+?)[ \t]*\{#(tbl-[\w-]+)[^}\n]*\}$", re.M)
REFS = re.compile(r"^:::+ *\{#refs\}\n:::+$", re.M)
FENCE = re.compile(r'^:::+[ \t]*(?:\{(?:[^}]*title="([^"]*)")?[^}]*\})?[ \t]*$', re.M)


def readable(prose: str) -> str:
    "Prose without what only a builder reads: fences (their titles stay), attributes, comments; links lead to the copies."
    prose = re.sub(r"<!--.*?-->", "", prose, flags=re.S)
    prose = FENCE.sub(lambda m: f"**{m[1]}**\n" if m[1] else "", prose)
    prose = re.sub(r"(?<=\])\{[.#][^}\n]*\}|(?<=\))\{[.#][^}\n]*\}", "", prose)
    prose = re.sub(r"(\]\((?!\w+:)[^)\s#]+)\.(?:ipynb|qmd)(?:#[^)\s]*)?\)", r"\1.md)", prose)
    return re.sub(r"\n{3,}", "\n\n", prose)


def page_copy(path: Path, site: Path, page: str, names: dict[str, str], entries: dict[str, str]) -> str:
    "The Markdown copy of one page, whose finished form is `page`."
    if path.suffix == ".ipynb":
        text = "\n\n".join(filter(None, (cell_markdown(c, site / "pictures") for c in read(path)["cells"])))
    else:
        text = path.read_text(encoding="utf-8")
    text = TABLE.sub(lambda m: f"*{names.get(m[2], 'Table')}: {m[1]}*", text)
    text = re.sub(r"(?<!\w)\[?@((?:fig|tbl|eq|sec|lst)-\w[\w-]*)\]?", lambda m: names.get(m[1], m[0]), text)
    return with_sources(text, page, tuple(entries.items()))


@lru_cache(maxsize=128)
def with_sources(text: str, page: str, sources: tuple[tuple[str, str], ...]) -> str:
    "The text with its citations in words, and behind it the sources that the page cites."
    entries = dict(sources)
    text = REFS.sub(lambda _: _listed(entries.values()), cite(text, page))
    text = outside_code(re.sub(r"^(`{3,})\{=html\}\n.*?^\1$", "", text, flags=re.M | re.S), readable)
    text = re.sub(r"^(#+ .*?)\s*\{[#.][^}]*\}$", r"\1", text, flags=re.M)
    text = re.sub(r"(\$\$)\s*\{#[^}]*\}", r"\1", text).strip()
    cited = sorted({key for keys, _ in CITED.findall(page) for key in keys.split()} & entries.keys(), key=entries.get)
    return text + (f"\n\n## Sources\n\n{_listed(entries[key] for key in cited)}" if cited else "") + "\n"


def _listed(entries) -> str:
    return "\n".join(f"- {entry}" for entry in entries)


def write_copies(site: Path, root: Path, files: list[str], settings: dict[str, str], names: dict[str, str]) -> None:
    "Write `page.md` beside every page, and `llms.txt` that lists them; `names` says what each label is called."
    pages = {name: (site / name).with_suffix(".html") for name in files}
    shown = {name: page.read_text(encoding="utf-8") for name, page in pages.items() if page.exists()}
    entries = {key: plain(words) for text in shown.values() for key, words in ENTRY.findall(text)}
    lines = []
    for name, page in shown.items():
        text = page_copy(root / name, site, page, names, entries)
        copy = Path(name).with_suffix(".md")
        (site / copy).write_text(text, encoding="utf-8")
        title = re.search(r"^# (.+)$", text, re.M)
        lines.append(f"- [{title[1] if title else copy.stem}]({copy.as_posix()})")
    head = f"# {settings.get('title', 'The book')}\n\n> {settings.get('description', '')}\n\n## Pages\n\n"
    (site / "llms.txt").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
