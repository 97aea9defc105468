"""A heat map for the dark theme, drawn from the one for the light theme.

Lines and letters turn their lightness around, as the style sheet does with every other drawing. The colors of the map stay
(bright is still much) unless one of them is white, the color of the paper: then that is black."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
import zlib
from pathlib import Path
from typing import Iterator

MAP = re.compile(r'<image\b[^>]*?href="data:image/png;base64,([^"]*)"', re.S)
COLOR = re.compile(r"#[0-9a-fA-F]{6}\b")
WRITTEN = ("#111111", "#f5f5f5")             # numbers that `heatmap` writes on a cell
FLIP = "filter: invert(1) hue-rotate(180deg)"
SHOWN = re.compile(r'<img\b[^>]*?\bsrc="([^":]+\.svg)"[^>]*>')


def flipped(color: str) -> str:
    "The color that `invert(1) hue-rotate(180deg)` makes of one."
    r, g, b = (255 - int(color[i:i + 2], 16) for i in (1, 3, 5))
    turned = (-0.574 * r + 1.430 * g + 0.144 * b, 0.426 * r + 0.430 * g + 0.144 * b, 0.426 * r + 1.430 * g - 0.856 * b)
    return "#" + "".join(f"{min(255, max(0, round(x))):02x}" for x in turned)


def rows(png: bytes) -> Iterator[bytearray]:
    "The rows of a PNG with four bytes for each pixel, unfiltered; none of any other kind."
    width, _, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    if (depth, kind, interlaced) != (8, 6, 0):
        return
    data, start, before = zlib.decompress(_pixels(png)), 0, bytearray(4 * width)
    while start < len(data):
        row = bytearray(data[start + 1:start + 1 + 4 * width])
        _unfilter(data[start], row, before)
        yield row
        start, before = start + 1 + 4 * width, row


def _pixels(png: bytes) -> bytes:
    parts, at = [], 8
    while at < len(png):
        size = int.from_bytes(png[at:at + 4], "big")
        if png[at + 4:at + 8] == b"IDAT":
            parts.append(png[at + 8:at + 8 + size])
        at += 12 + size
    return b"".join(parts)


def _unfilter(how: int, row: bytearray, above: bytearray) -> None:
    "Add to each byte what the PNG filter took away: left, above, their mean, or Paeth's choice."
    for i in range(len(row) if how else 0):
        a, b, c = (row[i - 4], above[i], above[i - 4]) if i > 3 else (0, above[i], 0)
        guess = a + b - c
        paeth = min((a, b, c), key=lambda x: abs(guess - x)) if how == 4 else 0
        row[i] = (row[i] + (0, a, b, (a + b) // 2, paeth)[how]) & 255


def begins_at_white(png: bytes) -> bool:
    "Whether any pixel is as light as the paper."
    return any(min(row[i:i + 3]) > 236 and row[i + 3] > 127 for row in rows(png) for i in range(0, len(row), 4))


def dark_drawing(svg: str) -> str:
    "A drawing with heat maps as the dark theme shows it."
    turns = any(begins_at_white(base64.b64decode(m[1])) for m in MAP.finditer(svg))       # a map and its scale turn together
    kept = () if turns else WRITTEN
    pieces = re.split(r'("data:[^"]*")', svg.replace("<image", f'<image style="{FLIP}"') if turns else svg)
    pieces[::2] = [COLOR.sub(lambda m: m[0] if m[0].lower() in kept else flipped(m[0]), piece) for piece in pieces[::2]]
    return "".join(pieces).replace("<svg ", '<svg fill="#ffffff" ', 1)


def both_themes(text: str, page: Path, memory: Path) -> str:
    "Behind each heat map of a page, the same for the dark theme; the style sheet shows one of them."
    def twice(match: re.Match[str]) -> str:
        file = page.parent / match[1]
        svg = file.read_text(encoding="utf-8") if file.exists() else ""
        if re.search(r"\bin-(light|dark)\b", match[0]) or not MAP.search(svg):
            return match[0]
        file.with_suffix(".dark.svg").write_text(_remembered(svg, memory), encoding="utf-8")
        other = re.sub(r'\s(?:id|class)="[^"]*"', "", match[0]).replace(match[1], match[1][:-4] + ".dark.svg")
        light = re.sub(r'\sclass="', r"\g<0>in-light ", match[0]) if " class=" in match[0] else match[0].replace("<img", '<img class="in-light"', 1)
        return light + other.replace("<img", '<img class="in-dark no-flip" data-pagefind-ignore', 1)
    return SHOWN.sub(twice, text)


def _remembered(svg: str, memory: Path) -> str:
    "The dark form of a drawing, from `memory` where it was drawn before."
    known = memory / f"{hashlib.sha256(svg.encode() + Path(__file__).read_bytes()).hexdigest()[:20]}.svg"
    if not known.exists():
        memory.mkdir(parents=True, exist_ok=True)
        known.write_text(dark_drawing(svg), encoding="utf-8")
    return known.read_text(encoding="utf-8")
