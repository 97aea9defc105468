"""The two commands say clearly what went wrong, and do nothing twice."""
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import yaml

import env
import nb
import prove
import release

INPUTS = ['Makefile', 'tools/*.py', '_quarto.yml', 'nbs/images/*', '.ci/run', 'settings.ini', 'CHANGELOG.md', '.github/workflows/release.yml', '.devcontainer/*', '.binder/*']
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


# The rings --------------------------------------------------------------------------------------------------------

ASK = """import json, os, signal
print(json.dumps({"ignored": [n for n in ("SIGINT", "SIGHUP") if signal.getsignal(getattr(signal, n)) == signal.SIG_IGN], **os.environ}))"""


def asked(ring):
    "What a process started in a ring finds."
    with prove.surroundings(ring): done = subprocess.run([sys.executable, '-c', ASK], env=prove.environment(ring), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(os.name == 'nt', reason='these signals are those of Unix')
@pytest.mark.parametrize('ring', prove.RINGS)
def test_a_ring_is_the_setting_that_it_says(ring):
    found = asked(ring)
    assert found['BOOK_RING'] == ring and (found['ignored'] == ['SIGINT', 'SIGHUP']) >= (ring == 'nohup')
    assert all(found.get(k) == v for k, v in prove.RINGS[ring][1].items() if k != 'LC_CTYPE')     # Python itself sets LC_CTYPE where the locale is C


def test_a_busy_ring_leaves_nothing_running():
    import psutil
    me = psutil.Process()
    before = set(me.children())
    with prove.surroundings('busy'): spinning = set(me.children()) - before
    assert len(spinning) == 2 and not spinning & set(me.children())


def test_signals_are_as_before_after_a_ring():
    before = signal.getsignal(signal.SIGINT)
    with prove.surroundings('nohup'): assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before


def test_the_commit_chooses_a_ring(monkeypatch):
    chosen = []
    for n in range(len(prove.RINGS)):
        monkeypatch.setattr(prove.subprocess, 'run', lambda *a, n=n, **k: subprocess.CompletedProcess(a, 0, stdout=f'{6 * 10**40 + n:x}\n'))
        chosen.append(prove.of_commit(prove.RINGS))
    assert chosen == list(prove.RINGS)


def test_one_chapter_is_its_notebook_its_tests_and_its_page(monkeypatch):
    "`make test n=07` asks no other chapter's tests, and misses none of its own."
    files = [f'tests/test_{name}.py' for name in ('tensors', 'text', 'storyland', 'data', 'data_faults', 'library', 'notebooks', 'grow', 'site')]     # all would cost ten seconds
    done = subprocess.run([sys.executable, '-m', 'pytest', '--collect-only', '--all', '-p', 'no:cacheprovider', *files], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'BOOK_CHAPTER': '01_tensors', 'BOOK_RING': ''})
    found = {line for line in done.stdout.splitlines() if '::' in line}
    assert 'tests/test_notebooks.py::test_stored_outputs_are_what_a_fresh_run_gives[01_tensors]' in found
    assert any(line.startswith('tests/test_tensors.py::') for line in found) and any('test_site.py' in line for line in found)
    assert [line for line in found if '01_tensors' not in line and not line.startswith(('tests/test_tensors.py::', 'tests/test_grow.py::'))] == []
    assert {line for line in found if 'test_grow' in line} == {'tests/test_grow.py::test_every_class_that_grows_is_whole_in_the_library[Value]'}


# A release --------------------------------------------------------------------------------------------------------

CHANGES = '# Changelog\n\n## 0.2.0 (2026-11-30)\n\n* New.\n\n### The book\n\n* Newer.\n\n## 0.1.0 (2026-11-21)\n\n* Old.\n'


def released(folder, version='0.2.0', changes=CHANGES, tag=None):
    "What `make release` thinks of a version and its notes."
    (folder/'settings.ini').write_text(f'[DEFAULT]\nversion = {version}\n', encoding='utf-8')
    (folder/'CHANGELOG.md').write_text(changes, encoding='utf-8')
    return release.ready(tag, folder), release.notes(version, folder)


def test_the_notes_of_a_release_are_its_part_of_the_changelog(tmp_path):
    assert released(tmp_path, tag='v0.2.0') == ('0.2.0', '* New.\n\n### The book\n\n* Newer.\n')
    assert released(tmp_path, '0.1.0')[1] == '* Old.\n'
    assert release.notes(release.ready()).count('### ') >= 3                # this book's own


@pytest.mark.parametrize('version, changes, tag, said', [
    ('0.3.0.dev0', CHANGES, None, '0.3.0.dev0'),
    ('0.3.0', CHANGES, None, 'no entry `## 0.3.0'),
    ('0.2.0', CHANGES.replace('(2026-11-30)', '(unreleased)'), None, 'no entry'),
    ('0.2.0', '## 0.2.0 (2026-11-30)\n\n## 0.1.0 (2026-11-21)\n\n* Old.\n', None, 'no entry'),
    ('0.2.0', CHANGES, 'v0.2.1', 'the tag of that is v0.2.0'),
])
def test_no_release_without_notes_or_with_another_tag(tmp_path, version, changes, tag, said):
    with pytest.raises(release.Refused, match=re.escape(said)): released(tmp_path, version, changes, tag)


def test_no_release_of_what_is_not_committed(tmp_path):
    git = ['git', '-c', 'user.name=A', '-c', 'user.email=a@example.org', '-C', tmp_path]
    for command in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'As it is']): subprocess.run([*git, *command], check=True)
    release.committed(tmp_path)
    (tmp_path/'new.txt').write_text('', encoding='utf-8')
    with pytest.raises(release.Refused, match='new.txt is not committed'): release.committed(tmp_path)


def test_a_python_that_does_not_run_is_missing(tmp_path, monkeypatch):
    "As with a version manager, whose commands exist and refuse."
    monkeypatch.setattr(release, 'supported', lambda: ['3.10', '3.99'])
    shim = tmp_path/'python3.99'
    shim.write_text('#!/bin/sh\necho "command not found" >&2\nexit 127\n', encoding='utf-8')
    shim.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    assert '3.99' not in release.pythons()
    shim.write_text('#!/bin/sh\necho 3.99\n', encoding='utf-8')
    assert next(reversed(release.pythons().items())) == ('3.99', 'python3.99')


def test_what_the_workflows_and_containers_call_is_there():
    settings = json.loads((ROOT/'.devcontainer'/'devcontainer.json').read_text(encoding='utf-8'))
    program, script, kind = settings['postCreateCommand'].split()
    assert (ROOT/script).is_file() and kind in env.KINDS
    wanted = re.findall(r'\[(\w+)\]', (ROOT/'.binder'/'requirements.txt').read_text(encoding='utf-8'))
    assert wanted == ['notebooks'] and 'notebooks = [' in (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    steps = yaml.safe_load((ROOT/'.github'/'workflows'/'release.yml').read_text(encoding='utf-8'))
    assert steps['permissions'] == {'contents': 'read'} and 'secrets.' not in (ROOT/'.github'/'workflows'/'release.yml').read_text(encoding='utf-8')
    said = [step.get('run', '') + step.get('uses', '') for job in steps['jobs'].values() for step in job['steps']]
    assert any('make release args="--tag' in s for s in said) and any('attest-build-provenance' in s for s in said) and any('gh-action-pypi-publish' in s for s in said)
