"""A million strings through every path of the tokenizers, compared with `tiktoken` and `tokenizers`.

Each batch holds strings of all kinds below. Ordinary encoding, batches, streams and files cut anywhere, exported tokenizers and the way back
must agree on every one; lone surrogates must be refused by each path, naming the place.
"""
import functools, random, sys, time

from common import ROOT, Tally, scratch

SPECIAL = ['<|endoftext|>', '<|a|>', '<s>', ' \u00e9\u4e2d ']
ALIKE = ['<|a|>', '<|a|>b', '<|a|']                        # names that begin alike: the longest counts
SPACE = ' \t\n\r\x0b\x0c\x1c\x85\xa0\u2000\u2028\u2029\u3000\ufeff\u200b'
BLOCKS = [(0x20, 0x7f), (0, 0x20), (0x80, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xe00), (0x1100, 0x1200), (0x2000, 0x2070), (0x20d0, 0x2100),
          (0x3040, 0x3100), (0x4e00, 0x9fff), (0xac00, 0xd7a4), (0xe000, 0xe100), (0xfe00, 0xfe10), (0xfff0, 0x10000), (0x1d400, 0x1d800), (0x1f300, 0x1fb00), (0xe0100, 0xe01f0), (0x10fff0, 0x110000)]


# Strings ----------------------------------------------------------------------------------------------------------

def anything(draw):
    "A character of any plane that is no surrogate."
    while 0xd800 <= (c := draw.randrange(0x110000)) < 0xe000: pass
    return chr(c)


def planes(draw): return ''.join(anything(draw) for _ in range(draw.randrange(12)))


def scripts(draw):
    places = [draw.choice(BLOCKS) for _ in range(draw.randint(1, 3))]
    return ''.join(chr(draw.randrange(*draw.choice(places))) for _ in range(draw.randrange(24)))


def runs(draw):
    length = draw.choice([2, 3, 7, 30, 200]) if draw.random() < .9995 else 3000
    return planes(draw)[:2] + draw.choice([' ', '\n', '\r\n', '\t', 'a', 'A', '1', '.', "'s", 'ab', '\xa0', '\u0301', '\U0001f468\u200d', 'é', '中', anything(draw)]) * length + draw.choice(['', ' a', 'b', '\n', '1'])


def spaces(draw): return ''.join(draw.choice([*SPACE, 'a', 'Ab', '12', "'s", "'LL", '!?', 'é']) for _ in range(draw.randrange(20)))


def junk(draw):
    data = draw.randbytes(draw.randrange(40))
    return data.decode(*draw.choice([('utf-8', 'replace'), ('latin-1',), ('utf-8', 'ignore'), ('cp437',)]))


def special(draw):
    parts = [*SPECIAL, *ALIKE, *(name[:draw.randrange(1, len(name))] for name in SPECIAL), *(name[1:] for name in SPECIAL), ' a', '|', '\n', 'é', '<', 'word ']
    return ''.join(draw.choice(parts) for _ in range(draw.randrange(8)))


@functools.cache
def real():
    "Text that people wrote, and stories."
    from llm_from_scratch.storyland import stories
    from llm_from_scratch.text import pydoc_corpus
    return ''.join(story.text for story in stories(100, seed=3)) + ''.join(list(pydoc_corpus().values())[:40])


def mutated(draw):
    text = real()
    at = draw.randrange(len(text) - 80)
    piece = [*text[at:at + draw.randrange(60)]]
    for _ in range(draw.randrange(4)):
        i = draw.randrange(len(piece) + 1)
        piece[i:i + draw.randrange(3)] = draw.choice([anything(draw), ' ', "'", '', piece[i - 3:i], '\n\n', '0'])
    return ''.join(c if isinstance(c, str) else ''.join(c) for c in piece)


KINDS = {'all planes': planes, 'scripts': scripts, 'long runs': runs, 'white space': spaces, 'bytes': junk, 'special tokens': special, 'real text, changed': mutated}


def broken(draw):
    "A string with a lone surrogate, and the place of the first one."
    before = mutated(draw)
    return before + chr(draw.randrange(0xd800, 0xe000)) + planes(draw), len(before)


# Tokenizers -------------------------------------------------------------------------------------------------------

