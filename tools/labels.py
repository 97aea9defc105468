"""What a label is called on the finished site, and where it stands: `eq-attention` is "Equation 6.3" in chapter 6.

Prose names labels through each builder's own references. Two other places name them too and are mended here, for both
builders: code (a docstring says `@eq-attention`) and the Markdown copies."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

KINDS = "fig|tbl|eq|sec|lst"
NAMED = re.compile(rf"(?<![\w@])@((?:{KINDS})-\w[\w-]*)")
PLACE = re.compile(rf'<[^>]*\bid="((?:{KINDS})-[\w-]+)"')
XREF = re.compile(rf'<a\b(?=[^>]*class="quarto-xref")(?=[^>]*href="[^"]*#((?:{KINDS})-[\w-]+)")[^>]*>(.*?)</a>', re.S)
PRE = re.compile(r"<pre\b.*?</pre>", re.S)
NUMBERS = {
    "eq": (r'class="equation-number">\(([\w.]+)\)', "Equation"),
    "sec": (r'class="(?:header-section-number|chapter-number)">([\w.]+)<|Appendix\s([A-Z])\b', "Section"),
    **{kind: (rf"<(?:fig)?caption\b(?:(?!</(?:fig)?caption>).)*?{word}(?:\s|&nbsp;)+([\w.]*\w)", word) for kind, word in (("fig", "Figure"), ("tbl", "Table"), ("lst", "Listing"))},
}

Labels = dict[str, tuple[Path, str]]


def labels(texts: dict[Path, str]) -> Labels:
    "Of each label on the pages: the page that has it, and what a reader knows it by."
    called = {label: plain(words) for text in texts.values() for label, words in XREF.findall(text)}
    found: Labels = {}
    for page, text in texts.items():
        places = list(PLACE.finditer(text))
        for place, after in zip(places, [*(p.start() for p in places[1:]), len(text)]):
            name = called.get(place[1]) or own_name(place[1], text[place.start():after])
            if name:
                found.setdefault(place[1], (page, name))
    return found


def plain(words: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", words))


def own_name(label: str, text: str) -> str:
    "The name of a label that no sentence mentions, from the number that its place bears."
    pattern, word = NUMBERS[label.partition("-")[0]]
    number = re.search(pattern, text, re.S)
    if not number:
        return ""
    if word == "Section" and "chapter-number" in number[0]:
        word = "Chapter" if number[1].isdigit() else "Appendix"
    return f"Appendix\u00a0{number[2]}" if word == "Section" and number[2] else f"{word}\u00a0{number[1]}"


def link_labels(text: str, page: Path, known: Labels) -> str:
    "Labels in the code of a page become links that read as in its prose."
    def link(match: re.Match[str]) -> str:
        if match[1] not in known:
            return match[0]
        target, name = known[match[1]]
        way = "" if target == page else Path(os.path.relpath(target, page.parent)).as_posix()
        return f'<a href="{way}#{match[1]}" class="quarto-xref">{name}</a>'
    return PRE.sub(lambda block: NAMED.sub(link, block[0]) if "@" in block[0] else block[0], text)
