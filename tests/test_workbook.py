"""Workbooks: what is taken out of a chapter, what a check finds in one that comes back, and the plan of a course that uses them."""
import ast
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import course
import nb
import packing
import prove
import pytest
import release
from check import course_faults

from llm_from_scratch import cli, workbook
from llm_from_scratch.workbook import check_workbook, list_workbooks, make_workbook

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))
SMALL = [p for p in CHAPTERS if p.stem[:2] in ('18', '22')]            # checked in every run; of the others, the commit chooses one


def INPUTS(chapter=None, **_):
    "A chapter's own test depends on that chapter, the others on all of them."
    return ['nbs/educators.qmd', *([f'nbs/{chapter.name}', f'imports:nbs/{chapter.name}'] if chapter else ['nbs/*.ipynb'])]


def rotating():
    "The small chapters, and one that the commit chooses; the rest are slow."
    chosen = prove.of_commit([p for p in CHAPTERS if p not in SMALL and p.stem not in nb.BUDGETS])
    return [pytest.param(p, id=p.stem, marks=[] if p in [*SMALL, chosen] else pytest.mark.slow) for p in CHAPTERS]


# Filling --------------------------------------------------------------------------------------------------------------

def functions(source): return {name: node for name, node in workbook._functions(ast.parse(source).body)}


def lines(source, node): return source.splitlines()[node.lineno - 1:node.end_lineno]


def filled(book, bodies):
    "A workbook in whose cells each function that is not written has the lines that `bodies` has for it."
    for cell in book['cells']:
        if cell['cell_type'] != 'code' or 'NotImplementedError' not in cell['source']: continue
        rows = cell['source'].splitlines()
        for name, node in reversed(functions(cell['source']).items()):
            if name in bodies and not workbook._is_written(node) and workbook._body(node): rows[node.lineno - 1:node.end_lineno] = bodies[name]
        cell['source'] = '\n'.join(rows)
    return book


def library(chapter):
    "The functions of a chapter as its module has them; those that are shown and not exported, as the chapter has them."
    shown = {name: lines(c['source'], node) for c, names in zip(workbook._page(chapter).cells, workbook._page(chapter).names) if names for name, node in functions(c['source']).items()}
    module = (ROOT/'llm_from_scratch'/f"{chapter.partition('_')[2]}.py").read_text(encoding='utf-8')
    return shown | {name: lines(module, node) for name, node in functions(module).items()}


def solved(chapter): return filled(make_workbook(chapter), library(chapter))


def checked(book, folder, **options):
    path = folder/'workbook.ipynb'
    path.write_text(json.dumps(book), encoding='utf-8')
    return check_workbook(path, **options)


# Chapters -------------------------------------------------------------------------------------------------------------

@pytest.mark.long(60)
@pytest.mark.parametrize('chapter', rotating())
def test_the_library_s_own_bodies_pass_and_an_untouched_workbook_says_what_is_missing(chapter, tmp_path):
    if chapter.stem not in list_workbooks():
        with pytest.raises(ValueError, match=f'core path of {chapter.stem} exports nothing to write; with `only`, choose from '): make_workbook(chapter.stem)
        return
    full = checked(solved(chapter.stem), tmp_path)
    assert full.passed and full.functions, str(full)
    empty = checked(make_workbook(chapter.stem), tmp_path)
    assert {f.state for f in empty.functions} == {'not written yet'} and not empty.passed and not empty.others, str(empty)
    assert [f.name for f in empty.functions] == list_workbooks()[chapter.stem]


@pytest.mark.parametrize('chapter', [p for p in CHAPTERS if p.stem[:2] == '22'], ids=lambda p: p.stem)
def test_a_solved_workbook_runs_in_jupyter(chapter, tmp_path):
    "All checks in front of the reader are green, too."
    (tmp_path/'solved.ipynb').write_text(json.dumps(solved(chapter.stem)), encoding='utf-8')
    nb.run(tmp_path/'solved.ipynb')                              # raises where a cell raises


@pytest.mark.parametrize('wrong', ['    return torch.zeros_like(x)', '    return x.exp() / x.exp().sum(dim, keepdim=True)'], ids=['zeros', 'without the maximum'])
@pytest.mark.parametrize('chapter', [p for p in CHAPTERS if p.stem[:2] == '01'], ids=lambda p: p.stem)
def test_a_wrong_softmax_is_named_and_right_functions_are_not(chapter, wrong, tmp_path):
    book = make_workbook(chapter.stem, only=['softmax'])
    head = [*lines(*next((c['source'], node) for c in book['cells'] if 'def softmax' in c['source'] for name, node in functions(c['source']).items() if name == 'softmax'))][:-1]
    report = checked(filled(book, {'softmax': [*head, wrong]}), tmp_path)
    assert [(f.name, f.state) for f in report.functions] == [('softmax', 'check failed')] and not report.passed
    assert 'Error' in report.functions[0].message and '\n' not in report.functions[0].message


