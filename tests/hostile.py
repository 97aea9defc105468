"Requests that nobody sends by accident: JSON with wrong values, HTTP with wrong bytes. Each carries a canary, a text of its own."
import json
import random
import re

CANARY = re.compile(r'canary-\d+-[0-9a-f]{8}')
END = '<|endoftext|>'
PATHS = {'completion': '/v1/completions', 'chat': '/v1/chat/completions', 'tokenize': '/tokenize', 'detokenize': '/detokenize'}

# Written as JSON by hand, because `json.dumps` makes none of them.
RAW = ['NaN', 'Infinity', '-Infinity', '1e999', '-1e999', '1e-999', '01', '.5', '0x10', "'x'", '"\\ud800"', '"\\udc00\\ud800"', '"\\x"', '"\\u12"', '"\x01"', '{"a":1,"a":2}',
       'undefined', '', '[1,]', '{"a":1,}', '//', '1' * 400, '-' + '9' * 4299, '9' * 5000, '[' * 40 + ']' * 40, '{"a":' * 33 + '1' + '}' * 33, 'tru', '"' + '\\' * 99, '-0', '-0.0']
VALUES = [None, True, False, 0, 1, -1, 2, 3, .5, -.5, 1.0, 2**31, 2**63, -2**63, 2**64, 1e308, 5e-324, '', 'x', '0', '1', 'NaN', 'x' * 300, [], [[]], [None], ['x'], [0], [-1], [2**70], [1.0], {}, {'': ''},
          {'a': {'b': []}}, '\0', '\ufeff', '\u202e', '🦊' * 20, 'e\u0301' * 50, END, END * 30, f'[user]{END}', '{{ 7 * 7 }}', '{% for x in y %}', "'; DROP TABLE", '../../etc/passwd', '%s%n', '<script>', [END], ['a'] * 500, [[0]] * 20,
          {'type': 'json_object'}, {'type': 'text'}, {'type': []}, 'auto', 'required', 'none']
BIASES = [{'0': 101}, {'0': -101}, {'-1': 1}, {'999999': 1}, {'257': 1}, {'abc': 1}, {'0': None}, {'0': True}, {'0': '1'}, {'1.5': 1}, {'٣': 1}, {'1' * 30: 1}, {str(i): -100 for i in range(257)}, {str(i): 100 for i in range(257)},
          {str(i): 0 for i in range(2000)}, {'256': 100}, {'0': 1e-300}, {' 1': 1}, {'': 0}]
FIELDS = ['model', 'prompt', 'messages', 'max_tokens', 'max_completion_tokens', 'temperature', 'top_p', 'n', 'stream', 'stream_options', 'stop', 'seed', 'logprobs', 'top_logprobs', 'logit_bias', 'presence_penalty', 'frequency_penalty', 'response_format', 'tools', 'tool_choice',
          'user', 'echo', 'suffix', 'best_of', 'top_k', 'min_p', 'repetition_penalty', 'store', 'metadata', 'modalities', 'tokens', 'add_special_tokens', 'parallel_tool_calls', 'temprature', '__class__', '', '\0', 'prompt\ud83e'[:6]]
SCHEMAS = [True, False, [], {'type': 'nothing'}, {'type': {}}, {'type': []}, {'type': ['string', 'null']}, {'type': [['string']]}, {'properties': []}, {'properties': {'a': 1}}, {'required': [{}], 'properties': {'a': {}}}, {'required': 'a'}, {'required': ['b'], 'properties': {}}, {'enum': []}, {'enum': 1},
           {'enum': [[], {}, None]}, {'const': 'a.b*(['}, {'$ref': '#'}, {'$ref': '#/$defs/a'}, {'$ref': 1}, {'$defs': {'a': {'$ref': '#/$defs/a'}}, '$ref': '#/$defs/a'}, {'$defs': [], '$ref': '#/$defs/a'}, {'anyOf': [{'anyOf': [{'anyOf': [True]}]}]}, {'anyOf': {}}, {'oneOf': [1]}, {'pattern': '(a+)+$'},
           {'type': 'string', 'pattern': '(x' * 50}, {'type': 'string', 'minLength': 3, 'maxLength': 2}, {'type': 'string', 'maxLength': -1}, {'type': 'string', 'maxLength': 1e9}, {'type': 'array', 'minItems': True}, {'type': 'array', 'items': [], 'maxItems': 0}, {'additionalProperties': 7}, {'type': 'integer', 'minimum': float('1e308')},
           {'type': 'object', 'properties': {'': {'type': 'integer'}, '\0"\\': {'type': 'null'}}}, {'not': {}}, {'type': 'boolean', 'title': []}]


