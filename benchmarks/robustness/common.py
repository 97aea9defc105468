"What the parts of the campaign share: children that may die, tallies that add up, and a folder in memory."
import contextlib, json, os, resource, shutil, signal, sys, tempfile, time
from collections import Counter
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')              # children are forks, which inherit no threads
ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = 5                                               # of each kind of failure that are kept


class Tally:
    "Counts by name, and the first examples of whatever went wrong; two of them add up."
    def __init__(self, counts=(), faults=()): self.counts, self.faults = Counter(dict(counts)), dict(faults)

    def add(self, name, n=1): self.counts[name] += n

    def fault(self, kind, example):
        self.counts[f'fault: {kind}'] += 1
        kept = self.faults.setdefault(kind, [])
        if len(kept) < EXAMPLES: kept.append((str(example).splitlines() or [''])[0][:200])         # no trace of another library, with paths of this machine

    def __iadd__(self, other):
        self.counts.update(other.counts)
        for kind, examples in other.faults.items(): self.faults[kind] = [*self.faults.get(kind, []), *examples][:EXAMPLES]
        return self

    def to_json(self): return {'counts': dict(sorted(self.counts.items())), 'faults': self.faults}


@contextlib.contextmanager
def scratch():
    "A new folder, in memory where there is one: a kill does not empty the cache of a disk, so that no file differs."
    where = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    path = Path(tempfile.mkdtemp(dir=where, prefix='robustness-'))
    try: yield path
    finally: shutil.rmtree(path, ignore_errors=True)


def fork(function, said=os.devnull):
    "Start `function` in a child, whose exit status is what it returns; its output goes to a file."
    if pid := os.fork(): return pid
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        status = function() or 0
    except BaseException as e: print(f'unexpected {type(e).__name__}: {e}', flush=True)
    finally:
        with contextlib.suppress(Exception): sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def ended(pid, seconds=60):
    "Wait for a child: its exit status, negative if a signal ended it; one that takes too long is killed and gives None."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found: return os.waitstatus_to_exitcode(status)
        time.sleep(.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def limited(memory):
    "Allow this process so many bytes beyond what it has."
    pages = int(Path('/proc/self/statm').read_text().split()[0]) if Path('/proc/self/statm').exists() else 0
    size = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def answered(function, seconds=60, memory=None):
    "What a function returns in a child, as JSON, and the child's exit status (None: it took too long)."
    read, write = os.pipe()

    def inside():
        os.close(read)
        if memory: limited(memory)
        with os.fdopen(write, 'w') as file: json.dump(function(), file)
    pid = fork(inside)
    os.close(write)
    with tempfile.TemporaryFile() as held:
        os.set_blocking(read, False)
        deadline, status, done = time.monotonic() + seconds, None, False
        while not done and time.monotonic() < deadline:
            try:
                data = os.read(read, 1 << 16)
                done = not data
                held.write(data)
            except BlockingIOError: time.sleep(.001)
        os.close(read)
        status = ended(pid, 5 if done else 0)
        held.seek(0)
        text = held.read()
    return (json.loads(text) if text and status == 0 else None), status