def test_each_chapter_loses_its_bodies_and_nothing_else():
    "What is not to be written is there word for word; what is, keeps signature and docstring."
    for stem in list_workbooks():
        page, book = workbook._page(stem), make_workbook(stem)
        made = {c['id']: c['source'] for c in book['cells']}
        module = f"from llm_from_scratch.{stem.partition('_')[2]} import"
        for cell, names in zip(page.cells, page.names):
            if not names:
                assert made[cell['id']] == cell['source'] or module in cell['source']
                continue
            before, after = functions(cell['source']), functions(made[cell['id']])
            assert before.keys() >= after.keys() and after.keys() >= {*names}
            for name in names:
                assert ast.unparse(before[name].args) == ast.unparse(after[name].args) and ast.get_docstring(before[name]) == ast.get_docstring(after[name])
                assert not workbook._is_written(after[name]) and workbook._body(after[name])
        text = '\n'.join(made.values())
        assert '## Exercises' not in text and '## Going deeper' not in text and not any(c.get('outputs') for c in book['cells'])


def test_no_cell_takes_from_the_library_what_the_reader_writes():
    for stem in list_workbooks():
        page, module = workbook._page(stem), stem.partition('_')[2]
        own = workbook._own_names(page.cells)
        sources = [c['source'] for c in make_workbook(stem)['cells'] if c['cell_type'] == 'code']
        taken = {alias.name for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module == f'llm_from_scratch.{module}' for alias in node.names}
        assert not taken & own, stem


# A chapter of our own -------------------------------------------------------------------------------------------------

PROSE, DEEP = '# Small {#sec-small}\n\nWords.', 'Almost.\n\n## Going deeper {#sec-small-deeper}\n\nMore.'
EXPORTED = '''#| export
FACTOR = 2

def double(x: int) -> int:              # twice
    """Two times x.

    >>> double(4)
    8
    """
    # the idea
    return FACTOR * x

def quadruple(x: int) -> int: return double(double(x))

class Pair:
    def __init__(self, a, b): self.a, self.b = a, b

    @property
    def sum(self) -> int:
        return self.a + self.b

    def each(self):
        yield self.a
        yield self.b

    def later(self) -> None: ...'''
CHECKS = 'four = double(2)\nassert four == 4', 'assert quadruple(1) == four', 'pair = Pair(1, 2)\nassert pair.sum == 3', 'assert list(pair.each()) == [1, 2]'
NAMES = ['double', 'quadruple', 'Pair.__init__', 'Pair.sum', 'Pair.each']


def notebook(*sources):
    return {'cells': [{'cell_type': 'markdown' if s[0] in '#A' and not s.startswith('#|') else 'code', 'id': f'c{i}', 'metadata': {}, 'source': s, 'outputs': [{'output_type': 'stream'}]} for i, s in enumerate(sources)]}


@pytest.fixture
def small(tmp_path, monkeypatch):
    "The library with one chapter, 05_small."
    folder = tmp_path/'nbs'
    folder.mkdir()

    def write(*sources):
        (folder/'05_small.ipynb').write_text(json.dumps(notebook(*sources)), encoding='utf-8')
        for known in (workbook._chapters, workbook._cells, workbook._shown): known.cache_clear()
    monkeypatch.setattr(workbook, '_shelf', lambda: folder)
    write(PROSE, EXPORTED, *CHECKS, DEEP, '#| export\ndef deep(): return 1')
    yield write
    for known in (workbook._chapters, workbook._cells, workbook._shown): known.cache_clear()


BODIES = {name: lines(EXPORTED, node) for name, node in functions(EXPORTED).items()}


def states(report): return {f.name: f.state for f in report.functions}


def with_bodies(**changed):
    "The small workbook, right but for these functions; None leaves one unwritten."
    bodies = BODIES | {name.replace('__dot__', '.'): body and body.splitlines() for name, body in changed.items()}
    return filled(make_workbook('5'), {name: body for name, body in bodies.items() if body})


