"""Damaged files of every format that the library reads.

Each trial spoils one good file and reads it, in a child with little memory and little time. The reader must refuse it with a
ValueError or OSError that names the file, or give what the whole file gives. Where a file carries no checksum, it may also
give another value: that is counted, and said.
"""
import copy, functools, json, random, shutil, signal, sys

from common import Tally, ended, fork, limited, scratch

MEMORY, SECONDS, TOGETHER = 1 << 30, 5, 500               # for one reading; trials in one child


# Formats ----------------------------------------------------------------------------------------------------------

class Format:
    "A kind of file: how one is written, how it is read into a value that can be compared, what guards it."
    def __init__(self, name, write, read, guarded, files=None, aware=(), seal=None):
        self.name, self.write, self.read, self.guarded, self.files, self.aware, self.seal = name, write, read, guarded, files, aware, seal


def stable(value):
    "A value as text: tensors by what they hold."
    import numpy as np
    from torch import Tensor
    if isinstance(value, Tensor): return [str(value.dtype), list(value.shape), value.contiguous().view(-1).numpy().tobytes().hex() if value.numel() < 4096 else hash(value.numpy().tobytes())]
    if isinstance(value, np.ndarray): return [str(value.dtype), value.tobytes().hex()]
    if isinstance(value, dict): return {str(k): stable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [stable(v) for v in value]
    return repr(value)


def read_tokens(path, verify=True):
    from llm_from_scratch.data import TokenFile
    with TokenFile.open(path, verify=verify) as file: return stable([file.ids, file.offsets, file.header.fingerprint, len(file), file.vocab_size])


def read_batches(path):
    "Without `verify`, as training does: the header alone is checked."
    import numpy as np
    from llm_from_scratch.data import BatchLoader, TokenFile
    with TokenFile.open(path) as file:
        loader = BatchLoader(file, 4, 2, vocab_size=64)
        return stable([np.asarray(t) for step in range(3) for t in loader.batch(step)])


def read_model(path):
    from llm_from_scratch.gpt import GPT
    model = GPT.from_pretrained(path.parent)
    return stable([vars(model.config), model.state_dict()])


def read_tokenizer(path):
    from llm_from_scratch.bpe import load_tokenizer
    made = load_tokenizer(path)
    return stable([type(made).__name__, made.special_tokens, getattr(made, 'vocab', None) or made.state(), getattr(made, 'pattern', '')])


def read_checkpoint(path):
    from llm_from_scratch.training import load_checkpoint
    found = load_checkpoint(path.parent)
    return stable([found.step, found.tensors, found.state])


def read_saved(path):
    import torch
    from llm_from_scratch.training import load
    model = tiny(3)
    optimizer = torch.optim.AdamW(model.parameters())
    step = load(path, model, optimizer)
    return stable([step, model.state_dict(), optimizer.state_dict()['state'], [{k: v for k, v in g.items() if k != 'params'} for g in optimizer.param_groups]])


def read_log(path):
    from llm_from_scratch.training import read_log
    return stable(read_log(path, until=3))


def read_run(path):
    "What `llmfs train --resume` makes of run.json before it starts."
    from llm_from_scratch import cli
    from llm_from_scratch.gpt import GPTConfig
    from llm_from_scratch.training import TrainConfig
    found = cli._run_defaults(['--resume', '--out', str(path.parent)])
    return stable([vars(TrainConfig(**found['settings'])), vars(GPTConfig(**found['shape'])), str(found['data'])])


def read_settings(path):
    from llm_from_scratch import cli
    return stable(cli._settings(str(path)))


def read_gpt2(path):
    from llm_from_scratch.bpe import BPETokenizer
    made = BPETokenizer.from_gpt2_files(path.parent/'encoder.json', path.parent/'vocab.bpe')
    return stable([made.vocab, made.special_tokens])


def read_llama2c(path):
    from llm_from_scratch.formats import read_llama2c
    return stable([vars(x) if hasattr(x, '__dict__') else x for x in read_llama2c(path)])


def read_corpus(path):
    from llm_from_scratch.data import load_corpus
    return stable([*load_corpus(path)])


def tiny(seed=1, width=8):
    import torch
    from llm_from_scratch.gpt import GPT, GPTConfig
    config = GPTConfig(20, 8, width, 1, 2, norm='rmsnorm', norm_eps=1e-6, positions='rope', feed_forward='swiglu', bias=False, qk_norm=True)
    return GPT(config, generator=torch.Generator().manual_seed(seed))


STORY = 'Once upon a time a dog sat in a house. A cat saw the dog, and the dog saw the cat. '


def write_tokens(folder):
    from llm_from_scratch.data import TokenFile
    from llm_from_scratch.text import CharTokenizer
    TokenFile.from_texts(folder/'train.tok', [STORY, STORY[10:40]], CharTokenizer.train([STORY], ['<|endoftext|>'])).close()


def write_model(folder): tiny().save_pretrained(folder)


def write_foreign(folder):
    "As another program writes it: no checksum anywhere."
    import safetensors.torch
    from llm_from_scratch.pretrained import FAMILIES, config_to_hf
    from llm_from_scratch.weight_maps import export_weights
    model = tiny()
    (folder/'config.json').write_text(json.dumps(config_to_hf(model.config)))
    safetensors.torch.save_file(export_weights(model, FAMILIES['qwen3'].lines), folder/'model.safetensors', {'format': 'pt'})


def write_bpe(folder, hf=False):
    from llm_from_scratch.bpe import BPETokenizer
    made = BPETokenizer.train([STORY], 270, ['<|endoftext|>'])
    (made.to_hf if hf else made.save)(folder/'tokenizer.json')


def write_words(folder, hf=False):
    from llm_from_scratch.text import SpacedWordTokenizer
    made = SpacedWordTokenizer.train([STORY], special_tokens=['<|endoftext|>'])
    (made.to_hf if hf else made.save)(folder/'tokenizer.json')


def write_chars(folder):
    from llm_from_scratch.text import CharTokenizer
    CharTokenizer.train([STORY], ['<unk>']).save(folder/'tokenizer.json')


def trained():
    "A model and an optimizer that remembers something."
    import torch
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def write_checkpoint(folder):
    "One real checkpoint of a run of two steps."
    import numpy as np
    from llm_from_scratch.training import TrainConfig, Trainer, latest_checkpoint, loader_for
    config = TrainConfig(steps=2, batch_size=2, precision='float32')
    Trainer(tiny(), config, loader_for(config, np.arange(60) % 20, 4), folder=folder/'run').fit()
    latest_checkpoint(folder/'run').rename(folder/'step-00000002')
    shutil.rmtree(folder/'run')


def write_saved(folder):
    from llm_from_scratch.training import save
    save(folder/'state.safetensors', *trained(), step=7)


def write_log(folder):
    from llm_from_scratch.training import append_line
    for step in range(1, 6): append_line(folder/'log.jsonl', {'step': step, 'loss': 3.5 / step, 'lr': 1e-3, 'tokens': 8 * step})


def write_run(folder):
    from dataclasses import asdict
    from llm_from_scratch.training import TrainConfig
    (folder/'data').mkdir()
    (folder/'data'/'train.tok').touch()
    run = {'data': 'data', 'shape': asdict(tiny().config), 'settings': asdict(TrainConfig(steps=10))}
    (folder/'run.json').write_text(json.dumps(run, indent=1))


def write_settings(folder): (folder/'settings.json').write_text(json.dumps({'steps': 10, 'lr': 1e-3, 'betas': [0.9, 0.99], 'optimizer': 'muon', 'clip': None, 'schedule': 'wsd', 'decay': 2}))


def write_gpt2(folder):
    from llm_from_scratch.bpe import BPETokenizer, byte_alphabet
    made, letters = BPETokenizer.train([STORY], 270), byte_alphabet()
    spell = lambda token: ''.join(letters[b] for b in token)
    (folder/'encoder.json').write_text(json.dumps({**{spell(t): i for t, i in made.vocab.items()}, '<|endoftext|>': len(made.vocab)}))
    (folder/'vocab.bpe').write_text('#version: 0.2\n' + '\n'.join(f'{spell(a)} {spell(b)}' for a, b in made.merges) + '\n', encoding='utf-8')


def write_llama2c(folder):
    import numpy as np
    head = D, F, L, H, K, V, T = 8, 12, 1, 2, 2, 9, 4
    n = V * D + 2 * L * D + 4 * L * D * D + 3 * L * D * F + D + 2 * T * (D // H // 2)
    (folder/'model.bin').write_bytes(np.array(head, '<i4').tobytes() + np.linspace(-1, 1, n, dtype='<f4').tobytes())


def write_corpus(folder): (folder/'text.txt').write_text((STORY + '\u00fc\u4e2d\n\n') * 20, encoding='utf-8')


def sealed(content):
    "The same content with the checksum that belongs to it, as a forger would write it."
    from llm_from_scratch.files import digest
    if 'state' in content: content['sha256'] = digest(content['state'])
    elif 'sha256' in content: content['sha256'] = digest({k: v for k, v in content.items() if k not in ('format', 'version', 'sha256')})
    return content


W, C = 'model.safetensors', 'config.json'
FORMATS = [
    Format('token file, verified', write_tokens, read_tokens, True, ['train.tok']),
    Format('token file, as training opens it', write_tokens, read_batches, False, ['train.tok']),
    Format('model: weights', write_model, read_model, True, [W], ['safetensors']),
    Format('model: configuration', write_model, read_model, True, [C], ['json']),
    Format('another maker\'s weights', write_foreign, read_model, False, [W], ['safetensors']),
    Format('another maker\'s configuration', write_foreign, read_model, False, [C], ['json']),
    Format('tokenizer of bytes and merges', write_bpe, read_tokenizer, True, ['tokenizer.json'], ['json'], sealed),
    Format('tokenizer of words', write_words, read_tokenizer, True, ['tokenizer.json'], ['json'], sealed),
    Format('tokenizer of characters', write_chars, read_tokenizer, True, ['tokenizer.json'], ['json'], sealed),
    Format('tokenizer.json of bytes and merges', functools.partial(write_bpe, hf=True), read_tokenizer, False, ['tokenizer.json'], ['json']),
    Format('tokenizer.json of words', functools.partial(write_words, hf=True), read_tokenizer, True, ['tokenizer.json'], ['json']),
    Format('GPT-2\'s two files', write_gpt2, read_gpt2, False, ['encoder.json', 'vocab.bpe'], ['json']),
    Format('checkpoint', write_checkpoint, read_checkpoint, True, None, ['safetensors', 'json']),
    Format('model and optimizer', write_saved, read_saved, True, ['state.safetensors'], ['safetensors']),
    Format('log of a run', write_log, read_log, False, ['log.jsonl']),
    Format('run.json', write_run, read_run, False, ['run.json'], ['json']),
    Format('settings of a run', write_settings, read_settings, False, ['settings.json'], ['json']),
    Format('checkpoint of llama2.c', write_llama2c, read_llama2c, False, ['model.bin']),
    Format('text', write_corpus, read_corpus, False, ['text.txt']),
]


# Damage -----------------------------------------------------------------------------------------------------------

def cut(data, draw): return data[:draw.randrange(len(data))]


def flip(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])): data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def overwrite(data, draw):
    at, n = draw.randrange(len(data)), draw.choice([1, 4, 8, 64, 512])
    return data[:at] + draw.choice([bytes, draw.randbytes, lambda n: b'\xff' * n])(min(n, len(data) - at)) + data[at + n:]