def nested(n, schema, **bounds):
    for _ in range(n): schema = {'type': 'array', 'items': schema, **bounds}
    return schema


# Each would be a small schema with a huge automaton, or one that takes long to find.
BOMBS = [nested(7, {'type': 'integer'}, minItems=256, maxItems=256), nested(3, {'type': 'string', 'maxLength': 256}, maxItems=256), {'enum': ['x' * 200 + str(i) for i in range(90)]}, nested(1, {'enum': ['a' * i for i in range(1, 100)]}, maxItems=100),
         nested(1, {'anyOf': [{'type': 'string', 'maxLength': 200}, {'type': 'string', 'minLength': 100}]}, maxItems=200), {'type': 'object', 'properties': {f'p{i}': {'type': 'integer'} for i in range(1500)}}, {'type': ['array'] * 3000},
         {'$defs': {f'a{i}': {'anyOf': [{'$ref': f'#/$defs/a{i + 1}'}] * 9} for i in range(7)} | {'a7': {'const': 0}}, '$ref': '#/$defs/a0'}, {'anyOf': [nested(6, {}, maxItems=9)] * 8}]


def base(kind, canary, rng):
    "A right request."
    if kind == 'completion': return {'model': 'tiny', 'prompt': canary, 'max_tokens': rng.randint(1, 3), 'seed': 1}
    if kind == 'chat': return {'model': 'tiny', 'messages': [{'role': 'user', 'content': canary}], 'max_completion_tokens': rng.randint(1, 3), 'seed': 1}
    return {'prompt': canary} if kind == 'tokenize' else {'tokens': [1, 2, 3]}


def hostile_json(rng, canary):
    "(path, body): JSON, or nearly, in which something is wrong."
    kind = rng.choice(['completion', 'completion', 'chat', 'chat', 'chat', 'tokenize', 'detokenize'])
    given, raws = base(kind, canary, rng), {}
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = given
        if kind == 'chat' and rng.random() < .3: place = given['messages'][0] if isinstance(given.get('messages'), list) and given['messages'] and isinstance(given['messages'][0], dict) else given
        name = rng.choice(FIELDS if place is given else ['role', 'content', 'name', 'tool_calls', 'tool_call_id', 'refusal', 'audio', 'x'])
        roll = rng.random()
        if name == 'logit_bias' and roll < .8: place[name] = rng.choice(BIASES)
        elif name == 'response_format' and roll < .8: place[name] = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': rng.choice(SCHEMAS)}}
        elif name == 'content' and roll < .4: place[name] = [{'type': rng.choice(['text', 'image_url', None, {}]), rng.choice(['text', 'image_url', 'x']): rng.choice(VALUES)}]
        elif name == 'tool_calls' and roll < .7: place.update(role='assistant', tool_calls=[{'id': canary, 'type': 'function', 'function': {'name': 'f', 'arguments': rng.choice(['{}', '[', '[' * 90_000, '{"a":' * 5000, 'NaN', '{"a": ' + '9' * 5000 + '}', canary])}}])
        elif name == 'tools' and roll < .7: place.update(tools=[{'type': 'function', 'function': {'name': rng.choice(['f', '', 'a b', 'x' * 70]), 'parameters': rng.choice(SCHEMAS)}}], tool_choice=rng.choice(['required', 'auto', 'none', {'type': 'function', 'function': {'name': 'f'}}, {}]))
        elif roll < .2: place[name] = marker = f'@raw{len(raws)}@'; raws[marker] = rng.choice(RAW)
        elif name.startswith('max_') and roll < .4: place[name] = rng.choice([0, -1, '3', 2**40, [], 1.0])        # never left out: the answer would be long
        elif roll < .25: place.pop(name, None)
        elif roll < .35: place[name] = f'{canary}{rng.choice(VALUES)!s:.40}'
        else: place[name] = rng.choice(VALUES[1:] if name.startswith('max_') else VALUES)
    if rng.random() < .05: given = rng.choice([[given], canary, None, 7, [], {}, [[[]]]])
    text = json.dumps(given, ensure_ascii=rng.random() < .5)
    for marker, raw in raws.items(): text = text.replace(f'"{marker}"', raw)
    data = text.encode('utf-8', 'surrogatepass')
    roll = rng.random()
    if roll < .08:                                            # a byte that is wrong, or an end that is missing
        i = rng.randrange(len(data) or 1)
        data = rng.choice([data[:i], data[:i] + bytes([rng.randrange(256)]) + data[i + 1:], data[:i] + b'\xff\xfe' + data[i:], data + b'}', b'\xef\xbb\xbf' + data, data.replace(b'"', b'"\xc0\x80', 1), data.decode(errors='ignore').encode('utf-16')])
    return PATHS[kind], data


