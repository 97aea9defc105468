"""Every house rule finds what it forbids, and leaves alone what it does not."""
import json, re, shutil, subprocess, sys

import anywhere
import check
import nbfilter
import pytest
from conftest import ROOT
from finish import read_settings

INPUTS = ['tools/check.py', 'tools/reading.py', 'tools/book.py', 'tools/cells.py', 'tools/finish.py', 'tools/anywhere.py', 'tools/nbfilter.py', 'tools/pandoc.py', 'tools/book.lua', 'settings.ini', 'pyproject.toml']
STORED = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}, 'stored_with': {'python': '3.11'}}
IMAGE = {'output_type': 'display_data', 'metadata': {}, 'data': {'image/svg+xml': '<svg/>', 'text/plain': '<Figure>'}}


def md(text): return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def code(text, *outputs): return {'cell_type': 'code', 'execution_count': None, 'metadata': {}, 'outputs': list(outputs), 'source': text}


def stream(text, name='stdout'): return {'output_type': 'stream', 'name': name, 'text': text}


def shown(**data): return {'output_type': 'execute_result', 'execution_count': None, 'metadata': {}, 'data': {k.replace('_', '/'): v for k, v in data.items()}}


class Maker:
    "Builds a small book in a folder and says what a rule finds in it."
    def __init__(self, root):
        self.root = root
        for name in ('settings.ini', 'pyproject.toml'): self.write(name, (ROOT/name).read_text(encoding='utf-8'))
        self.write('llm_from_scratch/__init__.py', f'__version__ = "{read_settings(root)["version"]}"\n')
        self.write('references.bib', '@article{sennrich2016,\n title={Subwords}}\n')
        self.contents('nbs/01_x.ipynb')

    def write(self, name, text):
        path = self.root/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8', newline='\n')
        return self

    def contents(self, *pages):
        return self.write('_quarto.yml', 'bibliography: references.bib\nbook:\n  chapters:\n    - part: "I  One"\n      chapters:\n' + ''.join(f'        - {p}\n' for p in pages))

    def notebook(self, *cells, name='01_x', metadata=STORED):
        for i, cell in enumerate(cells): cell.setdefault('id', f'{i:08x}')
        nb = {'cells': [{**c, 'source': c['source'].splitlines(True)} for c in cells], 'metadata': metadata, 'nbformat': 4, 'nbformat_minor': 5}
        return self.write(f'nbs/{name}.ipynb', json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n')

    def library(self, *cells):
        "The module of `cells` as the exporter writes it, with a list of what is public."
        written = [(i, cell['source'].removeprefix('#| export\n')) for i, cell in enumerate(cells) if cell['source'].startswith('#| export\n')]
        public = re.findall(r'^(?:def|class) ([a-zA-Z]\w*)', '\n'.join(source for _, source in written), re.M)
        return self.write('llm_from_scratch/x.py', ''.join([f'__all__ = {public}\n', *(f'\n# %% ../nbs/01_x.ipynb #{i:08x}\n{source}\n' for i, source in written)]))

    def finds(self, rule): return list(check.RULES[rule](check.Book(self.root)))


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setattr(check, 'WAITING', {})
    return Maker(tmp_path)


def one(found, *words):
    "There is one finding, and it says these words."
    assert len(found) == 1, found
    assert all(w in found[0] for w in words), found[0]


# Each rule: cells that break it, words of the finding; and cells that do not.

DEFINED = '#| export\ndef half(x: int) -> int:\n    "Half of `x`."\n    return x // 2'
CLASS = '#| export\nclass Box:\n    "Holds a value."\n    def __init__(self, value: int): self.value = value\n    def open(self) -> int:\n        "What is inside."\n        return self.value'
HEIR = '#| export\nclass Lid(Box):\n    "A box that is shut."\n    def open(self) -> int: return 0'
CHECK = code('assert half(4) == 2')
FIGURE = '#| label: fig-x-a\n#| fig-cap: "Does it rise?"\n#| fig-alt: "A rising line."\nplot()'

BROKEN = [
    ('ruff', [code(DEFINED.replace('    "Half of `x`."\n', '')), CHECK], ['cell 0: line 2', 'Missing docstring', '(D103)', 'add one sentence']),
    ('ruff', [code(DEFINED.replace('x: int', 'x')), CHECK], ['cell 0: line 2', '`x` (ANN001); annotate it']),
    ('ruff', [code(DEFINED.replace(' -> int', '')), CHECK], ['return type', '`half`']),
    ('ruff', [code(DEFINED.replace('x: int', 'x: int, *rest')), CHECK], ['`*rest` (ANN002)']),
    ('names', [code(DEFINED), code('print(half(4))')], ['no check uses `half`']),
    ('names', [code(DEFINED), code('half(4) == 2')], ['no check uses `half`']),
    ('names', [code(CLASS), code('assert Box(3).value == 3')], ['no check uses `Box.open`']),
    ('ruff', [code(CLASS.replace('        "What is inside."\n', '')), code('assert Box(3).open() == 3')], ['cell 0: line 5', 'public method (D102)']),
    ('ruff', [code(CLASS), code(HEIR.replace('open', 'shut')), code('assert Box(3).open() == Lid(3).shut()')], ['cell 1: line 4', 'public method (D102)']),
    ('ruff', [code(CLASS.replace('value: int', 'value')), code('assert Box(3).open() == 3')], ['cell 0: line 4', '`value` (ANN001)']),
    ('names', [code(DEFINED.replace('    return', '    if x < 0: raise ValueError(x)\n    return')), code('print(half(4))')], ['no check uses `half`']),
    ('names', [code(DEFINED), code('def tried(x):\n    try: return half(x)\n    except TypeError: return 0')], ['no check uses `half`']),
    ('exported', [code('#| export\nassert 1 + 1 == 2')], ['would run on import']),
    ('exported', [code('#| export\nfor i in range(3): table[i] = i')], ['would run on import']),
    ('ruff', [code('#| export\nfrom math import *')], ['cell 0: line 2', '(F403); name what is imported']),
    ('ruff', [code('#| export\ndef f(): print("hello")')], ['cell 0: line 2', '`print` found']),
    ('ruff', [code('#| export\ndef f(x): assert x > 0')], ['cell 0: line 2', '(S101); raise ValueError']),
    ('exported', [code('#| export\ndef f(: pass')], ['does not parse']),
    ('ruff', [code('x == 2\nprint(x)')], ['cell 0: line 1', 'Pointless comparison']),
    ('vacuous', [code('#| timing\nf(x) == 2;')], ['line 2', 'asserts nothing']),
    ('ruff', [code('for x in y: x > 0')], ['Pointless comparison']),
    ('ruff', [code('def f():\n    a == b and c\n    return 1')], ['cell 0: line 2', 'useless expression']),
    ('vacuous', [code('torch.allclose(a, b)\nx')], ['asserts nothing']),
    ('ruff', [code('not broken\nx')], ['useless expression']),
    ('vacuous', [code('assert True')], ['asserts a constant']),
    ('ruff', [code('assert (x == 1, "message")')], ['non-empty tuple']),
    ('vacuous', [code('assert x == x')], ['with itself']),
    ('vacuous', [code('assert a.b[0] is a.b[0]')], ['with itself']),
    ('ruff', [code('y = 1\nassert x == 1 and y == 2 or z')], ['line 2', 'Parenthesize `a and b`']),
    ('ruff', [code('#| timing\n%matplotlib inline\nassert all(z or "é" in x and\n           (y == 2) for x in zs)', stream('1'))], ['line 3', 'Parenthesize `a and b`']),
    ('ruff', [code('assert (x == 1  # ) or (\n        and y or z)')], ['line 1', 'Parenthesize `a and b`']),
    ('vacuous', [code('with pytest.raises((TypeError, Exception)): f()')], ['line 1', 'any error']),
    ('vacuous', [code('def test_it():\n    x = f(1)\n    print(x)')], ['`test_it` asserts nothing']),
    ('ruff', [code('import math')], ['cell 0: line 1', '`math` imported but unused (F401); Remove unused import']),
    ('ruff', [code(CLASS.replace('    "Holds a value."\n', ''))], ['cell 0: line 2', 'public class (D101)']),
    ('ruff', [code('def key(k=[]): return k')], ['cell 0: line 1', '(B006)']),
    ('ruff', [code('import pytest\nwith pytest.raises(): print(1)')], ['cell 0: line 2', '(PT010)']),
    ('ruff', [code('class Box:\n    def __init__(self): yield 1')], ['cell 0: line 2', '(PLE0100)']),
    ('ruff', [code('#| export\ndef f(x: int) -> None:\n    "F."\n    assert x'), code('#| export\ndef g(x: int) -> None:\n    "G."\n    assert x')], ['cell 0: line 4', 'cell 1: line 4']),
    ('ruff', [code('def f(): return undefined_name')], ['Undefined name `undefined_name`']),
    ('ruff', [code('def f(: pass')], ['cell 0', 'invalid-syntax']),
    ('figures', [code('plot()', IMAGE)], ['without a label', 'fig-x-']),
    ('figures', [code(FIGURE.replace('#| fig-alt: "A rising line."\n', ''), IMAGE)], ['fig-x-a', 'no alt text']),
    ('figures', [code(FIGURE.replace('#| fig-cap: "Does it rise?"\n', ''), IMAGE)], ['fig-x-a', 'no caption']),
    ('figures', [code(FIGURE.replace('A rising line.', 'Does it rise?'), IMAGE)], ['repeats the caption']),
    ('figures', [code(FIGURE)], ['no stored picture']),
    ('figures', [code('#| code-fold: true\n#| code-summary: "Solution"\nplot()', IMAGE)], ['solution', 'no alt text']),
    ('figures', [code('#| label: tbl-x-t\ntable()')], ['tbl-x-t', 'no caption']),
    ('figures', [md('![](road.svg)')], ['road.svg', 'neither caption nor alt']),
    ('figures', [md('| a |\n|---|\n| 1 |\n\n{#tbl-x-t}')], ['tbl-x-t', 'no caption']),
    ('references', [md('see @fig-x-none')], ['cell 0', '@fig-x-none, which no page defines']),
    ('references', [md('see @eq-x-none.')], ['cell 0', '@eq-x-none, which no page defines']),
    ('references', [md('see [@nobody2020, p. 3]')], ['@nobody2020', 'references.bib']),
    ('references', [md('# A {#sec-x}'), md('## B {#sec-x}')], ['cell 1', '@sec-x a second time']),
    ('references', [code(FIGURE, IMAGE)], ['cell 0: no sentence refers', 'fig-x-a']),
    ('references', [code('#| export\ndef f():\n    "By @eq-x-none."')], ['docstring', '@eq-x-none']),
    ('references', [code('Markdown(...)', shown(text_markdown='see @tbl-x-none'))], ['cell 0: refers to @tbl-x-none']),
    ('links', [md('[the plan](../PLAN.md)')], ['../PLAN.md', 'no file']),
    ('links', [md('[above](#no-such-place)')], ['no place called #no-such-place']),
    ('remote', [md('![a cat](https://example.org/cat.png)')], ['another host', 'cat.png']),
    ('remote', [md('<iframe src="//example.org/video"></iframe>')], ['another host']),
    ('remote', [code('show()', shown(text_html='<script async src="https://example.org/x.js"></script>'))], ['another host', 'x.js']),
    ('clean', [code('f()', {'output_type': 'error', 'ename': 'KeyError', 'evalue': 'x', 'traceback': []})], ['KeyError']),
    ('clean', [code('f()', stream('a warning', 'stderr'))], ['stderr']),
    ('clean', [code('f', shown(text_plain='<function f at 0x7f00deadbeef>'))], ['address of an object']),
    ('clean', [code('#| timing\nx = 1')], ['timing', 'no output']),
    ('clean', [{**code('f()'), 'execution_count': 3}], ['cell 0', 'execution counts']),
    ('clean', [{**code('f()'), 'metadata': {'collapsed': True}}], ['cell 0', 'metadata']),
    ('clean', [{**code('1'), 'id': 'same'}, {**code('2'), 'id': 'same'}], ['2 cells have the id same']),
    ('options', [code('#| exprot\nx = 1')], ['exprot']),
    ('options', [code('#| export:\nx = 1')], ['has a colon']),
    ('options', [code('#| figcap: "x"\nplot()')], ['no option']),
    ('options', [code('#| fig-subcap:\n#| - left\nplot()')], ['on one line', 'no directive']),
    ('options', [code('x = 1\n#| export\ny = 2')], ['below code']),
    ('width', [code(f'x = "{"a" * 79}"')], ['cell 0', '1 line(s) of more than 80', 'break them']),
    ('absent', [md('As chapter 2 shows.')], ['cell 0: "chapter 2", but the last chapter is 1']),
    ('absent', [md('Chapters 1 and 16 do.')], ['"Chapters 1 and 16"']),
    ('absent', [code('#| fig-cap: "As in chapters 1–4"\nx = 1  # a comment')], ['cell 0: "chapters 1–4"']),
    ('absent', [code('Markdown(...)', shown(text_markdown='see Part II'))], ['"Part II" is not in _quarto.yml']),
    ('words', [md('It is simply a sum.')], ['"simply"']),
    ('words', [md('We just add them.')], ['"just"']),
    ('words', [md('In this section we will add.')], ['In this section we will']),
    ('words', [code('Markdown(...)', shown(text_markdown='a powerful idea'))], ['"powerful"']),
]

FINE = [
    ('names', [code(CLASS), code(HEIR), code('assert Box(3).open() > Lid(3).open()')]),
    ('names', [code(DEFINED), CHECK]),
    ('names', [code(DEFINED), code('def promise(f):\n    assert f(4) == 2'), code('promise(half)')]),
    ('names', [code(DEFINED), code('try: half("4")\nexcept TypeError as e: print(e)')]),
    ('names', [code(CLASS), code('assert Box(3).open() == 3')]),
    ('names', [code('#| export\ndef _private(x): return x\nclass _Hidden:\n    def open(self): return 1')]),
    ('names', [code('def shown_only(x): return x')]),
    ('exported', [code('#| export\n"A module."\nimport math\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING: import torch\nSIZE: int = 3\n' + DEFINED[10:])]),
    ('ruff', [code('print("not exported"); assert 1 < 2')]),
    ('vacuous', [code('x = 2\nx == 2')]),
    ('vacuous', [code('assert x == 2\nassert f(1) == f(1)\nassert x != x')]),
    ('vacuous', [code('def test_it():\n    holds(f)\n\ndef holds(f):\n    assert f(1) == 1')]),
    ('vacuous', [code('%timeit f()\nx == 2')]),
    ('ruff', [code('x = y = z = 1\nassert (x == 1 and y == 2) or z\nassert "é" in x or (  # why\n    (x) and y\n)\nassert x and (y or z) and min(x and y, y or z)\nassert "a and b or c" in x')]),
    ('vacuous', [code('with pytest.raises(Exception, match="too many"): f()\nwith pytest.raises((KeyError, ValueError)): f()')]),
    ('ruff', [code('x = 2\nx == 2'), code('%timeit x\nx == 2')]),
    ('ruff', [code(DEFINED), CHECK]),
    ('ruff', [code(CLASS), code('class Box(Box):\n    def shut(self): return 0'), code('from __future__ import annotations')]),
    ('ruff', [code('#| export\ndef _private(x: int) -> int: return x\nclass _Hidden:\n    def open(self) -> int: return 1'), code('def shown_only(x): return x')]),
    ('ruff', [code('#| export\nfrom jaxtyping import Float\nfrom torch import Tensor\ndef f(x: Float[Tensor, "B T d"], y: Float[Tensor, "D"]) -> None:\n    "Nothing."')]),
    ('figures', [code(FIGURE, IMAGE)]),
    ('figures', [code('#| hide\nplot()', IMAGE)]),
    ('figures', [code('plot()', {**IMAGE, 'data': {'image/svg+xml': ['<svg><title>A line', ' that rises</title></svg>']}})]),
    ('figures', [code('#| code-summary: "Solution"\n#| fig-alt: "A line."\nplot()', IMAGE)]),
    ('figures', [md('![](road.svg){fig-alt="The road."} and ![The road](road.svg)')]),
    ('figures', [md('| a |\n|---|\n| 1 |\n\n: What it holds {#tbl-x-t}')]),
    ('references', [md('# A {#sec-x}\n\n$$ a $$ {#eq-x-a}\n\n@sec-x, @eq-x-a, @fig-x-a, [@sennrich2016].'), code(FIGURE, IMAGE)]),
    ('references', [md('@fig-x-a'), code(FIGURE.replace('plot()', '#| fig-subcap: ["one", "two"]\nplot()'), IMAGE, IMAGE)]),
    ('references', [md('@fig-x-a and @fig-x-a-2'), code(FIGURE.replace('plot()', '#| fig-subcap: ["one", "two"]\nplot()'), IMAGE, IMAGE)]),
    ('references', [md('`@fig-x-none`, ada@example.org, \\@handle\n\n```python\n@patch\ndef f(): ...\n```')]),
    ('links', [md('# A {#sec-x}\n\n## What comes next\n\n[a](#sec-x) [b](#what-comes-next) [c](../settings.ini) [d](https://example.org) [e](01_x.ipynb#sec-x)')]),
    ('remote', [md('[a link](https://example.org/cat.png) and\n\n```html\n<script src="https://example.org/x.js"></script>\n```')]),
    ('remote', [code('plot()', shown(text_html='<svg xmlns="http://www.w3.org/2000/svg"><a href="https://example.org">x</a></svg>'))]),
    ('clean', [code('f()', stream('text')), code('#| timing\nf()', stream('1 s'))]),
    ('options', [code(FIGURE), code('#| default_exp x'), code('#| export\nx = 1'), code('# a comment | with a bar\nx = 1')]),
    ('width', [code(f'#| fig-cap: "{"a" * 95}"\nx = "{"a" * 74}"'), code(f'#| echo: false\nx = "{"a" * 95}"')]),
    ('absent', [md('Chapter 1, a later chapter, 16 chapters, Part I, part of it, `chapter 9`, Part Iván.')]),
    ('words', [md('Exact and adjustable: `simply` is quoted, the sum is just below.\n\n```python\njust = 1\n```')]),
]


def ids(cases): return [f"{c[0]}-{i}" for i, c in enumerate(cases)]


@pytest.mark.parametrize('rule, cells, words', BROKEN, ids=ids(BROKEN))
def test_the_rule_finds(book, rule, cells, words):
    if rule == 'ruff': book.library(*cells)
    found = book.notebook(*cells).finds(rule)
    assert found and all(any(w in sentence for sentence in found) for w in words), found


@pytest.mark.parametrize('rule, cells', FINE, ids=ids(FINE))
def test_the_rule_leaves_alone(book, rule, cells):
    if rule == 'ruff': book.library(*cells)
    assert book.notebook(*cells).finds(rule) == []


def test_a_fault_in_a_class_that_grew_is_found_in_the_cell_that_wrote_it(book):
    grown = '#| export\nclass Box(Box):\n    def shut(self): return 0'
    book.notebook(code(CLASS), code(grown)).library(code(CLASS + '\n    def shut(self): return 0'))
    found = book.finds('ruff')
    assert len(found) == 2 and all(f.startswith('01_x: cell 1: line 3: ') for f in found), found


def test_ruff_that_cannot_run_is_no_pass(book):
    one(book.write('pyproject.toml', '[tool.ruff.lint]\nselect = ["no-such-rule"]\n').finds('ruff'), 'ruff did not run', 'no-such-rule')


def test_every_rule_is_tried_both_ways():
    apart = {'anywhere', 'machine', 'step', 'anatomy', 'classes', 'core', 'diagrams', 'glossary', 'form', 'waiting'}                       # these have tests of their own below
    assert {c[0] for c in BROKEN} | apart == set(check.RULES) == {c[0] for c in FINE} | apart


def test_a_sentence_that_code_will_write_is_no_code_to_the_reader(book):
    cells = [code('a = 1'), code('b = 2'), code('#| echo: false\nMarkdown(f"{a}")'), code('c = 3')]
    assert not any('third' in f for f in book.notebook(*cells).finds('anatomy'))


# Tests under the rules --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, words', [
    ('def test_a():\n    f(1) == 1\n', 'Pointless comparison'), ('def test_a():\n    f(1) == 1\n', 'asserts nothing'), ('def test_a():\n    f(1)\n', '`test_a` asserts nothing'), ('def test_a():\n    assert True\n', 'constant'), ('def test_a():\n    subprocess.run(["false"], check=False)\n', 'asserts nothing'),
    ('import pytest\ndef test_a():\n    pytest.skip()\n    assert x\n', 'without a reason'), ('import pytest\n@pytest.mark.skip\ndef test_a(): assert x\n', 'without a reason'),
    ('import pytest\n@pytest.mark.skipif(x, reason="")\ndef test_a(): assert x\n', 'without a reason'), ('def test_a():\n    assert f(1) == 1 and "é" in x or f(2)\n', 'Parenthesize `a and b`')])
