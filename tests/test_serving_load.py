"""The server from outside: two hundred clients at once, some of whom go away, and thousands that mean no good.

A model with random weights answers, so each text is cheap, looks like no other, and changes with every token before it.
`alone.json` holds what `generate` writes for each job by itself."""
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from hostile import BOMBS, CANARY, PATHS, canary_of, hostile_http, hostile_json, post
from shared import in_a_loop

httpx = pytest.importorskip('httpx', reason='the client is an extra: dev')
pytest.importorskip('uvicorn', reason='the server is an extra: serve')

INPUTS = ['imports:tests/tiny_server.py']
ROOT = Path(__file__).resolve().parent.parent
SHARED = 'Once upon a time there was a little girl who lived by the river.'       # so that prompts share pages
CLIENTS, PATIENCE = 200, 120.


def job(i):
    "What client i asks for: beginnings that are shared, or not; greedy, or not; an end by length, or by a string."
    rng = random.Random(i)
    text = SHARED[:rng.choice([0, 0, 20, 40, 64])] + f' {i} ' + 'abcdefghij klmno'[:rng.randint(0, 16)] * rng.randint(1, 3)
    asked = {'max_tokens': rng.choice([1, 2, 3, 5, 8, 13]), 'seed': rng.choice([i, 7]), 'temperature': rng.choice([0., .7, 1., 1.]), 'top_p': rng.choice([1., .9])}
    if i % 7 == 0: asked['stop'] = ['a', 'Z', ' ']
    if i % 2: return {**asked, 'prompt': text}
    return {**asked, 'messages': [{'role': 'user', 'content': text}]}


class Running:
    "A server in a process of its own."

    def __init__(self, folder, port=0):
        self.folder, self.log = folder, open(folder/'log', 'ab')
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        self.process = subprocess.Popen([sys.executable, ROOT/'tests'/'tiny_server.py', str(port), folder], stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.complaints()
        self.port = int(self.url.rpartition(':')[2])

    def complaints(self): return (self.folder/'log').read_text(encoding='utf-8', errors='replace')

    def gauges(self):
        with urllib.request.urlopen(f'{self.url}/metrics', timeout=PATIENCE) as answer: return {name: float(x) for name, x in re.findall(r'^llmfs_(\S+) ([\d.e+]+)$', answer.read().decode(), re.M)}

    def is_at_rest(self):
        now = self.gauges()
        return now['pages_free'] == now['pages'] > 0 and now['open_texts'] == now['waiting'] == now['running'] == 0

    def comes_to_rest(self):
        "Whether, soon, no request and no page is in use."
        for _ in range(200):
            if self.is_at_rest(): return True
            time.sleep(.05)
        return False

    def end(self, sign=signal.SIGTERM):
        if self.process.poll() is None: self.process.send_signal(sign)
        code = self.process.wait(timeout=PATIENCE)
        self.process.stdout.close()
        self.log.close()
        return code


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('server')
    (folder/'jobs.json').write_text(json.dumps([job(i) for i in range(CLIENTS)]), encoding='utf-8')
    running = Running(folder)
    running.alone = json.loads((folder/'alone.json').read_text(encoding='utf-8'))
    (folder/'jobs.json').unlink()
    yield running
    assert running.end() == 0


# Many clients -----------------------------------------------------------------------------------------------------

def request_of(asked, stream, logprobs=False):
    "(path, body) of a job."
    body = {'model': 'tiny', **asked, 'stream': stream}
    if stream: body['stream_options'] = {'include_usage': True}
    if 'messages' in asked and logprobs: body.update(logprobs=True, top_logprobs=2)
    return PATHS['chat' if 'messages' in asked else 'completion'], body


async def events(response):
    async for line in response.aiter_lines():
        if line.startswith('data: ') and line != 'data: [DONE]': yield json.loads(line[6:])


async def ask(client, asked, stream, logprobs=False):
    "The answer as (text, number of tokens, how it ended, bytes of its tokens if they were asked for)."
    path, body = request_of(asked, stream, logprobs)
    if not stream:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()['choices']
        text = choice['message']['content'] if 'message' in choice else choice['text']
        told = choice['logprobs']
        return text, answer.json()['usage']['completion_tokens'], choice['finish_reason'], bytes_of(told) if logprobs and told else None
    text, reason, n, seen = '', None, None, b''
    async with client.stream('POST', path, json=body) as response:
        assert response.status_code == 200 and response.headers['content-type'].startswith('text/event-stream')
        async for chunk in events(response):
            if chunk.get('usage'): n = chunk['usage']['completion_tokens']
            for choice in chunk['choices']:
                text += choice['delta'].get('content') or '' if 'delta' in choice else choice['text']
                reason = choice['finish_reason'] or reason
                if choice['logprobs'] and logprobs: seen += bytes_of(choice['logprobs']) or b''
    return text, n, reason, seen if logprobs and 'messages' in asked else None


def bytes_of(logprobs): return b''.join(bytes(t['bytes']) for t in logprobs['content']) if 'content' in logprobs else None


def long_request(i, stream=True):
    "For an answer that takes much longer than anybody here waits."
    path, body = request_of({**job(i), 'max_tokens': 2000, 'logit_bias': {'256': -100}}, stream)
    body.pop('stop', None)
    return path, body


async def leave(client, i, stream):
    "Ask for much, and go away in the middle."
    path, body = long_request(i, stream)
    if not stream:
        with pytest.raises(httpx.TimeoutException): await client.post(path, json=body, timeout=httpx.Timeout(PATIENCE, read=.15))
        return
    async with client.stream('POST', path, json=body) as response:
        async for _ in events(response): break


def client_of(server): return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0), trust_env=False)


