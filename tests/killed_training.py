"""Kill a small training run again and again, let it resume, and compare it with the run never interrupted.

    killed_training.py FOLDER POINTS SEED

Started by test_training_faults.py. One interpreter imports torch and trains once, which brings the parts of torch that are imported late;
every run is a fork of it, and costs a twentieth of a second. Two of three runs die by their own hand at a random line: the first of them
in each function that saves, the others in functions of the library drawn at random; every third is killed from outside, a random
time after the log has reached a random step, however busy the machine is.
"""
import json, logging, os, random, shutil, signal, sys, time, types
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from llm_from_scratch import files, training
from llm_from_scratch.tensors import Dropout, Embedding, Linear, cross_entropy
from llm_from_scratch.training import SpikeGuard, TrainConfig, Trainer, latest_checkpoint, loader_for, read_log

SAVING = ['save_checkpoint', 'write_tensors', '_thin', '_write_state', '_cut_log', '_discard']
WATCHED = {training.__file__, files.__file__}


class Noisy(torch.nn.Module):
    "Draws from every generator there is: torch's in one dropout, its own in another, Python's and NumPy's in the loss."
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.table, self.middle, self.head = Embedding(11, 6, generator=draw), Linear(6, 6, generator=draw), Linear(6, 11, generator=draw)
        self.drop, self.own = Dropout(.2), Dropout(.2, generator=torch.Generator().manual_seed(5))

    def forward(self, x, y):
        h = self.own(self.middle(self.drop(self.table(x))).relu())
        scale = 1 + .1 * random.random() + .1 * np.random.random() if self.training else 1
        return cross_entropy(self.head(h), y) * scale


def trainer(folder):
    config = TrainConfig(steps=14, batch_size=4, micro_batch_size=3, lr=.05, warmup=2, optimizer='muon', precision='float32', save_every=3, eval_every=4,
                         eval_batches=1, keep=2, on_spike='skip', spike_sigmas=1.0, on_nan='skip')
    ids = np.random.default_rng(0).integers(0, 11, 200)
    made = Trainer(Noisy(), config, loader_for(config, ids, 5), loader_for(config, ids[:60], 5, shuffle=False), folder)
    made.find(SpikeGuard).detector.least = 4
    return made


def train(folder):
    "One life of a run: take up what is there, go on to the end."
    made = trainer(folder)
    made.resume()
    made.fit()


def bomb(name='', fuse=0):
    "Die at the line of function `name` that is executed as number `fuse`; without a name, the lines of every function are counted."
    counts = Counter()
    def local(frame, event, arg):
        here = frame.f_code.co_name
        counts[here] += event == 'line'
        if here == name and counts[here] == fuse: os.kill(os.getpid(), signal.SIGKILL)
        return local
    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in WATCHED and name in ('', frame.f_code.co_name) else None)
    return counts


def live(folder, fuse=None, step=None, delay=0.0):
    "Run in a child that dies by a bomb, or is killed a delay after it has logged a step; whether it was killed."
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if fuse: bomb(*fuse)
            train(folder)
            status = 0
        except BaseException as e: print('the run failed:', repr(e), flush=True)
        finally: os._exit(status)
    ended, status = 0, 0
    while step is not None and not ended and len(read_log(folder/'log.jsonl')) < step:
        time.sleep(.003)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if step is not None and not ended:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    if not ended: _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status): sys.exit('a run failed')
    return os.WIFSIGNALED(status)


def measure(folder):
    "How many lines of each function and how many seconds an undisturbed run takes, in a child."
    read, write = os.pipe()
    if not os.fork():
        lines = bomb()
        train(folder)
        sys.settrace(None)
        os.write(write, json.dumps(lines).encode()); os._exit(0)
    os.wait()
    start = time.perf_counter()
    live(folder.with_name('timed'))
    return json.loads(os.read(read, 1 << 16)), time.perf_counter() - start


def remains(folder):
    "What must not differ: every byte of the last checkpoint and the log, clocks apart."
    last = latest_checkpoint(folder)
    state = training._read_state(last/'state.json')
    del state['parts']['trainer']['seconds']
    log = [{k: v for k, v in record.items() if k not in ('seconds', 'tokens_per_second', 'mfu')} for record in read_log(folder/'log.jsonl')]
    return last.name, json.dumps(state), log, *((last/f'{name}.safetensors').read_bytes() for name in ('model', 'optimizer'))


def main(home, points, seed):
    # torch imports its compiler with the first optimizer, only to ask it to leave a method alone: a second for nothing
    sys.modules['torch._dynamo'] = torch._dynamo = types.SimpleNamespace(disable=lambda function, *args, **options: function)
    torch.set_num_threads(1)
    logging.disable()
    draw = random.Random(seed)
    train(home/'warm')
    lines, seconds = measure(home/'whole')
    expected, deaths, resumed, where = remains(home/'whole'), 0, 0, set()
    for i in range(points):
        folder, killed, before = home/f'run{i}', True, deaths
        while killed and (deaths == before or draw.random() < .3):       # at least one death for each run
            name = SAVING[i - i // 3] if i - i // 3 < len(SAVING) and deaths == before else draw.choice(sorted(lines))
            outside = i % 3 == 2
            killed = live(folder, step=draw.randrange(14), delay=draw.random() * seconds / 14) if outside else live(folder, fuse=(name, draw.randint(1, lines[name])))
            deaths += killed
            resumed += killed and latest_checkpoint(folder) is not None
            if killed and not outside: where.add(name)
        live(folder)
        for what, found, wanted in zip(('step', 'state', 'log', 'weights', 'optimizer'), remains(folder), expected):
            if found != wanted: sys.exit(f'run {i}: another {what} than without interruption')
        shutil.rmtree(folder)
    print(json.dumps({'deaths': deaths, 'resumed': resumed, 'where': sorted(where)}))


if __name__ == '__main__': main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
