#!/usr/bin/env python3
"""What make needs and cannot do alike on every system: list the targets, remove what was built."""
import re, shutil, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ['_site', '_build', '_book', '.quarto', '.cache', 'build', 'dist', 'llm_from_scratch.egg-info']


def targets(makefile):
    "The targets of a makefile with the sentence behind each `##`."
    return re.findall(r'^([a-z-]+):[^#\n]*##\s*(.+)$', Path(makefile).read_text(encoding='utf-8'), re.M)


def clean():
    "Remove everything that the two commands can make again, except the environment."
    for name in BUILT: shutil.rmtree(ROOT/name, ignore_errors=True)


if __name__ == '__main__':
    if sys.argv[1:] == ['--clean']: clean()
    else: print('\n'.join(f'  make {name:<12}{what}' for name, what in targets(sys.argv[1])))
