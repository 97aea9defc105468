"""The two commands say clearly what went wrong, and do nothing twice."""
import importlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

import env
import nb

INPUTS = ['Makefile', 'tools/*.py', '_quarto.yml', 'nbs/images/*', '.ci/run']
ROOT = env.ROOT
needs_make = pytest.mark.skipif(shutil.which('make') is None, reason='this machine has no make')


def sentence(raised):
    "The one line that a person reads; it names a cause and a remedy."
    said = str(raised.value)
    assert said.startswith('Cannot set up the environment: ') and ' Remedy: ' in said and '\n' not in said
    return said


@needs_make
@pytest.mark.parametrize('goal', [[], ['help']])
def test_make_lists_every_target(goal):
    alone = {k: v for k, v in os.environ.items() if k not in ('MAKEFLAGS', 'MAKELEVEL')}     # not as a part of `make test`
    said = subprocess.run(['make', *goal], cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout.splitlines()
    listed = {line.split()[1] for line in said}
    phony = next(line for line in (ROOT/'Makefile').read_text(encoding='utf-8').splitlines() if line.startswith('.PHONY:'))
    assert listed == set(phony.split()[1:]) - {'book-env', 'dev-env'}
    assert all(len(line.split(None, 2)) == 3 for line in said)


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(env.sys, 'version_info', (3, 9, 1))
    with pytest.raises(SystemExit) as raised: env.check_machine('dev')
    assert '3.10' in sentence(raised)


def test_a_full_disk_is_named(monkeypatch):
    monkeypatch.setattr(env.shutil, 'disk_usage', lambda _: namedtuple('Usage', 'total used free')(10**12, 10**12, 10**8))
    with pytest.raises(SystemExit) as raised: env.check_machine('dev')
    assert '0.1 GB free' in sentence(raised)


@pytest.mark.parametrize('log, cause', [
    ('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device', 'disk is full'),
    ('ERROR: Could not find a version that satisfies the requirement torch (from versions: none)', 'registry'),
    ("WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'", 'registry'),
    ('ERROR: Package requires a different Python: 3.14.0 not in <3.14', 'Python'),
    ('something nobody has seen before', 'pip failed'),
])
def test_what_pip_says_is_translated(log, cause):
    with pytest.raises(SystemExit) as raised: env.explain(log)
    assert cause in sentence(raised)


def test_without_a_registry_one_sentence(tmp_path):
    "A real installation into an empty environment, against an address where nothing listens."
    nowhere = {**os.environ, 'VENV': str(tmp_path/'venv'), 'PIP_INDEX_URL': 'http://127.0.0.1:9/', 'PIP_RETRIES': '0', 'PIP_NO_CACHE_DIR': '1',
               'PIP_EXTRA_INDEX_URL': '', 'PIP_FIND_LINKS': '', 'PIP_CONFIG_FILE': os.devnull}
    tools = tmp_path/'tools'
    tools.mkdir()
    for name in ('pyproject.toml', 'constraints.txt', 'tools/env.py'): shutil.copy(ROOT/name, tmp_path/name)
    done = subprocess.run([sys.executable, tools/'env.py', 'book'], env=nowhere, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('Cannot set up the environment: the package registry cannot be reached') and done.stderr.count('\n') == 1
    assert not list((tmp_path/'venv').glob('.made-for-*'))


def test_an_environment_that_is_up_to_date_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv('VENV', str(tmp_path))
    fresh = importlib.reload(env)
    try:
        monkeypatch.setattr(fresh, 'make', lambda kind: made.append(kind))
        monkeypatch.setattr(fresh.sys, 'argv', ['env.py', 'book'])
        made = []
        fresh.PYTHON.parent.mkdir(parents=True)
        fresh.PYTHON.touch()
        fresh.main(), fresh.main()
        assert made == ['book']
        (tmp_path/'.made-for-book').write_text('made from something else')
        fresh.main()
        assert made == ['book', 'book']
    finally:
        monkeypatch.undo()
        importlib.reload(env)


def test_a_notebook_that_raises_is_named(tmp_path):
    bad = tmp_path/'66_bad.ipynb'
    bad.write_text('{"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": null, "outputs": [], "source": "1 / 0"}],'
                   ' "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', encoding='utf-8')
    done = subprocess.run([sys.executable, ROOT/'tools'/'nb.py', 'execute', str(bad)], capture_output=True, text=True)
    assert done.returncode and '66_bad.ipynb raised' in done.stderr and 'ZeroDivisionError' in done.stderr
    assert '"outputs": []' in bad.read_text(encoding='utf-8')                      # what raised is not stored


def test_an_unknown_chapter_is_named():
    with pytest.raises(SystemExit, match="'nowhere'.*figures"): nb.find('nowhere')


def test_the_front_picture_shows_the_book_as_it_is():
    subprocess.run([sys.executable, ROOT/'tools'/'pictures.py', '--check'], check=True)
