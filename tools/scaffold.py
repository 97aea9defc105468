#!/usr/bin/env python3
"""Start a chapter: `make chapter n=31 name=smoothing title="Smoothing"`.

Writes `nbs/31_smoothing.ipynb` from tools/chapter.md, an example with every part a chapter has that runs and passes the
tests; executes it, exports its module, and adds its line to `_quarto.yml`. If a step fails, nothing is left behind.
"""
import keyword, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = [(1, 'Text to numbers'), (6, 'The transformer'), (10, 'Learning'), (14, 'Real models'), (16, 'Speed'), (20, 'Assistants'), (28, 'Scale')]
CONTENTS = ROOT/'_quarto.yml'
IMAGES = ROOT/'nbs'/'images'
LISTS = [CONTENTS, ROOT/'nbs'/'symbols.qmd', ROOT/'llm_from_scratch'/'_modidx.py', IMAGES/'road.svg', IMAGES/'road-narrow.svg']      # what lists the chapters
ROMAN = ['I', 'II', 'III', 'IV', 'V', 'VI', 'VII']
CHAPTER = re.compile(r'^(\s*)- nbs/(\d\d)_\w+\.ipynb\s*(?:#.*)?$')
PART = re.compile(r'^(\s*)- part:\s*(["\']?)[IVX]+(\W+)')
USAGE = 'write: make chapter n=31 name=smoothing title="Smoothing"'


class Refused(Exception):
    "A sentence on why this chapter cannot be started."


def wanted(n, name, title, root=ROOT):
    "The number, name and title of the new chapter, or a refusal that says which of them is wrong and why."
    if not re.fullmatch(r'\d{1,2}', n) or int(n) == 0: raise Refused(f'n={n!r} is not a chapter number from 1 to 99; {USAGE}')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', name) or keyword.iskeyword(name):
        raise Refused(f'name={name!r} cannot name a Python module: use lower-case letters, digits and _, beginning with a letter; {USAGE}')
    title = title.strip()
    if not title or set(title) & set('{}\n"<>'): raise Refused(f'title={title!r} must be one line of text, without braces, double quotes or angle brackets; {USAGE}')
    number = f'{int(n):02d}'
    for path in sorted((root/'nbs').glob('*.ipynb')):
        there, _, its_name = path.stem.partition('_')
        if there == number: raise Refused(f'chapter {number} exists already: nbs/{path.name}; choose another number')
        if name in (path.stem, its_name): raise Refused(f'a notebook named {name} exists already: nbs/{path.name}; choose another name')
    if (root/'llm_from_scratch'/f'{name}.py').exists(): raise Refused(f'the library has a module {name} already; choose another name')
    return int(n), name, title


def part_of(n): return max((i for i, (first, _) in enumerate(PARTS) if first <= n), default=-1)      # -1: the tour, before all parts


def insert(text, n, name):
    "_quarto.yml with the line of the new chapter in its part, in order; the part too where it is not there. All else stays as it is."
    lines = text.splitlines(keepends=True)
    chapters = [(i, m[1], int(m[2])) for i, line in enumerate(lines) if (m := CHAPTER.match(line))]
    mine = [c for c in chapters if part_of(c[2]) == part_of(n)]
    entry = f'- nbs/{n:02d}_{name}.ipynb\n'
    if mine:
        before = [i for i, _, number in mine if number < n]
        at, new = (before[-1] + 1 if before else mine[0][0]), [mine[0][1] + entry]
    else: at, new = new_part(lines, chapters, n, entry)
    if at and not lines[at - 1].endswith('\n'): lines[at - 1] += '\n'
    return ''.join(lines[:at] + new + lines[at:])


def new_part(lines, chapters, n, entry):
    "Where the part of chapter `n` begins, and its lines, written like the parts that stand there."
    parts = [(i, m) for i, line in enumerate(lines) if (m := PART.match(line))]
    if not parts or not chapters: raise Refused('_quarto.yml has no part like `- part: "I  Text to numbers"` with chapters below it; add the line of this chapter by hand')
    indent, quote, gap = parts[0][1].groups()
    k = part_of(n)
    earlier = [i for i, _, number in chapters if number < n]
    at = earlier[-1] + 1 if earlier else parts[0][0]
    return at, [f'{indent}- part: {quote}{ROMAN[k]}{gap}{PARTS[k][1]}{quote}\n', f'{indent}  chapters:\n', f'{indent}    {entry}']


def scaffold(n, name, title):
    "Write the chapter, run it, list it; leave nothing behind if a step fails."
    import nb
    book, draft = ROOT/'nbs'/f'{n:02d}_{name}.ipynb', nb.WORK/f'{n:02d}_{name}.md'
    if draft.exists(): raise Refused(f'.work/{draft.name} exists already: a draft of this chapter; `make update n={n:02d}` takes it in, or delete it')
    made, changed = (draft, book, ROOT/'llm_from_scratch'/f'{name}.py'), {path: path.read_bytes() if path.exists() else None for path in LISTS}
    contents = insert(CONTENTS.read_text(encoding='utf-8'), n, name)
    text = (ROOT/'tools'/'chapter.md').read_text(encoding='utf-8').replace('<<name>>', name).replace('<<title>>', title)
    try:
        nb.WORK.mkdir(exist_ok=True)
        draft.write_text(text, encoding='utf-8')
        nb.update(book)
        nb.execute(book)
        CONTENTS.write_text(contents, encoding='utf-8')
        nb.indexes()
    except BaseException:
        for path in made: path.unlink(missing_ok=True)
        for path, old in changed.items(): path.unlink(missing_ok=True) if old is None else path.write_bytes(old)
        raise
    print(f'nbs/{book.name} runs and stands in _quarto.yml.\nEdit .work/{draft.name}, then: make update n={n:02d} && make execute n={n:02d} && make check')


def main(argv):
    try: scaffold(*wanted(*(argv + ['', '', ''])[:3]))
    except Refused as refusal: sys.exit(f'No chapter was started: {refusal}.')


if __name__ == '__main__': main(sys.argv[1:])