def test_tests_are_held_to_the_rule(book, text, words):
    found = book.write('tests/test_x.py', text).finds('vacuous') + book.finds('ruff')
    assert any(f.startswith('tests/test_x.py: line') and words in f for f in found), found


def test_a_picture_that_other_code_or_other_results_have_drawn_is_stale(book):
    import nb
    def stored(source, of): return {**code(source, IMAGE), 'metadata': {'drawn_from': of}}
    def finds(*cells): return [f for f in book.notebook(*cells).finds('clean') if 'picture' in f]
    source, path = '#| label: fig-x-a\nplot(results["depth"])', book.root/'nbs'/'01_x.ipynb'
    book.write('nbs/results/depth.json', '{"runs": 1}').write('nbs/results/other.json', '{"runs": 1}').notebook(code(source))
    drawn = nb.drawn_from(path, source)
    assert finds(stored(source, drawn)) == [] == finds(code(source, IMAGE))
    one(finds(stored(source + '  # again', drawn)), 'older than its code or the results')
    book.write('nbs/results/other.json', '{"runs": 2}')                   # which this notebook does not name
    assert finds(stored(source, drawn)) == []
    book.write('nbs/results/depth.json', '{"runs": 2}')
    one(finds(stored(source, drawn)), 'older than its code or the results')


