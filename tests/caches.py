"The promise of every cache: however a text is read, in whatever chunks, beside whatever rows and padding, its logits are those of the text alone."
import torch
from hypothesis import strategies as st


def check_cache(make_cache, model, data, vocab_size, *, longest=12, most_rows=3, tolerance=1e-9, ragged=True, reorders=True):
    """Read some texts with a cache, in chunks that `data` (hypothesis) chooses; each logit must be that of its text alone, without a cache.

    Rows are of different lengths, padded anywhere, at different positions at the same time, and between the chunks rows are repeated, moved and left out. Gives back
    the cache."""
    draw, n_rows = data.draw, data.draw(st.integers(1, most_rows), 'rows')
    lengths = [draw(st.integers(1, longest), 'length') for _ in range(n_rows)] if ragged else [draw(st.integers(1, longest), 'length')] * n_rows
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9), 'seed'))
    texts = [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]
    with torch.no_grad():
        alone = [model(text[None])[0] for text in texts]
        rows, cache = [(i, 0) for i in range(n_rows)], make_cache()                           # of each row: which text, and how much of it was read
        while any(done < len(texts[i]) for i, done in rows):
            left = [len(texts[i]) - done for i, done in rows]
            takes = [draw(st.integers(0, n), 'tokens') for n in left] if ragged and draw(st.booleans(), 'ragged') else [draw(st.integers(0, min(left)), 'tokens')] * len(rows)
            if not max(takes): takes = [n if n == max(left) else 0 for n in left] if ragged else left
            ids, positions = chunk(texts, rows, takes, data if ragged else None)
            logits = model(ids, positions=positions, cache=cache)
            for b, ((i, done), n) in enumerate(zip(rows, takes, strict=True)):
                real = (positions.expand(len(rows), -1)[b] >= 0).nonzero()[:, 0]
                torch.testing.assert_close(logits[b, real], alone[i][done : done + n], rtol=0, atol=tolerance)
            rows = [(i, done + n) for (i, done), n in zip(rows, takes, strict=True)]
            if reorders and draw(st.booleans(), 'reorder'):
                order = draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=most_rows), 'order')
                cache.reorder(order)
                rows = [rows[b] for b in order]
    return cache


def chunk(texts, rows, takes, data):
    "The next tokens of each row as a rectangle, and their positions: (T,) if all rows are alike, or (B, T) with padding that `data` puts anywhere."
    starts = {done for _, done in rows}
    if len(starts) == len(set(takes)) == 1 and not (data and data.draw(st.booleans(), 'own positions')):
        return torch.stack([texts[i][done : done + takes[0]] for i, done in rows]), torch.arange(takes[0]) + min(starts)
    T = max(takes) + data.draw(st.integers(0, 2), 'padding')
    ids, positions = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
    for b, ((i, done), n) in enumerate(zip(rows, takes, strict=True)):
        at = sorted(data.draw(st.permutations(range(T)), 'columns')[:n])
        ids[b, at], positions[b, at] = texts[i][done : done + n], torch.arange(done, done + n)
    return ids, positions
