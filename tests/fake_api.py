"""A server that speaks as the real one does where the real one cannot be made to: text cut at any byte, markup, refusals, silence.

What it does is chosen by the last words it is given; see `ANSWERS`."""
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent/'llm_from_scratch'/'pages'/'chat.html'
HOSTILE = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>&lt;b&gt; </div>'
FOXES = 'Füchse 🦊🦊 sagen „héllo“ — 你好.\n\nZweite Zeile.'


def tokens_of(text):
    "Bytes of tokens that together make a text: words, and each character beyond ASCII in single bytes."
    for word in text.replace(' ', '\0 ').split('\0'):
        if word.isascii(): yield from [word.encode()] if word else []
        else: yield from (bytes([b]) for b in word.encode())


def logprob(i): return [-.02, -.4, -1.2, -2.5, -4.][i % 5]


def chat_chunk(text='', tokens=(), **choice):
    content = [{'token': t.decode(errors='replace'), 'logprob': logprob(i), 'bytes': list(t), 'top_logprobs': [
        {'token': t.decode(errors='replace'), 'logprob': logprob(i), 'bytes': list(t)}, {'token': '<i>other</i>', 'logprob': -1.5, 'bytes': None}]} for i, t in tokens]
    return {'choices': [{'index': 0, 'delta': {'content': text} if text else {}, 'logprobs': {'content': content} if content else None, 'finish_reason': None, **choice}]}


def story_chunk(text='', tokens=(), **choice):
    shown = {'tokens': [t.decode() for _, t in tokens], 'token_logprobs': [logprob(i) for i, _ in tokens],
             'top_logprobs': [{t.decode(): logprob(i), ' other': -1.5} for i, t in tokens], 'text_offset': [0] * len(tokens)}
    return {'choices': [{'index': 0, 'text': text, 'logprobs': shown if tokens else None, 'finish_reason': None, **choice}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_): pass

    def reply(self, status, body, kind='application/json', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Type': kind, 'Content-Length': len(body), **headers}.items(): self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message, **headers):
        self.reply(status, {'error': {'message': message, 'type': 'invalid_request_error', 'param': None, 'code': None}}, **headers)

    def do_GET(self):
        if self.path == '/': return self.reply(200, PAGE.read_bytes(), 'text/html; charset=utf-8')
        if self.path != '/v1/models': return self.refuse(404, 'there is nothing here')
        if self.server.key and self.headers.get('Authorization') != f'Bearer {self.server.key}': return self.refuse(401, 'no key')
        self.reply(200, {'object': 'list', 'data': [{'id': 'talker', 'object': 'model', 'chat': True}, {'id': 'teller', 'object': 'model', 'chat': False},
                                                    {'id': 'unknown', 'object': 'model'}, {'id': HOSTILE, 'object': 'model'}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.asked.append((self.path, self.headers.get('Authorization'), body))
        self.chats = self.path == '/v1/chat/completions'
        if body['model'] == 'unknown' and self.chats: return self.refuse(400, 'this model has no chat template: use /v1/completions')
        words = body['messages'][-1]['content'] if self.chats else body['prompt']
        self.body = body
        if words.startswith('sleep'): return self.never_end()
        for start, answer in ANSWERS.items():
            if words.startswith(start): return answer(self, words)
        self.stream(f' and {words.strip()[-20:]}' if not self.chats else f'You said: {words}')

    # Streams ------------------------------------------------------------------------------------------------------

    def begin(self):
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream; charset=utf-8')
        self.send_header('Connection', 'close')
        self.end_headers()
        self.close_connection = True

    def chunk(self, text, tokens=(), **choice):
        if self.body.get('logprobs') is None: tokens = ()
        return (chat_chunk if self.chats else story_chunk)(text, tokens, **choice)

    def stream(self, text, reason='stop', end='\n', size=None, hold=False):
        "All of an answer; `size`: written so many bytes at a time."
        chunks, held, n = [], b'', 0
        for n, t in enumerate(tokens_of(text)):
            held += t
            try: piece, held = held.decode(), b''
            except UnicodeDecodeError: piece = ''
            chunks.append(self.chunk(piece, [(n, t)]))
        chunks += [self.chunk('', finish_reason=reason), {'choices': [], 'usage': {'prompt_tokens': 3, 'completion_tokens': n + 1, 'total_tokens': n + 4}}]
        lines = [f'data: {json.dumps(c, ensure_ascii=False)}' for c in chunks] + ['data: [DONE]']
        raw = (': a comment' + end * 2 + (end * 2).join(lines) + end * 2).encode()
        self.begin()
        for i in range(0, len(raw), size or len(raw)):
            self.wfile.write(raw[i:i + (size or len(raw))])
            if size: time.sleep(.0005)

    def never_end(self):
        "A word now and then, until nobody listens any more."
        self.begin()
        try:
            while not self.server.stopping:
                self.wfile.write(f'data: {json.dumps(self.chunk("zzz "))}\n\n'.encode())
                time.sleep(.02)
        except OSError: self.server.gone.set()

    def break_off(self, words):
        self.begin()
        self.wfile.write(f'data: {json.dumps(self.chunk("Half of an"))}\n\n'.encode())

    def fail_midway(self, words):
        self.break_off(words)
        self.wfile.write(b'data: {"error": {"message": "the engine ' + HOSTILE.replace('"', "'").encode() + b' stopped", "type": "server_error"}}\n\n')

    def busy(self, words):
        self.server.busy -= 1
        if self.server.busy < 0: return self.stream('Now there is room.')
        self.refuse(429, 'too many requests', Retry_After=1)


ANSWERS = {
    'foxes': lambda h, _: h.stream(FOXES), 'drip': lambda h, _: h.stream(FOXES, end='\r\n', size=3), 'hostile': lambda h, _: h.stream(HOSTILE),
    'long': lambda h, _: h.stream('w' * 3000, reason='length'), 'half': Handler.break_off, 'midway': Handler.fail_midway, 'busy': Handler.busy,
    'wrong': lambda h, _: h.refuse(400, f"temperature must be at least 0, got {HOSTILE}"), 'broken': lambda h, _: h.reply(500, b'<h1>Oh no</h1>', 'text/html'),
    'garbage': lambda h, _: (h.begin(), h.wfile.write(b'data: {"choices": [}\n\n')), 'hang up': lambda h, _: setattr(h, 'close_connection', True),
    'echo': lambda h, _: h.stream(json.dumps(h.body)),
}


class Fake(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_): pass

    def forget(self):
        self.asked, self.key, self.busy, self.stopping, self.gone = [], None, 1, False, threading.Event()


@contextmanager
def fake_server():
    server = Fake(('127.0.0.1', 0), Handler)
    server.forget()
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    server.url = f'http://127.0.0.1:{server.server_port}/'
    yield server
    server.stopping = True
    server.shutdown()
    server.server_close()
