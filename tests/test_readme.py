"""The Python in README and on the front page runs as it stands, in silence but for what it prints."""
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ['README.md', 'index.qmd', 'llm_from_scratch/*.py']


@pytest.mark.parametrize('page', ['README.md', 'index.qmd'])
def test_the_lines_for_users_run(page, tmp_path):
    blocks = re.findall(r'^ *```python\n(.*?)^ *```', (ROOT/page).read_text(encoding='utf-8'), re.M | re.S)
    assert blocks, f'{page} shows no Python'
    for block in blocks:
        done = subprocess.run([sys.executable, '-W', 'error', '-c', textwrap.dedent(block)], cwd=tmp_path, capture_output=True, text=True,
                              encoding='utf-8', env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'utf-8'})
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert ' there ' in done.stdout                            # a story was told: "Once there was", "Long ago there lived"