def swap(data, draw):
    n = draw.choice([1, 4, 8, 64, 512])
    a, b = sorted(draw.randrange(max(1, len(data) - n)) for _ in range(2))
    if b - a < n: return data[:a] + data[b:] + data[a:b]
    return data[:a] + data[b:b + n] + data[a + n:b] + data[a:a + n] + data[b + n:]


def insert(data, draw):
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice([bytes(draw.randint(1, 9)), draw.randbytes(draw.randint(1, 9)), data[at:at + draw.randint(1, 99)]]) + data[at:]


def remove(data, draw):
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice([1, 4, 8, 64, 512]):]


def other(data, draw): return draw.choice([b'', b'\0', b'{}', b'[]', b'null', b'\xef\xbb\xbf' + data, data + data, b'<html></html>', bytes(len(data)), b'[' * 100_000, b'{"a":' * 50_000, data.replace(b'\n', b'\r\n'), data.decode('latin-1').encode('utf-16')])


BLIND = cut, flip, overwrite, swap, insert, remove, other
STRANGE = [None, True, False, -1, 0, 1, 2, 3, 0.5, -0.0, 1e308, 10**30, 10**400, 2**31, 2**53, 2**63, 2**64 - 1, float('nan'), float('inf'), '', 'a', '1', '\ud800', '\0', [], {}, [[]], {'': {}}, [1] * 50, [None], 'x' * 9000]


