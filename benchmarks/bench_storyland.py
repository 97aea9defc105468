"""Storyland's stream: how fast stories are told, by one core, from a cold start."""
import sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def stream(size, megabytes, seed):
    "Processor seconds for this many megabytes of the training split, every menu made anew; and the bytes told."
    from llm_from_scratch import storyland
    storyland.narrator.cache_clear()
    told, start = 0, time.process_time()
    for story in storyland.stories(seed=seed, size=size):
        told += len(story.text)
        if told >= megabytes * 1e6: return time.process_time() - start, told


def row(size, megabytes, runs):
    seconds = [time_ * megabytes * 1e6 / told for time_, told in (stream(size, megabytes, seed) for seed in range(runs))]
    return {'name': f'stories, {size}', 'what': f'stories(size={size!r}): {megabytes} MB of training stories from a cold start, processor time of one core',
            'ours': seconds, 'peer': [], 'peer_name': '', 'unit': 'MB/s', 'work': megabytes, 'target': 'at least 5 MB/s a core', 'limit': 5}


def rows(quick: bool) -> list[dict]:
    "One row per size."
    return [row(size, 10 if quick else 50, 3 if quick else 5) for size in ('tiny', 'small', 'large')]
