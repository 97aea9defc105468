"A class that grows in a notebook is one class in the library, and the same one."
import ast, json, re

import grow
import nb
import pytest

INPUTS = ['nbs/*.ipynb', 'llm_from_scratch/*.py']

NOTEBOOK = ['''
from functools import partial
''', '''
class Shape:
    "Something with sides."
    def __init__(self, *sides): self.sides = sides
''', '''
class Shape(Shape):
    # why: a polygon is closed
    unit = "cm"

    def around(self) -> float:
        "The sum of the sides."
        return total(self.sides)          # defined below

    @property
    def n(self): return len(self.sides)

def total(sides): return sum(sides)
''', '''
class Shape(Shape): limit: int = 3
''']


def module(*cells): return '\n'.join(f'# %% ../nbs/01_x.ipynb #c{i}{c}' for i, c in enumerate(cells))


def space(source):
    found = {}
    exec(source, found)
    return found


def test_one_statement_that_does_what_the_slices_do():
    text = grow.merged(module(*NOTEBOOK))
    assert text.count('class Shape') == 1 and ast.get_docstring(ast.parse(text).body[1]) == 'Something with sides.'
    assert '# why: a polygon is closed' in text and '# defined below' in text
    grown, whole = (space(s)['Shape'](3, 4, 5) for s in ('\n'.join(NOTEBOOK), text))
    for shape in (grown, whole): assert (shape.around(), shape.n, shape.unit, shape.limit) == (12, 3, 'cm', 3)
    assert len(type(whole).__mro__) == 2 < len(type(grown).__mro__)


def test_what_does_not_grow_is_left_as_it_is():
    text = module(NOTEBOOK[0], NOTEBOOK[1])
    assert grow.merged(text) == text


def test_decorated_classes_grow_with_the_same_decorator():
    first, more = '\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\nclass Point:\n    x: int\n', '\n@dataclass(frozen=True)\nclass Point(Point):\n    y: int = 0\n'
    text = grow.merged(module(first, more))
    assert text.count('@dataclass') == 1 and repr(space(text)['Point'](1)) == 'Point(x=1, y=0)'


def test_methods_need_no_decorator_and_fields_do():
    first = '\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\nclass Point:\n    x: int\n'
    text = grow.merged(module(first, '\nclass Point(Point):\n    def twice(self): return 2 * self.x\n'))
    assert space(text)['Point'](3).twice() == 6
    with pytest.raises(grow.Refused, match='decorate the slice'): grow.merged(module(first, '\nclass Point(Point):\n    y: int = 0\n'))


@pytest.mark.parametrize('more, words', [
    ('class Shape(Shape):\n    def around(self): return 1\nclass Shape(Shape):\n    def around(self): return 2', 'around is defined twice'),
    ('class Shape(Shape):\n    def __init__(self): self.sides = ()', '__init__ is defined twice'),
    ('class Shape(Shape):\n    def other(self): return super().__init__()', r'super\(\).__init__'),
    ('class Shape(Shape):\n    "Another."\n    x = 1', 'docstring'),
    ('class Shape(Shape, dict):\n    x = 1', 'only base'),
    ('class Shape(Shape, metaclass=type):\n    x = 1', 'only base'),
    ('@partial\nclass Shape(Shape):\n    x = 1', 'decorated otherwise'),
    ('START = 3\nclass Shape(Shape):\n    def around(self, start=START): return start', 'needs START'),
    ('class Unit: pass\nclass Shape(Shape):\n    def around(self, unit: Unit) -> float: return 1', 'the type Unit is not defined yet'),
    ('class Shape(Shape):\n    def around(self) -> Shape: return self', 'from __future__ import annotations'),
    ('class Shape:\n    "Again."', 'defined twice'),
    ('class Other(Other):\n    x = 1', 'no cell before it begins')])
def test_a_slice_that_would_mean_something_else_is_refused(more, words):
    with pytest.raises(grow.Refused, match=words): grow.merged(module(NOTEBOOK[0], NOTEBOOK[1], f'\n{more}\n'), 'shapes.py')


def exported(notebook):
    "The exported cells of a notebook, as a kernel would run them."
    cells = [''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    return '\n'.join(c for c in cells if re.match(r'#\| exporti?\n', c))


GROWING = [(p, name) for p in sorted(nb.NBS.glob('*.ipynb')) for name in
           sorted({n.name for n in ast.parse(exported(p)).body if isinstance(n, ast.ClassDef) and grow.grows(n)})]


@pytest.mark.parametrize('notebook, name', GROWING, ids=[name for _, name in GROWING])
def test_every_class_that_grows_is_whole_in_the_library(notebook, name):
    "Every member of every slice stands in the one statement, with the same code."
    module = (nb.LIBRARY/f"{re.sub('^[0-9]+_', '', notebook.stem)}.py").read_text(encoding='utf-8')
    whole, = (n for n in ast.parse(module).body if isinstance(n, ast.ClassDef) and n.name == name)
    slices = [n for n in ast.parse(exported(notebook)).body if isinstance(n, ast.ClassDef) and n.name == name]
    assert len(slices) > 1 and not grow.grows(whole)
    parts = [ast.dump(item) for s in slices for item in s.body]
    assert [ast.dump(item) for item in whole.body] == parts
