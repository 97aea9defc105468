"The examples in the docstrings of the library: each public function and class has one, and all of them hold."
import ast, doctest, importlib
from functools import cache

import pytest
from conftest import ROOT

INPUTS = ['llm_from_scratch/*.py', 'llm_from_scratch/models/*/*']
MODULES = sorted(p.stem for p in (ROOT/'llm_from_scratch').glob('*.py') if not p.stem.startswith('_'))
HOW = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@cache
def module(name): return importlib.import_module(f'llm_from_scratch.{name}')


def examples(name):
    "The examples of one module, by the name of what they belong to."
    found = doctest.DocTestFinder(exclude_empty=True).find(module(name), name)
    return {test.name.removeprefix(f'{name}.'): test for test in found if test.examples}


@pytest.mark.parametrize('name', MODULES)
def test_every_example_holds(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=HOW)
    said = []
    for test in examples(name).values(): runner.run(test, out=said.append)
    assert not runner.failures, ''.join(said)


def public(name):
    "The functions and classes of a module that are meant for users."
    tree = ast.parse((ROOT/'llm_from_scratch'/f'{name}.py').read_text(encoding='utf-8'))
    return [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in module(name).__all__]


def test_every_public_name_has_an_example():
    missing = [f'{name}.{thing}' for name in MODULES if hasattr(module(name), '__all__') for thing in public(name)
               if not any(key.partition('.')[0] == thing for key in examples(name))]
    assert not missing, f'{len(missing)} without an example: {" ".join(missing)}'