def is_alone(answer, expected):
    "Whether an answer is what the model writes by itself."
    text, n, reason, raw = answer
    return text == expected['text'] and n == expected['n'] and reason == expected['reason'] and raw in (None, bytes(expected['bytes']))


def test_two_hundred_clients_at_once(server):
    "None is lost, each gets the text that its request gets alone, and what those leave behind who go away is cleaned up."
    async def everybody():
        async with client_of(server) as client:
            stays = [ask(client, job(i), stream=i % 3 != 0, logprobs=i % 4 == 0) for i in range(CLIENTS)]
            goes = [leave(client, i, stream=i % 2 == 0) for i in range(1000, 1030)]
            mixed = [*stays, *goes]
            order = random.Random(0).sample(range(len(mixed)), len(mixed))
            done = await asyncio.gather(*(mixed[i] for i in order), return_exceptions=True)
            return dict(zip(order, done))

    found = in_a_loop(everybody())
    wrong = {i: (found[i], server.alone[i]) for i in range(CLIENTS) if isinstance(found[i], BaseException) or not is_alone(found[i], server.alone[i])}
    assert len(found) == CLIENTS + 30 and not wrong
    assert not [found[i] for i in range(CLIENTS, CLIENTS + 30) if found[i] is not None]
    assert server.comes_to_rest(), server.gauges()
    noticed = server.gauges()['texts_total{finish_reason="cancelled"}']
    assert 15 <= noticed <= 30                     # all who had read a first token; who asked for a whole answer may have left before the server had read the request
    long = [e['text'] for e in server.alone if e['n'] > 2]
    assert len(set(long)) > .9 * len(long) > .5 * CLIENTS                                       # the texts differ, so a mixture would show


# Those that mean no good ------------------------------------------------------------------------------------------