class Peers:
    "One of our tokenizers beside the same one in two other libraries."
    def __init__(self, name, ours, folder):
        import tiktoken, tokenizers
        from llm_from_scratch.bpe import BPETokenizer
        self.name, self.ours = name, ours
        ours.to_hf(folder)
        self.tiktoken = tiktoken.Encoding(name, pat_str=ours.pattern, mergeable_ranks=ours.vocab, special_tokens=ours.special_tokens)
        self.exported = ours.to_tiktoken()
        self.hf = tokenizers.Tokenizer.from_file(str(folder/'tokenizer.json'))
        if BPETokenizer.from_hf(folder) != ours: raise SystemExit(f'{name}: from_hf gives another tokenizer than to_hf was given')


def tokenizers(home):
    "Byte-pair encoders with both patterns, and GPT-2's own where its files are here."
    from llm_from_scratch.bpe import GPT2_PATTERN, GPT4_PATTERN, BPETokenizer
    draw = random.Random(0)
    texts = [real()[:300_000], ' '.join(scripts(draw) for _ in range(4000))]
    made = {f'GPT-{n}': BPETokenizer.train(texts, size, SPECIAL, pattern) for n, size, pattern in ((2, 1500, GPT2_PATTERN), (4, 1000, GPT4_PATTERN))}
    files = [ROOT.parent/'shared'/'data'/'gpt2'/name for name in ('encoder.json', 'vocab.bpe')]
    if all(f.is_file() for f in files): made["OpenAI's"] = BPETokenizer.from_gpt2_files(*files)
    for name in made: (home/name).mkdir()
    return [Peers(name, ours, home/name) for name, ours in made.items()]


# Comparisons ------------------------------------------------------------------------------------------------------

def same(tally, peers, what, texts, found, wanted):
    "Count comparisons; note the shortest text where two differ."
    tally.add(f'compared: {what}', len(texts))
    if found == wanted: return
    bad = [t for t, a, b in zip(texts, found, wanted) if a != b] or ['(another number of results)']
    for text in sorted(bad, key=len)[:3]: tally.fault(f'{what} differs', f'{peers.name}: {text!r}')


def compare(peers, texts, tally):
    "Every path over some texts."
    ours, check = peers.ours, functools.partial(same, tally, peers)
    names = [*ours.special_tokens]
    ids = [ours.encode(t) for t in texts]
    every = [ours.encode(t, 'all') for t in texts]
    check('encode_batch', texts, ours.encode_batch(texts, threads=1), ids)
    check('tiktoken', texts, [*map(peers.tiktoken.encode_ordinary, texts)], ids)
    check('to_tiktoken', texts, [*map(peers.exported.encode_ordinary, texts)], ids)
    check('encode_batch, special tokens', texts, ours.encode_batch(texts, 'all', threads=1), every)
    check('to_hf with tokenizers, special tokens', texts, [e.ids for e in peers.hf.encode_batch(texts)], every)
    special = [(t, e) for t, e in zip(texts, every) if any(name in t for name in names)]
    check('tiktoken, special tokens', [t for t, _ in special], [peers.tiktoken.encode(t, allowed_special='all') for t, _ in special], [e for _, e in special])
    check('decode', texts, [ours.decode(row) for row in ids], texts)
    check('decode, special tokens', texts, [ours.decode(row) for row in every], texts)
    check('tokenizers decode', texts, peers.hf.decode_batch(every, skip_special_tokens=False), texts)
    check('no special token without leave', texts, [bool(set(row) & set(ours.special_tokens.values())) for row in ids], [False] * len(texts))


def compare_newer(peers, texts, tally):
    "Texts with characters that the engines know differently: they come back whole, though their ids may depend on the path."
    ours = peers.ours
    ids, batch = [*map(ours.encode, texts)], ours.encode_batch(texts, threads=1)
    for rows in ids, batch: same(tally, peers, 'decode, disputed characters', texts, [*map(ours.decode, rows)], texts)
    tally.add('strings with disputed characters', len(texts))
    tally.add('disputed: encode_batch gives other ids than encode', sum(a != b for a, b in zip(ids, batch)))


