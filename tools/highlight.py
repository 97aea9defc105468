"""The colors of code on the embedded builder's pages: Python's own tokenizer, with pandoc's names for the classes.

Pandoc colors code of every language, but it takes half of the time that a page needs; nearly all code of the book is Python."""

from __future__ import annotations

import builtins
import html
import io
import keyword
import re
import tokenize
from typing import Iterator

BLOCK = re.compile(r'<pre(?: id="(?P<id>[^"]*)")? class="(?P<language>\w+)(?P<more>[^"]*)"[^>]*><code>(?P<code>.*?)</code></pre>', re.S)
CONTROL = {"as", "assert", "async", "await", "break", "continue", "del", "elif", "else", "except", "finally", "for", "if", "pass", "raise", "return", "try", "while", "with", "yield"}
VALUES = {"False", "None", "True"}
IMPORTS = {"from", "import"}
FIRST = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENCODING}
FSTRING = getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1)       # from Python 3.12 on

Span = tuple[tuple[int, int], tuple[int, int], str]         # from row, column to row, column: a class


def colored(page: str) -> str:
    "The page of a pandoc that colored nothing, with every block that names its language in a frame, and Python in colors."
    return BLOCK.sub(_frame, page)


def _frame(block: re.Match[str]) -> str:
    language, lines = block["language"], html.unescape(block["code"]).split("\n")
    shown = "\n".join(_painted(lines) if language == "python" else map(html.escape, lines))
    place = f' id="{block["id"]}"' if block["id"] else ""
    return f'<div class="sourceCode"{place}><pre class="sourceCode {language}{block["more"]}"><code class="sourceCode {language}">{shown}</code></pre></div>'


def _painted(lines: list[str]) -> list[str]:
    "Every line with its spans; a span over several lines is closed and opened again."
    marks: list[list[tuple[int, int, str]]] = [[] for _ in lines]
    for (row, start), (last, end), name in _spans("\n".join(lines)):
        for r in range(row, last + 1):
            marks[r - 1].append((start if r == row else 0, end if r == last else len(lines[r - 1]), name))
    return [_line(line, here) for line, here in zip(lines, marks)]


def _line(line: str, marks: list[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for start, end, name in marks:
        if start < end:
            parts += [html.escape(line[at:start]), f'<span class="{name}">{html.escape(line[start:end])}</span>']
            at = end
    return "".join(parts) + html.escape(line[at:])


def _spans(code: str) -> Iterator[Span]:
    "What is colored, in order; after a place that is no Python, nothing."
    before, opened, begin = tokenize.TokenInfo(tokenize.ENCODING, "", (0, 0), (0, 0), ""), 0, (0, 0)
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == FSTRING[0]:
                begin, opened = begin if opened else token.start, opened + 1
            elif token.type == FSTRING[1]:
                opened -= 1
                if not opened:
                    yield begin, token.end, "st"
            elif not opened and (name := _class(token, before)):
                yield token.start, token.end, name
            before = token
    except (tokenize.TokenError, SyntaxError):
        return


def _class(token: tokenize.TokenInfo, before: tokenize.TokenInfo) -> str:
    word = token.string
    if token.type == tokenize.COMMENT:
        return "co"
    if token.type == tokenize.STRING:
        return "co" if before.type in FIRST else "st"            # a string that begins a statement documents it
    if token.type == tokenize.NUMBER:
        return "dv" if word.isdigit() else "fl"
    if token.type != tokenize.NAME:
        return ""
    return ("im" if word in IMPORTS else "va" if word in VALUES else "cf" if word in CONTROL else "kw" if keyword.iskeyword(word)
            else "va" if word == "self" else "bu" if hasattr(builtins, word) and before.string != "." else "")