def test_the_core_path_is_taken(small):
    book = make_workbook('small')
    text = '\n'.join(c['source'] for c in book['cells'])
    assert book['metadata']['workbook']['write'] == NAMES and 'def deep' not in text and 'More.' not in text and 'Almost.' in text
    assert 'FACTOR = 2' in text and '# twice' in text and 'the idea' not in text and 'def later(self) -> None: ...' in text


def test_right_bodies_pass(small, tmp_path):
    report = checked(with_bodies(), tmp_path)
    assert report.passed and states(report) == dict.fromkeys(NAMES, 'done') and str(report).endswith('05_small: 5 of 5 done')


def test_unwritten_is_told_apart_from_wrong_and_from_waiting(small, tmp_path):
    "`double` is missing, so `quadruple` waits; `sum` is wrong; what needs neither is done."
    report = checked(with_bodies(double=None, Pair__dot__sum='    def sum(self) -> int:\n        return self.a - self.b'), tmp_path)
    assert states(report) == {'double': 'not written yet', 'quadruple': 'waiting', 'Pair.__init__': 'done', 'Pair.sum': 'check failed', 'Pair.each': 'done'}
    assert report.functions[1].message == 'for double' and report.functions[3].message == 'AssertionError, at `assert pair.sum == 3`' and not report.others


def test_an_old_value_of_a_name_is_not_taken_for_the_new_one(small, tmp_path):
    "Where the cell that would have made it had to stop, a check of it says nothing."
    small(PROSE, EXPORTED, 'four = 0', 'four = double(2)', 'assert quadruple(1) == four')
    report = checked(with_bodies(double=None, quadruple='def quadruple(x: int) -> int: return 4 * x'), tmp_path)
    assert (states(report)['double'], states(report)['quadruple']) == ('not written yet', 'waiting')


def test_an_untouched_workbook_needs_no_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', None)
    assert {f.state for f in checked(make_workbook('5'), tmp_path).functions} == {'not written yet'}


@pytest.mark.parametrize('name, body, message', [
    ('double', 'def double(x: int) -> int:\n    return 2 * x if x < 4 else undefined', "NameError: name 'undefined' is not defined, at `double(4)`"),
    ('double', 'def double(x: int) -> int:\n    return 4', 'AssertionError: expected 8, got 4, at `double(4)`'),           # only the example sees it
    ('quadruple', 'def quadruple(x: int) -> int: return [][x]', 'IndexError: list index out of range, at `assert quadruple(1) == four`'),
    ('quadruple', 'def quadruple(x: int) -> int: return undefined', "NameError: name 'undefined' is not defined, at `assert quadruple(1) == four`"),
    ('Pair.each', '    def each(self):\n        yield self.a', 'AssertionError, at `assert list(pair.each()) == [1, 2]`'),
    ('quadruple', 'def quadruple(x: int) -> int: raise SystemExit(0)', 'SystemExit: 0, at `assert quadruple(1) == four`')])
def test_a_wrong_body_is_named_with_the_first_line_of_its_error(small, tmp_path, name, body, message):
    report = checked(with_bodies(**{name.replace('.', '__dot__'): body}), tmp_path)
    assert {f.name: f.message for f in report.functions if f.state != 'done'} == {name: message} and not report.passed


def test_a_body_that_does_not_parse_is_a_failed_check(small, tmp_path):
    book = with_bodies()
    cell = next(c for c in book['cells'] if 'def double' in c['source'])
    cell['source'] = cell['source'].replace('return FACTOR * x', 'return FACTOR *')
    report = checked(book, tmp_path)
    assert {f.state for f in report.functions} == {'check failed'} and 'SyntaxError' in report.functions[0].message


@pytest.mark.parametrize('body, message', [('import os; os._exit(3)', 'the process ended with status 3, in c3'), ('while True: pass', 'not done after 3 s, in c3')])
def test_a_process_that_ends_or_never_ends_is_a_failed_check(small, tmp_path, body, message):
    report = checked(with_bodies(quadruple=f'def quadruple(x: int) -> int:\n    {body}'), tmp_path, seconds=3)
    assert not report.passed and message in str(report)


# What comes back ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change', ['deleted', 'changed'])
def test_a_check_that_was_deleted_or_changed_is_run_as_the_chapter_has_it(small, tmp_path, change):
    "Only one check sees this wrong `double`: its example holds, and `quadruple` agrees with it."
    book = with_bodies(double='def double(x: int) -> int: return 8 if x == 4 else 5', quadruple='def quadruple(x: int) -> int: return 5')
    if change == 'deleted': book['cells'] = [c for c in book['cells'] if c['id'] != 'c2']
    for c in book['cells']: c['source'] = c['source'].replace('assert four == 4', 'assert True')
    assert states(checked(book, tmp_path))['double'] == 'check failed'


