"""Each notebook is executed once, in a fork of one warm process and in an empty folder, and that run serves every check.

Some of them, chosen by the commit, are executed once more with nothing but the wheel: without the extras.
"""
import ast
import json
import os
import re
import subprocess
import sys
import time

import anywhere
import forks
import inputs
import nb
import prove
import pytest
from finish import read_settings

from llm_from_scratch.figures import EXTRAS

NOTEBOOKS = sorted(nb.NBS.glob('*.ipynb'))
DATA = {'measurements': ['benchmarks/results/*', 'benchmarks/run.py'], 'robustness': ['benchmarks/results/robustness.json'],
        'workbook': ['nbs/06_attention.ipynb'], 'command': ['nbs/18_flash.ipynb']}


def INPUTS(notebook=None, **_):
    "A notebook depends on its code cells, on what they import, and on the data it draws from."
    if notebook is None: return []
    name = f'nbs/{notebook.name}'
    return [f'cells:{name}', f'imports:{name}', *DATA.get(notebook.stem, [])]


@pytest.fixture(scope='session')
def forked():
    "Kernels are forks of one process that has imported what they need."
    forks.use_forks()
    yield
    forks.WARM_PROCESS.close()


@pytest.mark.portable
@pytest.mark.long(40)
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_what_a_fresh_run_gives(notebook, forked):
    stored = json.loads(notebook.read_text(encoding='utf-8'))
    fresh = nb.run(notebook)                                     # raises where a cell raises
    here, there = nb.environment(), stored['metadata'].get('stored_with')
    assert there, f'{notebook.name} was never executed: make execute n={notebook.stem[:2]}'
    found = nb.differences(stored, fresh, kinds_only=here != there)
    assert not found, '\n'.join([f'stored with {there}, run with {here}', *found])
    assert not left_out(fresh)                                   # no check is skipped where all extras are


def notebook(path, *sources):
    "A notebook with these code cells, in a file."
    cells = [{'cell_type': 'code', 'id': f'c{i}', 'metadata': {}, 'execution_count': None, 'outputs': [], 'source': s} for i, s in enumerate(sources)]
    path.write_text(json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}), encoding='utf-8')
    return path


only_with_forks = pytest.mark.skipif(not forks.CAN_FORK, reason='kernels are forked on Linux alone')


# Where a reader opens it ------------------------------------------------------------------------------------------

SHARES = 12                # of the notebooks, one is run without extras; `make slow` runs the others
ALONE = """import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {extras}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
for name in [name for name in sys.modules if name.partition('.')[0] in {extras}]: del sys.modules[name]
sys.meta_path.insert(0, Missing())
sys.path[:] = [{site!r}, *(place for place in sys.path if place != {root!r})]"""


NEEDS_EXTRAS = rf"{'|'.join(EXTRAS)}|use_style|\bplt\.|\bax\b|\bhf\.|modeling_|download\(|Markdown\(|#\| label: fig-"


def share(n):
    "Notebooks as parameters: those that the commit does not choose are slow."
    chosen = prove.of_commit(range(n))
    return [pytest.param(p, id=p.stem, marks=[] if i % n == chosen and p.stem not in nb.BUDGETS else pytest.mark.slow) for i, p in enumerate(NOTEBOOKS)]


def importing(book):
    "The functions of a notebook that import an extra when they are called."
    def of_extra(node): return isinstance(node, ast.ImportFrom) and node.module.partition('.')[0] in EXTRAS
    trees = [ast.parse(cell.source) for cell in book.cells if cell.cell_type == 'code']
    return {f.name for tree in trees for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and any(map(of_extra, ast.walk(f)))}


def left_out(book):
    "The cells that went without an extra, by number, and what they say."
    outputs = [(i, ''.join(out.get('data', {}).get('text/markdown', ''))) for i, cell in enumerate(book.cells) if cell.cell_type == 'code' for out in cell.outputs]
    return {i: text for i, text in outputs if text.startswith('*Left out:*')}


@pytest.mark.parametrize('notebook', share(SHARES))
def test_a_notebook_goes_on_with_nothing_but_the_wheel(notebook, forked, installed, tmp_path):
    "In an empty folder, with no extra: whatever needs one says so, all else runs."
    book = json.loads(notebook.read_text(encoding='utf-8'))
    hide = ALONE.format(extras=set(EXTRAS), site=str(installed), root=str(nb.ROOT))
    book['cells'].insert(0, {'cell_type': 'code', 'id': 'alone', 'metadata': {}, 'execution_count': None, 'outputs': [], 'source': hide})
    (tmp_path/notebook.name).write_text(json.dumps(book), encoding='utf-8')
    fresh = nb.run(tmp_path/notebook.name)                       # raises where a cell raises
    missing = left_out(fresh)
    assert all("pip install 'llm-from-scratch[" in text for text in missing.values())
    needs = '|'.join([NEEDS_EXTRAS, *(rf'\b{name}\(' for name in importing(fresh))])
    dragged = [fresh.cells[i].source for i in missing if not re.search(needs, fresh.cells[i].source)]
    assert not dragged, 'left out without need: it uses what another cell computes below its first line that draws or imports an extra'


