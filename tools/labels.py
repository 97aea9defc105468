"""What a label is called on the finished site, and where it stands: `eq-attention` is "Equation 6.3" in chapter 6.

Prose names labels through each builder's own references. Two other places name them too and are mended here, for both
builders: code (a docstring says `@eq-attention`) and the Markdown copies."""

from __future__ import annotations

import html
import os
import re
from functools import lru_cache
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
    called = {label: name for text in texts.values() for label, name in mentioned(text)}
    found: Labels = {}
    for page, text in texts.items():
        for label, name in defined(text):
            if called.get(label) or name:
                found.setdefault(label, (page, called.get(label) or name))
    return found


@lru_cache(maxsize=128)
def mentioned(text: str) -> list[tuple[str, str]]:
    "The labels that a page refers to, and what it calls them."
    return [(label, plain(words)) for label, words in XREF.findall(text)]


@lru_cache(maxsize=128)
def defined(text: str) -> list[tuple[str, str]]:
    "The labels that stand on a page, each with the name that its place gives it."
    places = list(PLACE.finditer(text))
    return [(place[1], own_name(place[1], text[place.start():after])) for place, after in zip(places, [*(p.start() for p in places[1:]), len(text)])]


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
    return PRE.sub(lambda block: NAMED.sub(link, block[0]), text) if names_in_code(text) else text


@lru_cache(maxsize=128)
def names_in_code(text: str) -> bool:
    return any(NAMED.search(block[0]) for block in PRE.finditer(text) if "@" in block[0])