def test_honest_tests_pass(book):
    text = ('import pytest\nimport torch\ndef test_a():\n    with pytest.raises(ValueError): f()\ndef test_b(): torch.testing.assert_close(a, b)\n'
            'def test_c(): pytest.skip("needs a GPU"); assert x\n@pytest.mark.skipif(x, reason="needs java")\ndef test_d(): holds(1)\ndef test_e(): subprocess.run(["true"], check=True)\ndef holds(x): assert x == f(1)\n')
    assert book.write('tests/test_x.py', text).finds('vacuous') == []


def test_a_check_in_tests_counts(book):
    book.notebook(code(DEFINED))
    one(book.finds('names'), 'no check uses `half`')
    book.write('tests/test_x.py', 'def test_half(): assert half(4) == 2\n')
    assert book.finds('names') == []


# Files ------------------------------------------------------------------------------------------------------------

# written in two pieces, because this file is checked as well
LOCAL = ['/ho' 'me/ada/book/x.py', '/Us' 'ers/ada/x', 'C:' '\\Users\\ada', '/usr/lib/python3/site' '-packages/x.py', 'https://pypi.example.org/sim' 'ple', 'https://ada:secret' '@example.org/x']


@pytest.mark.parametrize('text', LOCAL)
def test_addresses_of_one_machine_are_found(book, text): one(book.write('tools/x.py', f'a = 1\npath = "{text}"\n').finds('machine'), 'tools/x.py: line 2', 'machine' if 'http' not in text else 'registry')