class Wire:
    "One connection, byte by byte."

    def __init__(self, port): self.port, self.writer = port, None

    async def __aenter__(self): return self

    async def __aexit__(self, *_): await self.close()

    async def close(self):
        if self.writer is not None: self.writer.close()
        self.writer = None

    async def send(self, raw):
        if self.writer is None: self.reader, self.writer = await asyncio.open_connection('127.0.0.1', self.port, limit=1 << 22)
        try:
            self.writer.write(raw)
            await self.writer.drain()
        except OSError: pass                                  # it was refused before all of it was sent

    async def receive(self, patience=PATIENCE, has_body=True):
        "(status, headers, body) of the next answer; None: the connection was closed without one."
        try: return await asyncio.wait_for(self._receive(has_body), patience)
        except (asyncio.IncompleteReadError, ConnectionError): return None

    async def _receive(self, has_body):
        while True:
            head = (await self.reader.readuntil(b'\r\n\r\n')).decode('latin-1')
            first, *lines = head.strip().split('\r\n')
            status, headers = int(first.split()[1]), dict(line.lower().split(': ', 1) for line in lines)
            if status >= 200: break
        if not has_body: return status, headers, b''
        if headers.get('transfer-encoding') == 'chunked':
            body = b''
            while size := int(await self.reader.readline(), 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        else: body = await self.reader.readexactly(int(headers['content-length'])) if 'content-length' in headers else await self.reader.read()
        if headers.get('connection') == 'close': await self.close()
        return status, headers, body


def fault_of(answer, canary, is_http=False):
    "What is wrong with an answer to a hostile request; '' if it is a refusal as it should be, or right."
    status, headers, body = answer
    text = body.decode(errors='replace')
    if others := set(CANARY.findall(text + str(headers))) - {canary}: return f'the text of another request: {others}'
    if re.search(r'Traceback|\.py\b|site-packages', text): return 'the insides of the server'
    if is_http and status < 500 and not body: return '' if status == 200 or status >= 400 else f'status {status}'      # HEAD
    if status == 200:
        if headers['content-type'].startswith('text/event-stream'): return '' if '"error"' not in text and text.endswith('data: [DONE]\n\n') else 'a stream that failed'
        if not headers['content-type'].startswith('application/json'): return '' if is_http else 'no JSON'
        found = json.loads(text)
        if 'choices' in found: return '' if found['choices'] and all(c['finish_reason'] in ('stop', 'length', 'tool_calls') for c in found['choices']) else 'no answer'
        return '' if found.keys() & {'tokens', 'prompt', 'data', 'status', 'id'} else 'another answer'
    if not 400 <= status < 500: return f'status {status}'
    if is_http and status == 400 and text == 'Invalid HTTP request received.': return ''             # below the level of the API
    error = json.loads(text).get('error', {})
    right = isinstance(error.get('message'), str) and 0 < len(error['message']) < 2000 and isinstance(error.get('type'), str) and {'param', 'code'} <= error.keys()
    return '' if right else 'no error object'


SENTINELS = [1, 3, 2, 4]                                       # jobs whose answers are known


async def attack(server, first, n, share_http, workers=12):
    "Send n hostile requests and, between them, right ones; how many came to what, and what was wrong."
    counts, faults, numbers = Counter(), [], iter(range(first, first + n))

    async def worker():
        async with Wire(server.port) as wire:
            for i in numbers:
                rng, canary = random.Random(i), canary_of(i)
                if rng.random() < share_http:
                    raw, whole = hostile_http(rng, canary)
                    found = await once(raw, whole)
                    counts['http', found and found[0]] += 1
                    if found is None and whole: faults.append((i, raw[:300], 'no answer'))
                    elif found is not None and (fault := fault_of(found, canary, is_http=True)): faults.append((i, raw[:300], fault, found[0], found[2][:300]))
                else:
                    path, data = hostile_json(rng, canary)
                    for _ in range(2):                        # the connection may have been idle too long
                        await wire.send(post(path, data, canary))
                        if (found := await wire.receive()) is not None: break
                        await wire.close()
                    counts['json', found and found[0]] += 1
                    fault = 'no answer' if found is None else fault_of(found, canary)
                    if fault: faults.append((i, path, data[:300], fault, found and found[0], found and found[2][:300]))
                if i % 60 == 0: await sentinel(SENTINELS[i // 60 % len(SENTINELS)])

    async def once(raw, whole):
        async with Wire(server.port) as wire:
            await wire.send(raw)
            if not whole and wire.writer.can_write_eof():
                try: wire.writer.write_eof()
                except OSError: pass
            return await wire.receive(has_body=not raw.startswith(b'HEAD '))

    async def sentinel(i):
        async with Wire(server.port) as wire:
            path, body = request_of(job(i), stream=False)
            await wire.send(post(path, json.dumps(body).encode(), 'none'))
            status, _, told = await wire.receive()
            choice = json.loads(told)['choices'][0] if status == 200 else {}
            text = choice.get('message', {}).get('content', choice.get('text'))
            counts['right', status] += 1
            if text != server.alone[i]['text']: faults.append((i, 'a right request', told[:300]))

    await asyncio.gather(*(worker() for _ in range(workers)))
    return counts, faults


def survives(server, first, n, share_http=.2):
    before = len(server.complaints())
    counts, faults = in_a_loop(attack(server, first, n, share_http))
    assert not faults, f'{len(faults)} of {n}: ' + '\n'.join(map(str, faults[:12]))
    assert sum(v for (kind, _), v in counts.items() if kind != 'right') == n and counts['right', 200] >= n // 60
    assert sum(v for (kind, status), v in counts.items() if kind == 'json' and status == 200) > n * .03       # not all of it is refused at the door
    assert server.process.poll() is None and 'Traceback' not in server.complaints()[before:], server.complaints()[-3000:]
    assert server.comes_to_rest(), server.gauges()
    return counts


def test_hostile_requests_are_refused_and_leak_nothing(server):
    survives(server, 0, 2000)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_requests(server):
    print(survives(server, 10_000, 100_000))


@pytest.mark.parametrize('which', [[0, *range(5, len(BOMBS))], pytest.param([1, 2, 3, 4], marks=pytest.mark.slow)])
def test_bombs_in_schemas_are_refused_soon(server, which):
    async def all_of_them():
        async with client_of(server) as client:
            async def send(schema):
                body = {'model': 'tiny', 'messages': [{'role': 'user', 'content': 'x'}], 'max_tokens': 8, 'response_format': {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema}}}
                return (await client.post(PATHS['chat'], json=body)).status_code
            beside = [ask(client, job(i), stream=True) for i in range(4)]
            return await asyncio.wait_for(asyncio.gather(*beside, *(send(BOMBS[i]) for i in which)), PATIENCE)

    found = in_a_loop(all_of_them())
    assert all(is_alone(found[i], server.alone[i]) for i in range(4)) and set(found[4:]) <= {200, 400} and server.comes_to_rest()


def test_requests_in_one_piece_are_answered_in_order(server):
    async def talk():
        async with Wire(server.port) as wire:
            bodies = [{**request_of(job(i), stream=False)[1], 'prompt': f'{i}', 'max_tokens': i, 'logit_bias': {'256': -100}} for i in (1, 3, 5)]
            good = [post(PATHS['completion'], json.dumps(b).encode(), '') for b in bodies]
            await wire.send(good[0] + post(PATHS['chat'], b'{', '') + good[1] + b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n' + good[2])
            return [await wire.receive() for _ in range(5)]

    answers = in_a_loop(talk())
    assert [status for status, *_ in answers] == [200, 400, 200, 200, 200] and json.loads(answers[3][2]) == {'status': 'ok'}
    assert [json.loads(answers[i][2])['usage']['completion_tokens'] for i in (0, 2, 4)] == [1, 3, 5]


def test_slow_senders_hold_nobody_up(server):
    "Headers and bodies that never end are given up, and meanwhile others are served."
    async def drip(start, piece):
        async with Wire(server.port) as wire:
            await wire.send(start)
            begun = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - begun < 10:
                try: return await wire.receive(.2)
                except asyncio.TimeoutError: await wire.send(piece)
            return 'still open'

    async def everybody():
        head = post(PATHS['completion'], b'', '', length=500)
        slow = [drip(head, b' ') for _ in range(20)] + [drip(head.replace(b'Content-Length: 500', b'Transfer-Encoding: chunked'), b'1\r\n \r\n') for _ in range(5)]
        slow += [drip(b'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n', b'X-A: b\r\n') for _ in range(10)] + [drip(b'', b'G')]
        async with client_of(server) as client: return await asyncio.gather(*slow, *(ask(client, job(i), stream=True) for i in range(10)))

    found = in_a_loop(everybody())
    assert all(is_alone(found[36 + i], server.alone[i]) for i in range(10))
    told = [f and f[0] for f in found[:25]]
    assert {*told} <= {408, None} and told.count(408) >= 15               # what was on its way when the server closed may undo its answer
    assert 'still open' not in found[25:36] and server.comes_to_rest()


# The end ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='Windows has no signals')
def test_killed_and_started_again_on_the_same_port(server):
    "Every client hears of it at once, none waits; a new server takes the port and answers as the first did."
    async def killed():
        async with client_of(server) as client:
            async def one(i):
                path, body = long_request(i)
                async with client.stream('POST', path, json=body) as response:
                    async for _ in events(response):
                        started.append(i)
                        if len(set(started)) == 10: server.process.kill()
            started = []
            return await asyncio.wait_for(asyncio.gather(*(one(i) for i in range(20)), return_exceptions=True), 30)

    port = server.port
    outcome = in_a_loop(killed())
    assert all(isinstance(o, httpx.TransportError) for o in outcome) and server.process.wait(10) == -signal.SIGKILL
    with pytest.raises(ConnectionRefusedError): socket.create_connection(('127.0.0.1', port), 5)
    again = Running(server.folder, port)
    again.alone, server.process, server.log = server.alone, again.process, again.log
    assert again.port == port

    async def ten():
        async with client_of(again) as client: return await asyncio.gather(*(ask(client, job(i), stream=True) for i in range(10)))
    assert all(is_alone(answer, expected) for answer, expected in zip(in_a_loop(ten()), server.alone)) and again.comes_to_rest()
