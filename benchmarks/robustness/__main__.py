"""The robustness campaign: `make campaign`, or `python benchmarks/robustness [--size SHARE] [kills|strings|damage|conditions ...]`.

Kills commands, feeds tokenizers, damages files and takes streams and disks away; what came of it is stored in `../results/robustness.json`,
from which the page *Robustness* is drawn. An interrupted campaign goes on where it was: each finished piece is kept in
`.cache/robustness.json`, as long as its size is the same and no file of the library or of this folder has changed.
Parts may run at the same time.
"""
import argparse, hashlib, json, os, subprocess, sys, time
from pathlib import Path

from common import ROOT, Tally

sys.path.append(str(ROOT/'tools'))
from machine import processor  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS, KEPT = HERE.parent/'results'/'robustness.json', ROOT/'.cache'/'robustness.json'
WHOLE = {'kills': 1000, 'strings': 1_000_000, 'damage': 10_000}           # kills, strings, files of each format
PARTS = 'kills', 'strings', 'damage', 'conditions'


class Store:
    "Finished pieces of a campaign, on disk after each of them."
    def __init__(self, path, about): self.path, self.about = path, about

    def pieces(self):
        found = read_json(self.path)
        return found['pieces'] if found.get('about') == self.about else {}

    def get(self, name): return self.pieces().get(name)

    def put(self, name, piece, seconds):
        write_json(self.path, {'about': self.about, 'pieces': {**self.pieces(), name: {'piece': piece, 'seconds': round(seconds, 1)}}})


def read_json(path):
    try: return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError): return {}


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix('.part')
    beside.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    os.replace(beside, path)


def state():
    "A hash of everything that the outcome depends on."
    paths = sorted([*(ROOT/'llm_from_scratch').glob('*.py'), *HERE.glob('*.py')])
    return hashlib.sha256(b''.join(p.read_bytes() for p in paths)).hexdigest()


def clock():
    "Processor seconds of this process and its children so far."
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def pieces(part, size):
    "The names of a part's pieces, each with what runs it and gives something for JSON."
    import conditions, damage, kills, strings
    n = {name: max(1, round(whole * size)) for name, whole in WHOLE.items()}
    if part == 'kills':
        rounds = max(1, round(25 * size))
        for i in range(rounds): yield f'kills {i}', lambda i=i: {k: t.to_json() for k, t in kills.run(n['kills'] / rounds, i).items()}
    if part == 'strings':
        rounds = max(1, round(20 * size))
        for i in range(rounds): yield f'strings {i}', lambda i=i: strings.run(-(-n['strings'] // rounds), i).to_json()
    if part == 'damage':
        for form in damage.FORMATS: yield f'damage {form.name}', lambda form=form: {form.name: damage.run(n['damage'], 0, [form.name])[form.name].to_json()}
    if part == 'conditions':
        for command in conditions.COMMANDS: yield f'conditions {command}', lambda command=command: conditions.run([command])[0]


def inside(name, size):
    "Run one piece in this process, and print it."
    part = name.partition(' ')[0]
    print('RESULT ' + json.dumps(dict(pieces(part, size))[name]()))


def one(name, size):
    "Run one piece in a process of its own, which may fork as it likes."
    done = subprocess.run([sys.executable, str(HERE), '--size', str(size), '--piece', name], env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    if not found: raise SystemExit(f'{name}: {done.stdout}{done.stderr}')
    return json.loads(found[-1])


def gathered(store, part, size):
    "A part's pieces put together: tallies add up, tables are joined."
    found, names = {}, [name for name, _ in pieces(part, size)]
    for name in names:
        piece = store.get(kept(name, size))['piece']
        if part == 'strings': piece = {'strings': piece}
        for key, value in piece.items():
            if part == 'conditions': found[key] = value
            else:
                found.setdefault(key, Tally())
                found[key] += Tally(value['counts'], value['faults'])
    return {key: value.to_json() if isinstance(value, Tally) else value for key, value in found.items()}, sum(store.get(kept(name, size))['seconds'] for name in names)


def machine():
    "Where it was run, and with what."
    import platform
    from importlib.metadata import version
    return {'processor': processor(), 'cores': os.cpu_count(), 'system': platform.system(), 'python': platform.python_version(),
            'packages': {p: version(p) for p in ('torch', 'numpy', 'safetensors', 'tiktoken', 'tokenizers', 'regex')}}


def campaign(parts, size):
    "Run what has not been run yet, and store what came of it."
    store, found = Store(KEPT, state()), {}
    for part in parts:
        for name, _ in pieces(part, size):
            if store.get(kept(name, size)): continue
            start = clock()
            piece = one(name, size)
            store.put(kept(name, size), piece, clock() - start)
            print(f'{clock() - start:6.0f} s  {name}', flush=True)
        tallies, seconds = gathered(store, part, size)
        found[part] = {'machine': machine(), 'date': time.strftime('%Y-%m-%d'), 'size': size, 'seconds': round(seconds), 'found': tallies}
    return found


def kept(name, size): return f'{name}, size {size}'


def faults(found):
    "Every fault of a campaign, in a line each."
    for part, result in found.items():
        for name, value in result['found'].items():
            if part == 'conditions': yield from (f'{name}, {condition}: {cell["outcome"]}' for condition, cell in value.items() if cell['outcome'].startswith('fault'))
            else: yield from (f'{name}: {kind}: {example}' for kind, examples in value['faults'].items() for example in examples)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=PARTS, help=f'which of {", ".join(PARTS)}; all of them if none is named')
    parser.add_argument('--size', type=float, default=1.0, help='a share of the whole')
    parser.add_argument('--check', action='store_true', help='store nothing; exit status 1 where there is a fault')
    parser.add_argument('--piece', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.piece: return inside(args.piece, args.size)
    if unknown := set(args.parts) - set(PARTS): parser.error(f'there is no part {", ".join(sorted(unknown))}; there are {", ".join(PARTS)}')
    found = campaign(args.parts, args.size)
    if not args.check: write_json(RESULTS, {**read_json(RESULTS), **found})
    for line in (wrong := [*faults(found)]): print(line)
    return int(args.check and bool(wrong))


if __name__ == '__main__': sys.exit(main())