GOES_ON = 'from llm_from_scratch.figures import allow_missing_extras; allow_missing_extras()'


@only_with_forks
def test_a_cell_without_its_extra_is_left_out_and_what_builds_on_it(forked, tmp_path):
    "What comes before the import has run; cells that need neither the extra nor its names run as ever."
    hide = ALONE.format(extras={'pooch'}, site=str(nb.ROOT), root='')
    book = notebook(tmp_path/'trial.ipynb', hide, f'{GOES_ON}\n{GOES_ON}', 'old = 1', 'before = 1\nbegun = {}\nimport pooch\nafter = old = begun[1] = 2',
                    'later = after + 1', 'print(later)', 'print(begun[1])', 'print(old)', 'print(before + 1)')
    fresh = nb.run(book)
    assert list(left_out(fresh)) == [3, 4, 5, 6, 7] and all('pooch' in text and '[hub]' in text for text in left_out(fresh).values())
    assert fresh.cells[8].outputs[0].text == '2\n'


@only_with_forks
@pytest.mark.parametrize('wrong', ['import nunpy', 'undefined', 'from llm_from_scratch.files import nothing'])
def test_other_errors_are_errors(forked, tmp_path, wrong):
    from nbclient.exceptions import CellExecutionError
    hide = ALONE.format(extras={'pooch'}, site=str(nb.ROOT), root='')
    with pytest.raises(CellExecutionError, match=wrong.split()[-1]): nb.run(notebook(tmp_path/'trial.ipynb', hide, GOES_ON, 'import pooch', wrong))


def test_the_first_cell_installs_what_is_missing_and_says_when_it_cannot(monkeypatch):
    cell, asked, missing = anywhere.first_cell(read_settings(nb.ROOT)), [], True
    def pip(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, int(offline), stderr='ERROR: no route')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if missing else name)
    monkeypatch.setattr('subprocess.run', pip)
    monkeypatch.setattr('llm_from_scratch.figures.allow_missing_extras', lambda: asked.append('goes on'))
    offline = True
    with pytest.raises(SystemExit, match='Is there a network.* ERROR: no route'): exec(cell, {})
    offline = False
    exec(cell, {})
    assert asked[1][:5] == [sys.executable, '-m', 'pip', 'install', '-q'] and asked[1][5].startswith('llm-from-scratch[notebooks] @ https://') and asked[2] == 'goes on'
    missing = False
    exec(cell, {})
    assert asked[3:] == ['goes on']                              # never where it can be imported


@pytest.mark.parametrize('a, b', [('loss 2.31', 'loss 2.32'), ('1.0000e-05', '1.0009e-05'), ('about 1,234.5 tokens', 'about 1,235.0 tokens'), ('x', 'x')])
def test_equal_up_to_rounding(a, b): assert nb.same_text(a, b)


@pytest.mark.parametrize('a, b', [('loss 2.31', 'loss 2.33'), ('3 tokens', '4 tokens'), ('loss 2.3', 'cost 2.3'), ('[1.0, 2.0]', '[1.0]'), ('-1.5', '1.5'), ('0.5', 'nan')])
def test_different_results(a, b): assert not nb.same_text(a, b)


def test_a_picture_is_stored_with_what_drew_it_and_the_text_to_edit_does_not_show_it(tmp_path, monkeypatch):
    import nbformat
    picture = {'output_type': 'display_data', 'metadata': {}, 'data': {'image/svg+xml': '<svg/>'}}
    path, book = notebook(tmp_path/'it.ipynb', 'plot()', '1'), nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell('plot()', outputs=[nbformat.from_dict(picture)]), nbformat.v4.new_code_cell('1', metadata={'drawn_from': 'before'})]
    nb.stamp(book, path)
    drawn = {'drawn_from': nb.drawn_from(path, 'plot()')}
    assert [c.metadata for c in book.cells] == [drawn, {}] and nb.drawn_from(path, 'plot(2)') != drawn['drawn_from']
    nbformat.write(book, path)
    monkeypatch.setattr(nb, 'WORK', tmp_path)
    nb.text(path)
    assert 'drawn_from' not in (text := (tmp_path/'it.md').read_text(encoding='utf-8'))
    (tmp_path/'it.md').write_text(text + '\nMore.\n', encoding='utf-8')
    nb.update(path)
    assert [c.metadata for c in nbformat.read(path, as_version=4).cells] == [drawn, {}, {}, {}]              # with the first cell of every notebook


