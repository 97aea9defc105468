"""The library as someone gets it who only wants the library: a wheel, installed alone, imported, typed."""
import ast, json, os, re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email.parser import Parser

import pytest
import yaml
from conftest import ROOT

from llm_from_scratch import figures
from llm_from_scratch.files import _RESULTS, stored_runs

INPUTS = ['llm_from_scratch/*', 'llm_from_scratch/models/*/*', 'llm_from_scratch/pages/*', 'nbs/results/*', 'benchmarks/results/*', 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE', 'CITATION.cff', 'CHANGELOG.md', 'MANIFEST.in', 'tools/check.py', 'tools/release.py', 'tools/packing.py']
MODULES = sorted(p.stem for p in (ROOT/'llm_from_scratch').glob('*.py') if not p.stem.startswith('_'))
WITHOUT_TORCH = ['files', 'text', 'bpe', 'storyland', 'grammar', 'data', 'figures', 'hub', 'cli']
TOOLS = ['nbdev', 'fastcore', 'execnb', 'IPython', 'ipykernel', 'jupyter_client', 'nbformat']             # what writes the book
EXTRAS = ['matplotlib', 'pooch', 'requests', 'transformers', 'tokenizers', 'sklearn', 'peft', 'beartype', 'hypothesis', 'pytest', 'playwright', 'huggingface_hub']


def run(*command, **options): return subprocess.run([*map(str, command)], capture_output=True, text=True, encoding='utf-8', **options)


IMPORT = '''
import json, os, sys, tempfile
folder, missing, needed, modules, then = json.loads(sys.argv[1])
sys.path.insert(0, folder)
class Missing:
    "Some packages are not installed; whoever asks for one without need is noted."
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
for name in needed: __import__(name)               # once, for all modules
Missing.asked.clear()
def load(name):
    module = __import__(f"llm_from_scratch.{name}", fromlist=["x"])
    assert module.__file__.startswith(folder), module.__file__
    exec(then)
    return f"asked for {Missing.asked}" if Missing.asked and not then else ""
found = {}
for name in modules:                               # each in a process that has imported no other
    with tempfile.TemporaryFile() as said:
        if len(modules) == 1: print(load(name), end=""); break
        pid = os.fork()
        if not pid:
            os.dup2(said.fileno(), 1); os.dup2(said.fileno(), 2)
            try: print(load(name), end="", flush=True); os._exit(0)
            except BaseException as e: print(repr(e), flush=True); os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        found[name] = status, said.read().decode()
else: print(json.dumps(found))
'''


def import_alone(folder, modules, missing, needed=(), then=''):
    "Import modules in a new process in which some packages are not installed, each in a fork of it."
    return run(sys.executable, '-c', IMPORT, json.dumps([str(folder), missing, needed, modules, then]), cwd=folder)


def import_each(*arguments, **options):
    "The status and the words of the import of each module."
    folder, modules, *rest = arguments
    if hasattr(os, 'fork'):
        done = import_alone(*arguments, **options)
        assert done.returncode == 0, done.stderr
        return {name: tuple(found) for name, found in json.loads(done.stdout).items()}
    alone = {name: import_alone(folder, [name], *rest, **options) for name in modules}
    return {name: (done.returncode, done.stdout + done.stderr) for name, done in alone.items()}


def test_importing_needs_no_extra_asks_for_none_and_prints_nothing(installed):
    assert import_each(installed, MODULES, TOOLS + EXTRAS, needed=['numpy', 'torch']) == {module: (0, '') for module in MODULES}


def test_importing_needs_no_torch_and_does_not_ask_for_it(installed):
    assert import_each(installed, WITHOUT_TORCH, [*TOOLS, *EXTRAS, 'torch']) == {module: (0, '') for module in WITHOUT_TORCH}


def test_an_import_of_what_is_missing_would_be_seen(installed):
    done = import_alone(installed, ['figures'], TOOLS + EXTRAS, then='import matplotlib')
    assert done.returncode and 'matplotlib' in done.stderr
    (installed/'llm_from_scratch'/'curious.py').write_text('try: import transformers\nexcept ImportError: pass\n', encoding='utf-8')
    try: assert import_each(installed, ['curious', 'text'], TOOLS + EXTRAS) == {'curious': (0, "asked for ['transformers']"), 'text': (0, '')}
    finally: (installed/'llm_from_scratch'/'curious.py').unlink()


def test_a_figure_without_its_extra_names_it(installed):
    done = import_alone(installed, ['figures'], TOOLS + EXTRAS, then='module.use_style()')
    assert done.returncode and "pip install 'llm-from-scratch[plots]'" in done.stderr


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {n for n in names if not n.partition('/')[0].endswith('.dist-info')}
    modules = {f'llm_from_scratch/{p.name}' for p in (ROOT/'llm_from_scratch').iterdir() if p.suffix == '.py' or p.name == 'py.typed'}
    models = {p.relative_to(ROOT).as_posix() for p in (ROOT/'llm_from_scratch'/'models').rglob('*.*')}
    results = {f'llm_from_scratch/results/{kind}/{p.name}' for kind, folder in _RESULTS.items() for p in (ROOT/folder).iterdir()}
    pages = {f'llm_from_scratch/pages/{p.name}' for p in (ROOT/'llm_from_scratch'/'pages').glob('*.html')}
    assert package == modules | models | pages | results | {'llm_from_scratch/notebooks.zip'} and len(models) >= 3 and pages
    assert 'llm_from_scratch/py.typed' in package
    assert any(n.endswith('.dist-info/licenses/LICENSE') for n in names)


def test_the_source_distribution_brings_no_test_that_cannot_run(packages):
    "The wheel is built from it, so it has what it needs; tests run in a clone."
    names = [n.partition('/')[2] for n in tarfile.open(packages[0]).getnames()]
    assert 'pyproject.toml' in names and not [n for n in names if n.startswith('tests')]


def test_stored_results_are_found_where_only_the_wheel_is(installed):
    done = import_alone(installed, ['files'], TOOLS + EXTRAS, then='''
assert len(module.stored_runs("norm_orders")) == 3
print(sorted(p.stem for p in module.results_folder("benchmarks").iterdir()))''')
    assert done.returncode == 0 and done.stdout.split() == str(sorted(p.stem for p in (ROOT/'benchmarks'/'results').iterdir())).split(), done.stderr
    assert stored_runs('norm_orders') == json.loads((ROOT/'nbs'/'results'/'norm_orders.json').read_text(encoding='utf-8'))['runs']


def test_the_extras_that_a_notebook_can_do_without_are_those_of_the_package(wheel):
    "`allow_missing_extras` names the extra that brings each package, and `notebooks` brings them all but the harness and a gigabyte of Triton."
    extras = {extra: {re.split(r'[^\w.-]', r)[0].replace('_', '-') for r in metadata(wheel).get_all('Requires-Dist') if f'extra == "{extra}"' in r} for extra in metadata(wheel).get_all('Provides-Extra')}
    package_of = {'sklearn': 'scikit-learn'}
    needed = {package: package_of.get(package, package).replace('_', '-') for package in figures.EXTRAS}
    for package, extra in figures.EXTRAS.items(): assert needed[package] in extras[extra]
    brought = set.union(*(extras[e] for e in ('plots', 'hub', 'peers', 'formats', 'quantization', 'finetuning')))
    for package in set(figures.EXTRAS) - {'lm_eval', 'triton'}: assert needed[package] in brought
    assert any(r.startswith('llm-from-scratch[plots,hub,peers]') or 'plots' in r for r in metadata(wheel).get_all('Requires-Dist') if 'extra == "notebooks"' in r)


def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    return Parser().parsestr(archive.read(next(n for n in archive.namelist() if n.endswith('.dist-info/METADATA'))).decode())


def test_the_wheel_asks_for_the_core_alone(wheel):
    required = [re.split(r'[^\w.-]', r)[0] for r in metadata(wheel).get_all('Requires-Dist') if 'extra ==' not in r]
    assert sorted(required) == ['jaxtyping', 'numpy', 'regex', 'safetensors', 'tiktoken', 'torch', 'tqdm', 'tyro']


def test_the_wheel_says_who_may_use_it(wheel):
    said = metadata(wheel)
    assert (said['License-Expression'], said['Requires-Python']) == ('Apache-2.0', '>=3.10')


def test_one_version_everywhere(wheel):
    version = re.search(r'__version__ = "(.+)"', (ROOT/'llm_from_scratch'/'__init__.py').read_text(encoding='utf-8'))[1]
    settings = ConfigParser(interpolation=None)
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    cited = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    headings = re.findall(r'^## (\S+) \((.+)\)$', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    assert [metadata(wheel)['Version'], settings['DEFAULT']['version'], headings[0][0]] == [version, version, version.partition('.dev')[0]]
    released = next((number, date) for number, date in headings if date != 'unreleased')
    assert (cited['version'], cited['date-released']) == released


@pytest.mark.long(12)
def test_the_types_are_clean():
    done = run(sys.executable, '-m', 'basedpyright', '--pythonpath', sys.executable, '--outputjson', cwd=ROOT)      # what is installed here, whatever the folder is called
    report = json.loads(done.stdout)
    assert report['summary']['filesAnalyzed'] >= len(MODULES)
    assert not report['summary']['errorCount'], [f"{d['file']}:{d['range']['start']['line'] + 1}: {d['message']}" for d in report['generalDiagnostics'] if d['severity'] == 'error']


def test_the_types_reach_someone_else(installed, tmp_path):
    "A checker that sees only the installed wheel finds a wrong call, so the types travel with it."
    (tmp_path/'use.py').write_text('from llm_from_scratch.figures import graph_svg\ngraph_svg({"a": "a"}, [], width="wide")\n', encoding='utf-8')
    (tmp_path/'pyrightconfig.json').write_text(json.dumps({'extraPaths': [str(installed)], 'typeCheckingMode': 'basic', 'include': ['use.py']}), encoding='utf-8')
    done = run(sys.executable, '-m', 'basedpyright', '--pythonpath', sys.executable, '--outputjson', cwd=tmp_path)
    messages = [d['message'] for d in json.loads(done.stdout)['generalDiagnostics'] if d['severity'] == 'error']
    assert len(messages) == 1 and 'width' in messages[0], messages


def test_both_licences_are_there():
    text = (ROOT/'LICENSE').read_text(encoding='utf-8')
    for words in ('Apache License\n', 'Version 2.0, January 2004', 'END OF TERMS AND CONDITIONS', 'CC BY 4.0', 'https://creativecommons.org/licenses/by/4.0/legalcode'): assert words in text


# The front of the package -----------------------------------------------------------------------------------------

def test_what_the_package_offers_is_what_its_modules_have():
    import llm_from_scratch as package
    for name in package.__all__: assert getattr(package, name) is getattr(sys.modules[f'llm_from_scratch.{package._HOME[name]}'], name)
    assert set(package.__all__) == set(package._HOME) <= set(dir(package))
    said = ast.parse((ROOT/'llm_from_scratch'/'__init__.py').read_text(encoding='utf-8'))
    typed = {alias.name for n in ast.walk(said) if isinstance(n, ast.ImportFrom) and n.level for alias in n.names}
    assert typed == set(package.__all__)                               # what type checkers see
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): print(package.nothing)


def test_the_tokenizer_at_the_front_needs_no_torch(installed):
    "A name loads its own module and no other."
    script = f'import sys; sys.path.insert(0, {str(installed)!r})\nfrom llm_from_scratch import BPETokenizer, stories\nassert not {{"torch", "llm_from_scratch.gpt"}} & set(sys.modules)'
    done = run(sys.executable, '-c', script, cwd=installed)
    assert done.returncode == 0, done.stderr


def test_a_model_is_opened_without_the_compiler(installed):
    "Random numbers for tensors that have none would import torch's compiler: two seconds for each program that opens a model."
    script = f'import sys; sys.path.insert(0, {str(installed)!r})\nfrom llm_from_scratch import GPT\nGPT.from_pretrained("storyland")\nassert "torch._dynamo" not in sys.modules'
    done = run(sys.executable, '-c', script)
    assert done.returncode == 0, done.stderr


# One small library ------------------------------------------------------------------------------------------------

def tree(module): return ast.parse((ROOT/'llm_from_scratch'/f'{module}.py').read_text(encoding='utf-8'))


def defined(module):
    "The names without an underscore that a module defines itself."
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]: yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def test_one_name_means_one_thing():
    homes = {}
    for module in MODULES:
        for name in {*defined(module)}:
            if not name.startswith('_'): homes.setdefault(name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_no_module_imports_a_private_name_of_another():
    found = [f'{module}: {alias.name}' for module in MODULES for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('llm_from_scratch'))
             for alias in node.names if alias.name.startswith('_') and alias.name != '__version__']
    assert found == []