def test_a_cell_to_write_that_is_gone_is_not_written(small, tmp_path):
    book = with_bodies()
    book['cells'] = [c for c in book['cells'] if 'def double' not in c['source']]
    book['cells'][-1]['source'] = 'mine = 1'
    assert set(states(checked(book, tmp_path)).values()) == {'not written yet'}


def test_an_editor_may_rename_cells_and_a_reader_add_some(small, tmp_path):
    "Colab keeps its ids in the metadata; a second definition counts; magics of a reader's own cell hurt nothing."
    book = with_bodies(double=None)
    for i, c in enumerate(book['cells']): c['id'] = f'new{i}'
    place = 1 + next(i for i, c in enumerate(book['cells']) if 'def double' in c['source'])
    own = {'cell_type': 'code', 'metadata': {}, 'outputs': [], 'execution_count': None}
    book['cells'][place:place] = [own | {'source': 'TWO = 2'}, own | {'source': '%timeit 1'}, own | {'source': 'def double(x): return TWO * x'}]
    assert checked(book, tmp_path).passed
    for c in book['cells']: c['metadata'] = {'id': c.pop('id', 'x')}
    del book['metadata']
    book['metadata'] = {}
    assert checked(book, tmp_path, chapter='5').passed
    with pytest.raises(ValueError, match='names no chapter'): checked(book, tmp_path)


def test_a_failing_cell_of_the_reader_s_own_is_no_check(small, tmp_path):
    book = with_bodies()
    book['cells'].append({'cell_type': 'code', 'id': 'mine', 'metadata': {}, 'source': '1 / 0'})
    assert checked(book, tmp_path).passed


@pytest.mark.parametrize('text, error', [('{}', "is not a workbook: KeyError"), ('nothing', 'not JSON'), ('{"cells": [1], "metadata": {}}', 'is not a workbook')])
def test_what_is_no_notebook_is_refused(small, tmp_path, text, error):
    (tmp_path/'x.ipynb').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=error): check_workbook(tmp_path/'x.ipynb', '5')


def test_the_workbook_of_another_chapter_is_refused(tmp_path):
    (tmp_path/'x.ipynb').write_text(json.dumps(make_workbook('18')), encoding='utf-8')
    with pytest.raises(ValueError, match='is a workbook of 18_flash, not of 06_attention'): check_workbook(tmp_path/'x.ipynb', '06')


def test_a_cell_that_needs_a_missing_package_is_left_out_and_the_check_does_not_pass(small, tmp_path):
    small(PROSE, EXPORTED, 'import nowhere_to_be_found\nx = 1', 'print(x)', *CHECKS)
    report = checked(with_bodies(), tmp_path)
    assert states(report) == dict.fromkeys(NAMES, 'done') and not report.passed
    assert report.others == ["a cell was left out: ModuleNotFoundError: No module named 'nowhere_to_be_found', at `import nowhere_to_be_found`"]


def test_imports_of_the_chapter_s_own_module_leave_the_reader_s_version(small, tmp_path):
    small(PROSE, EXPORTED, 'def run():\n    from llm_from_scratch.small import double, quadruple\n    return quadruple(double(1))\nassert run() == 8')
    assert checked(with_bodies(), tmp_path).passed


def test_folded_cells_solutions_and_unexported_code_are_given(small):
    small(PROSE, EXPORTED.replace('#| export', '#| export\n#| code-fold: true'), 'def shown(x):\n    return x', '#| exporti\ndef helper():\n    return 1', 'Ask.\n\n## Exercises\n\n')
    assert list_workbooks() == {'05_small': ['helper']}
    assert make_workbook('5', ['shown'])['metadata']['workbook']['write'] == ['shown']
    with pytest.raises(ValueError, match="defines no 'double': expected some of helper, shown"): make_workbook('5', ['double'])


def test_what_the_box_names_is_written_too(small):
    small(PROSE, '::: {.callout-note title="You will build"}\n`shown`, a function. *You need:* `other`.\n:::', 'def shown(x):\n    return x', 'def other(x):\n    return x')
    small(PROSE, '# A\n\n::: {.callout-note title="You will build"}\n`shown`, a function. *You need:* `other`.\n:::', 'def shown(x):\n    return x', 'def other(x):\n    return x')
    assert list_workbooks() == {'05_small': ['shown']}


