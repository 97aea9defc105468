#!/usr/bin/env python3
"""What both builders do to a finished site: typeset mathematics, notebook links, metadata, Markdown copies, old addresses, 404, sitemap.

Quarto runs this file after `quarto render`; the embedded builder calls `finish`. Only the standard library is used, and
what is optional (Node.js, KaTeX, fonts) is left out with a sentence when it is missing, never with an error."""

from __future__ import annotations

import configparser
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import anywhere                                              # noqa: E402
import assets                                                # noqa: E402
import reading                                               # noqa: E402
from card import CARD, write_card                            # noqa: E402
from copies import write_copies                              # noqa: E402
from dark import both_themes                                 # noqa: E402
from labels import labels, link_labels                       # noqa: E402
from paths import add_times                                  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Pages that have another address now: what was published at the old one leads to the new one.
MOVED = {"nbs/06_positions.html": "nbs/07_positions.html", "nbs/07_attention.html": "nbs/06_attention.html"}


def read_settings(root: Path) -> dict[str, str]:
    "The values of settings.ini: the only place that knows the address of the repository."
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini", encoding="utf-8")
    return {key: parser.get("DEFAULT", key) for key in parser.defaults()}


def listed_files(root: Path) -> list[str]:
    "The files that `_quarto.yml` lists, in its order (without a YAML parser, which Quarto's Python may lack)."
    text = (root / "_quarto.yml").read_text(encoding="utf-8")
    book = re.search(r"^book:.*?(?=^\S|\Z)", text, re.M | re.S)
    return re.findall(r"^\s*-\s+[\"']?([\w./-]+\.(?:qmd|ipynb|md))\b", book[0] if book else "", re.M)


def pages(site: Path) -> list[Path]:
    "Every page of the site but the one for missing pages, and those that only lead to another."
    skipped = {"404.html", *MOVED}
    found = (p for p in sorted(site.rglob("*.html")) if p.relative_to(site).as_posix() not in skipped)
    return [p for p in found if "site_libs" not in p.parts and "pagefind" not in p.parts]


def up(site: Path, page: Path) -> str:
    "The way from a page to the root of the site."
    return "../" * (len(page.relative_to(site).parts) - 1)


# Mathematics ------------------------------------------------------------------------------------------------------

MATH = re.compile(r"<math\b(?P<attributes>[^>]*)>.*?<annotation encoding=\"application/x-tex\">(?P<tex>.*?)</annotation>\s*</semantics>\s*</math>", re.S)
WRAPPED = re.compile(r"<span class=\"math (?:inline|display)\">(<math\b(?:(?!</math>).)*</math>)</span>", re.S)
NUMBER = re.compile(r"\s*\\qquad\(([A-Z]?[\d.]+)\)\s*$")
NUMBER_ML = re.compile(r"<mspace width=\"2(?:\.0)?em\"></mspace>(?:<mrow>)?<mo[^>]*>\(</mo>(?:(?!<mo[^>]*>\().)*?<mo[^>]*>\)</mo>(?:</mrow>)?(?=(?:</mrow>)?\s*<annotation)", re.S)
RENDER = r"""
const katex = require(process.argv[1]);
const items = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const show = ([tex, display]) => {
  try { return katex.renderToString(tex, { displayMode: display, output: 'htmlAndMathml', strict: 'ignore', trust: false }); }
  catch (error) { return { error: String(error.message) }; }
};
process.stdout.write(JSON.stringify(items.map(show)));
"""


def formulas(text: str) -> list[tuple[str, bool]]:
    "Every formula of a page: its TeX without the equation's number, and whether it stands on a line of its own."
    return [(NUMBER.sub("", html.unescape(m["tex"])), 'display="block"' in m["attributes"]) for m in MATH.finditer(text)]