def places(node, path=()):
    "Every place in a JSON value."
    yield path
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner: yield from places(value, (*path, key))


def strange_json(content, draw):
    "A JSON value with one or two parts replaced, removed, renamed, doubled or moved."
    for _ in range(draw.choice([1, 1, 2])):
        content = changed(content, draw.choice([*places(content)]), draw)
    return content


def changed(content, path, draw):
    if not path: return draw.choice(STRANGE) if draw.random() < .1 else content
    node = content
    for key in path[:-1]: node = node[key]
    key, way = path[-1], draw.randrange(6)
    if way == 0: del node[key]
    elif way == 1 and isinstance(node, dict): node[f'{key}{draw.choice(["s", " ", "", "_"])}'] = node.pop(key)
    elif way == 2 and isinstance(node, list): node.insert(draw.randrange(len(node) + 1), node[key])
    elif way == 3: node[key] = copy.deepcopy(node[draw.choice([*node])] if isinstance(node, dict) else draw.choice(node))
    elif way == 4 and isinstance(node[key], (int, float)): node[key] = node[key] + draw.choice([-1, 1, .5]) if draw.random() < .5 else -node[key]
    else: node[key] = copy.deepcopy(draw.choice(STRANGE))             # it may be changed in its turn
    return content


def text_of(content, draw): return json.dumps(content, ensure_ascii=draw.random() < .5).encode('utf-8', 'surrogatepass')


