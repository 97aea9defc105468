"""Byte-pair encoding beside `tokenizers`: training, encoding, and the memory of training on 200 MB."""
import json, os, subprocess, sys, sysconfig, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAKESPEARE = ROOT.parent/'shared'/'data'/'tinyshakespeare.txt'
PEER = 'tokenizers'


def python_sources(size):
    "Text that every Python carries, in one order everywhere: the sources of its standard library, read again if they are too short."
    folder, parts, n = Path(sysconfig.get_paths()['stdlib']), [], 0
    files = sorted(p for p in folder.rglob('*.py') if not {'site-packages', '__pycache__'} & set(p.relative_to(folder).parts))
    while n < size:
        for path in files:
            try: text = path.read_text(encoding='utf-8')
            except (UnicodeDecodeError, OSError): continue
            parts.append(text[:size - n])
            n += len(parts[-1])
            if n >= size: break
    return parts


def english(size):
    "English prose: the topics of pydoc, cleaned."
    from llm_from_scratch.text import clean, pydoc_corpus
    documents = [clean(text) for text in pydoc_corpus().values()]
    out, n = [], 0
    while n < size:
        for text in documents:
            out.append(text[:size - n])
            n += len(out[-1])
            if n >= size: break
    return out


def alternate(ours, peer, times):
    "Seconds of each, run in turn."
    a, b = [], []
    for _ in range(times):
        for function, seconds in (ours, a), (peer, b):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return a, b


def train_peer(texts, vocab_size):
    import tokenizers
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    peer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    return peer


def training(name, texts, vocab_size, runs, target, **limits):
    from llm_from_scratch.bpe import BPETokenizer
    ours, peer = alternate(lambda: BPETokenizer.train(texts, vocab_size), lambda: train_peer(texts, vocab_size), runs)
    return {'name': name, 'what': f'train {sum(len(t.encode()) for t in texts) / 1e6:.3g} MB to {vocab_size:,} tokens, one process', 'ours': ours, 'peer': peer,
            'peer_name': PEER, 'unit': 'MB/s', 'work': sum(len(t.encode()) for t in texts) / 1e6, 'target': target, **limits}


def train_133_kb(quick):
    return training('train-133kB', english(133_000), 500, 3 if quick else 9, 'at most 4 times the time of tokenizers', ratio_limit=4)


def train_shakespeare(quick):
    if not SHAKESPEARE.is_file(): return {'name': 'train-shakespeare', 'what': 'train tinyshakespeare to 1,024 tokens', 'skipped': 'tinyshakespeare.txt is not in ../shared/data'}
    return training('train-shakespeare', [SHAKESPEARE.read_text(encoding='utf-8')], 1024, 3 if quick else 7, 'within 2 s', limit_s=2)


def train_20_mb(quick):
    size = 2_000_000 if quick else 20_000_000
    return training('train-20MB', python_sources(size), 8000, 3, 'at most 3 times the time of tokenizers', ratio_limit=3)


def encoders():
    "The same tokenizer, ours and theirs, trained on Python's sources."
    import tokenizers
    from llm_from_scratch.bpe import BPETokenizer
    ours = BPETokenizer.train(python_sources(4_000_000) + english(450_000), 8000)
    with tempfile.TemporaryDirectory() as folder:
        ours.to_hf(folder)
        return ours, tokenizers.Tokenizer.from_file(str(Path(folder)/'tokenizer.json'))


def encoding(name, what, ours, peer, texts, runs, target, **limits):
    work = sum(len(t.encode()) for t in texts) / 1e6
    a, b = alternate(ours, peer, runs)
    return {'name': name, 'what': what, 'ours': a, 'peer': b, 'peer_name': f'{PEER} encode_batch', 'unit': 'MB/s', 'work': work, 'target': target, **limits}


def encode_rows(quick):
    "Pure Python with an empty cache, batches on one thread and on all, and a file; `tokenizers` encodes the same documents."
    from llm_from_scratch.bpe import BPETokenizer
    ours, peer = encoders()
    runs, texts = 3 if quick else 5, english(900_000 if quick else 4_000_000)
    fresh = lambda: BPETokenizer(ours.vocab, ours.pattern)
    assert ours.encode_batch(texts) == [ours.encode(t) for t in texts] == [e.ids for e in peer.encode_batch(texts)]
    theirs = lambda: peer.encode_batch(texts)

    once = english(400_000)                          # no topic twice: the cache of pre-tokens may not profit from the copies

    def pure():
        tokenizer = fresh()
        for t in once: tokenizer.encode(t)

    def file():
        for _ in ours.encode_file(path, threads=1): pass

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'text.txt'
        path.write_text(''.join(texts), encoding='utf-8', newline='\n')
        return [
            encoding('encode-python', 'encode English in pure Python, starting with an empty cache', pure, lambda: peer.encode_batch(once), once, runs, 'at least 1 MB/s', limit=1),
            encoding('encode-batch-1-thread', 'encode a batch of English documents on one thread', lambda: ours.encode_batch(texts, threads=1), theirs, texts, runs,
                     'at least 10 MB/s a core, ahead of tokenizers', limit=10, ratio_limit=1),
            encoding('encode-batch', 'encode a batch of English documents on all cores', lambda: ours.encode_batch(texts), theirs, texts, runs, 'ahead of tokenizers', ratio_limit=1),
            encoding('encode-file', 'encode a file of English on one thread', file, theirs, texts, runs, 'at least 10 MB/s a core, ahead of tokenizers', limit=10, ratio_limit=1),
        ]


MEASURE_MEMORY = '''
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from llm_from_scratch.bpe import BPETokenizer
start = time.perf_counter()
BPETokenizer.train(Path(sys.argv[1]), 8000)
seconds, status = time.perf_counter() - start, Path("/proc/self/status")
if status.exists(): peak = 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])     # ru_maxrss would count the parent's peak as well
else: peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak / 1e6]))
'''


def memory(quick):
    "Train on a file in a process of its own and ask the system for its peak. Words are varied so that they do not merely repeat."
    size = 20_000_000 if quick else 200_000_000
    row = {'name': 'train-memory', 'what': f'peak memory of training {size // 1_000_000} MB to 8,000 tokens', 'unit': 'MB/s', 'work': size / 1e6, 'target': 'under 1 GB of memory', 'memory_limit_mb': 1000}
    if os.name == 'nt': return {**row, 'skipped': 'Windows does not report the peak of a process this way'}
    import re
    with tempfile.TemporaryDirectory() as folder:
        path, written, copy, parts = Path(folder)/'text.txt', 0, 0, python_sources(20_000_000)
        with path.open('w', encoding='utf-8', newline='\n') as file:
            while written < size:
                for part in parts:                  # every copy has other spellings of one identifier in ten
                    if written >= size: break
                    written += file.write(part if copy == 0 else re.sub(r'\b([a-z])(\w{7,})\b', rf'\1{"qzxjkvwyfb"[copy % 10]}\2', part))
                copy += 1
        done = subprocess.run([sys.executable, '-c', MEASURE_MEMORY, str(path), str(ROOT)], capture_output=True, text=True, check=True)
    seconds, peak = json.loads(done.stdout)
    return {**row, 'ours': [seconds], 'peer': [], 'peer_name': None, 'memory_mb': peak}


def rows(quick: bool) -> list[dict]:
    "One row for each speed target of chapter 3."
    return [train_133_kb(quick), train_shakespeare(quick), train_20_mb(quick), *encode_rows(quick), memory(quick)]
