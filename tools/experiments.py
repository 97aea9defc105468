#!/usr/bin/env python3
"""Run the long experiments of the chapters and store what they found: `make experiments args="08"`, or a name; all without one.

An experiment is a function in its chapter, in a cell that begins with `#| experiment` and stands alone: it makes its own
imports. `def depth(seed, quick=False) -> dict` is run for `depth.seeds` seeds (3 unless it says otherwise) and returns what JSON can
hold; `def check_depth(runs)` asserts the story that the chapter tells about these runs. Results go to `nbs/results/depth.json`.
`--quick` runs one seed at reduced size, checks the story, and stores nothing.

One that is many small runs takes a case as well, `def depth(seed, quick=False, case="")`, and `depth.cases(seed, before, quick)` lists
the cases of a seed, given the runs of the seeds before it. Cases run `--jobs` at a time, and a seed's run is {case: result}.

What has finished is kept under `.cache/experiments` until all is stored, so that a run that was interrupted goes on where it was.
"""
import argparse, ast, hashlib, inspect, json, multiprocessing, os, shutil, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from machine import processor

ROOT = Path(__file__).resolve().parent.parent
NBS, RESULTS, KEPT = ROOT/'nbs', ROOT/'nbs'/'results', ROOT/'.cache'/'experiments'
MARK, SEEDS = '#| experiment', 3


class Experiment:
    "A function of a chapter, the seeds it is run with, and the story its runs must tell."
    def __init__(self, run, check, notebook, cells):
        self.name, self.run, self.check, self.notebook, self.chapter = run.__name__, run, check, notebook, notebook.stem
        self.cases = getattr(run, 'cases', None)
        source = '\n\n'.join(behind({run.__name__, check.__name__}, cells))
        self.seeds, self.code = getattr(run, 'seeds', SEEDS), hashlib.sha256(source.encode()).hexdigest()[:16]

    @property
    def stored(self): return RESULTS/f'{self.name}.json'

    @property
    def kept(self): return KEPT/f'{self.name}-{self.code}'

    def runs(self, seeds, quick, jobs=1):
        "The run of each seed, one after the other; the cases of a seed, several at a time."
        done = []
        for seed in seeds: done.append(self.by_case(seed, self.cases(seed, done, quick), quick, jobs) if self.cases else self.one(seed, quick))
        return done

    def by_case(self, seed, cases, quick, jobs):
        found = {case: read(self.place(seed, case)) for case in cases if not quick and self.place(seed, case).is_file()}
        todo = [case for case in cases if case not in found]
        if jobs == 1: found |= {case: self.one(seed, quick, case) for case in todo}
        else:
            with ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), initializer=sys.path.insert, initargs=(0, str(ROOT))) as pool:
                started = {pool.submit(in_a_process, self.notebook, self.name, seed, quick, case): case for case in todo}
                for future in as_completed(started): found[started[future]] = self.keep(self.place(seed, started[future]), future.result(), quick)
        return {case: found[case] for case in cases}

    def one(self, seed, quick, case=None):
        "One run: what was kept of it, or a new one, which is kept."
        place = self.place(seed, case)
        if not quick and place.is_file(): return read(place)
        found = self.run(seed, quick=quick) if case is None else self.run(seed, quick=quick, case=case)
        return self.keep(place, found, quick)

    @staticmethod
    def keep(place, found, quick):
        if not quick: write(place, found)
        return found

    def place(self, seed, case=None): return self.kept/f'{seed}{"" if case is None else "-" + hashlib.sha256(case.encode()).hexdigest()[:8]}.json'


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def write(path, found):
    "Beside, and renamed."
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix('.part')
    beside.write_text(json.dumps(found, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    os.replace(beside, path)


@lru_cache
def loaded(notebook): return {e.name: e for e in of_notebook(notebook)}


def in_a_process(notebook, name, seed, quick, case): return loaded(notebook)[name].run(seed, quick=quick, case=case)


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
    runs = {k: f for k, f in space.items() if inspect.isfunction(f) and list(inspect.signature(f).parameters) == ['seed', 'quick', 'case'][:2 + hasattr(f, 'cases')]}
    checks = {k.removeprefix('check_'): f for k, f in space.items() if k.startswith('check_') and inspect.isfunction(f)}
    alone = sorted(set(runs) ^ set(checks))
    if alone: raise ValueError(f'nbs/{notebook.name}: an experiment `NAME(seed, quick=False)` and its `check_NAME(runs)` come in pairs; alone: {", ".join(alone)}')
    return [Experiment(f, checks[k], notebook, cells) for k, f in runs.items()]


def found(root=NBS):
    "All experiments, in the order of the chapters."
    return [e for notebook in sorted(root.glob('*.ipynb')) if marked(notebook) for e in of_notebook(notebook)]


def store(experiment, runs, seconds):
    "Write the runs, and what they were made with, beside and rename."
    result = {'name': experiment.name, 'chapter': experiment.chapter, 'code': experiment.code, 'seeds': len(runs), 'seconds': round(seconds),
              'machine': f'{os.cpu_count()} cores, {processor()}', 'versions': {'python': sys.version.split()[0], **{p: version(p) for p in ('torch', 'numpy')}}, 'runs': runs}
    write(experiment.stored, result)
    shutil.rmtree(experiment.kept, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='chapters (08) or experiments; all of them if none is named')
    parser.add_argument('--quick', action='store_true', help='one seed at reduced size, to see that the story holds; stores nothing')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='how many cases to run at a time, where an experiment has cases')
    args = parser.parse_args()
    experiments = found()
    for name in args.names:
        if not any(name in (e.name, e.chapter, e.chapter[:2]) for e in experiments):
            parser.error(f"no chapter or experiment is called {name!r}; there are {', '.join(f'{e.name} ({e.chapter[:2]})' for e in experiments)}")
    for e in experiments:
        if args.names and not {e.name, e.chapter, e.chapter[:2]} & set(args.names): continue
        start = time.perf_counter()
        runs = e.runs(range(1 if args.quick else e.seeds), args.quick, args.jobs)
        seconds = time.perf_counter() - start
        e.check(runs)
        if not args.quick: store(e, runs, seconds)
        print(f"{e.name}: {len(runs)} seed{'s' * (len(runs) > 1)}, {seconds:.0f} s, the story holds{'' if args.quick else f'; stored in {e.stored.relative_to(ROOT)}'}", flush=True)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main()