def typeset(items: list[tuple[str, bool]], memory: Path) -> dict[tuple[str, bool], str]:
    "KaTeX's HTML for each formula; empty where Node.js or KaTeX is missing. Results are remembered in `memory`."
    katex, program = assets.MODULES / "katex" / "dist" / "katex.js", assets.node()
    if not (items and katex.exists() and program):
        return {}
    known: dict[str, str] = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    names = {item: hashlib.sha256(f"{assets.PACKAGES['katex']} {item}".encode()).hexdigest()[:20] for item in items}
    missing = sorted({item for item in items if names[item] not in known})
    for item, result in zip(missing, _run_katex(program, katex, missing)):
        if isinstance(result, str):
            known[names[item]] = result
        else:
            print(f"Note: KaTeX cannot typeset {item[0]!r} ({result['error']}); it stays MathML.", file=sys.stderr)
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps(known), encoding="utf-8")
    return {item: known[names[item]] for item in items if names[item] in known}


def _run_katex(program: str, katex: Path, items: list[tuple[str, bool]]) -> list[str | dict[str, str]]:
    if not items:
        return []
    try:
        done = subprocess.run([program, "-e", RENDER, str(katex)], input=json.dumps(items), capture_output=True, text=True, encoding="utf-8", timeout=120)
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        print("Note: KaTeX did not run, so mathematics stays MathML.", file=sys.stderr)
        return []


def set_math(text: str, typeset_formulas: dict[tuple[str, bool], str]) -> str:
    "Replace each formula by its typeset form, and put the numbers of equations at the right."
    def show(match: re.Match[str]) -> str:
        tex, display = html.unescape(match["tex"]), 'display="block"' in match["attributes"]
        number = NUMBER.search(tex)
        plain = NUMBER_ML.sub("", match[0]) if number else match[0]
        body = typeset_formulas.get((NUMBER.sub("", tex), display), plain)
        if not display:
            return body
        mark = f'<span class="equation-number">({number[1]})</span>' if number else ""
        return f'<span class="equation"><span class="equation-body">{body}</span>{mark}</span>'
    return MATH.sub(show, WRAPPED.sub(r"\1", text))


def clean_search(site: Path, texts: dict[Path, str]) -> None:
    "Quarto's index holds each formula twice, as characters and as TeX: keep the characters."
    file = site / "search.json"
    if not file.exists():
        return
    pairs = {}
    for page, text in texts.items():
        for m in MATH.finditer(text):
            tex, shown = html.unescape(m["tex"]), html.unescape(re.sub(r"<annotation.*?</annotation>|<[^>]+>", "", m[0], flags=re.S))
            pairs.setdefault(page.relative_to(site).as_posix(), {})[shown + tex] = shown
            pairs[page.relative_to(site).as_posix()][shown + "\n" + tex] = shown
    entries = json.loads(file.read_text(encoding="utf-8"))
    for entry in entries:
        for twice, once in sorted(pairs.get(entry["href"].partition("#")[0], {}).items(), key=lambda p: -len(p[0])):
            if len(twice) > 3 or "\\" in twice:
                entry["text"] = entry["text"].replace(twice, once)
    file.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


# Notebooks --------------------------------------------------------------------------------------------------------

def notebook_links(name: str, settings: dict[str, str], prefix: str) -> str:
    "A line of links: the notebook itself, and where to run it without installing anything."
    links = [f'<a href="{prefix}{name}" download>Download notebook</a>']
    if settings.get("user") and settings.get("repo"):
        links += [f'<a href="{address}">Open in {where}</a>' for where, address in anywhere.addresses(name, settings).items()]
    return f'<p class="notebook-links" data-pagefind-ignore><span>Run this chapter:</span> {" ".join(links)}</p>'


def add_below_title(text: str, line: str) -> str:
    "Put a line behind the title of the page (behind Quarto's title block where there is one), if it is not there."
    if line.partition(" data-")[0] in text:
        return text
    end = r"</header>" if 'id="title-block-header"' in text else r"</h1>"
    place = re.search(rf"id=\"title-block-header\".*?{end}|<main\b.*?{end}", text, re.S)
    return text[:place.end()] + "\n" + line + text[place.end():] if place else text