def post(path, data, canary, *more, kind='application/json', length=None):
    "A request as bytes."
    lines = [f'POST {path} HTTP/1.1', 'Host: 127.0.0.1', f'X-Canary: {canary}', f'Content-Type: {kind}', f'Content-Length: {len(data) if length is None else length}', *more]
    return '\r\n'.join(lines).encode('latin-1') + b'\r\n\r\n' + data


def chunked(*pieces, end=b'0\r\n\r\n'): return b''.join(b'%x\r\n%s\r\n' % (len(p), p) for p in pieces) + end


def hostile_http(rng, canary):
    """(raw bytes, is it whole?): HTTP in which something is wrong, or only strange.

    What is not whole may be left without an answer once the client says that no more will come."""
    data = json.dumps(base('completion', canary, rng)).encode()
    good = post('/v1/completions', data, canary)
    head, _, body = good.partition(b'\r\n\r\n')
    te = head.replace(b'Content-Length: %d' % len(data), b'Transfer-Encoding: chunked') + b'\r\n\r\n'
    def get(path, *more, version='HTTP/1.1', method='GET', host='Host: 127.0.0.1'): return '\r\n'.join([f'{method} {path} {version}', *([host] if host else []), f'X-Canary: {canary}', *more, '', '']).encode('latin-1', 'replace')
    target = rng.choice(['/', '/health', '/v1/models', '/v1/models/tiny', '/v1/completions', '/metrics', '/nowhere'])
    makers = {
        'paths': lambda: (get(rng.choice(['/../../etc/passwd', '//', '///v1//models', '/%2e%2e/%2e%2e/etc/passwd', '/%00', '/v1/models/%00%ff', f'/v1/models/{canary}', '/v1/models/../../x', '/v1/models/' + 'x' * 9000, '/v1/models/%2e%2e%2f', '/?' + 'a=b&' * 2000, '/#x', '/\\..\\..', '/%', '/%zz',
                                          '*', 'http://evil.example/v1/models', '/v1/models/<script>', '/v1/models/\x7f', '/v1/completions/', '/V1/MODELS', '/./v1/models', '/v1/models;x=1', '/v1/models/%0d%0aX-Evil:1'])), True),
        'methods': lambda: (get(target, method=rng.choice(['PUT', 'DELETE', 'PATCH', 'TRACE', 'OPTIONS', 'HEAD', 'CONNECT', 'get', 'PROPFIND', 'X' * 300, 'GE\tT', 'G@T'])), True),
        'versions': lambda: (get(target, version=rng.choice(['HTTP/1.0', 'HTTP/0.9', 'HTTP/2.0', 'HTTP/9.9', 'HTTP/1.', 'HTPP/1.1', '', 'http/1.1', 'HTTP/1.1 x'])), True),
        'hosts': lambda: (get(target, host=rng.choice(['', 'Host: evil.example', 'Host:', 'Host: 127.0.0.1\r\nHost: evil.example', 'Host: 127.0.0.1:99999999', 'Host: [::1', 'Host: 127.0.0.1@evil.example', 'Host: \xff', f'Host: {canary}', 'Host: 127.0.0.1#.evil.example', 'Host: ' + 'a' * 5000])), True),
        'headers': lambda: (get(target, rng.choice(['no colon here', ': empty name', 'X-A : space', 'X\0A: b', 'X-A: \0', 'X-A: b\r\n folded', 'X-A: ' + 'y' * 20_000, *(['\r\n'.join(f'X-{i}: y' for i in range(n)) for n in (50, 3000)]), 'Authorization: Bearer \xff\xfe', 'Authorization: ' + 'Bearer ' * 500, 'Origin: http://evil.example', 'Origin: null', 'X-A: \x1b[31m',
                                                        'Cookie: ' + canary, 'Connection: close, keep-alive', 'Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13', 'Upgrade: h2c\r\nConnection: Upgrade', 'Range: bytes=0-99999999999', 'X-Forwarded-For: 1.1.1.1', 'Expect: 200-ok', 'Accept-Encoding: ' + 'gzip,' * 900])), True),
        'lengths': lambda: rng.choice([(post('/v1/completions', data, canary, length=n), w) for n, w in (('-1', True), ('x', True), ('1e3', True), (len(data) + 50, False), ('9' * 30, True), ('0x10', True), (f'{len(data)}, {len(data)}', True), ('', True), ('+5', True), (2_000_000, True), ('1' * 5000, True))]
                                      + [(post('/v1/completions', data, canary, f'Content-Length: {len(data) + 1}'), True), (post('/v1/completions', data, canary, length=7), False), (post('/v1/completions', b'x' * 1_000_001, canary), True), (post('/v1/completions', b'', canary), True)]),
        'chunks': lambda: rng.choice([(te + chunked(body[:9], body[9:]), True), (te + chunked(body, end=b''), False), (te + chunked(body)[:-9], False), (te + b'zz\r\n' + body, True), (te + b'-5\r\nabcde\r\n0\r\n\r\n', True), (te + b'f' * 30 + b'\r\n', True), (te + b'5;' + b'x' * 40_000, True), (te + chunked(body, end=b'0\r\nX-T: ' + canary.encode() + b'\r\n\r\n'), True),
                                      (te + chunked(*[bytes([c]) for c in body]), True), (te.replace(b'chunked', b'gzip, chunked') + chunked(body), True), (te.replace(b'chunked', b'identity') + body, True), (post('/v1/completions', chunked(body), canary, 'Transfer-Encoding: chunked'), True), (te.replace(b'chunked', b'xchunked') + chunked(body), True)]),
        'kinds': lambda: (post('/v1/completions', data, canary, kind=rng.choice(['text/plain', '', 'application/json; charset=utf-16', 'multipart/form-data; boundary=x', 'application/x-www-form-urlencoded', 'application/json, text/html', 'APPLICATION/JSON', 'x' * 3000, 'application/json;;;=', '\xff'])), True),
        'other': lambda: rng.choice([(b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + rng.randbytes(200), False), (b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', True), (rng.randbytes(300), False), (b'\r\n' * 200, False), (b'\0' * 500, False), (b'GET', False), (b'GET /' + b'a' * 70_000, True), (head + b'\r\n', False), (good.replace(b'\r\n', b'\n'), False),
                                     (good.replace(b'\r\n', b'\r'), False), (b' ' + good, False), (head.replace(b'Host', b'Expect: 100-continue\r\nHost') + b'\r\n\r\n' + body, True), (b'SSH-2.0-x\r\n', False), (b'{"jsonrpc":"2.0"}\n', False)]),
    }
    if rng.random() < .45:                                    # bytes of a right request that were changed on the way
        raw = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            i = rng.randrange(len(raw))
            what = rng.randrange(4)
            if what == 0: raw[i] = rng.randrange(256)
            elif what == 1: del raw[i:i + rng.randint(1, 9)]
            elif what == 2: raw[i:i] = rng.randbytes(rng.randint(1, 5))
            else: raw[i:i] = raw[max(0, i - 20):i]
        return bytes(raw), False
    return makers[rng.choice(list(makers))]()


def canary_of(i): return f'canary-{i}-{random.Random(i).getrandbits(32):08x}'
