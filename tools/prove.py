#!/usr/bin/env python3
"""Run the tests.

    make test                  everything whose inputs have changed since it passed
    make test n=07             one chapter: its notebook, its tests, its page
    make test ring=avx2        the portable tests in another setting: what holds on this machine must hold on any
    make test ring=commit      in the setting that the hash of the commit chooses, as CI does; its name is printed
    make test args=--all       whatever follows `args=` goes to pytest

With `args=--whole` a ring runs every test, not only the portable ones.
"""
import argparse, os, signal, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ['-n', '2', '--dist', 'worksteal']

# The settings: what a reader's machine may be like, and the environment that is like it (None: not set).
RINGS = {
    'sse': ('an old processor', {'ATEN_CPU_CAPABILITY': 'default', 'ONEDNN_MAX_CPU_ISA': 'SSE41'}),
    'avx2': ('a processor without AVX-512', {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2'}),   # PyTorch and oneDNN must agree
    'thread': ('one core', {'OMP_NUM_THREADS': '1'}),
    'nohup': ('started in the background: SIGINT and SIGHUP are ignored', {}),
    'bare': ('no home, and a locale that knows only ASCII', {'HOME': None, 'LANG': 'C', 'LC_ALL': None, 'LC_CTYPE': None, 'PYTHONUTF8': None}),
    'busy': ('two other processes use both cores', {}),
}


def of_commit(choices):
    "What the hash of the commit chooses."
    said = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return list(choices)[int(said or '0', 16) % len(choices)]


def environment(ring):
    "This process's environment, as the ring wants it."
    changed = {**os.environ, **RINGS[ring][1], 'BOOK_RING': ring}
    return {k: v for k, v in changed.items() if v is not None}


@contextmanager
def surroundings(ring):
    "What a ring needs besides its environment, for as long as the tests run."
    ignored = [getattr(signal, name) for name in ('SIGINT', 'SIGHUP') if ring == 'nohup' and hasattr(signal, name)]
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]         # processes started from here inherit it
    spin = f'import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))'
    spinning = [subprocess.Popen([sys.executable, '-c', spin]) for _ in range(2 if ring == 'busy' else 0)]
    try: yield
    finally:
        for process in spinning: process.kill(), process.wait()
        for number, handler in zip(ignored, before): signal.signal(number, handler)


def in_ring(ring, whole, more):
    "Run the portable tests in a ring; pytest's exit status."
    ring = of_commit(RINGS) if ring == 'commit' else ring
    print(f'Portable tests in the ring "{ring}": {RINGS[ring][0]} (repeat with `make test ring={ring}`).', flush=True)
    chosen = [] if whole else ['-m', 'portable and not slow']
    with surroundings(ring): return pytest(environment(ring), *chosen, *more)


def pytest(env, *arguments):
    "Two workers whose threads sleep while they wait: threads that spin, the default, take the cores from the other worker, and each waits for each."
    return subprocess.run([sys.executable, '-m', 'pytest', *WORKERS, *arguments], cwd=ROOT, env={'OMP_WAIT_POLICY': 'PASSIVE', **env}).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ring', choices=[*RINGS, 'commit'], help='the setting to run the portable tests in')
    parser.add_argument('--chapter', help='run the tests of this chapter alone: a number or a name')
    parser.add_argument('--whole', action='store_true', help='with --ring: every test')
    chosen, more = parser.parse_known_args()
    if chosen.chapter:
        import nb
        os.environ['BOOK_CHAPTER'] = nb.find(chosen.chapter).stem
    if chosen.ring and not chosen.whole: return in_ring(chosen.ring, False, more)
    built = subprocess.run([sys.executable, ROOT/'tools'/'build.py', '--quiet']).returncode
    if built: return built
    return in_ring(chosen.ring, True, more) if chosen.ring else pytest(dict(os.environ), *more)


if __name__ == '__main__': sys.exit(main())