def test_one_statement_of_a_future_counts_for_all_cells(small, tmp_path):
    small(PROSE, 'from __future__ import annotations', '#| export\ndef f(x: Nowhere) -> int:\n    return 1', 'assert f(0) == 1')
    assert checked(filled(make_workbook('5'), {'f': ['def f(x: Nowhere) -> int:', '    return 1']}), tmp_path).passed


# The command ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    def run(line):
        status = cli.main(shlex.split(line))
        return (*capsys.readouterr(), status)
    return run


def test_a_workbook_is_never_written_over_unasked(small, call, tmp_path):
    path = tmp_path/'05_small_workbook.ipynb'
    out, err, status = call('workbook 5')
    assert (err, status) == ('', 0) and out == f"{path.name}: 5 to write: {', '.join(NAMES)}\n" and json.loads(path.read_text(encoding='utf-8'))['nbformat'] == 4
    path.write_text('my work', encoding='utf-8')
    out, err, status = call('workbook 5')
    assert (out, status) == ('', 1) and '--overwrite' in err and path.read_text(encoding='utf-8') == 'my work'
    assert call('workbook 5 --overwrite')[2] == 0 and path.read_text(encoding='utf-8') != 'my work'
    assert call('workbook 5 --file other.ipynb --only double')[2] == 0 and (tmp_path/'other.ipynb').is_file()


def test_the_exit_status_of_a_check_is_its_verdict(small, call, tmp_path):
    call('workbook 5')
    out, err, status = call('workbook 5 --check')
    assert (err, status) == ('', 1) and out.count('not written yet') == 5 and out.endswith('05_small: 0 of 5 done\n')
    (tmp_path/'right.ipynb').write_text(json.dumps(with_bodies()), encoding='utf-8')
    out, err, status = call('workbook 5 --check --file right.ipynb --json')
    facts = json.loads(out)
    assert (err, status) == ('', 0) and facts['passed'] and facts['functions'][0] == {'name': 'double', 'state': 'done', 'message': ''}


@pytest.mark.parametrize('line, status, said', [
    ('workbook 99', 2, r"there is no chapter '99': expected one of 00_tour, .*22_instruction"), ('workbook nowhere --check', 2, 'there is no chapter'),
    ('workbook 18 --only nothing', 2, "defines no 'nothing': expected some of"), ('workbook 18 --check', 1, 'no such file or directory: 18_flash_workbook.ipynb')])
def test_an_error_is_a_sentence_that_helps(call, line, status, said):
    out, err, got = call(line)
    assert (out, got) == ('', status) and re.search(said, err) and err.count('\n') == 1, err


def test_a_chapter_that_exports_nothing_says_what_can_be_chosen(small, call):
    small(PROSE, 'def shown(x):\n    return x')
    out, err, status = call('workbook 5')
    assert (out, status) == ('', 2) and 'exports nothing to write; with --only, choose from shown' in err


def test_without_a_chapter_the_command_lists_them(call):
    out, _, status = call('workbook')
    assert status == 0 and len(out.splitlines()) == len(list_workbooks()) and json.loads(call('workbook --json')[0]) == list_workbooks()


# The wheel ------------------------------------------------------------------------------------------------------------

ALONE = '''import json, sys
from llm_from_scratch import workbook
assert workbook._shelf().__class__.__module__.startswith("zipfile"), workbook._shelf()
print(json.dumps({stem: workbook.make_workbook(stem) for stem in workbook.list_workbooks()}))
assert not {"torch", "IPython", "nbformat", "matplotlib"} & set(sys.modules), "a workbook needs none of these"'''


def alone(installed, code, folder):
    return subprocess.run([sys.executable, '-c', code], cwd=folder, env={'PYTHONPATH': str(installed), 'PYTHONUTF8': '1'}, capture_output=True, text=True, encoding='utf-8')


