"""Supervised fine-tuning beside the batches and the loss of `trl` on `transformers`: tokens a second, and the memory of a step.

Both sides have the same Llama with the same weights in float32, conversations of the same lengths with the same loss mask, and AdamW, in
one process and in turn. A step is forward, backward and update. The peer gets what `SFTTrainer` gives its model: padded ids, an attention
mask and labels. Before anything is timed, three steps must give the same losses. Packing is reported by itself: the same conversations,
counted by their real tokens, padded on the peer's side and packed on ours. `rows(quick)` is what `make bench` runs.
"""
import os, random, tempfile, warnings

import torch

from bench_gpt import SIZES, T, alternate, theirs
from bench_lora import peak, stepper
from llm_from_scratch.gpt import GPT
from llm_from_scratch.instruction import ConversationRows
from llm_from_scratch.training import lm_loss

RUNS = {'1 M': 15, '10 M': 9, '124 M': 5}


def conversations(V, n, seed=0):
    "Token ids and masks: a question of some length, and a shorter answer."
    coin, made = random.Random(seed), []
    for _ in range(n):
        asked, said = coin.randint(T // 8, 3 * T // 4), coin.randint(4, T // 8)
        made.append(([coin.randrange(V) for _ in range(asked + said)], [False] * asked + [True] * said))
    return made


def models(size):
    "Ours and the peer's with the same weights."
    V, D, L, H, B, _ = SIZES[size]
    torch.manual_seed(0)
    peer = theirs('Llama', V, D, L, H)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return GPT.from_hf(folder).train(), peer.train(), V, B


def padded(coded):
    "What the peer's collator makes: ids, which are real, and labels."
    longest = max(len(ids) for ids, _ in coded)
    ids, real, labels = torch.zeros(len(coded), longest, dtype=torch.long), torch.zeros(len(coded), longest, dtype=torch.long), torch.full((len(coded), longest), -100)
    for i, (row, trained) in enumerate(coded):
        ids[i, :len(row)], real[i, :len(row)] = torch.tensor(row), 1
        labels[i, :len(row)] = torch.tensor([token if on else -100 for token, on in zip(row, trained)])
    return {'input_ids': ids, 'attention_mask': real, 'labels': labels}


def row(size, quick, pack):
    "Tokens a second at one size, in padded or packed rows."
    name = f'SFT, {size}, {"packed" if pack else "padded"}'
    try: ours, peer, V, B = models(size)
    except ImportError as e: return {'name': name, 'skipped': f'no peer to compare with: {e}'}
    coded = conversations(V, 3 if quick else 2 * B)
    loader = ConversationRows(coded, T, len(coded), pack=False, shuffle=False)
    if pack: loader = ConversationRows(coded, T, len(ConversationRows(coded, T, 1).rows), shuffle=False)
    batch, given = loader.batch(0), padded(coded)
    if pack: batch = *batch, loader.segments(0)
    (we, n), (they, m) = stepper(ours, lambda: lm_loss(ours, batch)), stepper(peer, lambda: peer(**given, use_cache=False).loss)
    assert n == m, (n, m)
    for _ in range(3): assert abs(we() - they()) < 1e-3
    seconds, work = alternate(we, they, 3 if quick else RUNS[size]), sum(len(ids) for ids, _ in coded)
    row = {'name': name, 'what': f'forward, backward and update of {n:,} parameters on {len(coded)} conversations of {work:,} tokens, float32', 'ours': seconds[0], 'peer': seconds[1],
           'peer_name': 'batches of trl + transformers', 'unit': 'tokens/s', 'work': work, 'memory_mb': peak(we), 'peer_memory_mb': peak(they)}
    return row if pack else {**row, 'target': 'at least 1.0 × the tokens/s of trl + transformers', 'ratio_limit': 1.0}


def rows(quick: bool) -> list[dict]:
    "Two rows for each size."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count() or 1)
    return [row(size, quick, pack) for size in (['1 M'] if quick else SIZES) for pack in (False, True)]