def test_the_path_of_the_checkout_is_found_in_an_output(book):
    one(book.notebook(code('print(p)', stream(f'{book.root.as_posix()}/nbs\n'))).finds('machine'), 'nbs/01_x.ipynb', 'path of this checkout')


def test_ordinary_paths_are_left_alone(book):
    assert book.write('tools/x.py', 'a = "/usr/bin/env", "nbs/home/x", "https://example.org/simple-things", "~/book"\n').finds('machine') == []


@pytest.mark.parametrize('name, text', [('tools/theme/x.css', '@import url("https://fonts.example.org/css");'), ('tools/theme/x.css', 'a {background: url(//example.org/x.png)}'),
                                        ('tools/theme/x.js', 'fetch("https://example.org/count")'), ('index.qmd', '<img alt="x" src="https://example.org/x.png">'),
                                        ('README.md', '![badge](https://example.org/badge.svg)'), ('tools/theme/x.html', '<link rel="stylesheet" href="https://example.org/x.css">')])
def test_remote_files_are_found(book, name, text): one(book.write(name, text + '\n').finds('remote'), name, 'another host')


def test_links_to_other_hosts_are_not_loads(book):
    book.write('tools/theme/x.html', '<link rel="canonical" href="https://example.org/"><a href="https://example.org">x</a>\n')
    assert book.finds('remote') == []


