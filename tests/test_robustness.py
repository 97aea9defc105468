"""The robustness campaign at reduced size: kills, strings, damaged files and hostile conditions, each with the oracle of the whole one.

`make campaign` runs it whole and stores what the Robustness page shows; `make slow` asks it the same question.
"""
import json, os, subprocess, sys

import pytest
from conftest import ROOT

HERE = ROOT/'benchmarks'/'robustness'
INPUTS = ['benchmarks/robustness/*.py', 'llm_from_scratch/*.py', 'tools/machine.py']
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='what is killed is a fork, and scripts are those of a POSIX shell')


def campaign(code):
    "What some code of the campaign prints, as JSON; in a process of its own, which may fork."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), str(ROOT)]), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', f'import json\n{code}'], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TALLIES = 'print(json.dumps({name: tally.to_json() for name, tally in found.items()}))'


def test_killed_commands_leave_whole_files_and_can_be_typed_again():
    found = campaign(f'import kills; found = kills.run(16, 0); {TALLIES}')
    assert {name: tally['faults'] for name, tally in found.items() if tally['faults']} == {}
    total = sum(tally['counts']['kills'] for tally in found.values())
    assert total >= 8 and sum(tally['counts'].get('with leftovers', 0) for tally in found.values()) > 0          # some died inside a write


def test_the_killer_sees_a_file_that_is_written_in_place():
    "The oracle itself: without atomic writes it finds torn files."
    found = campaign(f"""import contextlib, kills
from llm_from_scratch import files
@contextlib.contextmanager
def careless(path):
    with open(path, 'wb') as file:
        file.write(b'half'); file.flush(); files.sync_folder('.')
        file.seek(0); file.truncate(); yield file
files.replacing = careless
found = kills.run(8, 0, only=['tokenizer train, chars']); {TALLIES}""")
    assert 'a file is torn' in found['tokenizer train, chars']['faults']


def test_strings_of_all_kinds_on_every_path():
    found = campaign('import strings; print(json.dumps(strings.run(1000, 0, batch=500).to_json()))')
    assert found['faults'] == {} and found['counts']['compared: to_hf with tokenizers, special tokens'] > 900


def test_damaged_files_are_refused_by_name_or_read_as_they_were():
    found = campaign(f'import damage; found = damage.run(15, 0); {TALLIES}')
    assert {name: tally['faults'] for name, tally in found.items() if tally['faults']} == {}
    assert sum(bool(tally['counts'].get('refused')) for tally in found.values()) > 0.7 * len(found)


def test_a_command_under_hostile_conditions():
    conditions = ['standard output closed', 'output to a full disk', 'nobody reads the output', 'folder is read-only', 'disk is full', 'two at once']
    found = campaign(f'import conditions; print(json.dumps(conditions.run(["tokenizer train"], {conditions})[0]))')
    assert [f'{name}: {cell}' for name, cell in found['tokenizer train'].items() if cell['outcome'].startswith('fault')] == []


def test_an_interrupted_campaign_goes_on_where_it_was(tmp_path):
    code = f"""import importlib.util, pathlib
spec = importlib.util.spec_from_file_location('campaign', {str(HERE/'__main__.py')!r})
campaign = importlib.util.module_from_spec(spec); spec.loader.exec_module(campaign)
path = pathlib.Path({str(tmp_path/'kept.json')!r})
campaign.Store(path, 'state').put('kills 0', {{'a': 1}}, 2.04)
print(json.dumps([campaign.Store(path, 'state').get('kills 0'), campaign.Store(path, 'another').get('kills 0')]))"""
    assert campaign(code) == [{'piece': {'a': 1}, 'seconds': 2.0}, None]


@pytest.mark.slow
def test_the_whole_campaign():
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, HERE, '--check'], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