def spoil_json(data, draw, seal=None):
    "Another content, in half of the cases with the checksum that belongs to it."
    head, text = data.split(b'\n', 1) if data[:1] != b'{' else (b'', data)          # state.json begins with its checksum
    content = strange_json(json.loads(text), draw)
    if seal and isinstance(content, dict) and draw.random() < .5:
        try: content = seal(content)
        except (ValueError, TypeError, RecursionError): pass
    new = text_of(content, draw)
    if head and draw.random() < .5:
        from llm_from_scratch.files import checksum
        head = f'{checksum(new):08x}'.encode()
    return (head + b'\n' if head else b'') + new


def spoil_safetensors(data, draw):
    "Another header before the same numbers: lengths, offsets, shapes and types that cannot be."
    size = int.from_bytes(data[:8], 'little')
    header, rest = json.loads(data[8:8 + size]), data[8 + size:]
    if draw.random() < .5: header.get('__metadata__', {}).pop('crc32', None)         # a forger leaves out what would tell
    names = [name for name in header if name != '__metadata__']
    entry, n = header[draw.choice(names)], len(rest)
    big = [0, 1, -1, n, n + 1, n - 1, 2**31, 2**62, 2**63, 2**64 - 1, 10**25, 0.5, '8', None, [], True]
    way = draw.randrange(8)
    if way == 0: entry['data_offsets'] = [draw.choice(big), draw.choice(big)]
    elif way == 1: entry['shape'] = [draw.choice(big) for _ in range(draw.randrange(4))]
    elif way == 2: entry['dtype'] = draw.choice(['F64', 'F16', 'BF16', 'I64', 'U8', 'BOOL', 'F8_E5M2', 'F4', 'F33', '', None, 7, []])
    elif way == 3: header = strange_json(header, draw)
    elif way == 4: entry['data_offsets'] = list(header[draw.choice(names)]['data_offsets'])       # two tensors in one place
    elif way == 5: header[draw.choice(['w', '', '__metadata__', 'a' * 5000])] = entry
    elif way == 6: header['__metadata__'] = draw.choice([None, [], 'x', {'crc32': '0'}, {'crc32': 7}, {'format': {}}, {'a': 'b' * 10**5}])
    text = json.dumps(header).encode()
    if way == 7: return draw.choice([0, 1, 7, size - 1, size + 1, len(data), 2**31, 2**32, 2**40, 2**63, 2**64 - 1]).to_bytes(8, 'little') + text + rest
    return len(text).to_bytes(8, 'little') + text + rest


def spoil(form, name, data, draw):
    "A spoilt copy of a file, and in what way."
    aware = [kind for kind in form.aware if (kind == 'safetensors') == name.endswith('.safetensors') and (kind != 'json' or name.endswith('.json'))]
    if aware and draw.random() < .5: return aware[0], spoil_json(data, draw, form.seal) if aware[0] == 'json' else spoil_safetensors(data, draw)
    way = draw.choice(BLIND)
    return way.__name__, way(data, draw)


# Trials -----------------------------------------------------------------------------------------------------------

