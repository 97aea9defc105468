"""What every test shares: where things are, strict shapes, and a memory of what has already passed.

A second `make test` runs only what changed. A module that tests a part of the tree names it in `INPUTS` (globs from the
root); a module without `INPUTS` depends on everything. A test whose inputs are, byte for byte, those of its last pass is
left out and counted; `make test args=--all` runs it anyway. A fresh clone has no memory and runs everything.
"""
import hashlib, json, os, sys
from functools import cache
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
MEMORY = ROOT/'.cache'/'passed.json'
EVERYTHING = ['llm_from_scratch/*.py', 'llm_from_scratch/models/*/*', 'nbs/*', 'nbs/results/*', 'tests/*.py', 'tools/**/*', 'benchmarks/*', '*.*', 'Makefile', '.ci/run', '.github/**/*']
SHARED = ['tests/conftest.py', 'constraints.txt', 'pyproject.toml']

sys.path.insert(0, str(ROOT/'tools'))
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
hypothesis.settings.register_profile('book', deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile('book')


@cache
def _content(pattern):
    "A hash of all files that match a glob."
    files = sorted(p for p in ROOT.glob(pattern) if p.is_file() and '__pycache__' not in p.parts)
    return hashlib.sha256(b'\0'.join(str(p.relative_to(ROOT)).encode() + b'\0' + p.read_bytes() for p in files)).hexdigest()


def _state(item):
    "What the outcome of a test depends on."
    callspec = getattr(item, 'callspec', None)
    inputs = getattr(item.module, 'INPUTS', EVERYTHING)
    if callable(inputs): inputs = inputs(**(callspec.params if callspec else {}))
    own = str(Path(item.fspath).relative_to(ROOT).as_posix())
    parts = [_content(p) for p in [*SHARED, own, *inputs]]
    return hashlib.sha256('\0'.join([sys.version, *parts]).encode()).hexdigest()


def _read_memory():
    try: return json.loads(MEMORY.read_text(encoding='utf-8'))
    except (OSError, ValueError): return {}


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run every test, also those whose inputs have not changed since they passed')


def pytest_collection_modifyitems(config, items):
    passed = {} if config.getoption('--all') else _read_memory()
    for item in items: item.user_properties.append(('state', _state(item)))
    fresh = [i for i in items if passed.get(i.nodeid) != dict(i.user_properties)['state']]
    config.unchanged = len(items) - len(fresh)
    items[:] = fresh


class Memory:
    "Remember which tests passed, and with which inputs."
    def __init__(self): self.passed = {}

    def pytest_runtest_logreport(self, report):
        state = dict(report.user_properties).get('state')
        if report.when == 'call' and report.passed: self.passed[report.nodeid] = state
        if report.failed: self.passed[report.nodeid] = None

    def pytest_sessionfinish(self, session, exitstatus):
        if hasattr(session.config, 'workerinput'): return
        MEMORY.parent.mkdir(exist_ok=True)
        beside = MEMORY.with_suffix('.part')
        beside.write_text(json.dumps({**_read_memory(), **self.passed}, indent=0, sort_keys=True), encoding='utf-8')
        os.replace(beside, MEMORY)
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _read_memory(): session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter, config):
        if not getattr(config, 'unchanged', 0) and not self.passed: terminalreporter.write_line('Nothing changed since every test passed.')


def pytest_configure(config):
    config.pluginmanager.register(Memory(), 'memory')
    _check_shapes()


def _check_shapes():
    "Check every jaxtyping shape of the library while the tests run."
    from jaxtyping import install_import_hook
    install_import_hook('llm_from_scratch', 'conftest.checked')


def checked(function):
    "beartype, with an int welcome where a float is expected, as everywhere in Python."
    from beartype import BeartypeConf, beartype
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


@pytest.fixture(scope='session')
def shared_data():
    "The folder of reference data, which a reader's clone does not have."
    folder = ROOT.parent/'shared'/'data'
    if not folder.is_dir(): pytest.skip('the reference data of ../shared/data is not here')
    return folder


@pytest.fixture(scope='module')
def one_thread():
    "Sums in one order: results do not depend on how many cores there are."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