def test_links_in_documents(book):
    book.write('README.md', '# Title\n\n[a](LICENSE) [b](#title) [c](docs/x.md#part)\n').write('docs/x.md', '# Other\n')
    found = book.finds('links')
    assert len(found) == 2 and 'LICENSE' in found[0] and 'docs/x.md has no place called #part' in found[1]


def test_a_notebook_that_was_never_run(book):
    metadata = {k: v for k, v in STORED.items() if k != 'stored_with'}
    one(book.notebook(code('1'), metadata=metadata).finds('clean'), 'never run')


def test_a_file_written_by_an_editor(book):
    book.notebook(code('1'))
    path = book.root/'nbs'/'01_x.ipynb'
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8'))), encoding='utf-8')
    one(book.finds('clean'), 'nbdev_clean')


def test_two_entries_of_one_key(book):
    one(book.notebook(md('x')).write('references.bib', '@book{a1, title={A}}\n@book{a1, title={B}}\n').finds('references'), 'a1 is defined 2 times')


# Step -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A book whose library was exported."
    book = Maker(tmp_path_factory.mktemp('exported')).notebook(md('# X {#sec-x}'), code('#| default_exp x'), code(DEFINED))
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=book.root, check=True)
    return book.root


@pytest.fixture
def in_step(exported, tmp_path):
    shutil.copytree(exported, tmp_path/'book')
    return Maker(tmp_path/'book')


def test_a_book_as_it_was_exported(in_step): assert in_step.finds('step') == []


def test_a_module_edited_by_hand(in_step):
    path = in_step.root/'llm_from_scratch'/'x.py'
    path.write_text(path.read_text(encoding='utf-8').replace('x // 2', 'x / 2'), encoding='utf-8')
    one(in_step.finds('step'), 'llm_from_scratch/x.py', 'differs')


def test_a_notebook_that_was_not_exported(in_step):
    in_step.notebook(md('# X {#sec-x}'), code('#| default_exp x'), code(DEFINED + '\n\ndef third(x: int) -> int:\n    "A third."\n    return x // 3'))
    assert sorted(f.partition(':')[0] for f in in_step.finds('step')) == ['llm_from_scratch/_modidx.py', 'llm_from_scratch/x.py']


@pytest.mark.parametrize('text, words', [
    ('class _Half: pass\nclass Whole(_Half): pass\n', 'class _Half has one heir'), ('class Whole: pass\nclass Whole(Whole): x = 1\n', 'class Whole stands 2 times'),
    ('class _Base: pass\nclass One(_Base): pass\nclass Two(_Base): pass\n', None), ('class Base: pass\nclass Heir(Base): pass\n', None)])