def download_links(site: Path) -> str:
    "A line of links to the book in one file, where there are any."
    files = sorted(site.glob("*.epub")) + sorted(site.glob("*.pdf"))
    links = " ".join(f'<a href="{file.name}" download>{file.suffix[1:].upper()}</a>' for file in files)
    return f'<p class="notebook-links" data-pagefind-ignore><span>The whole book in one file:</span> {links}</p>' if files else ""


# References to whole chapters, which Quarto sends to the page and, on an unnumbered page, names by their titles ---------

TITLE = re.compile(r'<h1 class="title"><span id="(?P<label>sec-[\w-]+)" class="quarto-section-identifier">'
                   r'(?:<span class="chapter-number">(?P<number>\d+)</span>|(?P<appendix>Appendix [A-Z]))')
WHOLE = re.compile(r'(<a href=")([^"#:]+\.html)(" class="quarto-xref">)(?:<span>)?.*?(?:</span>)?</a>', re.S)
APPENDIX = re.compile(r'(class="quarto-section-identifier">)Appendix ([A-Z])\s*—\s*')
SCROLLS = re.compile(r'<(?:pre(?: class="[^"]*")?|div class="(?:cell-output|table-scroll)[^"]*"|span class="equation-body")(?=>)')     # what may scroll sideways can be reached by keyboard


def chapter_names(texts: dict[Path, str]) -> dict[Path, tuple[str, str]]:
    "The label and the name of each numbered page that Quarto made."
    found = {page.resolve(): TITLE.search(text) for page, text in texts.items()}
    return {page: (m["label"], m["appendix"] or f"Chapter {m['number']}") for page, m in found.items() if m}


def name_chapters(text: str, page: Path, names: dict[Path, tuple[str, str]]) -> str:
    "References to whole chapters by their numbers; the title of an appendix as the embedded builder sets it."
    def named(match: re.Match[str]) -> str:
        label, name = names.get((page.parent / match[2]).resolve(), ("", ""))
        return f"{match[1]}{match[2]}#{label}{match[3]}{name}</a>" if label else match[0]
    titled = APPENDIX.sub('\\1<span class="chapter-number">Appendix\u00a0\\2</span>\u00a0\u00a0', text)
    return WHOLE.sub(named, titled)


# The EPUB that Quarto makes ---------------------------------------------------------------------------------------

