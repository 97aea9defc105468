"""The Python in README and on the front page runs as it stands, in silence but for what it prints."""
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ['README.md', 'index.qmd', 'nbs/results/storyland_small.json']
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'utf-8', 'OMP_NUM_THREADS': '1'}


@pytest.mark.parametrize('page', ['README.md', 'index.qmd'])
def test_the_lines_for_users_run(page, tmp_path):
    blocks = re.findall(r'^ *```python\n(.*?)^ *```', (ROOT/page).read_text(encoding='utf-8'), re.M | re.S)
    assert blocks, f'{page} shows no Python'
    for block in blocks:
        done = subprocess.run([sys.executable, '-W', 'error', '-c', textwrap.dedent(block)], cwd=tmp_path, capture_output=True, text=True,
                              encoding='utf-8', env=ENVIRONMENT)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert ' there ' in done.stdout                            # a story was told: "Once there was", "Long ago there lived"


def test_the_story_is_what_the_model_tells(tmp_path):
    "Word for word; README may break its lines elsewhere. And the world could have told it."
    from llm_from_scratch.storyland import can_begin
    shown = re.search(r'^(llmfs generate .*)\n```\n\n```text\n(.*?)\n```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S)
    assert shown, 'README.md shows no story'
    done = subprocess.run([sys.executable, '-m', 'llm_from_scratch.cli', *shlex.split(shown[1])[1:]], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          encoding='utf-8', env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    assert done.stdout.split() == shown[2].split()
    assert can_begin(done.stdout.strip()), 'the world cannot tell this story: choose another seed'


def test_what_readme_says_of_the_model_is_so():
    from llm_from_scratch.gpt import GPT
    said = re.search(r'([\d,]+) weights, trained in (\w+) minutes', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert said, 'README.md says nothing about the size of its model and the time it took'
    shipped = json.loads((ROOT/'nbs'/'results'/'storyland_small.json').read_text(encoding='utf-8'))['runs'][0]
    weights = sum(p.numel() for p in GPT.from_pretrained('storyland').parameters())
    assert int(said[1].replace(',', '')) == weights == shipped['parameters']
    minutes = ['one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten'].index(said[2]) + 1
    assert minutes == round(shipped['seconds'] / 60)
