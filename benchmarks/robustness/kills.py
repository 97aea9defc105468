"""Commands of the library, killed at random moments: what is lost, is every file whole, does the next command work?

One process imports torch and runs every command once; each trial is a fork of it that runs a command as a shell would
(`main`, on real files), and is killed without warning in one of four ways:

    clock   from outside, at a random time of its life
    file    from outside, a random moment after a temporary file has appeared
    call    before a random call that opens a file for writing, renames, removes, or waits for the disk
    line    at a random line of a function that writes
"""
import functools, inspect, itertools, json, logging, os, random, shutil, signal, sys, threading, time
from collections import Counter
from pathlib import Path

from common import Tally, ended, fork, scratch

WAYS = 'clock', 'file', 'call', 'line'
SHAPE = '--context-length 8 --d-model 8 --n-layers 1 --n-heads 2 --batch-size 4 --precision float32 --device cpu'.split()
STEPS, EVERY = 12, 3
TRAIN = ['train', '--data', '../data', '--out', 'run', '--steps', str(STEPS), '--save-every', str(EVERY), '--eval-every', '4', '--eval-batches', '1', '--keep', '2', *SHAPE]
RESUME = ['train', '--out', 'run', '--resume']
DATA = ['data', '--corpus', '../new.txt', '--tokenizer', '../tokenizer.json', '--out', 'data']
TOKENIZERS = {kind: ['tokenizer', 'train', '--corpus', '../new.txt', '--kind', kind, '--out', 'tokenizer.json', *(['--vocab-size', '270'] if kind == 'bpe' else [])]
              for kind in ('bpe', 'words', 'chars')}
CALLS = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.chmod', 'shutil.rmtree', 'shutil.copymode', 'os.truncate', 'os.link', 'os.symlink'}
CLOCKS = 'seconds', 'tokens_per_second', 'mfu'


# What is run ------------------------------------------------------------------------------------------------------

def command(words): return lambda: __import__('llm_from_scratch.cli').cli.main(words)


def model(seed, width=8):
    import torch
    from llm_from_scratch.gpt import GPT, GPTConfig
    return GPT(GPTConfig(52, 8, width, 1, 2, norm='rmsnorm', norm_eps=1e-6, positions='rope', feed_forward='swiglu', bias=False, qk_norm=True), generator=torch.Generator().manual_seed(seed))


def save_model(): model(2, 16).save_pretrained('model')


def save_hf():
    from llm_from_scratch.text import SpacedWordTokenizer
    model(2, 16).to_hf("model", SpacedWordTokenizer.train(['a dog sat'], special_tokens=['<|endoftext|>']))


def save_state(seed=2):
    import torch
    from llm_from_scratch.training import save
    made = model(seed)
    optimizer = torch.optim.AdamW(made.parameters())
    for p in made.parameters(): p.grad = torch.ones_like(p)
    optimizer.step()
    save('state.safetensors', made, optimizer, step=seed)


# What is on disk --------------------------------------------------------------------------------------------------

