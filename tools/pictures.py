#!/usr/bin/env python3
"""Draw into nbs/images/ the book's front picture, the road from text to assistant (once wide, once narrow), and the letters of shapes.

Every station is one part of the book. Those whose chapters stand in `_quarto.yml` have a firm outline, the others are
dashed, so the picture never claims more than there is. `pictures.py --check` says whether the stored files are in step.
"""
import math, sys
from html import escape
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/'nbs'/'images'
sys.path.insert(0, str(ROOT))
from letters import drawings  # noqa: E402
from llm_from_scratch.figures import COLORS, INK  # noqa: E402

BLUE, ORANGE, GREEN, PINK, AMBER, SKY = COLORS[:6]
FAINT = '#767676'                                    # darker than in plots: here it is the color of words
WIDTH, HEIGHT, GAP = 168, 150, 22

# Of each part: its name, what the reader holds at its end, and the function that draws it in a 140 x 60 box.
STATIONS = [('Text to numbers', 'a tokenizer, a corpus', 'tokens'), ('The transformer', 'a model, untrained', 'attention'),
            ('Learning', 'a model that speaks', 'curve'), ('Real models', 'trained weights', 'stack'), ('Speed', 'fast answers', 'cache'),
            ('Assistants', 'a working assistant', 'dialog'), ('Scale', 'many machines', 'grid')]


def text(x, y, words, size=12, color=INK, anchor='middle', weight='normal'):
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'


def box(x, y, w, h, color=FAINT, fill='none', more=''):
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" stroke="{color}" {more}/>'


def line(points, color, width=2.0):
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def tokens():
    "A sentence, cut, and its numbers: the place of each word in the sorted vocabulary."
    words, x, out = ['Mia', 'has', 'a', 'key'], 4, []
    for word, color in zip(words, (BLUE, ORANGE, GREEN, PINK)):
        w = 14 + 7 * len(word)
        out += [box(x, 6, w, 20, color), text(x + w / 2, 20, word, 12), text(x + w / 2, 46, str(sorted(words).index(word)), 12, color)]
        x += w + 4
    return out


def attention():
    "Each position looks back at the ones before it."
    dots = [12 + 29 * i for i in range(5)]
    arcs = [f'<path d="M{a},46 C{a},{46 - 0.52 * (b - a)} {b},{46 - 0.52 * (b - a)} {b},46" fill="none" stroke="{BLUE}" stroke-opacity="{0.9 - 0.16 * (b - a) / 29:.2f}" stroke-width="1.6"/>'
            for b in dots for a in dots if a < b]
    return arcs + [f'<circle cx="{x}" cy="50" r="5" fill="{ORANGE}"/>' for x in dots]


def curve():
    "A loss that falls towards the floor no model can beat."
    loss = [(6 + 128 * t, 8 + 38 * (1 - math.exp(-4 * t))) for t in [i / 40 for i in range(41)]]
    return [line(loss, BLUE), f'<path d="M6,52 H134" stroke="{ORANGE}" stroke-width="1.6" stroke-dasharray="5 4"/>', text(134, 22, 'loss', 11, FAINT, 'end')]


def cache():
    "Keys and values that are kept, and the one column that is new."
    return [box(6 + 16 * i, 10 + 20 * j, 13, 16, ORANGE if i == 7 else FAINT, ORANGE if i == 7 else SKY, f'fill-opacity="{0.9 if i == 7 else 0.45}"') for i in range(8) for j in range(2)]


def stack():
    "Three families, one set of parts."
    heights = [4, 5, 6]
    return [box(18 + 40 * i, 52 - 9 * (j + 1), 26, 7, c, c, 'fill-opacity="0.55"') for i, (n, c) in enumerate(zip(heights, (BLUE, GREEN, PINK))) for j in range(n - 1)]


def dialog():
    "A question and its answer."
    return [box(2, 2, 106, 22, FAINT), text(55, 17, 'Who has the key?', 11), box(92, 32, 44, 22, GREEN), text(114, 47, 'Mia.', 12)]


def grid():
    "Many devices, each joined to its neighbors."
    at = [(20 + 33 * i, 14 + 32 * j) for i in range(4) for j in range(2)]
    wires = [line([a, b], FAINT, 1) for a in at for b in at if a < b and abs(a[0] - b[0]) + abs(a[1] - b[1]) <= 33]
    return wires + [box(x - 8, y - 8, 16, 16, BLUE, SKY) for x, y in at]


def written():
    "How many parts of the book have chapters."
    book = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['book']
    return sum(isinstance(c, dict) and 'part' in c for c in book['chapters'])


def station(i, x, y, ready):
    "One part of the book: number, name, picture, and what the reader holds at its end."
    name, gain, draw = STATIONS[i]
    color, dash = (BLUE, '') if ready else (FAINT, 'stroke-dasharray="4 4"')
    roman = ('I', 'II', 'III', 'IV', 'V', 'VI', 'VII')[i]
    return [f'<g transform="translate({x:g} {y:g})">', box(0, 0, WIDTH, HEIGHT, color, 'none', f'stroke-width="1.6" {dash}'),
            text(12, 24, f'{roman}  {name}', 14, INK, 'start', 'bold'), '<g transform="translate(14 40)">', *globals()[draw](), '</g>',
            text(WIDTH / 2, 128, gain, 13), '' if ready else text(WIDTH / 2, 144, 'planned', 11, FAINT), '</g>']


def road(columns):
    "The whole picture: stations in rows that turn at their ends, as a road does."
    n, step_x, step_y = len(STATIONS), WIDTH + GAP, HEIGHT + GAP
    spots = [((i % columns if i // columns % 2 == 0 else columns - 1 - i % columns) * step_x + 4, i // columns * step_y + 4) for i in range(n)]
    path = [(x + WIDTH / 2, y + HEIGHT / 2) for x, y in spots]
    joins = [_join(a, b) for a, b in zip(path, path[1:])]
    w, h = columns * step_x - GAP + 8, math.ceil(n / columns) * step_y - GAP + 8
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" font-family="Helvetica, Arial, sans-serif" role="img">'
            '<title>The road from text to a working assistant</title>')
    return '\n'.join([head, *joins, *(s for i, (x, y) in enumerate(spots) for s in station(i, x, y, i < written()) if s), '</svg>\n'])


def _join(a, b):
    "The piece of road between two neighbors, drawn only in the gap between their boxes."
    dx, dy = (b[0] > a[0]) - (b[0] < a[0]), (b[1] > a[1]) - (b[1] < a[1])
    start = (a[0] + dx * WIDTH / 2, a[1] + dy * HEIGHT / 2)
    return line([start, (start[0] + dx * GAP, start[1] + dy * GAP)], AMBER, 4.0)


def main():
    pictures = {'road.svg': road(4), 'road-narrow.svg': road(2), **drawings()}
    FOLDER.mkdir(exist_ok=True)
    if '--check' not in sys.argv:
        for name, svg in pictures.items(): (FOLDER/name).write_text(svg, encoding='utf-8')
    stale = [n for n, svg in pictures.items() if not (FOLDER/n).exists() or (FOLDER/n).read_text(encoding='utf-8') != svg]
    if stale: sys.exit(f"{', '.join(stale)} in nbs/images are not what tools/pictures.py draws; run: python tools/pictures.py")


if __name__ == '__main__': main()
