#!/usr/bin/env python3
"""Run the long experiments of the chapters and store what they found: `make experiments args="08"`, or a name; all without one.

An experiment is a function in its chapter, in a cell that begins with `#| experiment` and stands alone: it makes its own
imports. `def depth(seed, quick=False) -> dict` is run for `depth.seeds` seeds (3 unless it says otherwise) and returns what JSON can
hold; `def check_depth(runs)` asserts the story that the chapter tells about these runs. Results go to `nbs/results/depth.json`.
`--quick` runs one seed at reduced size, checks the story, and stores nothing.
"""
import argparse, ast, hashlib, inspect, json, os, sys, time
from importlib.metadata import version
from pathlib import Path

from machine import processor

ROOT = Path(__file__).resolve().parent.parent
NBS, RESULTS = ROOT/'nbs', ROOT/'nbs'/'results'
MARK, SEEDS = '#| experiment', 3


class Experiment:
    "A function of a chapter, the seeds it is run with, and the story its runs must tell."
    def __init__(self, run, check, chapter, cells):
        self.name, self.run, self.check, self.chapter = run.__name__, run, check, chapter
        source = '\n\n'.join(behind({run.__name__, check.__name__}, cells))
        self.seeds, self.code = getattr(run, 'seeds', SEEDS), hashlib.sha256(source.encode()).hexdigest()[:16]

    @property
    def stored(self): return RESULTS/f'{self.name}.json'

    def runs(self, seeds, quick): return [self.run(seed, quick=quick) for seed in seeds]


def marked(notebook):
    "The source of the cells that hold experiments."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return [s for s in sources if any(line.strip() == MARK for line in s.splitlines() if line.startswith('#|'))]


def bound(statement):
    "The names that a statement of a cell gives a meaning."
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)): return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)): return {(a.asname or a.name).partition('.')[0] for a in statement.names}
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def behind(names, cells):
    "The cells that `names` depend on: those that define them, and all that these use. A change of the others changes no result."
    trees = [ast.parse(cell) for cell in cells]
    defined = [set().union(*map(bound, tree.body)) for tree in trees]
    used = [{n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} for tree in trees]
    def home(name, at):                      # as the reader sees it: the last definition so far, else the first to come
        homes = [i for i, here in enumerate(defined) if name in here]
        return max((i for i in homes if i <= at), default=min(homes, default=None))
    found, todo = set(), {home(name, len(cells)) for name in names}
    while todo:
        i = todo.pop()
        found.add(i)
        todo |= {home(name, i) for name in used[i]} - found - {None}
    return [cells[i] for i in sorted(found)]


def of_notebook(notebook):
    "The experiments of one chapter; ValueError where one has no check or nobody to check."
    cells = marked(notebook)
    source = '\n\n'.join(cells)
    space = {'__name__': f'experiments_of_{notebook.stem}'}
    exec(compile(source, f'nbs/{notebook.name}', 'exec'), space)
    runs = {k: f for k, f in space.items() if inspect.isfunction(f) and list(inspect.signature(f).parameters) == ['seed', 'quick']}
    checks = {k.removeprefix('check_'): f for k, f in space.items() if k.startswith('check_') and inspect.isfunction(f)}
    alone = sorted(set(runs) ^ set(checks))
    if alone: raise ValueError(f'nbs/{notebook.name}: an experiment `NAME(seed, quick=False)` and its `check_NAME(runs)` come in pairs; alone: {", ".join(alone)}')
    return [Experiment(f, checks[k], notebook.stem, cells) for k, f in runs.items()]


def found(root=NBS):
    "All experiments, in the order of the chapters."
    return [e for notebook in sorted(root.glob('*.ipynb')) if marked(notebook) for e in of_notebook(notebook)]


def store(experiment, runs, seconds):
    "Write the runs, and what they were made with, beside and rename."
    result = {'name': experiment.name, 'chapter': experiment.chapter, 'code': experiment.code, 'seeds': len(runs), 'seconds': round(seconds),
              'machine': f'{os.cpu_count()} cores, {processor()}', 'versions': {'python': sys.version.split()[0], **{p: version(p) for p in ('torch', 'numpy')}}, 'runs': runs}
    RESULTS.mkdir(exist_ok=True)
    beside = experiment.stored.with_suffix('.part')
    beside.write_text(json.dumps(result, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    os.replace(beside, experiment.stored)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='chapters (08) or experiments; all of them if none is named')
    parser.add_argument('--quick', action='store_true', help='one seed at reduced size, to see that the story holds; stores nothing')
    args = parser.parse_args()
    experiments = found()
    for name in args.names:
        if not any(name in (e.name, e.chapter, e.chapter[:2]) for e in experiments):
            parser.error(f"no chapter or experiment is called {name!r}; there are {', '.join(f'{e.name} ({e.chapter[:2]})' for e in experiments)}")
    for e in experiments:
        if args.names and not {e.name, e.chapter, e.chapter[:2]} & set(args.names): continue
        start = time.perf_counter()
        runs = e.runs(range(1 if args.quick else e.seeds), args.quick)
        seconds = time.perf_counter() - start
        e.check(runs)
        if not args.quick: store(e, runs, seconds)
        print(f"{e.name}: {len(runs)} seed{'s' * (len(runs) > 1)}, {seconds:.0f} s, the story holds{'' if args.quick else f'; stored in {e.stored.relative_to(ROOT)}'}", flush=True)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main()