def tree(folder):
    "Every file and what it holds, clocks apart; temporary files are listed by `leftovers`."
    found = {}
    for path in sorted(folder.rglob('*')):
        if not path.is_file() or any(part.startswith('.') for part in path.relative_to(folder).parts): continue
        name = path.relative_to(folder).as_posix()
        if name == 'said': continue
        data = path.read_bytes()
        if path.name == 'log.jsonl': data = json.dumps([{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in data.decode().splitlines()]).encode()
        if path.name == 'state.json': data = timeless(path)
        found[name] = data
    return found


def timeless(path):
    state = json.loads(path.read_text().partition('\n')[2])
    state['parts']['trainer'].pop('seconds', None)
    return json.dumps(state, sort_keys=True).encode()


def leftovers(folder): return [p for p in folder.rglob('.*') if p.name not in ('.', '..') and (p.name.endswith('.tmp') or p.name.startswith('.step'))]


def torn_files(folder):
    "The files under their final names that cannot be read, each with the reason."
    from llm_from_scratch.bpe import load_tokenizer
    from llm_from_scratch.data import TokenFile
    from llm_from_scratch.training import checkpoints, load_checkpoint
    readers = {'*.tok': lambda p: TokenFile.open(p, verify=True).close(), 'tokenizer.json': load_tokenizer, 'run.json': lambda p: json.loads(p.read_text()),
               'tokenizer_config.json': lambda p: json.loads(p.read_text())}
    found = [problem for pattern, read in readers.items() for path in folder.rglob(pattern) if (problem := trouble(read, path))]
    found += [problem for run in (folder, *(p for p in folder.iterdir() if p.is_dir())) for path in checkpoints(run) if (problem := trouble(load_checkpoint, path))]
    for path in folder.rglob('log.jsonl'):
        for line in path.read_text().split('\n')[:-1]: found += filter(None, [trouble(json.loads, line)])
    return found


def trouble(read, path):
    try: read(path)
    except Exception as e: return f'{path}: {type(e).__name__}: {e}'


def readable_model(folder):
    "What reading a saved model gives: `ok`, `nothing` where there is none yet, or why it cannot be read."
    from llm_from_scratch.gpt import GPT
    if not (folder/'config.json').exists() and not (folder/'model.safetensors').exists(): return 'nothing'
    problem = trouble(GPT.from_pretrained, folder)
    return problem or 'ok'


# The trials -------------------------------------------------------------------------------------------------------

class Trial:
    "A command that is killed: what is there before, what it does, and what must be there after a second try."
    def __init__(self, name, act, again=None, before=lambda folder: None, look=lambda folder, tally: None):
        self.name, self.act, self.again, self.before, self.look = name, act, again or act, before, look

    def folder(self, home, name):
        folder = home/name
        folder.mkdir()
        self.before(folder)
        return folder

    def measure(self, home):
        "An undisturbed run: seconds, calls, lines of each function that writes, and what is on disk at the end."
        folder = self.folder(home, f'{self.name}-whole'.replace(' ', '-'))
        start = time.monotonic()
        status = ended(fork(lambda: self.inside(folder), folder/'said'))
        self.seconds = time.monotonic() - start
        if status: raise SystemExit(f'{self.name} failed undisturbed: {(folder/"said").read_text()}')
        self.old, self.new = tree(self.folder(home, f'{self.name}-old'.replace(' ', '-'))), tree(folder)
        counted = self.folder(home, f'{self.name}-counted'.replace(' ', '-'))
        ended(fork(lambda: self.counting(counted), counted/'said'))
        self.counts = json.loads((counted/'.counts').read_text())

    def inside(self, folder, act=None):
        os.chdir(folder)
        return (act or self.act)()

    def counting(self, folder):
        os.chdir(folder)
        calls, lines = bomb('call'), bomb('line')
        self.act()
        sys.settrace(None)
        counts = {'call': calls['call'], 'line': dict(lines)}
        Path('.counts').write_text(json.dumps(counts))

    def life(self, folder, way, draw, act=None):
        "Run and be killed in some way; whether death came before the end, and the exit status if not."
        fuse = None
        if way == 'call': fuse = 'call', draw.randint(1, max(1, self.counts['call']))
        if way == 'line':
            name = draw.choice(sorted(self.counts['line']))
            fuse = name, draw.randint(1, self.counts['line'][name])

        def inside():
            os.chdir(folder)
            if fuse: bomb('call' if way == 'call' else 'line', *fuse)
            return (act or self.act)()
        pid = fork(inside, folder/'said')
        if way == 'clock': time.sleep(draw.random() * self.seconds)
        if way == 'file': wait_for_a_file(pid, folder, draw)
        if way in ('clock', 'file'): os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        return status == -signal.SIGKILL, status


def wait_for_a_file(pid, folder, draw):
    "Until the n-th temporary file has been seen, and a moment longer."
    seen, wanted, deadline = set(), draw.randint(1, 6), time.monotonic() + 20
    while len(seen) < wanted and time.monotonic() < deadline and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        seen |= {path for place in (folder, *folder.glob('*/')) for path in place.glob('.*.tmp')}
    time.sleep(draw.random() * .002)


def bomb(way, name='', fuse=0):
    "Die at the call, or at the line of function `name`, that comes as number `fuse`; with 0, count them all."
    counts = Counter()

    def tick(what):
        counts[what] += 1
        if what == name and counts[what] == fuse: os.kill(os.getpid(), signal.SIGKILL)

    if way == 'call':
        def hook(event, args):
            if event in CALLS or (event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)): tick('call')
        sys.addaudithook(hook)
        real = os.fsync
        os.fsync = lambda handle: (tick('call'), real(handle))[1]
        return counts

    def local(frame, event, arg):
        if event == 'line': tick(frame.f_code.co_name)
        return local
    sys.settrace(lambda frame, event, arg: local if frame.f_code in writers() and name in ('', frame.f_code.co_name) else None)
    return counts


