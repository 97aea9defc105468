"""A small picture for each letter of shapes, for the page Notation: what the letter counts is colored and has a bracket.

Tokens are rounded boxes, vectors rows of cells, learned weights orange, as in all diagrams of the book. On the page a picture
stands in a column of a table, so all have one size. `tools/pictures.py` writes them beside the front picture."""
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llm_from_scratch.figures import COLORS, INK, frame, label  # noqa: E402

BLUE, ORANGE, SKY = COLORS[0], COLORS[1], COLORS[5]
FAINT, PALE, WARM = '#767676', '#d6ebf7', '#fdf1e7'
WIDTH, HEIGHT = 150, 86
WORDS = ['Mia', 'has', 'a', 'key']


def line(*points, color=FAINT, width=1.2):
    way = ' L'.join(f'{x:g},{y:g}' for x, y in points)
    return f'<path d="M{way}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'


def bracket(letter, x, y, length, down=False):
    "A bracket over `length`, or to the left of it where it runs down, with the letter that counts what it spans."
    if down: return line((x + 5, y), (x, y), (x, y + length), (x + 5, y + length), color=INK) + letter_at(letter, x - 9, y + length / 2 + 5)
    return line((x, y + 5), (x, y), (x + length, y), (x + length, y + 5), color=INK) + letter_at(letter, x + length / 2, y - 4)


def letter_at(letter, x, y): return label(x, y, letter, 14, INK, font_weight='bold', font_family='monospace')


def row(x, y, n, color=BLUE, fill=PALE, size=10):
    "A vector of n cells by its upper left corner."
    return ''.join(frame(x + size * i, y, size, size, color, fill, 1) for i in range(n))


def tokens(x, y, lit=()):
    "Four tokens in a row, each with room for a short word."
    return ''.join(frame(x + 34 * i, y, 30, 18, BLUE if i in lit else FAINT, PALE if i in lit else 'none', 5) + label(x + 34 * i + 15, y + 13, word, 10.5)
                   for i, word in enumerate(WORDS))


def batch():
    "Three sequences, one below the other."
    rows = [frame(32 + 27 * i, 8 + 26 * j, 23, 18, BLUE, PALE, 5) for j in range(3) for i in range(4)]
    return [bracket('B', 22, 8, 70, down=True), *rows]


def looks(x, xs, y, color):
    "Lines from one query down to the keys that it reads."
    return [line((x, y), (to, y + 20), color=color, width=1.6) for to in xs]


def queries():
    "Two tokens are new, and each looks at what there is."
    return [bracket('T', 75, 19, 66), tokens(7, 28, (2, 3)), tokens(7, 66), *looks(90, (22, 56, 90), 46, FAINT), *looks(124, (22, 56, 90, 124), 46, FAINT)]


def keys():
    "The same, seen from the other side: all four tokens are looked at."
    return [tokens(7, 4), *looks(124, (22, 56, 90, 124), 22, FAINT), tokens(7, 42, range(4)), line((7, 64), (7, 69), (139, 69), (139, 64), color=INK), letter_at('S', 73, 83)]


def vocabulary():
    "The list of all tokens, each with its number."
    words = ['a', 'has', '…', 'your']
    return [bracket('V', 40, 5, 76, down=True), *(frame(50, 5 + 19 * i, 46, 19, BLUE, PALE, 1) + label(73, 18 + 19 * i, word, 11) for i, word in enumerate(words)),
            *(label(116, 18 + 19 * i, number, 10, FAINT) for i, number in enumerate(['0', '1', '', 'V − 1']))]


def width():
    "One token and its vector."
    return [frame(60, 62, 30, 18, FAINT, radius=5), label(75, 75, 'key', 10.5), line((75, 60), (75, 50)), row(35, 34, 8), bracket('D', 35, 24, 80)]


def feed_forward():
    "The wide middle of the feed-forward layer, between two narrow rows."
    def learned(y, top, bottom): return f'<path d="M{75 - top / 2},{y} h{top} L{75 + bottom / 2},{y + 14} h-{bottom} Z" fill="{WARM}" stroke="{ORANGE}" stroke-width="1.2"/>'
    return [row(60, 75, 3, FAINT, 'none'), learned(57, 120, 30), row(15, 44, 12), learned(26, 30, 120), row(60, 13, 3, FAINT, 'none'), bracket_beside('F')]


def bracket_beside(letter):
    "Over the wide row there is no room; the letter stands in line with it."
    return letter_at(letter, 143, 54)


def layers():
    "Blocks, one on top of the other."
    return [bracket('L', 36, 6, 74, down=True), *(frame(48, 6 + 26 * i, 74, 22, ORANGE, WARM, 4) + label(85, 21 + 26 * i, f'block {3 - i}', 10.5) for i in range(3))]


def head(x, y, fill, color, size=24):
    "A small attention matrix: rows look at the columns up to their own."
    step = size / 4
    return ''.join(f'<rect x="{x + step * j:g}" y="{y + step * i:g}" width="{step:g}" height="{step:g}" fill="{fill if j <= i else "none"}" stroke="{color}" stroke-width=".7"/>'
                   for i in range(4) for j in range(4))


def query_heads():
    "Several attention matrices, side by side."
    return [bracket('H', 12, 26, 126), *(head(12 + 34 * i, 38, SKY, BLUE) for i in range(4))]


def key_value_heads():
    "Four query heads that share two heads of keys and values."
    shared = [line((24 + 34 * i, 24), (41 + 68 * (i // 2), 44)) for i in range(4)]
    return [*(frame(13 + 34 * i, 8, 22, 16, FAINT, radius=2) + label(24 + 34 * i, 20, 'q', 10.5) for i in range(4)), *shared,
            *(frame(24 + 68 * i, 44, 34, 16, BLUE, PALE, 2) + label(41 + 68 * i, 56, 'k, v', 10.5) for i in range(2)),
            line((24, 64), (24, 69), (126, 69), (126, 64), color=INK), letter_at('K', 75, 84)]


def head_width():
    "A vector of width D in equal pieces, one for each head."
    return [bracket('d', 17, 22, 30), *(row(17 + 31 * i, 32, 3, BLUE if i == 0 else FAINT, PALE if i == 0 else 'none') for i in range(4)),
            line((17, 46), (17, 51), (140, 51), (140, 46), color=FAINT), label(78.5, 66, 'D = H × d', 11.5, FAINT)]


def experts():
    "A router that sends a token to two of four experts."
    at = [24, 58, 92, 126]
    ways = [line((75, 66), (x, 44), color=ORANGE if i in (1, 3) else FAINT, width=2 if i in (1, 3) else .8) for i, x in enumerate(at)]
    return [bracket('E', 10, 18, 130), *ways, *(frame(x - 14, 26, 28, 18, ORANGE if i in (1, 3) else FAINT, WARM if i in (1, 3) else 'none', 3) for i, x in enumerate(at)),
            frame(60, 66, 30, 16, FAINT, radius=5), label(75, 78, 'key', 10.5)]


PICTURES = {'batch': batch, 'queries': queries, 'keys': keys, 'vocabulary': vocabulary, 'width': width, 'feed-forward': feed_forward, 'layers': layers,
            'query-heads': query_heads, 'key-value-heads': key_value_heads, 'head-width': head_width, 'experts': experts}


def drawings():
    "The file name and the SVG of each letter; names are words, because some disks do not tell D from d."
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">'
    return {f'shape-{name}.svg': '\n'.join([head, f'<title>{escape(draw.__doc__)}</title>', *draw(), '</svg>\n']) for name, draw in PICTURES.items()}
