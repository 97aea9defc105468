#!/usr/bin/env python3
"""Record the story on the book's first page: the shipped model writes it, and this file puts it into index.qmd.

`story.py --check` says whether what stands there is what the model writes and what is known of the model. The seed is one
at which no draw is close: processors round differently, and all of them must write the same words.
"""
import json, random, re, sys
from functools import cache
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT/'index.qmd', ROOT/'nbs'/'results'/'storyland_small.json'
sys.path.insert(0, str(ROOT))
PROMPT, MARGIN, WORDS = 'Once upon a time', 1e-3, range(70, 91)
PLACE = re.compile(r'(?<=::: \{\.story\}\n)(?P<text>.*?)\n\n(?P<note>.*?)(?=\n\n:::$)', re.M | re.S)
NUMBERS = ['no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten']


@cache
def written(seed):
    "The story of a seed, and by how much its closest draw was decided: the distance of a random number from the edge of its token's share."
    import torch
    from llm_from_scratch.bpe import load_tokenizer
    from llm_from_scratch.generation import generate, row_seeds
    from llm_from_scratch.gpt import GPT
    model, table = GPT.from_pretrained('storyland'), load_tokenizer('storyland')
    end = table.special_tokens['<|endoftext|>']
    ids = [end, *table.encode(PROMPT)]
    new = generate(model, [ids], 300, seed=seed, end_tokens=end)[0]
    with torch.no_grad(): shares = model(torch.tensor([ids + new]))[0, len(ids) - 1:-1].double().softmax(-1)
    coin, upper = random.Random(row_seeds(seed, 1)[0]), shares.cumsum(-1)
    draws = [(coin.random(), upper[i, token].item(), shares[i, token].item()) for i, token in enumerate(new)]
    return table.decode(ids[1:] + new[:-1]), min(min(above - u, u - above + share) for u, above, share in draws)


def record():
    "The first seed whose story is short enough for a first screen, could have happened in the world, and was clearly decided."
    from llm_from_scratch.storyland import can_begin
    for seed in count():
        text, margin = written(seed)
        if len(text.split()) in WORDS and margin > MARGIN and can_begin(text): return seed, text


def shown(text):
    "The story in one paragraph, what the model was given in bold."
    return f'**{PROMPT}**{" ".join(text.split()).removeprefix(PROMPT)}'


def note(seed):
    "What is known of the model that wrote it, and how to let it write again."
    run = json.loads(RESULTS.read_text(encoding='utf-8'))['runs'][0]
    return (f"Recorded: you give the first words, the model writes the rest. It comes with the library: {run['parameters']:,} parameters, trained in {NUMBERS[round(run['seconds'] / 60)]} minutes on one core "
            f'by the code of @sec-training. On your machine, `llmfs generate --prompt "{PROMPT}" --seed {seed}` writes it again.')


def fault(page):
    "What is wrong with the story on the page, in a sentence, or nothing."
    found = PLACE.search(page)
    seed = found and re.search(r'--seed (\d+)', found['note'])
    if not seed: return 'index.qmd shows no story with a seed'
    text, margin = written(int(seed[1]))
    if found['text'] != shown(text): return f'the model writes other words with seed {seed[1]}: {text!r}'
    if margin <= MARGIN: return f'a draw of seed {seed[1]} is too close to hold on every processor: {margin:.5f}'
    if found['note'] != note(int(seed[1])): return f'what is known of the model is another: {note(int(seed[1]))}'


def main():
    page = PAGE.read_text(encoding='utf-8')
    if '--check' not in sys.argv:
        seed, text = record()
        page = PLACE.sub(lambda _: f'{shown(text)}\n\n{note(seed)}', page)
        PAGE.write_text(page, encoding='utf-8')
    wrong = fault(page)
    if wrong: sys.exit(f'{wrong}; run: python tools/story.py')


if __name__ == '__main__': main()