def notebook_with(source, *outputs): return {'cells': [{'cell_type': 'code', 'source': source, 'outputs': list(outputs)}]}


def stream(text): return {'output_type': 'stream', 'name': 'stdout', 'text': text}


def picture(svg='<svg/>'): return {'output_type': 'display_data', 'data': {'image/svg+xml': svg, 'text/plain': '<Figure size>'}}


def test_only_timed_cells_are_exempt():
    assert nb.differences(notebook_with('f()', stream('1.0 s')), notebook_with('f()', stream('2.0 s')))
    assert not nb.differences(notebook_with('#| timing\nf()', stream('1.0 s')), notebook_with('#| timing\nf()', stream('2.0 s')))


def test_a_missing_figure_is_noticed():
    assert nb.differences(notebook_with('#| timing\nplot()', picture()), notebook_with('#| timing\nplot()'))
    assert nb.differences(notebook_with('plot()'), notebook_with('plot()', picture()))
    assert nb.differences(notebook_with('plot()', picture()), notebook_with('plot()', stream('')), kinds_only=True)


def test_a_missing_cell_is_noticed():
    assert nb.differences(notebook_with('f()'), {'cells': []})


LINE = '<svg><defs><path id="m0{}" d="M 1 2"/></defs><use href="#m0{}"/><path d="M 0 {} L 10 20"/></svg>'


def test_a_stale_picture_is_noticed():
    "Another curve is; another rounding of it, and other names inside the file, are not."
    stored = notebook_with('plot()', picture(LINE.format('ab', 'ab', 30.0)))
    assert nb.differences(stored, notebook_with('plot()', picture(LINE.format('ab', 'ab', 31.0))))
    assert not nb.differences(stored, notebook_with('plot()', picture(LINE.format('cd', 'cd', 30.01))))
    assert not nb.differences(stored, notebook_with('plot()', picture(LINE.format('ab', 'ab', 31.0))), kinds_only=True)


@pytest.mark.parametrize('changed', ['system', 'processor', 'capability', 'threads', 'python', 'torch', 'numpy', 'matplotlib'])
def test_the_environment_names_what_outputs_depend_on(changed): assert nb.environment()[changed]


def test_another_capability_is_another_environment(monkeypatch):
    here = nb.environment()
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'SSE41')
    assert nb.environment() != here


@only_with_forks
def test_a_forked_kernel_is_a_fresh_one(forked, tmp_path):
    "It computes in several threads, draws what a new process draws, knows no module of tools/, and its end is waited for."
    book = notebook(tmp_path/'trial.ipynb', 'import os, sys, torch\nprint("forks" in sys.modules, os.getcwd())',
                    'x = torch.ones(400, 400) @ torch.ones(400, 400)\nx.sum().item(), torch.initial_seed()', 'print("llm_from_scratch" in sys.modules)')
    before = forks.spent()
    said = [''.join(o.get('text', o.get('data', {}).get('text/plain', '')) for o in c.outputs) for c in nb.run(book, tmp_path).cells]
    assert said[0] == f'False {tmp_path}\n' and said[1].startswith('(64000000.0, ') and said[2] == 'False\n'
    assert forks.spent() > before


@only_with_forks
def test_no_kernel_is_counted_twice(tmp_path, monkeypatch):
    "When the warm process is waited for, what its forks used is counted by the system, and by nobody else."
    warm = forks.Warm()
    monkeypatch.setattr(forks, 'WARM_PROCESS', warm)
    monkeypatch.setattr(forks.Fork, 'spent', 0.0)
    forks.use_forks()
    nb.run(notebook(tmp_path/'busy.ipynb', 'import time\nend = time.process_time() + 3\nwhile time.process_time() < end: pass'))
    used, children = forks.spent(), os.times()
    warm.close()
    reaped = sum(os.times()[2:4]) - sum(children[2:4])
    assert used >= 3 and reaped >= used and forks.spent() == 0