def test_one_module_for_files():
    "Nobody else replaces files, makes temporary ones beside them, or sums up bytes in a way of their own."
    own = {'os.replace', 'zlib.crc32', 'hashlib.sha256', 'tempfile.mkstemp', 'difflib.get_close_matches'}
    found = {f'{module}: {ast.unparse(node)}' for module in MODULES if module != 'files' for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute) and ast.unparse(node) in own}
    others = {'cli: difflib.get_close_matches', 'api: difflib.get_close_matches',      # of a misspelled command, or field of a request
              'serving: hashlib.sha256'}                                              # of a script, as browsers ask for it
    assert found == others


LATE = {('gpt', 'pretrained'),         # `GPT.from_pretrained` asks it for folders of other programs, when it is called
        ('attention', 'flash')}        # a backend that is chosen by name


def test_a_chapter_imports_from_earlier_ones_only():
    chapters = [p.stem.partition('_')[2] for p in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))]
    imports = [(chapter, node.module.rpartition('.')[2]) for chapter in chapters for node in ast.walk(tree(chapter))
               if isinstance(node, ast.ImportFrom) and node.module and (node.level or node.module.startswith('llm_from_scratch.'))]
    assert ('gpt', 'positions') in imports and ('attention', 'tensors') in imports
    assert {(one, other) for one, other in imports if other in chapters and chapters.index(other) >= chapters.index(one)} == LATE