class Late(BaseException):
    "A reading took too long."


def judge(form, path, wanted):
    "What reading gave: `refused`, `unnamed`, `same`, `other`, or the name of an exception that it must not raise."
    try: found = form.read(path)
    except (ValueError, OSError) as e:
        said = str(e)
        return ('refused', '') if path.name in said or path.parent.name in said else ('unnamed', f'{type(e).__name__}: {said}')
    except BaseException as e: return type(e).__name__, str(e)
    return ('same', '') if found == wanted else ('other', '')


def late(*_): raise Late


def trial(form, home, good, wanted, number, seed):
    "Spoil, read, judge, put back."
    draw = random.Random(f'{seed} {form.name} {number}')
    name = draw.choice(sorted(good))
    way, data = spoil(form, name, good[name], draw)
    path = home/name
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try: outcome, said = judge(form, path, wanted)
    except Late: outcome, said = 'Late', ''
    signal.setitimer(signal.ITIMER_PROF, 0)
    path.write_bytes(good[name])
    return {'file': name, 'way': way, 'outcome': 'unchanged' if data == good[name] and outcome == 'same' else outcome, 'said': said}


def several(form, home, numbers, seed, results):
    "Some trials in this process, each noted before the next begins."
    good = {p.name: p.read_bytes() for p in (home.rglob('*') if form.files is None else map(home.joinpath, form.files)) if p.is_file()}
    wanted = form.read(home/sorted(good)[0])
    signal.signal(signal.SIGPROF, late)
    limited(MEMORY)
    with open(results, 'w') as file:
        for number in numbers:
            file.write(json.dumps(trial(form, home, good, wanted, number, seed)) + '\n')
            file.flush()


def attempt(form, folder, n, seed, first=0):
    "`n` damaged files of one format, in children; who dies is a fault, and another child goes on behind it."
    home = folder/form.name.replace(' ', '-').replace("'", '')/'step-00000002'
    home.mkdir(parents=True)
    form.write(home.parent if form.files is None else home)
    tally, number = Tally(), first
    while number < first + n:
        numbers = range(number, min(first + n, number + TOGETHER))
        (folder/'results').unlink(missing_ok=True)
        status = ended(fork(lambda: several(form, home, numbers, seed, folder/'results'), folder/'said'), len(numbers) * SECONDS)
        if not (folder/'results').exists(): raise SystemExit(f'{form.name}: {(folder/"said").read_text()}')
        found = [json.loads(line) for line in (folder/'results').read_text().splitlines()]
        for i, row in enumerate(found): note(tally, form, row, numbers[i])
        number += len(found)
        if status and len(found) < len(numbers):
            tally.fault('crash', f'{form.name}, trial {number}, seed {seed}: exit status {status}: {(folder/"said").read_text()[-300:]}')
            tally.add('damaged')
            number += 1
            shutil.rmtree(home.parent); home.mkdir(parents=True)
            form.write(home.parent if form.files is None else home)
    shutil.rmtree(home.parent)
    return tally


def note(tally, form, row, number):
    "Count one trial; what may not be is a fault."
    outcome, where = row['outcome'], f'{form.name}, trial {number}: {row["file"]}, {row["way"]}: {row["said"]}'
    if outcome == 'unchanged': return tally.add('unchanged')
    tally.add('damaged')
    tally.add(f'damage: {row["way"]}')
    if outcome in ('refused', 'same'): return tally.add(outcome)
    if outcome == 'other' and not form.guarded: return tally.add('other')
    if outcome == 'other' and row['way'] in ('json', 'safetensors'): return tally.add('other, sealed')      # a forger who writes the right checksum, or none
    if outcome == 'Late': return tally.fault('takes too long', where)
    tally.fault({'other': 'another value in spite of a checksum', 'unnamed': 'the error names no file'}.get(outcome, f'raises {outcome}'), where)


def run(n, seed, only=None):
    "`n` damaged files of each format; a tally for each."
    import torch
    from llm_from_scratch import bpe, cli, data, formats, gpt, pretrained, text, training, weight_maps    # noqa: F401
    torch.set_num_threads(1)
    found = {}
    with scratch() as folder:
        for form in FORMATS:
            if only is not None and form.name not in only: continue
            found[form.name] = attempt(form, folder, n, seed)
    return found


if __name__ == '__main__':
    for name, tally in run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:] or None).items():
        print(name, json.dumps(tally.to_json(), indent=1))