def test_one_class_is_one_statement(book, text, words):
    found = book.write('llm_from_scratch/x.py', text).finds('classes')
    assert found == [] if words is None else len(found) == 1 and words in found[0]


def test_a_module_without_a_notebook(in_step): one(in_step.write('llm_from_scratch/stray.py', 'x = 1\n').finds('step'), 'stray.py', 'no notebook exports it')


def test_a_module_that_is_missing(in_step):
    (in_step.root/'llm_from_scratch'/'_modidx.py').unlink()
    one(in_step.finds('step'), '_modidx.py', 'is missing')


def test_a_notebook_that_cannot_be_exported(in_step):
    in_step.notebook(code('#| default_exp x'), code('#| export\ndef f(: pass'))
    one(in_step.finds('step'), 'cannot be exported')


@pytest.mark.parametrize('pages, words', [([], 'does not list nbs/01_x.ipynb'), (['nbs/01_x.ipynb'] * 2, 'lists nbs/01_x.ipynb 2 times'), (['nbs/01_x.ipynb', 'nbs/02_y.ipynb'], 'which does not exist')])
def test_contents_and_notebooks(in_step, pages, words):
    found = in_step.contents(*pages).finds('step')
    assert found and all('_quarto.yml' in f for f in found) and any(words in f for f in found), found


def test_a_symbol_index_that_is_out_of_step(in_step):
    page = in_step.root/'nbs'/'symbols.qmd'
    page.write_text(nbfilter.symbol_index(page.parent), encoding='utf-8')
    assert in_step.finds('step') == []
    in_step.notebook(md('# X {#sec-x}'), code('#| default_exp x'), code(DEFINED.replace('half', 'third')))
    assert 'nbs/symbols.qmd: is out of step with the notebooks; `make export` writes it' in in_step.finds('step')
    in_step.notebook(md('# X {#sec-x}'), code('#| default_exp x'), code('#| export\ndef f(: pass'))
    one(in_step.finds('step'), 'cannot be exported')


def test_the_order_of_chapters(in_step):
    in_step.notebook(md('# Y'), name='02_y').contents('nbs/02_y.ipynb', 'nbs/01_x.ipynb')
    one(in_step.finds('step'), 'order')


# Anatomy ----------------------------------------------------------------------------------------------------------

def solution(text='assert f(1) == 1'): return code(f'#| code-fold: true\n#| code-summary: "Solution"\n{text}')


def chapter():
    "The cells of a chapter with every part."
    exercises = [c for i in range(1, 5) for c in (md(f'**{i}.** Do it. *Target:* done.'), solution())]
    return [md('# X {#sec-x}\n\nAfter this you can.'), code('#| default_exp x'), md('::: {.callout-note title="You will build"}\n`f`.\n:::'), code('def f(x): return x'),
            md('## What can go wrong'), code('try: f()\nexcept TypeError as e: print(e)', stream('no')), md('## Exercises'), *exercises, md('## Recap')]


def test_a_whole_chapter(book): assert book.notebook(*chapter()).finds('anatomy') == []


def test_an_appendix_needs_no_anatomy(book): assert book.notebook(md('# Figures'), name='figures').finds('anatomy') == []


@pytest.mark.parametrize('at, with_, words', [
    (0, md('# X'), 'does not open with'), (1, code('pass'), 'no cell `#| default_exp x`'), (2, md('nothing'), '"You will build"'), (4, md('nothing'), 'What can go wrong'),
    (6, md('## Exercises\n\n# Another title'), 'second title'), (8, solution('f(1)'), 'exercise 1 does not assert'), (8, md('nothing'), 'exercise 1 has no solution'),
    (8, code('#| code-summary: "Solution"\nassert f(1) == 1'), 'lies open'), (15, md('nothing'), 'Recap'), (13, md('nothing'), 'has 3 exercises'),
    (3, code('x = 1\n' * 41), '41 lines')])
def test_a_chapter_that_lacks(book, at, with_, words):
    cells = chapter()
    cells[at] = with_
    found = book.notebook(*cells).finds('anatomy')
    assert any(words in f for f in found), found


def test_a_third_code_cell_in_a_row(book):
    cells = chapter()
    cells[3:4] = [code('a = 1'), code('b = 2'), code('c = 3'), code('d = 4')]
    one(book.notebook(*cells).finds('anatomy'), 'cell 5', 'third code cell')


def test_solutions_may_check_through_a_function(book):
    cells = chapter()
    cells[3] = code('def holds(f):\n    assert f(1) == 1')
    cells[8] = solution('holds(f)')
    assert book.notebook(*cells).finds('anatomy') == []


# The second edition -----------------------------------------------------------------------------------------------

CALLOUT = '::: {.callout-note title="You will build"}\n`f`. *You need:* nothing. *Reading time:* 1 minute. *Running time:* seconds on two cores.\n:::'
TROUBLE = '**Symptom:** it fails. **Cause:** a reason. **Cure:** this.\n\n**Symptom:** it fails. **Cause:** another. **Cure:** that.'


def exercise(i, kind): return md(f'**{i}.** *{kind} · easy · 5 min.* Do it.\n\n::: {{.callout-tip collapse="true" title="Hint"}}\nLook.\n:::')


def second():
    "The cells of a chapter of the second edition with every part."
    exercises = [c for i, kind in enumerate(('Predict', 'Paper', 'Explain', 'Implement'), 1) for c in (exercise(i, kind), solution('# Idea: it is so.\nassert f(1) == 1'))]
    return [md('# X {#sec-x}\n\nAfter this chapter you can do it.'), code('#| default_exp x'), code('#| echo: false\npipeline("ids")'), md(CALLOUT), code('def f(x): return x'),
            md('## What can go wrong\n\n' + TROUBLE), md('## Exercises'), *exercises, md('## Recap'), md('## Going deeper {#sec-x-deeper}'), code('a = 1')]