@functools.cache
def writers():
    "The code of functions that write, in any module of the library: those that use a file, or a function that does."
    code, used = {}, {'replacing', 'write_text', 'fsync', 'rename', 'rmtree', 'append_line', 'write_tensors', 'save_checkpoint', '_writing', 'write_model'}
    for module in [m for n, m in sys.modules.items() if n.startswith('llm_from_scratch.') and m]:
        things = [v for v in vars(module).values() if getattr(v, '__module__', '') == module.__name__]
        for f in itertools.chain(things, *(vars(c).values() for c in things if inspect.isclass(c))):
            f = getattr(inspect.unwrap(getattr(f, '__func__', f)), '__code__', None)
            if f is not None and f.co_filename == module.__file__: code[f.co_name] = {*code.get(f.co_name, ()), f}
    return frozenset(f for fs in code.values() for f in fs if used & {*f.co_names, f.co_name} and f.co_name not in ('main', '_dispatch'))


# One after another ------------------------------------------------------------------------------------------------

def trials(home):
    "The commands that are killed, and how many of a hundred kills each of them gets."
    def old_data(folder): shutil.copytree(home/'old-data', folder/'data')
    def old_tokenizer(folder): shutil.copy(home/'old-tokenizer.json', folder/'tokenizer.json')
    def old_model(folder): shutil.copytree(home/'old-model', folder/'model')
    def old_state(folder): shutil.copy(home/'old-state.safetensors', folder/'state.safetensors')

    def look_model(folder, tally):
        found = readable_model(folder/'model')
        tally.add('model: ' + ('readable' if found == 'ok' else 'unreadable'))
        if found != 'ok': tally.fault('a model cannot be read after a kill', found)
    made = [(Trial('train', command(TRAIN), command(RESUME)), 40), (Trial('data', command(DATA), before=old_data), 20),
            (Trial('save a model', save_model, before=old_model, look=look_model), 10), (Trial('save for transformers', save_hf, before=old_model, look=look_model), 5),
            (Trial('save model and optimizer', save_state, before=old_state), 7)]
    return made + [(Trial(f'tokenizer train, {kind}', command(words), before=old_tokenizer), 6) for kind, words in TOKENIZERS.items()]


def prepare(home):
    "Import and run everything once, so that a fork has all of it; the files that the commands find."
    import torch
    import tqdm
    from llm_from_scratch import bpe, cli, data, files, gpt, pretrained, storyland, text, training, weight_maps  # noqa: F401
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())              # the usual one is shared by all forks: whoever dies with it would stop the others
    logging.disable()
    inspect.getsource, inspect.getsourcelines = map(functools.cache, (inspect.getsource, inspect.getsourcelines))     # a command asks for its own comments, each time
    stories = [story.text for story in storyland.stories(40, seed=1)]
    (home/'old.txt').write_text('\n\n'.join(stories[:15]))
    (home/'new.txt').write_text('\n\n'.join(stories[15:]))
    warm = home/'warm'
    warm.mkdir()
    os.chdir(warm)
    text.CharTokenizer.train(stories, ['<|endoftext|>']).save('../tokenizer.json')
    text.CharTokenizer.train(stories[:1]).save('../old-tokenizer.json')
    for words in TOKENIZERS.values(): quiet(words)
    quiet(['data', '--corpus', '../old.txt', '--tokenizer', '../tokenizer.json', '--out', '../old-data'])
    quiet(['data', '--corpus', '../new.txt', '--tokenizer', '../tokenizer.json', '--out', '../data'])
    quiet(TRAIN)
    model(1).save_pretrained(home/'old-model')
    text.SpacedWordTokenizer.train(['a cat sat'], special_tokens=['<|endoftext|>']).to_hf(home/'old-model')
    save_state(1)
    os.rename('state.safetensors', home/'old-state.safetensors')
    save_hf()


def quiet(words):
    "Run a command in this process without its output."
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO
    from llm_from_scratch import cli
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said): status = cli.main(words)
    if status: raise SystemExit(f'llmfs {" ".join(words)}: {said.getvalue()}')