def test_the_wheel_makes_the_workbooks_of_the_clone(installed, tmp_path):
    done = alone(installed, ALONE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {stem: make_workbook(stem) for stem in list_workbooks()}


def test_the_wheel_checks_a_workbook_without_jupyter(installed, tmp_path):
    "In an empty folder, with an untouched workbook: the process that runs the cells finds the library of the wheel, too."
    done = alone(installed, 'import sys; from llm_from_scratch.cli import main; main(["workbook", "18"]); sys.exit(main(["workbook", "18", "--check"]))', tmp_path)
    assert done.returncode == 1 and done.stdout.endswith('18_flash: 0 of 2 done\n') and done.stderr == '', done.stderr


def test_the_packed_chapters_have_no_outputs_and_are_the_same_each_time(tmp_path):
    packing.pack(tmp_path/'a.zip')
    packing.pack(tmp_path/'b.zip')
    assert (tmp_path/'a.zip').read_bytes() == (tmp_path/'b.zip').read_bytes() and (tmp_path/'a.zip').stat().st_size < 1.5e6
    with zipfile.ZipFile(io.BytesIO((tmp_path/'a.zip').read_bytes())) as packed:
        assert packed.namelist() == [p.name for p in CHAPTERS]
        for path in CHAPTERS:
            cells, stored = json.loads(packed.read(path.name))['cells'], json.loads(path.read_text(encoding='utf-8'))['cells']
            assert [c['source'] for c in cells] == [c['source'] for c in stored] and not any('outputs' in c for c in cells)


def test_a_wheel_built_straight_from_a_clone_has_the_chapters(tmp_path):
    "As `pip install .` does, and the first cell of a notebook in Colab, which knows no source distribution."
    tree = tmp_path/'tree'
    for name in ('llm_from_scratch', 'nbs/results', 'benchmarks/results'): shutil.copytree(ROOT/name, tree/name, ignore=shutil.ignore_patterns('__pycache__'))
    for path in [*CHAPTERS[:2], *(ROOT/name for name in ('pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in', 'tools/packing.py'))]:
        there = tree/path.relative_to(ROOT)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(path, there)
    with zipfile.ZipFile(release.backend('build_wheel', tree, tmp_path)) as wheel, zipfile.ZipFile(wheel.open(packing.NAME)) as packed:
        assert packed.namelist() == [p.name for p in CHAPTERS[:2]]
    assert not (tree/packing.NAME).exists()                      # nothing is left in the clone


# The plan of a course -------------------------------------------------------------------------------------------------

PLAN = (ROOT/'nbs'/'educators.qmd').read_text(encoding='utf-8')


def test_the_numbers_of_the_plan_are_those_of_the_chapters(): assert course.plan(ROOT/'nbs') == PLAN, 'make export writes them'


def test_a_number_that_is_wrong_is_noticed(tmp_path):
    (tmp_path/'nbs').mkdir()
    for path in CHAPTERS: shutil.copy(path, tmp_path/'nbs')
    (tmp_path/'nbs'/'educators.qmd').write_text(PLAN, encoding='utf-8')
    assert not [*course_faults(SimpleNamespace(root=tmp_path))]
    row = next(course.ROW.finditer(PLAN))[0]
    (tmp_path/'nbs'/'educators.qmd').write_text(PLAN.replace(row, re.sub(r'\d+ \+ \d+', '1 + 2', row, count=1)), encoding='utf-8')
    assert 'make export' in [*course_faults(SimpleNamespace(root=tmp_path))][0]


def test_the_plan_has_twelve_weeks_and_the_chapters_in_their_order():
    "Up to the last one that it names; a chapter that is new need not be in it."
    rows = [*course.ROW.finditer(PLAN)]
    labels = [label for row in rows for label in re.findall('@(sec-[\\w-]+)', row['chapters'])]
    assert [int(row[0].split('|')[1]) for row in rows] == [*range(1, 13)] and labels == [*course.chapters(ROOT/'nbs')][:len(labels)] and len(labels) == 23
    assert all(row[0].count('|') == 8 and not re.search(r'\|\s*\|', row[0]) for row in rows)


def test_the_commands_of_the_page_can_be_typed(call):
    for line in re.findall(r'^llmfs (workbook \d\d(?: --only [\w ]+)?)$', PLAN, re.M):
        out, err, status = call(line)
        assert (err, status) == ('', 0) and 2 < int(out.split(': ')[1].split()[0]) < 14, out
    for line in re.findall(r'^ *llmfs (.*?)(?: *#.*)?$', PLAN, re.M): assert call(f'{line.split()[0]} --help')[2] == 0


def test_the_budgets_on_the_page_are_those_of_the_notebooks():
    said = re.search(r'at most (\d+) processor seconds; the tour, .* may take (\d+), and @sec-pretrained (\d+)', PLAN)
    assert said and [int(n) for n in said.groups()] == [nb.BUDGET, nb.BUDGETS['00_tour'], nb.BUDGETS['15_pretrained']]