def test_a_chapter_of_the_second_edition(book):
    book.notebook(*second())
    assert [book.finds(rule) for rule in ('form', 'anatomy', 'core')] == [[], [], []]


@pytest.mark.parametrize('at, with_, words', [
    (0, md('# X {#sec-x}\n\nIt is about x.'), 'no promise'), (0, md('# X {#sec-x}\n\nAfter this chapter you can. And more.'), 'no promise'), (2, md('Words.'), 'where it is in the pipeline'),
    (16, md('## Going deeper: other things'), 'no section `## Going deeper`'), (3, md(CALLOUT.replace('*You need:*', 'With')), 'what the reader needs'),
    (3, md(CALLOUT.replace('Running', 'Walking')), 'how long the chapter runs'), (3, md(CALLOUT.replace('Reading', 'Drawing')), '`*Reading time:* 1 minutes.`'),
    (3, md(CALLOUT.replace('1 minute', '40 minutes')), 'says 40 minutes of reading, the core path takes 1'),
    (5, md('## What can go wrong\n\nMuch.'), 'fewer than two troubles'), (5, md('## What can go wrong\n\n' + TROUBLE.replace('**Cause:** another. ', '')), 'Symptom, Cause, Cure, Symptom, Cure: a trouble'),
    (7, md('**1.** Do it.'), 'exercise 1 does not begin like'), (7, exercise(1, 'Guess'), 'the kinds are Explain'), (9, exercise(2, 'Predict'), 'no exercise of the kind Paper'),
    (7, md('**1.** *Predict · easy · 5 min.* Do it.'), 'exercise 1 has no hint'), (8, solution(), 'the solution of exercise 1 does not say its idea')])
def test_a_chapter_of_the_second_edition_that_lacks(book, at, with_, words):
    cells = second()
    cells[at] = with_
    found = book.notebook(*cells).finds('form')
    assert found and any(words in f for f in found), found


def test_the_tour_needs_no_strip_and_goes_no_deeper(book):
    cells = second()
    del cells[16], cells[2]
    assert book.notebook(*cells, name='00_x').contents('nbs/00_x.ipynb').finds('form') == []


def test_a_core_path_that_is_too_long(book):
    lines = code('a = 1\n' * 31)
    book.notebook(*[dict(lines) for _ in range(10)], md('## Going deeper'), dict(lines))
    one(book.finds('core'), '01_x', 'has 310 lines of visible code, the limit is 300')
    assert book.notebook(*[dict(lines) for _ in range(9)], code('#| code-fold: true\n' + 'b = 1\n' * 30), md('## Going deeper'), *[dict(lines) for _ in range(9)]).finds('core') == []


FIGURES = [md('# Figures'), code('#| export\ndef picture(*parts: str) -> SVG: return SVG("")\ndef cells(x: int) -> str: return ""\ndef use_style() -> None: pass')]
IMPORT = code('from llm_from_scratch.figures import cells, picture, use_style')
WEIGHTS = code('weights = softmax(scores)\nname = "a constant"')


@pytest.mark.parametrize('text, n', [
    ('picture(cells(weights))', 1), ('w = weights[0]; picture(w)', 1), ('picture("text")', 0), ('picture(name)', 0), ('ax.plot(weights)', 0), ('use_style(); ax.plot(weights)', 0),
    ('cells = len(weights)', 0)])
def test_what_counts_as_a_diagram(book, text, n):
    "Drawn with helpers that return a drawing, and from what the chapter has computed."
    book.notebook(*FIGURES, name='figures').notebook(IMPORT, WEIGHTS, code(f'#| label: fig-x-a\n{text}'))
    one(book.finds('diagrams'), f'01_x: has {n} diagram(s)')


def test_two_diagrams_are_enough_also_through_a_function_of_the_chapter(book):
    drawn = code('def show(w): return picture(cells(w))')
    book.notebook(*FIGURES, name='figures').notebook(IMPORT, WEIGHTS, drawn, code('#| label: fig-x-a\nshow(weights)'), code('#| label: fig-x-b\npicture(weights)'))
    assert book.finds('diagrams') == []
    book.notebook(WEIGHTS, code('from sketches import picture'), code('#| label: fig-x-a\npicture(weights)'), code('#| label: fig-x-b\npicture(weights)'))
    one(book.finds('diagrams'), '01_x: has 0 diagram(s)')                   # a function of that name that comes from elsewhere


ENTRY = '[KV cache]{#term-kv-cache} [(also cache of keys)]{.also}\n:   What is kept. Defined in @sec-x-a.\n'
HOME = '# X {#sec-x}\n\n## A {#sec-x-a}\n\nIt is the **KV cache**.\n\n## B {#sec-x-b}\n\nThe **cache of values**.'


