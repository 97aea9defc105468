"""Training beside its peers: the baby recipe beside ours on tinyshakespeare, the trainer beside the bare loop, a checkpoint beside its bytes.

The baby recipe (4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, AdamW 1e-3 -> 1e-4, no dropout) and ours are both
configurations of our trainer; ours has a short form, with a few large batches, and a long one, with the baby's batches.
`rows(quick)` is what `make bench` runs.
"""
import os, tempfile, time
from pathlib import Path

import numpy as np
import torch

from llm_from_scratch.data import BatchLoader
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.optim import AdamW, clip_grad_norm, param_groups
from llm_from_scratch.text import CharTokenizer
from llm_from_scratch.training import ProcessGroup, TrainConfig, Trainer, evaluate, save_checkpoint

PLACES = [Path(__file__).resolve().parents[2]/'shared'/'data'/name for name in ('tinyshakespeare.txt', 'tinyshakespeare/input.txt')]
T, STEPS, SPRINT, GOAL = 64, 2_000, 125, 1.88
BABY = dict(bias=False)
MODERN = dict(positions='rope', rope_base=100.0, norm='rmsnorm', qk_norm=True, feed_forward='relu2', bias=False, tie_embeddings=False)


def shakespeare():
    "Ids of the first nine tenths and of the rest, and how many characters there are; None where the file is not."
    found = next((path for path in PLACES if path.is_file()), None)
    if found is None: return None
    text = found.read_text(encoding='utf-8')
    letters = CharTokenizer.train([text])
    ids = np.array(letters.encode(text))
    cut = round(0.9 * len(ids))
    return ids[:cut], ids[cut:], letters.vocab_size


def recipe(kind, vocab_size, steps, seed=0):
    "The model and the configuration of one of the two recipes."
    model = GPT(GPTConfig(vocab_size, T, 128, 4, 4, **(BABY if kind == 'baby' else MODERN)), generator=torch.Generator().manual_seed(seed))
    common = dict(steps=steps, precision='float32', seed=seed)
    if kind == 'baby': return model, TrainConfig(lr=1e-3, min_lr_ratio=0.1, warmup=min(100, steps), betas=(0.9, 0.99), batch_size=12, **common)
    model.token_embedding.weight.data.mul_(25)
    pace = (dict(batch_size=20, lr=0.02, muon_lr=0.06, muon_momentum=0.85) if steps <= SPRINT
            else dict(batch_size=12, lr=0.015, muon_lr=0.02))
    return model, TrainConfig(optimizer='muon', schedule='linear', weight_decay=0.0, warmup=min(5, steps), **pace, **common)


def course(kind, data, steps, goal=None, every=5):
    "Train; seconds of the steps alone, steps made, and the loss on the held-out part. Ends early where the goal is reached (in the last quarter)."
    train, held, V = data
    model, config = recipe(kind, V, steps)
    trainer = Trainer(model, config, BatchLoader(train, T, config.batch_size), world=ProcessGroup())
    measure = BatchLoader(held, T, 128, shuffle=False)

    def loss(): return (lambda total, n: total / n)(*evaluate(model, measure, len(measure)))
    seconds = 0.0
    while trainer.step < steps:
        start = time.perf_counter()
        trainer.train_step()
        seconds += time.perf_counter() - start
        if goal and trainer.step % every == 0 and trainer.step >= 0.75 * steps and loss() <= goal: break
    return seconds, trainer.step, loss()


def recipes(quick):
    "The baby recipe to its end, ours to the same loss, and ours to the same number of steps."
    data, goal = shakespeare(), f'validation {GOAL} in at most 1/10 of the time'
    names = [f'tinyshakespeare to {GOAL}', f'tinyshakespeare, {STEPS:,} steps']
    if data is None: return [{'name': name, 'skipped': 'shared/data/tinyshakespeare.txt is not here'} for name in names]
    steps = 20 if quick else STEPS
    baby, _, baby_loss = course('baby', data, steps)
    fast, made, fast_loss = course('ours', data, min(steps, SPRINT), GOAL)
    whole, _, loss = course('ours', data, steps)
    return [{'name': names[0], 'what': f'{made} steps of ours to a held-out loss of {fast_loss:.3f}, beside {steps:,} of the baby recipe to {baby_loss:.3f}', 'ours': [fast], 'peer': [baby],
             'peer_name': 'the baby recipe', 'target': goal, 'ratio_limit': 0.1},
            {'name': names[1], 'what': f'{steps:,} steps of each: held-out loss {loss:.3f} (ours) and {baby_loss:.3f} (baby recipe)', 'ours': [whole], 'peer': [baby], 'peer_name': 'the baby recipe',
             'target': 'a held-out loss of at most 1.60 nats per character', 'loss': loss, 'loss_limit': 1.60}]


def overhead(quick):
    "Steps of the trainer beside the ten lines, on the same batches."
    ids = np.random.default_rng(0).integers(256, size=200_000)
    model = [GPT(GPTConfig(256, 128, 128, 4, 4), generator=torch.Generator().manual_seed(0)) for _ in 'ab']
    config = TrainConfig(steps=10_000, batch_size=16, precision='float32')
    trainer, loader = Trainer(model[0], config, BatchLoader(ids, 128, 16), world=ProcessGroup()), BatchLoader(ids, 128, 16)
    optimizer = AdamW(param_groups(model[1], config.weight_decay), lr=1e-3, betas=config.betas)

    def bare(step):
        x, y = loader.batch(step)
        model[1](x, y).backward()
        clip_grad_norm(model[1].parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    ours, peer = [], []
    for step in range(8 if quick else 60):
        pair = [(ours, trainer.train_step), (peer, lambda: bare(step))]
        for seconds, f in pair[::1 if step % 2 else -1]: seconds.append(timed(f))
    return {'name': 'trainer', 'what': 'a training step of 2,048 tokens, 0.8 M parameters, by the trainer and by ten lines', 'ours': ours[4:], 'peer': peer[4:], 'peer_name': 'the bare loop',
            'unit': 'tokens/s', 'work': 2048, 'target': 'at most 1.03 × the time of the bare loop', 'ratio_limit': 1.03}


def checkpoint(quick):
    "A checkpoint of a model and two averages of each weight, beside writing as many bytes."
    n = 1 << (20 if quick else 24)
    tensors = {'model': {'w': torch.randn(n)}, 'optimizer': {'a': torch.randn(n), 'b': torch.randn(n)}}
    data, ours, peer = os.urandom(12 * n), [], []

    def plain(path):
        with open(path, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3 if quick else 9):
            for seconds, f in [(ours, lambda: save_checkpoint(Path(folder)/'run', i, tensors, keep=1)), (peer, lambda: plain(Path(folder)/'plain'))][::1 if i % 2 else -1]:
                start = time.perf_counter()
                f()
                seconds.append(time.perf_counter() - start)
    return {'name': 'checkpoint', 'what': f'a checkpoint of {12 * n / 1e6:.0f} MB, checksums included, beside writing as many bytes to one file (both synced)', 'ours': ours[1:], 'peer': peer[1:],
            'peer_name': 'the bytes alone', 'unit': 'bytes/s', 'work': 12 * n, 'target': 'at most 1.5 × the time to write its bytes', 'ratio_limit': 1.5}


def threads():
    "As many as this process has cores."
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def rows(quick: bool) -> list[dict]:
    "Both recipes where the text is, then what the trainer and a checkpoint cost."
    torch.set_num_threads(threads())
    return [*recipes(quick), overhead(quick), checkpoint(quick)]
