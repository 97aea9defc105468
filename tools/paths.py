"""The reading paths of the front page: how long each chapter takes, and all of them together.

A path is a list of links in a box of class `path`. The times are counted from the notebooks when a site is finished, by either
builder, so that nobody types them; in the EPUB and the PDF a path is a list without times. Only the standard library is used."""

from __future__ import annotations

import re
from pathlib import Path

import reading

PATH = re.compile(r'<(?:div|section)\b[^>]*\bclass="(?:[^"]* )?path(?: [^"]*)?".*?</ol>', re.S)          # pandoc makes a box that begins with a heading a section
STEP = re.compile(r'<li>(?P<inside>(?:<p>)?<a href="(?P<page>[\w/]+)\.html(?:#[^"]*)?"[^>]*>.*?</a>(?:</p>)?)\s*</li>', re.S)


def hours(minutes: int) -> str:
    "A time as one says it: minutes below an hour and a half, then half hours. `site.js` says it alike."
    halves = (minutes + 15) // 30
    return reading.spoken(minutes) if minutes < 90 else f"{halves // 2}{'½' * (halves % 2)} hours"


def add_times(text: str, root: Path) -> str:
    "The front page with the minutes of the core path beside each chapter and their sum below each path; once."
    return text if 'class="path-time"' in text else PATH.sub(lambda match: timed(match[0], root), text)


def timed(path: str, root: Path) -> str:
    "One path with its times; what is no notebook takes none."
    total: list[int] = []

    def step(match: re.Match[str]) -> str:
        notebook = root / f"{match['page']}.ipynb"
        if not notebook.exists():
            return match[0]
        total.append(reading.notebook_lengths(notebook.read_text(encoding="utf-8"))[0].minutes)
        return f'<li data-minutes="{total[-1]}">{match["inside"]} <span class="minutes">{total[-1]} min</span></li>'

    path = STEP.sub(step, path)
    return path + f'\n<p class="path-time">About <span class="hours">{hours(sum(total))}</span>, core paths alone.<span class="left"></span></p>'