def mend_epub(file: Path) -> None:
    "Drop from each page what EPUB forbids and Quarto leaves: `alt` on a box around a figure."
    fresh = file.with_suffix(".part")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(fresh, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(".xhtml"):
                data = re.sub(r'(<div\b[^>]*?) alt="[^"]*"', r"\1", data.decode()).encode()
            new.writestr(item, data)
    os.replace(fresh, file)


# How long, and where the core path ends -------------------------------------------------------------------------

DEEPER = re.compile(r"(?:<section\b[^>]*\bid=\"(?P<section>[^\"]+)\"[^>]*>\s*)?<h2\b(?P<attributes>[^>]*)>(?:(?!</h2>).)*?Going deeper</h2>", re.S)

SECTION = re.compile(r"(?:<section\b[^>]*\bid=\"(?P<section>[^\"]+)\"[^>]*>\s*)?<h2\b(?:[^>]*?\bid=\"(?P<heading>[^\"]+)\")?[^>]*>(?:<span class=\"header-section-number\">[^<]*</span>)?\s*(?P<title>[^<]+)</h2>")


def reading_line(core: reading.Length, deeper: reading.Length | None, place: str) -> str:
    "How long a page takes to read, for its head."
    if deeper is None:
        words = f"about {reading.spoken(core.minutes)}"
    else:
        words = f'about {reading.spoken(core.minutes)} for the core path; <a href="#{place}">Going deeper</a>: {reading.spoken(deeper.minutes)} more'
    return f'<p class="reading-time" data-pagefind-ignore>Reading time: {words}.</p>'


def mark_deeper(text: str, minutes: int) -> tuple[str, str]:
    "Mark where the core path ends, in the text and in lists of contents; the page, and the id of that section."
    heading = DEEPER.search(text)
    if not heading:
        return text, ""
    place = re.search(r"\bid=\"([^\"]+)\"", heading["attributes"])
    place = heading["section"] or (place[1] if place else "")
    after = SECTION.search(text, heading.end())
    skip = f' <a href="#{after["section"] or after["heading"]}">Skip to “{after["title"]}”</a>' if after else ""
    note = (f'\n<p class="deeper-note" data-pagefind-ignore>The core path ends here. This section can wait for a second reading: '
            f"about {reading.spoken(minutes)}.{skip}</p>")
    text = text[:heading.end()] + note + text[heading.end():]
    return re.sub(rf'<li>(?=<a href="#{re.escape(place)}")', '<li class="deeper">', text), place


def add_reading_time(text: str, notebook: Path) -> str:
    "Put into a page what its notebook takes to read; a page that has it stays as it is."
    if 'class="reading-time"' in text:
        return text
    core, deeper = reading.notebook_lengths(notebook.read_text(encoding="utf-8"))
    text, place = mark_deeper(text, deeper.minutes) if deeper else (text, "")
    return add_below_title(text, reading_line(core, deeper, place))


# The head of a page -----------------------------------------------------------------------------------------------

def first_sentence(text: str) -> str:
    "The first paragraph of a page in plain words, cut at 200 characters."
    body = text.partition("<main")[2]
    for paragraph in re.findall(r"<p>(.*?)</p>", body, re.S):
        plain = html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split()
        if len(plain) > 4:
            words = " ".join(plain)
            return words if len(words) <= 200 else words[:200].rpartition(" ")[0] + " …"
    return ""


# What Quarto says on every page alike, or with addresses that only the page itself understands.
STANDARD = re.compile(r'<meta (?:name="description"|(?:property|name)="(?:og:(?:description|image)|twitter:(?:description|image|card))[^"]*") content="[^"]*">\n?')


def head(text: str, settings: dict[str, str], site_prefix: str, has_katex: bool, card: str = "") -> str:
    "Style sheets of fonts and mathematics, description and social metadata; `card` is the address of the picture for links."
    title = html.unescape(re.search(r"<title>(.*?)</title>", text, re.S)[1].strip())  # type: ignore[index]
    lines = []
    if "assets/fonts/fonts.css" not in text:
        lines.append(f'<link rel="stylesheet" href="{site_prefix}assets/fonts/fonts.css">')
    if has_katex and "katex.min.css" not in text:
        lines.append(f'<link rel="stylesheet" href="{site_prefix}assets/katex/katex.min.css">')
    words = html.escape(first_sentence(text) or settings.get("description", ""))
    text = STANDARD.sub("", text)
    facts = {"og:title": html.escape(title), "og:description": words, "og:type": "article", "og:site_name": html.escape(settings.get("title", "")),
             "og:image": html.escape(card)}
    if '<meta name="description"' not in text:
        lines.append(f'<meta name="description" content="{words}">')
    lines += [f'<meta property="{key}" content="{value}">' for key, value in facts.items() if value and f'property="{key}"' not in text]
    lines.append(f'<meta name="twitter:card" content="{"summary_large_image" if card else "summary"}">')
    return text.replace("</head>", "\n".join(lines) + "\n</head>", 1)


# The site ---------------------------------------------------------------------------------------------------------

def published(settings: dict[str, str], name: str) -> str:
    "The address of a file of the published site; nothing where settings.ini names none."
    host = settings.get("doc_host", "")
    return f"{host}{settings.get('doc_baseurl', '/')}{name}" if host else ""


def write_sitemap(site: Path, settings: dict[str, str]) -> None:
    "Addresses for search engines, from the address that settings.ini gives to the published book."
    if not published(settings, ""):
        return
    urls = "\n".join(f"  <url><loc>{published(settings, p.relative_to(site).as_posix())}</loc></url>" for p in pages(site))
    (site / "sitemap.xml").write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}\n</urlset>\n', encoding="utf-8")
    (site / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {published(settings, 'sitemap.xml')}\n", encoding="utf-8")


def write_404(site: Path, settings: dict[str, str]) -> None:
    "The page for addresses that lead nowhere. It may be shown at any depth, so it brings its own style."
    text = (Path(__file__).parent / "theme" / "404.html").read_text(encoding="utf-8")
    values = {"title": settings.get("title", "The book"), "base": settings.get("doc_baseurl", "/")}
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", html.escape(value))
    (site / "404.html").write_text(text, encoding="utf-8")


def write_moved(site: Path) -> None:
    "At each old address a page that leads to the new one: without JavaScript too, and with it to the same section."
    text = (Path(__file__).parent / "theme" / "moved.html").read_text(encoding="utf-8")
    for old, new in MOVED.items():
        if (site / new).exists():
            there = html.escape(up(site, site / old) + new)
            (site / old).write_text(text.replace("{{there}}", there), encoding="utf-8")


def finish(site: Path, root: Path, memory: Path, source: Path | None = None) -> None:
    "Do everything to the pages of a site, which lie in `source` where that is given; doing it twice changes nothing more."
    settings = read_settings(root)
    source = source or site
    plain = {site / page.relative_to(source): page.read_text(encoding="utf-8") for page in pages(source)}
    texts = dict(plain)
    names = chapter_names(texts)
    shown = typeset([f for text in texts.values() for f in formulas(text)], memory)
    assets.copy_fonts(site)
    if shown:
        assets.copy_katex(site)
    for page, text in texts.items():
        name = page.relative_to(site).with_suffix(".ipynb").as_posix()
        if (root / name).exists():
            shutil.copyfile(root / name, site / name)
            text = add_below_title(text, notebook_links(name, settings, up(site, page)))
            text = add_reading_time(text, root / name)
        elif name == "index.ipynb":
            text = add_times(add_below_title(text, download_links(site)), root)
        text = name_chapters(text, page, names)
        text = set_math(text, shown) if 'class="equation-body"' not in text else text
        if "site_libs/" in text:                             # Quarto's; the embedded site has a script for this
            text = SCROLLS.sub(r'\g<0> tabindex="0"', text)
        texts[page] = both_themes(text, page, memory.parent / "dark")
    clean_search(site, plain)
    known, card = labels(texts), published(settings, CARD) if write_card(site, root, settings, memory.parent / "card") else ""
    for page, text in texts.items():
        text = link_labels(text, page, known)
        page.write_text(head(text, settings, up(site, page), 'class="katex' in text, card), encoding="utf-8")
    write_copies(site, root, listed_files(root), settings, {label: name for label, (_, name) in known.items()})
    write_sitemap(site, settings)
    write_404(site, settings)
    write_moved(site)


def main() -> int:
    site = Path(os.environ.get("QUARTO_PROJECT_OUTPUT_DIR") or (sys.argv[1] if len(sys.argv) > 1 else ROOT / "_site"))
    site = site if site.is_absolute() else ROOT / site
    for file in site.glob("*.epub"):
        mend_epub(file)
    if not (site / "index.html").exists():
        return 0                                             # only the EPUB or the PDF was rendered
    note = assets.ensure()
    if note:
        print(note, file=sys.stderr)
    for name, file in json.loads(os.environ.get("BOOK_DOWNLOADS", "{}")).items():        # made beforehand by tools/build.py
        shutil.copyfile(file, site / name)
    finish(site, ROOT, ROOT / ".cache" / "katex.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
