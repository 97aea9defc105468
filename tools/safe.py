"""What a page may hold: characters that XML knows, and HTML whose tags are closed. The rest comes from outputs and slips of the
pen, and would make a page, or the whole EPUB, unreadable."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
CODE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[ \t]*$|(`+)(?!`).+?(?<!`)\2(?!`)", re.M | re.S)
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
OPTIONAL = {"p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "colgroup", "option", "optgroup"}


def printable(value: Any) -> Any:
    "Text, or whatever holds text, with a visible sign for each character that XML forbids and without colors of a terminal."
    if isinstance(value, str):
        return FORBIDDEN.sub(_sign, ANSI.sub("", value))
    if isinstance(value, list):
        return [printable(item) for item in value]
    return {printable(key): printable(item) for key, item in value.items()} if isinstance(value, dict) else value


def _sign(match: re.Match[str]) -> str:
    return chr(0x2400 + ord(match[0])) if match[0] < " " else "\ufffd"


def outside_code(text: str, change: Any) -> str:
    "Markdown with everything but its code changed."
    done, at = [], 0
    for code in CODE.finditer(text):
        done += [change(text[at:code.start()]), code[0]]
        at = code.end()
    return "".join([*done, change(text[at:])])


class _Closer(HTMLParser):
    "Reads HTML and writes it again, with every tag closed and no end tag that closes nothing."

    def __init__(self, text: str):
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        self.parts += [f"</{tag}>" for tag in reversed(self.open)]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.parts.append(self.get_starttag_text() or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.parts.append(self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        while tag in self.open:
            last = self.open.pop()
            self.parts.append(f"</{last}>")
            if last == tag:
                break

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        self.parts.append(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.parts.append(f"&#{name};")

    def handle_comment(self, data: str) -> None:
        self.parts.append(f"<!--{data}-->")


def closed(text: str) -> str:
    "HTML that leaves no tag open and closes none that stands outside of it; as it is, where that is so."
    tags = re.findall(r"<(/?)([a-z][a-z0-9-]*)\b[^>]*?(/?)>", re.sub(r"<!--.*?-->|(<(script|style)\b).*?(</\2>)", r"\1>\3", text.lower(), flags=re.S))
    stack: list[str] = []
    for end, tag, itself in tags:
        if tag in VOID | OPTIONAL or itself:
            continue
        if not end:
            stack.append(tag)
        elif not stack or stack.pop() != tag:
            return "".join(_Closer(text).parts)
    return "".join(_Closer(text).parts) if stack else text
