"""What the search knows of the glossary: each term with its other names, its sentence, and the section that defines it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from urllib.parse import urljoin

GLOSSARY = "nbs/glossary.html"
ENTRY = re.compile(r'<dt><span id="term-[^"]+">(?P<term>.*?)</span>(?:\s*<span class="also">\(also (?P<also>.*?)\)</span>)?</dt>\s*'
                   r'<dd>\s*(?:<p>)?(?P<sentence>.*?)\s*Defined in <a href="(?P<home>[^"]+)"[^>]*>(?P<section>.*?)</a>\.', re.S)


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def terms(page: str) -> list[dict[str, object]]:
    "The entries of the glossary page; addresses are seen from the root of the site."
    return [{"names": [plain(m["term"]), *map(str.strip, plain(m["also"] or "").split(",") if m["also"] else [])], "sentence": plain(m["sentence"]),
             "home": urljoin(GLOSSARY, m["home"]), "section": plain(m["section"])} for m in ENTRY.finditer(page)]


def write_terms(site: Path) -> None:
    "Write `assets/terms.json`, which the search asks for when it is opened first; without a glossary it is an empty list."
    file = site / GLOSSARY
    found = terms(file.read_text(encoding="utf-8")) if file.exists() else []
    (site / "assets" / "terms.json").write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
