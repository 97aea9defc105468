#!/usr/bin/env python3
"""Measure the library beside its peers and store what was seen: `make bench`, or `run.py [--quick] [name ...]`.

Each `bench_NAME.py` beside this file has `rows(quick)`, which runs ours and the peer's alternately in one process and
returns dicts: `name`, `what`, `ours` and `peer` (seconds of each run), `peer_name`, `work` (how much was done, in `unit`
without its "/s"), `target` (a sentence), and one or more limits that say whether the target is met:

    ratio_limit      our median time over the peer's is at most this
    limit_s          our median time in seconds is at most this
    limit            our throughput, in `unit`, is at least this
    memory_limit_mb  `memory_mb` is at most this
    loss_limit       `loss` is at most this

A row with `skipped` says why it could not be measured here. Results go to `results/NAME.json`; the Measurements page is
drawn from them.
"""
import argparse, importlib, json, os, platform, statistics, sys, time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent/'tools'))
from machine import processor  # noqa: E402

RESULTS = HERE/'results'
PACKAGES = ['torch', 'numpy', 'regex', 'tiktoken', 'tokenizers', 'transformers']


def machine():
    "Where the numbers were measured, and with what."
    return {'processor': processor(), 'cores': os.cpu_count(), 'system': platform.system(), 'python': platform.python_version(),
            'packages': {p: version(p) for p in PACKAGES}}


def summary(row):
    "The row with medians, spread, and whether each of its limits is met."
    if 'skipped' in row: return row
    out = dict(row)
    for who in ('ours', 'peer'):
        if row.get(who): out[f'{who}_median'] = statistics.median(row[who])
    if row.get('peer'): out['ratio'] = out['ours_median'] / out['peer_median']
    if row.get('work') and row.get('ours'): out['throughput'] = row['work'] / out['ours_median']
    return {**out, 'met': all(limits(out))}


def limits(row):
    "One truth value for each limit that the row names."
    checks = [('ratio', 'ratio_limit', 1), ('ours_median', 'limit_s', 1), ('memory_mb', 'memory_limit_mb', 1), ('loss', 'loss_limit', 1), ('throughput', 'limit', -1)]
    found = [sign * row[value] <= sign * row[limit] for value, limit, sign in checks if row.get(limit) is not None]
    if not found: raise ValueError(f"{row['name']} names no limit: one of {', '.join(limit for _, limit, _ in checks)}")
    return found


def measure(name, quick):
    "Run one benchmark and store its rows."
    start = time.time()
    rows = [summary(row) for row in importlib.import_module(f'bench_{name}').rows(quick)]
    result = {'machine': machine(), 'command': f"python benchmarks/run.py{' --quick' if quick else ''} {name}", 'quick': quick,
              'date': time.strftime('%Y-%m-%d'), 'seconds': round(time.time() - start), 'rows': rows}
    RESULTS.mkdir(exist_ok=True)
    beside = RESULTS/f'{name}.part'
    beside.write_text(json.dumps(result, indent=1, default=float) + '\n', encoding='utf-8')
    os.replace(beside, RESULTS/f'{name}.json')
    return rows


def tell(row):
    "One line about one row."
    if 'skipped' in row: return f"  -    {row['name']}: not measured, {row['skipped']}"
    ratio = f", {row['ratio']:.2f} x {row['peer_name']}" if 'ratio' in row else ''
    memory = f", {row['memory_mb']:.0f} MB" if row.get('memory_mb') else ''
    median = f" {row['ours_median']:.3g} s" if 'ours_median' in row else ''
    return f"  {'met ' if row['met'] else 'MISS'} {row['name']}:{median}{ratio}{memory} (target: {row['target']})"


def main():
    known = sorted(p.stem.removeprefix('bench_') for p in HERE.glob('bench_*.py'))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help=f"which of {', '.join(known)}; all of them if none is named")
    parser.add_argument('--quick', action='store_true', help='small inputs, to see that it runs')
    args = parser.parse_args()
    unknown = set(args.names) - set(known)
    if unknown: parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    for name in args.names or known:
        print(name, flush=True)
        for row in measure(name, args.quick): print(tell(row), flush=True)


if __name__ == '__main__': main()
