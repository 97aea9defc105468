"""What a test depends on: the files it names in `INPUTS`, and all that its own code imports, found by reading.

An entry of `INPUTS` is a glob from the root, or one of

    cells:nbs/07_x.ipynb     the code cells of a notebook and their outputs: a typo in its prose changes nothing
    imports:nbs/07_x.ipynb   what the code cells of a notebook import, and the stored results they name
    imports:tools/nb.py      a Python file and what it imports, all the way down
    page:nbs/07_x.html       a page as it was built; every source of the book, where `_site` is out of date
    text:...                 these words themselves

A test module without `INPUTS` depends on everything.
"""
import ast, hashlib, json, re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = 'llm_from_scratch'
EVERYTHING = ['llm_from_scratch/*.py', 'llm_from_scratch/models/*/*', 'llm_from_scratch/pages/*', 'nbs/*', 'nbs/results/*', 'tests/*.py', 'tools/**/*', 'benchmarks/**/*', '*.*', 'Makefile', '.ci/run', '.github/**/*']
FRONT = ROOT/LIBRARY/'__init__.py'                    # loads a module when one of its names is asked for
SHARED = ['tests/conftest.py', 'tests/inputs.py', 'tests/costs.py', 'constraints.txt', 'pyproject.toml']
SOURCES = ['_quarto.yml', 'settings.ini', '*.qmd', '*.bib', 'nbs/*', 'nbs/images/*', 'tools/*', 'tools/theme/*']


@cache
def content(entry):
    "A hash of what an entry of `INPUTS` stands for."
    kind, _, name = entry.partition(':') if ':' in entry else ('', '', entry)
    if kind == 'text': return digest([name.encode()])
    if kind == 'cells': return digest([cells(ROOT/name)])
    if kind == 'page': return digest([page(name)])
    paths = imported(ROOT/name) if kind == 'imports' else [p for p in ROOT.glob(entry) if p.is_file() and '__pycache__' not in p.parts]
    return digest(part for p in sorted(paths) for part in (p.relative_to(ROOT).as_posix().encode(), p.read_bytes()))


def digest(parts): return hashlib.sha256(b'\0'.join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def state(parts, file, inputs):
    "A hash of everything that the outcome of a test of `file` depends on."
    own = f'imports:{Path(file).relative_to(ROOT).as_posix()}'
    return digest([*(p.encode() for p in parts), *(content(e).encode() for e in [*SHARED, own, *inputs])])


# Notebooks and pages ----------------------------------------------------------------------------------------------

def code_cells(notebook):
    return [c for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def cells(notebook):
    "The code cells of a notebook with what they put out, and what they were run with."
    stored = json.loads(notebook.read_text(encoding='utf-8'))['metadata'].get('stored_with')
    return json.dumps([stored, [[c['source'], c['outputs']] for c in code_cells(notebook)]]).encode()


def page(name):
    "A page of the site; where the site is older than its sources, all of them."
    import build
    from book import load_book
    stamp = ROOT/'.cache'/'_site.stamp'
    wanted = build.fingerprint(load_book(ROOT), list(build.FORMATS))
    if (ROOT/'_site'/name).is_file() and stamp.is_file() and stamp.read_text(encoding='utf-8').startswith(wanted): return (ROOT/'_site'/name).read_bytes()
    return ''.join(map(content, SOURCES)).encode()


# Imports ----------------------------------------------------------------------------------------------------------

@cache
def imported(path):
    "The files of this repository that a Python file or notebook names in its code, and those that they name."
    found, ahead = set(), {path}
    while ahead:
        found.add(path := ahead.pop())
        leaf = path == FRONT or path.relative_to(ROOT).as_posix() in SHARED
        if path.suffix in ('.py', '.ipynb') and not leaf: ahead |= named(path) - found
    if ROOT/LIBRARY/'bpe.py' in found: found |= set((ROOT/LIBRARY/'models').glob('*/*'))           # `load_tokenizer` opens them
    return frozenset(p for p in found if p.suffix != '.ipynb')


@cache
def named(path):
    "The files that the code of one file names: imported anywhere in it, or in a string such as `python -m llm_from_scratch.cli`."
    code = path.read_text(encoding='utf-8') if path.suffix == '.py' else '\n'.join(''.join(c['source']) for c in code_cells(path))
    files = {ROOT/LIBRARY/f'{m}.py' for m in re.findall(rf'{LIBRARY}[./](\w+)', code)}
    for folder, name in imports(code, path): files |= library_files(name) if folder == LIBRARY else {at/f'{name}.py' for at in (path.parent, ROOT/'tools')}
    if path.suffix == '.ipynb': files |= {p for p in (ROOT/'nbs'/'results').glob('*.json') if re.search(rf'\b{p.stem}\b', code)}
    return frozenset(p for p in files - {path} if p.exists())


def imports(code, path):
    "(folder, module) pairs of the import statements."
    inside = LIBRARY if path.parent.name == LIBRARY else ''
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): yield from (('', alias.name.partition('.')[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in (None, LIBRARY): yield from ((LIBRARY, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom): yield inside if node.level else '', node.module.removeprefix(f'{LIBRARY}.')


def library_files(name):
    "What `from llm_from_scratch import name` reads: a module, or the one that the package takes the name from."
    return {FRONT, ROOT/LIBRARY/f'{front().get(name, name)}.py'}


@cache
def front():
    "The module of each name that the package itself offers."
    return {alias.name: n.module for n in ast.walk(ast.parse(FRONT.read_text(encoding='utf-8'))) if isinstance(n, ast.ImportFrom) and n.level for alias in n.names}
