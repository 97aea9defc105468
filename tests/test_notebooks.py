"""Each notebook is executed once, in a fork of one warm process, and that run serves every check."""
import json
import os
import time

import forks
import inputs
import nb
import pytest

NOTEBOOKS = sorted(nb.NBS.glob('*.ipynb'))
ALLOWANCE = 2              # a slower processor may use this many times the budget


def INPUTS(notebook=None, **_):
    "A notebook depends on its code cells, on what they import, and on the data it draws from."
    if notebook is None: return []
    name = f'nbs/{notebook.name}'
    return [f'cells:{name}', f'imports:{name}', *(['benchmarks/results/*', 'benchmarks/run.py'] if notebook.stem == 'measurements' else [])]


@pytest.fixture(scope='session')
def forked():
    "Kernels are forks of one process that has imported what they need."
    forks.use_forks()
    yield
    forks.WARM_PROCESS.close()


@pytest.mark.portable
@pytest.mark.long(40)
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_what_a_fresh_run_gives(notebook, forked, plain):
    stored = json.loads(notebook.read_text(encoding='utf-8'))
    fresh = nb.run(notebook)                                     # raises where a cell raises
    here, there = nb.environment(), stored['metadata'].get('stored_with')
    assert there, f'{notebook.name} was never executed: make execute n={notebook.stem[:2]}'
    found = nb.differences(stored, fresh, kinds_only=here != there)
    assert not found, '\n'.join([f'stored with {there}, run with {here}', *found])
    seconds, allowed = fresh.metadata.seconds, nb.budget(notebook) * ALLOWANCE
    assert not plain or seconds < allowed, f'{seconds:.0f} processor seconds; the budget of {notebook.stem} is {nb.budget(notebook)}: make the long part an experiment'


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
    assert [c.metadata for c in nbformat.read(path, as_version=4).cells] == [drawn, {}, {}]


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


def notebook(path, *sources):
    "A notebook with these code cells, in a file."
    cells = [{'cell_type': 'code', 'id': f'c{i}', 'metadata': {}, 'execution_count': None, 'outputs': [], 'source': s} for i, s in enumerate(sources)]
    path.write_text(json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}), encoding='utf-8')
    return path


only_with_forks = pytest.mark.skipif(not forks.CAN_FORK, reason='kernels are forked on Linux alone')


@only_with_forks
def test_a_forked_kernel_is_a_fresh_one(forked, tmp_path):
    "It computes in several threads, draws what a new process draws, knows no module of tools/, and its end is waited for."
    book = notebook(tmp_path/'trial.ipynb', 'import os, sys, torch\nprint("forks" in sys.modules, os.getcwd())',
                    'x = torch.ones(400, 400) @ torch.ones(400, 400)\nx.sum().item(), torch.initial_seed()', 'print("llm_from_scratch" in sys.modules)')
    before = forks.spent()
    said = [''.join(o.get('text', o.get('data', {}).get('text/plain', '')) for o in c.outputs) for c in nb.run(book).cells]
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
    from nbclient.exceptions import DeadKernelError
    lost = notebook(tmp_path/'lost.ipynb', 'import os, signal, time\nopen("pid", "w").write(str(os.getpid()))\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)')
    with pytest.raises(DeadKernelError): nb.run(lost)
    import psutil
    pid, end = int((tmp_path/'pid').read_text()), time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < end: time.sleep(0.2)
    assert not psutil.pid_exists(pid)
    assert nb.run(notebook(tmp_path/'next.ipynb', 'print(6 * 7)')).cells[0].outputs[0].text == '42\n'


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
    assert {p.stem for p in NOTEBOOKS if 'training' in library(p)} == {'11_training', 'command', 'distributed'}


def test_prose_is_no_input_of_a_run(tmp_path):
    def cells(prose, source='f()'):
        path = tmp_path/'x.ipynb'
        path.write_text(json.dumps({'cells': [{'cell_type': 'markdown', 'source': prose}, {'cell_type': 'code', 'source': source, 'outputs': []}], 'metadata': {}}), encoding='utf-8')
        return inputs.cells(path)
    assert cells('A sentence.') == cells('Another.') != cells('A sentence.', 'g()')