@pytest.mark.parametrize('entries, text, words', [
    (ENTRY, HOME, None), (ENTRY, HOME.replace('**KV cache**', '**caches of keys** (KV)'), '01_x: @sec-x-a never says **KV cache**'), (ENTRY, HOME.replace('**KV cache**', '**cache of keys (old)**'), None),
    (ENTRY, HOME.replace('**KV cache**', 'KV cache'), '01_x: @sec-x-a never says **KV cache**'), (ENTRY.replace('x-a.', 'x-b.'), HOME, '@sec-x-b never says'), (ENTRY.replace('x-a.', 'x.'), HOME, None),
    (ENTRY.replace('x-a.', 'x-c.'), HOME, 'the home of `KV cache`, @sec-x-c, is no section'), (ENTRY.replace('Defined in', 'See'), HOME, '`KV cache` is no entry'),
    (ENTRY.replace('#term-kv-cache', '#term-cache'), HOME, 'write #term-kv-cache'), (ENTRY.replace('kept.', 'kept. And more.'), HOME, 'not defined in one sentence'),
    (ENTRY.replace('What', 'what'), HOME, 'not defined in one sentence'), (ENTRY + '\n' + ENTRY, HOME, 'each term once'),
    (ENTRY + '\n' + ENTRY.replace('KV cache', 'B').replace('kv-cache', 'b').replace('cache of keys', 'KV cache'), HOME, '`B` stands behind `KV cache`'),
    (ENTRY + ENTRY.replace('KV cache', 'L').replace('kv-cache', 'l').replace('cache of keys', 'KV cache'), HOME, '`L` follows the entry before it without an empty line')])
def test_a_term_of_the_glossary_has_a_home_that_says_it(book, entries, text, words):
    found = book.notebook(md(text)).write('nbs/glossary.qmd', f'# Glossary {{#sec-glossary}}\n\n{entries}').finds('glossary')
    if words is None: assert found == []
    else: one(found, words)


# The list of pages that wait ----------------------------------------------------------------------------------------

def test_a_page_that_waits_is_excused_until_it_has_no_fault_left(book, monkeypatch):
    monkeypatch.setattr(check, 'WAITING', {'x': 'width, absent, form, core, diagrams'})
    book.notebook(code(f'x = "{"a" * 79}"'), md('See chapter 9.'))
    assert book.finds('width') == book.finds('absent') == book.finds('form') == book.finds('diagrams') == []
    one(book.finds('core'), '01_x: has no fault left; strike `core` from its line in WAITING')
    one(book.notebook(code(f'x = "{"a" * 95}"')).finds('width'), 'more than 96')
    one(book.notebook(code('x = 1')).finds('width'), 'strike `width`')


def test_a_term_that_waits_is_excused_until_its_home_says_it(book, monkeypatch):
    monkeypatch.setattr(check, 'WAITING', {'x': 'term-kv-cache'})
    book.notebook(md(HOME.replace('**KV cache**', 'KV cache'))).write('nbs/glossary.qmd', ENTRY)
    assert book.finds('glossary') == []
    one(book.notebook(md(HOME)).finds('glossary'), 'says `KV cache` in bold; strike `term-kv-cache`')
    one(book.write('nbs/glossary.qmd', '# Glossary\n').finds('glossary'), '`term-kv-cache` has another home, or none; strike it')


@pytest.mark.parametrize('waiting, words', [({'y': 'core'}, '`y` is no page of the book'), ({'x': 'core, words'}, '`words` excuses nothing'), ({'x': 'core, term-a, width'}, None)])
def test_the_list_names_pages_and_rules(book, monkeypatch, waiting, words):
    monkeypatch.setattr(check, 'WAITING', waiting)
    found = book.notebook(md('# X')).finds('waiting')
    assert found == [] if words is None else len(found) == 1 and words in found[0], found


# The command ------------------------------------------------------------------------------------------------------

def test_the_report_says_the_reason_once_and_counts(book, capsys):
    book.notebook(md('It is simply just so.'), code('#| exprot\nx = 1'))
    assert check.report(check.Book(book.root), ['words', 'options', 'links']) == 3
    out = capsys.readouterr().out
    assert out.count(check.RULES['words'].__doc__) == 1 and '01_x: cell 0: "simply"; strike it' in out and 'links' not in out


@pytest.mark.parametrize('rule', check.RULES)
def test_every_rule_has_a_reason_and_a_place_in_the_guide(rule):
    assert len(check.RULES[rule].__doc__) > 40
    assert f'| `{rule}` |' in (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')


def test_an_unknown_rule_is_named():
    with pytest.raises(SystemExit, match="no rule is called 'fitures'"): check.main(['fitures'])


def test_every_notebook_begins_with_the_cell_that_brings_the_library(book):
    "In the version of the page: a notebook whose cell names another one is found."
    settings = read_settings(book.root)
    begun = {'cells': [md('# A {#sec-x}'), code('a = 1')]}
    book.notebook(*begun['cells'])
    one(book.finds('anywhere'), '01_x', '--mend')
    for _ in range(2): anywhere.begin(begun, settings)               # once is enough, twice does no harm
    assert [c.get('id') for c in begun['cells']].count(anywhere.ID) == 1 and begun['cells'][1]['id'] == anywhere.ID
    assert f"tags/v{settings['version']}.zip" in ''.join(begun['cells'][1]['source'])
    cells = [{**c, 'source': ''.join(c['source'])} for c in begun['cells']]
    assert not book.notebook(*cells).finds('anywhere')
    book.write('settings.ini', (ROOT/'settings.ini').read_text(encoding='utf-8').replace(f"version = {settings['version']}", 'version = 99.0.0'))
    one(book.finds('anywhere'), '01_x')


@pytest.mark.parametrize('version, reference', [('0.2.0', 'tags/v0.2.0'), ('0.3.0.dev0', 'heads/main')])
def test_a_version_in_development_is_the_branch(version, reference):
    settings = {'user': 'someone', 'repo': 'small', 'branch': 'main', 'version': version}
    said = anywhere.first_cell(settings)
    assert f'/archive/refs/{reference}.zip"' in said and 'https://github.com/someone"' in said
    assert all(len(line) <= check.WIDTH for line in said.splitlines())
    for where, address in anywhere.addresses('nbs/01_x.ipynb', settings).items(): assert where == 'Codespaces' or reference.partition('/')[2] in address
