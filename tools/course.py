"""The numbers in the plan of nbs/educators.qmd: how long its chapters take to read, their exercises, and the bodies in their workbooks.

`plan` gives the page as it should be; `make export` writes it, and `make check` compares.
"""
import json, re

import reading
from nbfilter import source

ROW = re.compile(r'^(\| \d+ \| (?P<chapters>@sec-[^|]*?) \| (?P<subject>[^|]*?) \|)[^\n]*$', re.M)
EXERCISE = re.compile(r'^\*\*(?P<number>\d+)\.\*\* \*(?P<kind>\w+) · \w+ · (?P<minutes>\d+) min\.\*', re.M)
A_BODY, MOST = 10, 12            # minutes for a function of a workbook, and for how many of them in a chapter


def chapters(nbs):
    "The chapters, by the labels of their titles."
    found = {}
    for path in sorted(nbs.glob('[0-9][0-9]_*.ipynb')):
        title = re.search(r'^# .*\{#(sec-[\w-]+)', source(json.loads(path.read_text(encoding='utf-8'))['cells'][0]), re.M)
        if title: found[title[1]] = path
    return found


def exercises(path):
    "(number, kind, minutes) of each exercise that says so."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown').partition('\n## Exercises')[2]
    return [(int(m['number']), m['kind'], int(m['minutes'])) for m in EXERCISE.finditer(text)]


def numbers(paths, workbooks):
    "The last cells of a row: minutes of reading, exercises, bodies to write, hours."
    bodies = [len(workbooks.get(p.stem, ())) for p in paths]
    read = [reading.notebook_lengths(p.read_text(encoding='utf-8'))[0].minutes for p in paths]
    said, minutes = [], sum(read) + A_BODY * sum(min(n, MOST) for n in bodies)
    for path in paths:
        each = exercises(path)
        quick, long = ([e for e in each if e[1] == kind] for kind in ('Predict', 'Implement'))
        minutes += sum(m for _, _, m in quick) + sum(m for _, _, m in long[:2])
        if each: said.append(f"{path.stem[:2]}: {'; '.join(f'{kind} ' + ', '.join(str(n) for n, *_ in some) for kind, some in (('Predict', quick), ('Implement', long)) if some)}")
    return [' + '.join(reading.spoken(m).partition(' ')[0] for m in read), ' · '.join(said) or 'at the end of the chapter', ' + '.join(map(str, bodies)), str(max(1, round(minutes / 60)))]


def plan(nbs):
    "The page with the numbers of today's chapters."
    from llm_from_scratch.workbook import list_workbooks
    known, workbooks = chapters(nbs), list_workbooks(nbs)
    def row(match): return ' '.join([match[1], *(f'{n} |' for n in numbers([known[label] for label in re.findall(r'@(sec-[\w-]+)', match['chapters'])], workbooks))])
    return ROW.sub(row, (nbs/'educators.qmd').read_text(encoding='utf-8'))


def write(nbs):
    page = nbs/'educators.qmd'
    if page.exists(): page.write_text(plan(nbs), encoding='utf-8')
