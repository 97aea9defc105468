"""Classification of a message beside `GPT2ForSequenceClassification` of `transformers`: the same weights, the same 128 tokens, in one process and in turn.

Both sides give the logits of two labels for one message (the time that a user waits), for a batch of sixteen messages of different
length, and train one step on it (loss and gradients of all weights). Logits must agree before anything is timed. `rows(quick)` is
what `make bench` runs; it takes about a minute on two cores.
"""
import os, tempfile, warnings

import torch

from bench_generation import SIZES, alternate
from llm_from_scratch.classification import Classifier, pad_rows
from llm_from_scratch.gpt import GPT, GPTConfig

TOKENS, BATCH = 128, 16
RUNS = {'1 M': 31, '10 M': 15, '124 M': 5}


def models(size):
    "Ours and the peer with the same weights, and rows of tokens; 0 is padding and in no row."
    import transformers
    V, D, L, H, *_ = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    body = GPT(GPTConfig(V, 256, D, L, H), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        body.to_hf(folder)
        peer = transformers.GPT2ForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=0, dtype=torch.float32).eval()
    ours = Classifier(body, 2).eval()
    ours.head.load_state_dict(peer.score.state_dict())
    rows = [torch.randint(1, V, (TOKENS - 3 * i,), generator=generator).tolist() for i in range(BATCH)]
    return ours, peer, rows


def row(size, what, quick):
    "One comparison at one size."
    name = f'classification, {size}, {what}'
    try: ours, peer, rows = models(size)
    except (ImportError, OSError) as e: return {'name': name, 'skipped': f'not here: {e}'}
    if what == 'one message': rows = rows[:1]
    ids, last = pad_rows(rows)
    mask, labels = (torch.arange(ids.shape[1]) <= last[:, None]).long(), torch.arange(len(rows)) % 2

    def read(model, **given):
        with torch.inference_mode(): return model(**given)

    def step(model, loss):
        model.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        return found.detach()

    if what == 'training step':
        we, they = lambda: step(ours, lambda: ours(ids, last, labels)), lambda: step(peer, lambda: peer(ids, attention_mask=mask, labels=labels).loss)
    else:
        we, they = lambda: read(ours, ids=ids, last=last), lambda: read(peer, input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(we(), they(), atol=1e-4, rtol=1e-3)
    mine, other = alternate(lambda: bool(we().numel()), lambda: bool(they().numel()), 3 if quick else RUNS[size])
    return {'name': name, 'what': f'{what}: {len(rows)} × {TOKENS} tokens, padded on the right, float32', 'ours': mine, 'peer': other,
            'peer_name': 'transformers.GPT2ForSequenceClassification', 'unit': 'tokens/s', 'work': int(mask.sum()), 'parameters': sum(p.numel() for p in ours.parameters()),
            'target': 'at least as many tokens/s as transformers', 'ratio_limit': 1.0}


def rows(quick: bool) -> list[dict]:
    "A row for each size and kind of work."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count() or 1)
    sizes = ['1 M'] if quick else [*RUNS]
    return [row(size, what, quick) for size in sizes for what in ('one message', f'{BATCH} messages', 'training step')]
