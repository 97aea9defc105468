#!/usr/bin/env python3
"""Work on one chapter: `nb.py execute 03` runs notebook 03 in place and stores its outputs.

    text     write the notebook as Markdown into .work/ (jupytext), ready to edit; ⟦U+2028⟧ is a character that would end a line
    update   take the edited Markdown back; cells that did not change keep their ids and outputs
    export   write the notebook's module; without a notebook, write the whole library and its index
    execute  export, run from a clean kernel, store the outputs, clean
    verify   run from a clean kernel and compare with the stored outputs

Stored outputs are compared word for word only where everything they depend on is as it was: system, processor, threads, Python
and packages (`environment`). Elsewhere every cell must run, every assertion hold, and the kinds of output agree: another
processor rounds otherwise, and after a hundred steps of training no digit is the same.
"""
import argparse, hashlib, json, os, platform, re, shutil, subprocess, sys, tempfile
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import anywhere
import grow
from finish import read_settings
from machine import processor_model

ROOT = Path(__file__).resolve().parent.parent
NBS, WORK, LIBRARY = ROOT/'nbs', ROOT/'.work', ROOT/'llm_from_scratch'
NAMES = re.compile(r'\bid="[^"]*"|#[\w.-]+(?=[")])')    # names inside a drawing are checksums of what they name
NUMBER = re.compile(r'[-+]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?')
RELATIVE = 1e-3      # printed numbers may differ by this much, or by one unit in their last printed place
BUDGET = 20          # processor seconds that one run of a notebook may use; longer work is an experiment
BUDGETS = {'00_tour': 180, '15_pretrained': 60}
PACKAGES = ['torch', 'numpy', 'matplotlib', 'tiktoken', 'tokenizers', 'transformers']


def find(which):
    "The notebook that `which` names: '3', '03', 'bpe', '03_bpe' or a path."
    paths = sorted(NBS.glob('*.ipynb'))
    number = f'{int(which):02d}' if which.isdigit() else which
    hits = [p for p in paths if number in (p.stem, p.stem.split('_')[0], p.stem.partition('_')[2], str(p), p.name)]
    draft = sorted(p for p in WORK.glob('*.md') if number in (p.stem, p.stem.split('_')[0], p.stem.partition('_')[2]))
    if hits or Path(which).suffix == '.ipynb': return hits[0] if hits else Path(which).resolve()
    if draft: return NBS/f'{draft[0].stem}.ipynb'
    sys.exit(f"no notebook is called {which!r}; there are {', '.join(p.stem for p in paths)}")


def text(nb):
    "Write the notebook as Markdown to edit."
    import jupytext
    WORK.mkdir(exist_ok=True)
    jupytext.write(respelled(jupytext.read(nb), spell), WORK/f'{nb.stem}.md', fmt={'extension': '.md', 'cell_metadata_filter': '-all'})
    print(f'edit .work/{nb.stem}.md, then: nb.py update {nb.stem}')


# What jupytext takes for the end of a line or of a cell is written as ⟦U+2028⟧ in the text, and so is what looks like that.
SPELLED = re.compile('[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]|⟦(?=U\\+)|(?<=<!-- )#(?=(?:end)?(?:region|md|raw)\\b)')


def spell(source): return SPELLED.sub(lambda m: f'⟦U+{ord(m[0]):04X}⟧', source)


def unspell(source): return re.sub('⟦U\\+([0-9A-F]{4,5})⟧', lambda m: chr(int(m[1], 16)), source)


def respelled(book, change):
    for cell in book.cells: cell.source = change(cell.source)
    return book


def update(nb):
    "Take the edited Markdown back into the notebook."
    import jupytext
    from jupytext.combine import combine_inputs_with_outputs
    new = respelled(jupytext.read(WORK/f'{nb.stem}.md'), unspell)
    if nb.exists(): new = combine_inputs_with_outputs(new, jupytext.read(nb), fmt='md')
    new.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}, **kept(nb)}
    jupytext.write(new, nb)
    clean(nb)


def kept(nb):
    "The notebook metadata that outlives an edit: what the outputs were stored with."
    meta = json.loads(nb.read_text(encoding='utf-8'))['metadata'] if nb.exists() else {}
    return {k: meta[k] for k in ['stored_with'] if k in meta}


