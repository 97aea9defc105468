#!/usr/bin/env python3
"""Make the project's own environment: `python3 tools/env.py book` (to build the book) or `dev` (to test and to write).

Runs on the standard library alone. A second run sees that nothing changed and returns at once.
"""
import hashlib, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get('VENV') or ROOT/'.venv')
PYTHON = VENV/('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
LOG = ROOT/'.cache'/'install.log'
NEEDS_GB = {'book': 1, 'dev': 4}
KINDS = {'book': ['--group', 'book'], 'dev': ['--group', 'book', '-e', '.[dev]']}

# What pip's complaint means, and what to do about it; the first that matches is told.
CAUSES = [
    (r'no space left|disk quota', 'the disk is full', 'free some space (`make clean` drops what this project built) and run the same command again'),
    (r'requires a different python|requires-python', 'a package does not support this Python', 'use Python 3.10 to 3.13: `make PYTHON=python3.12 ...`'),
    (r'permission denied', 'a folder cannot be written', 'check who owns this folder and .venv'),
    (r'hash', 'a downloaded package is damaged', 'run the same command again'),
    (r'connection|timed? ?out|name resolution|failed to resolve|network is unreachable|proxy|ssl|no matching distribution|could not find a version',
     'the package registry cannot be reached, or lacks a package this Python needs', 'check the network and `pip config list`, then run the same command again; what is installed already is kept'),
]


def fail(cause, remedy):
    sys.exit(f'Cannot set up the environment: {cause}. Remedy: {remedy}.')


def fingerprint(kind):
    "What the environment was made from; a change of it means installing again."
    files = [ROOT/'pyproject.toml', ROOT/'constraints.txt', Path(__file__)]
    return hashlib.sha256(b'\0'.join([f.read_bytes() for f in files] + [kind.encode(), sys.version.encode()])).hexdigest()


def check_machine(kind):
    "Stop early, with a sentence, where the installation could only fail."
    if sys.version_info < (3, 10):
        fail(f'this is Python {sys.version.split()[0]}, and the book needs 3.10 or newer', 'name a newer one: `make PYTHON=python3.12 ...`')
    try: import ensurepip, venv  # noqa: F401
    except ImportError: fail('this Python has no venv module', 'install it (Debian, Ubuntu: `apt install python3-venv`)')
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDS_GB[kind]:
        fail(f'the disk has {free:.1f} GB free and `{kind}` needs {NEEDS_GB[kind]}', 'free some space and run the same command again')


def pip(*args):
    "Install with the project's constraints; the log keeps everything, the screen gets a sentence where it fails."
    command = [str(PYTHON), '-m', 'pip', '--disable-pip-version-check', 'install', '-q', '-c', str(ROOT/'constraints.txt'), *args]
    with LOG.open('a', encoding='utf-8') as log:
        log.write(f'$ pip install {" ".join(args)}\n')
        log.flush()
        start = log.tell()
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if done: explain(LOG.read_bytes()[start:].decode('utf-8', 'replace'))


def explain(log):
    "Name the cause of a failed installation and its remedy."
    for pattern, cause, remedy in CAUSES:
        if re.search(pattern, log, re.I): fail(cause, f'{remedy} (details: .cache/install.log)')
    fail('pip failed', 'read .cache/install.log')


def pinned(name):
    "The version of `name` that constraints.txt asks for, as pip wants it."
    found = re.search(rf'^{name}==\S+', (ROOT/'constraints.txt').read_text(encoding='utf-8'), re.M)
    return found[0] if found else name


def make(kind):
    check_machine(kind)
    LOG.parent.mkdir(exist_ok=True)
    if not PYTHON.exists():
        print(f'Making an environment in {VENV.name}/ ...', flush=True)
        if subprocess.run([sys.executable, '-m', 'venv', str(VENV)]).returncode: fail('`python -m venv` failed', 'read what it printed above')
    print(f'Installing what `{kind}` needs: a few minutes the first time ...', flush=True)
    pip('--upgrade', 'pip>=25.1')
    if kind == 'dev': pip(pinned('torch'))           # asked for by itself, pip takes the build meant for this machine
    pip(*KINDS[kind])


def main():
    kind = sys.argv[1] if len(sys.argv) == 2 else ''
    if kind not in KINDS: sys.exit(f'usage: env.py {"|".join(KINDS)}')
    stamps = [VENV/f'.made-for-{k}' for k in ({'book', 'dev'} if kind == 'book' else {'dev'})]
    made = PYTHON.exists() and any(s.exists() and s.read_text() == fingerprint(s.name.rpartition('-')[2]) for s in stamps)
    if made: return
    make(kind)
    (VENV/f'.made-for-{kind}').write_text(fingerprint(kind))


if __name__ == '__main__':
    try: main()
    except OSError as e: fail(f'{e.strerror or e} ({e.filename})' if e.filename else str(e), 'check the disk and who owns this folder')