@only_with_forks
def test_a_kernel_ends_with_the_warm_process_and_the_next_one_starts_another(forked, tmp_path):
    lost = notebook(tmp_path/'lost.ipynb', 'import os, signal, time\nopen("pid", "w").write(str(os.getpid()))\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)')
    with pytest.raises(nb.Stopped, match='cell c0'): nb.run(lost, tmp_path)
    import psutil
    pid, end = int((tmp_path/'pid').read_text()), time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < end: time.sleep(0.2)
    assert not psutil.pid_exists(pid)
    assert nb.run(notebook(tmp_path/'next.ipynb', 'print(6 * 7)')).cells[0].outputs[0].text == '42\n'


def test_a_kernel_that_dies_is_one_sentence_and_changes_nothing(forked, tmp_path, monkeypatch):
    path = notebook(tmp_path/'dies.ipynb', 'a = 1', '', 'import os\nos._exit(1)', 'b = 1')
    before = path.read_bytes()
    monkeypatch.setattr(sys, 'argv', ['nb.py', 'execute', str(path)])
    with pytest.raises(SystemExit, match=r'^dies\.ipynb is as it was: the kernel died in cell c2 \(os\._exit\(1\)\): [^\n]+\.$'): nb.main()
    assert path.read_bytes() == before


# A notebook as text -----------------------------------------------------------------------------------------------

ODD = ['# A\n\none\u2028two \x0c three \x85 four\u2029\n\n<!-- #region -->\n\nfive\n\n<!-- #endregion -->\n\nleft\u27e6U+2028\u27e7', "s = 'a\u2028b\x0c\x1c\r'\n# <!-- #region -->\nprint(s)",
       '<!-- #md -->\n<!-- #endmd -->', '- a\n\n<!-- #raw x -->', 'plain']


def test_what_jupytext_takes_for_borders_survives_an_edit(tmp_path, monkeypatch):
    "Line separators, form feeds and markers of regions, in prose and in code: the same cells come back, with their ids."
    monkeypatch.setattr(nb, 'WORK', tmp_path)
    monkeypatch.setattr(nb, 'clean', lambda path: None)
    path = notebook(tmp_path/'odd.ipynb', *ODD)
    book = json.loads(path.read_text(encoding='utf-8'))
    for i in (0, 2, 3, 4): book['cells'][i] = {'cell_type': 'markdown', 'id': f'c{i}', 'metadata': {}, 'source': ODD[i]}
    path.write_text(json.dumps(book), encoding='utf-8')
    nb.text(path)
    draft = tmp_path/'odd.md'
    draft.write_text(draft.read_text(encoding='utf-8').replace('plain', 'edited'), encoding='utf-8')
    nb.update(path)
    after = [(c['id'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    assert after[:4] == [(f'c{i}', s) for i, s in enumerate(ODD[:4])] and after[4][1] == 'edited'


# What a test depends on -------------------------------------------------------------------------------------------

def library(path): return {p.stem for p in inputs.imported(inputs.ROOT/path) if p.parent.name == inputs.LIBRARY}


def test_inputs_follow_the_imports():
    "Directly, through other modules, inside functions, and in the words of a command."
    assert {'positions', 'tensors'} <= library('tests/test_positions.py') and 'gpt' not in library('tests/test_positions.py')
    assert {'cli', 'training', 'evaluation'} <= library('tests/test_cli.py')
    assert inputs.ROOT/'tools'/'forks.py' in inputs.imported(inputs.ROOT/'tests'/'test_notebooks.py')
    assert inputs.ROOT/'nbs'/'results'/'recipe_ladder.json' in inputs.imported(nb.find('11'))
    assert any(p.suffix == '.safetensors' for p in inputs.imported(inputs.ROOT/'tests'/'test_gpt.py'))


def test_a_name_of_the_package_leads_to_its_module_alone():
    assert {p.stem for p in inputs.library_files('BPETokenizer')} == {'__init__', 'bpe'} and {p.stem for p in inputs.library_files('gpt')} == {'__init__', 'gpt'}


def test_a_change_of_training_concerns_few_notebooks():
    assert {p.stem for p in NOTEBOOKS if 'training' in library(p)} == {'11_training', '14_architectures', '16_inference', '20_classification', '21_lora', '22_instruction', 'command', 'distributed'}


def test_prose_is_no_input_of_a_run(tmp_path):
    def cells(prose, source='f()'):
        path = tmp_path/'x.ipynb'
        path.write_text(json.dumps({'cells': [{'cell_type': 'markdown', 'source': prose}, {'cell_type': 'code', 'source': source, 'outputs': []}], 'metadata': {}}), encoding='utf-8')
        return inputs.cells(path)
    assert cells('A sentence.') == cells('Another.') != cells('A sentence.', 'g()')