def compare_streams(peers, texts, draw, tally, folder):
    "All texts as one, cut anywhere, and as a file."
    ours, whole = peers.ours, ''.join(texts)
    for allowed in (), 'all':
        wanted = ours.encode(whole, allowed)
        parts = [whole[a:b] for a, b in cuts(len(whole), draw)]
        same(tally, peers, 'encode_iterable', [whole], [list(ours.encode_iterable(parts, allowed))], [wanted])
        (folder/'text.txt').write_bytes(whole.encode())
        found = [i for block in ours.encode_file(folder/'text.txt', allowed, threads=1) for i in block]
        same(tally, peers, 'encode_file', [whole], [found], [wanted])
    tally.add('characters in streams', 2 * len(whole))


def cuts(n, draw):
    places = sorted({0, n, *(draw.randrange(n + 1) for _ in range(40))})
    return zip(places, places[1:])


def compare_ids(peers, draw, tally, n):
    "Ids that no text gave: bytes that are no UTF-8."
    ours = peers.ours
    known = [*ours.vocab.values(), *ours.special_tokens.values()]
    rows = [[draw.choice(known) if draw.random() < .5 else draw.randrange(256) for _ in range(draw.randrange(12))] for _ in range(n)]
    check = functools.partial(same, tally, peers)
    check('decode of any ids', rows, [ours.decode(r) for r in rows], [peers.tiktoken.decode(r) for r in rows])
    check('decode_stream of any ids', rows, [''.join(ours.decode_stream(r)) for r in rows], [ours.decode(r) for r in rows])
    for row in rows[:20]:
        bad = draw.choice([max(known) + 1, -1, 1 << 40, 1.5, None, 'a'])
        refused(tally, 'an id outside the vocabulary', lambda: ours.decode([*row, bad]), f'position {len(row)}', repr(bad))


def refused(tally, what, act, words, example):
    "Count a refusal; anything else than a ValueError that says where is a fault."
    tally.add(f'refused: {what}')
    try: act()
    except ValueError as e: problem = '' if words in str(e) else f'does not say {words!r}: {e}'
    except BaseException as e: problem = f'{type(e).__name__}: {e}'
    else: problem = 'accepted'
    if problem: tally.fault(f'{what} is not refused as it should be', f'{example}: {problem}')


def random_few(draw): return draw.random() < .05