def after_death(trial, folder, tally, way):
    "What a kill has left."
    tally.add('kills')
    tally.add(f'kills: {way}')
    for problem in torn_files(folder): tally.fault('a file is torn', f'{trial.name}, {way}: {problem}')
    trial.look(folder, tally)
    left = leftovers(folder)
    tally.add('with leftovers', bool(left))
    for path in left: os.utime(path, (0, 0))                  # the next command is typed some minutes later
    if trial.name != 'train':
        now = tree(folder)
        states = {'old' if now.get(name) == trial.old.get(name) else 'new' if now.get(name) == trial.new.get(name) else 'other' for name in {*trial.old, *trial.new} if trial.old.get(name) != trial.new.get(name)}
        found = states.pop() if len(states) == 1 else 'mixed'
        tally.add(f'on disk: {found}')
        if found in ('mixed', 'other'): tally.fault('old and new files together', f'{trial.name}, {way}: {sorted(name for name in now if now[name] == trial.new.get(name) != trial.old.get(name))} are new')
    else: look_at_run(folder/'run', tally, way)


def look_at_run(run, tally, way):
    from llm_from_scratch.training import latest_checkpoint, read_log
    logged = max((r['step'] for r in read_log(run/'log.jsonl')), default=0)
    latest = latest_checkpoint(run)
    saved = int(latest.name[5:]) if latest else 0
    tally.add(f'steps to make again: {max(0, logged - saved)}')
    if logged - saved > EVERY: tally.fault('more steps lost than lie between two checkpoints', f'{way}: logged {logged}, saved {saved}')


def once(trial, home, number, draw, tally):
    "One trial: die (now and then more than once), look, try again, compare."
    way, folder = WAYS[number % len(WAYS)], trial.folder(home, f'trial{number}')
    died, status = trial.life(folder, way, draw)
    while died:
        after_death(trial, folder, tally, way)
        act = next_act(trial, folder)
        if trial.name != 'train' or draw.random() > .25: break
        way = draw.choice(WAYS)
        died, status = trial.life(folder, way, draw, act)
        tally.add('kills of a resumed run', died)
    else:
        tally.add('ended before the kill')
        if status: tally.fault('a command failed undisturbed', f'{trial.name}: {(folder/"said").read_text()}')
    if died: recover(trial, folder, tally, way)
    compare(trial, folder, tally, way)
    shutil.rmtree(folder)


def next_act(trial, folder):
    "What a person types next: `--resume`, where a run has a checkpoint."
    return trial.again if trial.name == 'train' and list((folder/'run').glob('step-*')) else trial.act


def recover(trial, folder, tally, way):
    "The same command once more; for a run that refuses to be resumed before its first checkpoint, what its message says."
    status = ended(fork(lambda: trial.inside(folder, next_act(trial, folder)), folder/'said'))
    said = (folder/'said').read_text()
    if status and trial.name == 'train' and not list((folder/'run').glob('step-*')):
        tally.add('refused to resume without a checkpoint')
        status = ended(fork(lambda: trial.inside(folder, trial.act), folder/'said'))
        if status: status = ended(fork(lambda: trial.inside(folder, command([*TRAIN, '--overwrite'])), folder/'said'))
    if status: tally.fault('the next command fails', f'{trial.name}, {way}: {status}: {said} {(folder/"said").read_text()}')


def compare(trial, folder, tally, way):
    now = tree(folder)
    if differing := [name for name in {*now, *trial.new} if now.get(name) != trial.new.get(name)]: tally.fault('another result than undisturbed', f'{trial.name}, {way}: {sorted(differing)}')
    else: tally.add('ends like an undisturbed run')
    if left := leftovers(folder): tally.add('leftovers that stay'); tally.fault('temporary files stay', f'{trial.name}, {way}: {[p.name for p in left]}')


def run(n, seed, only=None):
    "Kill `n` times; a tally for each command."
    with scratch() as home:
        prepare(home)
        found = [(trial, share) for trial, share in trials(home) if only is None or trial.name in only]
        number, total = 0, {}
        for trial, share in found:
            trial.measure(home)
            tally, draw = Tally(), random.Random(f'{seed} {trial.name}')
            while tally.counts['kills'] < max(1, round(n * share / sum(s for _, s in found))):
                once(trial, home, number, draw, tally)
                number += 1
            total[trial.name] = tally
    return total


if __name__ == '__main__':
    start = time.monotonic()
    for name, tally in run(int(sys.argv[1]), 0).items(): print(name, json.dumps(tally.to_json(), indent=1))
    print(round(time.monotonic() - start, 1), 's')
