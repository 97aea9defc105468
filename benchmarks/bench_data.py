"Batches from a token file beside PyTorch's `DataLoader` over the same file: `rows(quick)` is what `make bench` runs."
import tempfile, time
from pathlib import Path

import numpy as np
import torch

from llm_from_scratch.data import BatchLoader, TokenFile

T = 256


class Windows(torch.utils.data.Dataset):
    "The usual way: one window of the mapped file per item."
    def __init__(self, ids): self.ids = ids
    def __len__(self): return (len(self.ids) - 1) // T

    def __getitem__(self, w):
        row = torch.from_numpy(self.ids[w * T:(w + 1) * T + 1].astype(np.int64))
        return row[:-1], row[1:]


def timed(f):
    start = time.perf_counter(); f()
    return time.perf_counter() - start


def read(batches, steps):
    "Take `steps` batches."
    for _, (x, y) in zip(range(steps), batches): assert x.shape == y.shape


def row(file, batch_size, tokens, repeat):
    "Shuffled batches of one size, ours and the peer's in turn."
    steps = tokens // (batch_size * T)
    dataset, ours, peer = Windows(file.ids), [], []
    for i in range(repeat):
        loader = BatchLoader(file, T, batch_size, seed=i)
        ours.append(timed(lambda: read((loader.batch(step) for step in range(steps)), steps)))
        few = max(1, steps // 10)                                    # the peer is slow: a tenth of the work, counted as such
        batches = iter(torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(i)))
        next(batches)                                                # its shuffle of all windows is not part of the measurement
        peer.append(timed(lambda: read(batches, few)) * steps / few)
    return {'name': f'batches of {batch_size} × {T}', 'what': f'shuffled batches of {batch_size} rows of {T} tokens, int64 tensors, from a mapped file of {len(file.ids) / 1e6:.0f} M tokens',
            'ours': ours, 'peer': peer, 'peer_name': 'torch DataLoader, no workers', 'unit': 'M tokens/s', 'work': steps * batch_size * T / 1e6,
            'target': 'at least 50 M tokens/s', 'limit': 50}


def rows(quick: bool) -> list[dict]:
    "One row per batch size."
    torch.set_num_threads(1)
    tokens, rng = (2_000_000 if quick else 20_000_000), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'bench.tok'
        with TokenFile.create(path, vocab_size=50_257) as file:
            for _ in range(tokens // 1000): file.append(rng.integers(0, 50_257, 1000))
        with TokenFile.open(path) as file: return [row(file, batch_size, tokens - 1, 5 if quick else 9) for batch_size in (16, 64, 512)]