PUBLIC = {
    'text': 'CharTokenizer SpacedWordTokenizer Tokenizer WordTokenizer clean deduplicate', 'bpe': 'BPETokenizer GPT2_PATTERN GPT4_PATTERN load_tokenizer',
    'grammar': '', 'storyland': 'Preference SIZES STORIES_VERSION Story Task arithmetic continuations entropy_floor instructions labels log_probability preferences questions stories',
    'data': 'BatchLoader DownloadError TokenFile download load_corpus', 'files': '', 'pretrained': 'ChatTemplate SafetensorsFile load_chat_template', 'weight_maps': 'export_weights load_weights', 'formats': 'read_gpt2 read_llama2c read_tensorflow', 'families': '', 'gguf': 'GGUFFile dequantize quantize read_gguf write_gguf', 'hub': 'CATALOG cache_folder is_pulled pull pulled_folder', 'chat': 'Conversation', 'constraints': 'Constraint',
    'figures': 'COLORS FAINT INK graph_svg head_view heatmap pipeline use_style'}


@pytest.mark.parametrize('module', PUBLIC)
def test_the_public_names_are_few_and_have_examples(module):
    public = next(ast.literal_eval(node.value) for node in tree(module).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__')
    assert sorted(public) == PUBLIC[module].split()
    without = [node.name for node in tree(module).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public and '>>> ' not in (ast.get_docstring(node) or '')]
    assert without == []


def test_inner_functions_are_checked_where_they_have_shapes():
    "Annotations are strings where a module asks for that; others would be compiled anew at every call."
    from conftest import has_shapes
    def shaped(x): return x
    def plain(x, n=None): return n
    shaped.__annotations__ = {'x': 'Float[Tensor, "B T"]', 'return': 'Tensor'}
    plain.__annotations__ = {'x': 'Tensor', 'n': 'dict[str, Any]', 'return': 'int | None'}
    assert has_shapes(shaped) and not has_shapes(plain)