def clean(nb):
    "Drop execution counts and editor metadata, as nbdev's git hook does, and begin with the cell that all notebooks begin with."
    os.chdir(ROOT)
    from nbdev.clean import nbdev_clean
    book = json.loads(nb.read_text(encoding='utf-8'))
    anywhere.begin(book, read_settings(ROOT))
    nb.write_text(json.dumps(book, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    nbdev_clean(str(nb))


def export(nb):
    "Write the module of this notebook, if it has one; a class that grows in the notebook is one statement there."
    os.chdir(ROOT)
    from nbdev.export import nb_export
    name = re.search(r'#\| default_exp (\w+)', ''.join(sources(nb)))
    if not name: return
    nb_export(nb, LIBRARY)
    merge(LIBRARY/f'{name[1]}.py')


def merge(module):
    "Make one `class` statement of the slices of each class of a module."
    before = module.read_text(encoding='utf-8')
    try: after = grow.merged(before, f'llm_from_scratch/{module.name}')
    except grow.Refused as e: sys.exit(f'{e}; mend the notebook and export it again.')
    if after != before: module.write_text(after, encoding='utf-8')


def export_all():
    "Write every module, and the index that links names to pages."
    write_library(ROOT)
    indexes()


def write_library(root):
    "Every module that the notebooks below `root` export, and nbdev's index of them."
    os.chdir(root)
    from nbdev.doclinks import _build_modidx, nbdev_export
    nbdev_export()
    for module in sorted((root/'llm_from_scratch').glob('*.py')): merge(module)
    _build_modidx()


def indexes():
    "Bring what lists the chapters and their names in step: the library's index, the symbol index, the plan of a course, the front picture."
    os.chdir(ROOT)
    import course
    from nbdev.doclinks import _build_modidx
    _build_modidx()
    course.write(NBS)
    subprocess.run([sys.executable, str(ROOT/'tools'/'nbfilter.py'), '--symbols'], check=True)
    subprocess.run([sys.executable, str(ROOT/'tools'/'pictures.py')], check=True)


def sources(nb):
    "The source of every code cell."
    return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def environment():
    "What stored outputs depend on, besides the code."
    import torch
    return {'system': platform.system(), 'processor': processor_model(), 'capability': os.environ.get('ONEDNN_MAX_CPU_ISA') or torch.backends.cpu.get_cpu_capability(),
            'threads': torch.get_num_threads(), 'python': platform.python_version(), **{p: version(p).split('+')[0] for p in PACKAGES}}


def kernel_settings():
    "What a kernel finds in its environment: the library of this tree, and nothing that differs between two runs."
    os.environ.setdefault('LLM_FROM_SCRATCH_DATA', str(ROOT.parent/'shared'/'data'))
    os.environ.update(PYTHONHASHSEED='0', PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
                      MPLBACKEND='module://matplotlib_inline.backend_inline', JUPYTER_PLATFORM_DIRS='1', PYDEVD_DISABLE_FILE_VALIDATION='1', TOKENIZERS_PARALLELISM='false')
    if not shutil.which('nvidia-smi'): os.environ.setdefault('TRITON_INTERPRET', '1')        # triton asks for it when it is first imported
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')          # other work on the same cores costs less when waiting threads sleep


class Stopped(RuntimeError):
    "A run that could not go on, and in which cell."


def where(client):
    "The code cell that a client was running: it counts a cell as it begins."
    cell = [c for c in client.nb.cells if c.cell_type == 'code' and c.source.strip()][max(0, client.code_cells_executed - 1)]
    return f'in cell {cell.id} ({cell.source.strip().splitlines()[-1]})'


def run(nb, folder=None):
    """The notebook's cells, executed from a clean kernel in an empty folder, and the processor seconds they used in `metadata.seconds`.

    Raises CellExecutionError where a cell raises, and Stopped where the kernel ends or a cell takes too long.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty: return run(nb, empty)
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    kernel_settings()
    book, before = nbformat.read(nb, as_version=4), children_seconds()
    client = NotebookClient(book, timeout=1200, kernel_name='python3', extra_arguments=['--log-level=40'], resources={'metadata': {'path': str(folder)}})
    try: client.execute()
    except DeadKernelError: raise Stopped(f'the kernel died {where(client)}: out of memory, or ended by its own code or a compiled library') from None
    except CellTimeoutError: raise Stopped(f'twenty minutes were over {where(client)}: run less, or make an `#| experiment` of it') from None
    for cell in book.cells:
        if cell.cell_type == 'code': cell.outputs = join_streams(cell.outputs)
    book.metadata.seconds = children_seconds() - before
    return book


def children_seconds():
    "Processor seconds of the processes that this one started and waited for, and of the kernels forked for it."
    import forks
    spent = os.times()
    return spent.children_user + spent.children_system + forks.spent()


def budget(nb): return BUDGETS.get(nb.stem, BUDGET)


def join_streams(outputs):
    "A stream that arrives in pieces is one output: how it is cut depends on the moment."
    joined = []
    for out in outputs:
        if joined and out.output_type == 'stream' == joined[-1].output_type and out.name == joined[-1].name:
            joined[-1].text += out.text
        else: joined.append(out)
    return joined


def execute(nb):
    "Run the notebook in place and store its outputs."
    import nbformat
    export(nb)
    book = run(nb)
    seconds = book.metadata.pop('seconds')
    stamp(book, nb)
    book.metadata.pop('language_info', None)
    nbformat.write(book, nb)
    clean(nb)
    if seconds > budget(nb): print(f'{nb.name} used {seconds:.0f} processor seconds; its budget is {budget(nb)}: run less, or make the long part an `#| experiment` (CONTRIBUTING.md)', file=sys.stderr)


def stamp(book, nb):
    "Write into a notebook that was run what its outputs came from."
    book.metadata['stored_with'] = environment()
    for cell in book.cells: cell.metadata.pop('drawn_from', None)
    for cell in filter(draws, book.cells): cell.metadata['drawn_from'] = drawn_from(nb, cell.source)


def draws(cell): return any(kind.startswith('image/') for out in cell.get('outputs', []) for kind in out.get('data', {}))


@lru_cache(maxsize=64)
def words_of(text): return set(re.findall(r'\w+', text))


def drawn_from(nb, source):
    "A hash of what a stored picture must not be older than: the code of its cell, and the results of experiments that its notebook names."
    words = words_of('\n'.join(sources(nb)))
    results = [p for p in sorted((nb.parent/'results').glob('*.json')) if p.stem in words]
    return hashlib.sha256(b'\0'.join([source.encode(), *(p.read_bytes() for p in results)])).hexdigest()[:16]


def same_text(a, b):
    "Equal word for word, and number for number within one unit in the last printed place or `RELATIVE`."
    if NUMBER.sub('#', a) != NUMBER.sub('#', b): return False
    return all(same_number(x, y) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))


def same_number(x, y):
    "Whether two printed numbers may be the same result on two machines."
    if x == y: return True
    if '.' not in x and 'e' not in x.lower(): return False          # whole numbers are counts: exactly
    a, b = (float(s.replace(',', '').replace('_', '')) for s in (x, y))
    mantissa, _, exponent = x.lower().partition('e')
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition('.')[2]))
    return abs(a - b) <= max(RELATIVE * max(abs(a), abs(b)), 1.001 * unit)


def facts(output):
    "An output as (kind, content) pairs."
    if output['output_type'] == 'stream': return [(output['name'], ''.join(output['text']))]
    if output['output_type'] == 'error': return [('error', f"{output['ename']}: {output['evalue']}")]
    return [(mime, ''.join(data) if isinstance(data, (str, list)) else json.dumps(data, sort_keys=True)) for mime, data in sorted(output['data'].items())]


def same_content(kind, a, b):
    "Whether two outputs of one kind show the same: text up to rounding, drawings by what they draw, other pictures byte for byte."
    if kind == 'image/svg+xml': return same_text(NAMES.sub('', a), NAMES.sub('', b))
    return a.strip() == b.strip() if kind.startswith('image/') else same_text(a, b)


def is_timed(cell): return '#| timing' in ''.join(cell['source'])


def differences(stored, fresh, kinds_only=False):
    """Sentences on where two runs of a notebook differ.

    Cells marked `#| timing` need only show the same kinds of output, and so does every cell with `kinds_only`: for a run
    in another environment than the stored one.
    """
    if len(stored['cells']) != len(fresh['cells']): return [f"{len(stored['cells'])} cells are stored, {len(fresh['cells'])} were run"]
    found = []
    for i, (old, new) in enumerate(zip(stored['cells'], fresh['cells'])):
        if old['cell_type'] != 'code': continue
        a, b = ([f for o in c['outputs'] for f in facts(o)] for c in (old, new))
        if [k for k, _ in a] != [k for k, _ in b]:
            found.append(f"cell {i}: stored {[k for k, _ in a]}, a fresh run gives {[k for k, _ in b]}")
        elif not (kinds_only or is_timed(old)):
            found += [f"cell {i}: stored {x[:300]!r}, a fresh run gives {y[:300]!r}" for (kind, x), (_, y) in zip(a, b) if not same_content(kind, x, y)]
    return found


def verify(nb):
    "Run the notebook from a clean kernel and compare with what is stored."
    stored = json.loads(nb.read_text(encoding='utf-8'))
    here, there = environment(), stored['metadata'].get('stored_with')
    found = differences(stored, run(nb), kinds_only=here != there)
    if found: sys.exit('\n'.join([f"{nb.name}: stored outputs are not what a fresh run gives", *found]))
    print(f"{nb.name}: stored outputs are what a fresh run gives{'' if here == there else ', in kind: they were stored in another environment'}")


def main():
    from nbclient.exceptions import CellExecutionError
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (text, update, export, execute, verify)}
    parser.add_argument('command', choices=commands)
    parser.add_argument('notebook', nargs='*', help='a number, a name, or both: 3, bpe, 03_bpe')
    args = parser.parse_args()
    if not args.notebook:
        if args.command != 'export': parser.error(f'{args.command} which chapter? For example: make {args.command} n=03')
        export_all()
    for which in args.notebook:
        nb = find(which)
        try: commands[args.command](nb)
        except Stopped as e: sys.exit(f'{nb.name} is as it was: {e}.')
        except CellExecutionError as e: sys.exit(f'{nb.name} raised while it ran; mend the cell and run it again.\n{e}')
    if args.notebook and args.command in ('export', 'execute'): indexes()


if __name__ == '__main__': main()
