"""Stored outputs are what a fresh run gives, and the comparison itself notices what it should."""
import json
from pathlib import Path

import nb
import pytest

NOTEBOOKS = sorted(nb.NBS.glob('*.ipynb'))


def INPUTS(notebook=None, **_):
    "A notebook depends on itself, the library, and the data it draws from."
    if notebook is None: return ['tools/nb.py']
    measured = ['benchmarks/results/*', 'benchmarks/run.py'] if notebook.stem == 'measurements' else []
    return ['tools/nb.py', 'llm_from_scratch/*.py', 'llm_from_scratch/models/*/*', 'nbs/results/*', f'nbs/{notebook.name}', *measured]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_what_a_fresh_run_gives(notebook):
    stored = json.loads(notebook.read_text(encoding='utf-8'))
    fresh = nb.run(notebook)                                     # raises where a cell raises
    here, there = nb.environment(), stored['metadata'].get('stored_with')
    assert there, f'{notebook.name} was never executed: make execute n={notebook.stem[:2]}'
    found = nb.differences(stored, fresh, pictures_only=here != there)
    assert not found, '\n'.join([f'stored with {there}, run with {here}', *found])


@pytest.mark.parametrize('a, b', [('loss 2.31', 'loss 2.32'), ('1.0000e-05', '1.0009e-05'), ('about 1,234.5 tokens', 'about 1,235.0 tokens'), ('x', 'x')])
def test_equal_up_to_rounding(a, b): assert nb.same_text(a, b)


@pytest.mark.parametrize('a, b', [('loss 2.31', 'loss 2.33'), ('3 tokens', '4 tokens'), ('loss 2.3', 'cost 2.3'), ('[1.0, 2.0]', '[1.0]'), ('-1.5', '1.5'), ('0.5', 'nan')])
def test_different_results(a, b): assert not nb.same_text(a, b)


def notebook_with(source, *outputs): return {'cells': [{'cell_type': 'code', 'source': source, 'outputs': list(outputs)}]}


def stream(text): return {'output_type': 'stream', 'name': 'stdout', 'text': text}


def picture(): return {'output_type': 'display_data', 'data': {'image/svg+xml': '<svg/>', 'text/plain': '<Figure size>'}}


def test_only_timed_cells_are_exempt():
    assert nb.differences(notebook_with('f()', stream('1.0 s')), notebook_with('f()', stream('2.0 s')))
    assert not nb.differences(notebook_with('#| timing\nf()', stream('1.0 s')), notebook_with('#| timing\nf()', stream('2.0 s')))


def test_a_missing_figure_is_noticed():
    assert nb.differences(notebook_with('#| timing\nplot()', picture()), notebook_with('#| timing\nplot()'))
    assert nb.differences(notebook_with('plot()'), notebook_with('plot()', picture()))
    assert nb.differences(notebook_with('plot()', picture()), notebook_with('plot()', stream('')), pictures_only=True)


def test_a_missing_cell_is_noticed():
    assert nb.differences(notebook_with('f()'), {'cells': []})