def compare_broken(peers, draw, tally, n):
    "Lone surrogates, on every path from text to ids."
    ours, good = peers.ours, mutated(draw)
    for _ in range(n):
        text, at = broken(draw)
        paths: dict = {'encode': lambda: ours.encode(text), 'encode, special tokens': lambda: ours.encode(text, 'all'), 'encode_batch': lambda: ours.encode_batch([good, text]),
                 'encode_iterable': lambda: list(ours.encode_iterable([text[:at // 2], text[at // 2:]]))}
        if random_few(draw): paths['train'] = lambda: type(ours).train([text], 300)
        for name, act in paths.items(): refused(tally, f'a lone surrogate, {name}', act, f'position {at}' if name != 'train' else 'surrogate', repr(text))


CLASSES = r'\p{L}', r'\p{N}', r'\s'


@functools.cache
def engines(pattern):
    "Whether a character matches, by each of the three engines for regular expressions."
    import regex
    import tiktoken
    import tokenizers
    ours = regex.compile(pattern).fullmatch
    rust = tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}).encode_ordinary
    onig = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'removed').pre_tokenize_str
    return lambda c: bool(ours(c)), lambda c: bool(rust(c)), lambda c: not onig(c)


@functools.cache
def disputed(c, patterns=CLASSES):
    "Whether the engines disagree on the kind of a character: each knows another edition of Unicode."
    return any(len({matches(c) for matches in engines(pattern)}) > 1 for pattern in patterns)


def newer(text, patterns=CLASSES): return any(disputed(c, patterns) for c in {*text})


def compare_tables(draw, tally, texts, folder):
    "Tokenizers of words and characters: what they encode comes back; what they cannot is refused."
    import tokenizers
    from llm_from_scratch.bpe import load_tokenizer
    from llm_from_scratch.text import CharTokenizer, SpacedWordTokenizer
    kind = draw.choice([CharTokenizer, SpacedWordTokenizer])
    seen = [t for t in texts if t.strip()][:len(texts) // 2]
    try: made = kind.train(seen, special_tokens=['<unk>'] if draw.random() < .3 else [])
    except ValueError: return tally.add('tables: refused to learn')
    made.save(folder/'table.json')
    if load_tokenizer(folder/'table.json') != made: tally.fault('a saved table comes back as another', repr(seen))
    hf = None
    if kind is SpacedWordTokenizer:
        made.to_hf(folder/'hf.json')
        hf = tokenizers.Tokenizer.from_file(str(folder/'hf.json'))
        if kind.from_hf(folder/'hf.json') != made: tally.fault('an exported table comes back as another', repr(seen))
    for text in texts:
        tally.add(f'compared: {kind.__name__}')
        try: ids = made.encode(text)
        except ValueError: tally.add('tables: refused to encode'); continue
        except Exception as e: tally.fault(f'{kind.__name__}: {type(e).__name__}', repr(text)); continue
        if '<unk>' not in made.special_tokens and made.decode(ids) != text: tally.fault(f'{kind.__name__}: decode differs', repr(text))
        if not hf or any(name in text for name in made.special_tokens): continue
        try: theirs = hf.encode(text).ids
        except Exception as e: theirs = e
        if theirs != ids and newer(text, (r'\w',)): tally.add('tables: another \\w in tokenizers')
        elif theirs != ids: tally.fault(f'{kind.__name__}: tokenizers differs', f'{text!r}: {ids} and {theirs}')


def compare_alike(draw, tally, texts, folder):
    "Special tokens that begin alike: an export is equal, or refused."
    import tokenizers
    from llm_from_scratch.bpe import BPETokenizer
    draw.shuffle(names := [*ALIKE])
    ours, peers = BPETokenizer({bytes([b]): b for b in range(256)}, special_tokens={name: 256 + i for i, name in enumerate(names)}), {}
    try: peers['to_tiktoken'] = functools.partial(ours.to_tiktoken().encode, allowed_special='all')
    except ValueError: tally.add('special tokens that begin alike: to_tiktoken refuses')
    try: ours.to_hf(folder/'alike.json')
    except ValueError: tally.add('special tokens that begin alike: to_hf refuses')
    else:
        hf = tokenizers.Tokenizer.from_file(str(folder/'alike.json'))
        peers['to_hf'] = lambda text: hf.encode(text).ids
    for name, encode in peers.items():
        same(tally, Named(names), f'{name}, special tokens that begin alike', texts, [*map(encode, texts)], [ours.encode(t, 'all') for t in texts])


class Named:
    def __init__(self, name): self.name = name


def run(n, seed, batch=2000):
    "`n` strings in batches, dealt to the tokenizers in turn; each batch is a function of the seed and its number."
    from llm_from_scratch import bpe
    part, block = bpe._PART, bpe._BLOCK
    bpe._PART, bpe._BLOCK = 1 << 10, 1 << 11             # small blocks: many borders
    total = Tally()
    try:
        with scratch() as home:
            peers = tokenizers(home)
            for i in range(-(-n // batch)):
                draw, tally = random.Random(f'{seed} {i}'), Tally()
                kinds = [draw.choice(sorted(KINDS)) for _ in range(min(batch, n - i * batch))]
                texts = [KINDS[kind](draw) for kind in kinds]
                for kind in kinds: tally.add(f'strings: {kind}')
                tally.add('strings', len(texts))
                tally.add('characters', sum(map(len, texts)))
                one, known = peers[i % len(peers)], [t for t in texts if not newer(t)]
                compare(one, known, tally)
                compare_newer(one, [t for t in texts if newer(t)], tally)
                compare_streams(one, known[:400], draw, tally, home)
                compare_ids(one, draw, tally, len(texts) // 5)
                compare_broken(one, draw, tally, len(texts) // 50)
                compare_tables(draw, tally, texts[:200], home)
                compare_alike(draw, tally, [t for t, kind in zip(texts, kinds) if kind == 'special tokens'][:100], home)
                total += tally
    finally: bpe._PART, bpe._BLOCK = part, block
    return total


if __name__ == '__main__':
    import json
    start = time.process_time()
    print(json.dumps(run(int(sys.argv[1]), 0).to_json(), indent=1, ensure_ascii=False))
    print(round(time.process_time() - start, 1), 's')
