"""Tokens a second of the engine beside `transformers.generate_batch`: `rows(quick)` is what `make bench` runs.

Both have the same Llama-shaped model with the same random weights and serve the same 16 ragged requests greedily, all there
from the start, each with its own limit, in float32 on the CPU, in one process and in turn. Both have continuous batching over
a paged cache. They must write the same tokens.
"""
import gc, os, tempfile, warnings

import torch

from bench_generation import alternate
from llm_from_scratch.engine import Engine
from llm_from_scratch.generation import Sampler
from llm_from_scratch.gpt import GPT

#        V       D    F      L   H  K  new tokens  runs  least tokens/s over the peer's
SIZES = {'1 M': (1_024, 128, 344, 4, 4, 2, 64, 7, 2.0), '10 M': (4_096, 320, 864, 6, 5, 5, 64, 5, 2.0), '124 M': (32_000, 768, 2_048, 12, 12, 4, 32, 3, 2.0)}
REQUESTS, LONGEST = 16, 96


def pair(V, D, F, L, H, K):
    "The peer's model, and ours with its weights."
    import transformers
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K, max_position_embeddings=512)).eval()
    for p in peer.parameters(): p.data = torch.randn_like(p) * (0.5 / D**0.5 if p.ndim == 2 else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return GPT.from_hf(folder), peer


def writers(size, new_tokens):
    "Two functions that serve the same requests."
    V, D, F, L, H, K, *_ = SIZES[size]
    ours, peer = pair(V, D, F, L, H, K)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, LONGEST, (REQUESTS,), generator=generator).tolist()
    prompts = [torch.randint(1, V, (n,), generator=generator).tolist() for n in lengths]

    def we():
        engine = Engine(ours, n_pages=256, page_size=16)
        asked = [engine.submit(prompt, new_tokens, Sampler(temperature=0)) for prompt in prompts]
        engine.run()
        return [request.tokens for request in asked]

    from transformers import ContinuousBatchingConfig, GenerationConfig
    limits = ContinuousBatchingConfig(page_size=64, num_blocks=64, max_batch_tokens=512)   # left to itself, it fills the memory with zeros at each call
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def they():
        told = peer.generate_batch(prompts, generation_config=config, continuous_batching_config=limits, warmup=False, progress_bar=False)
        written = {tuple(out.prompt_ids): list(out.generated_tokens) for out in told.values()}
        return [written[tuple(prompt)] for prompt in prompts]
    return we, they, sum(p.numel() for p in ours.parameters())


def row(size, quick):
    "Tokens a second at one size."
    *_, new_tokens, runs, least = SIZES[size]
    if quick: new_tokens, runs = 8, 2
    name = f'engine, {size}'
    try: we, they, parameters = writers(size, new_tokens)
    except ImportError as e: return {'name': name, 'skipped': f'no peer to compare with: {e}'}
    ours, peer = alternate(we, they, runs)
    return {'name': name, 'what': f'{REQUESTS} ragged requests (8 to {LONGEST} tokens) of {new_tokens} greedy tokens each, a Llama-shaped model of {size} parameters, float32, pages of 16',
            'ours': ours, 'peer': peer, 'peer_name': 'transformers.generate_batch', 'unit': 'tokens/s', 'work': REQUESTS * new_tokens, 'parameters': parameters,
            'target': f'at least {least} × the tokens/s of transformers', 'ratio_limit': 1 / least}


def rows(quick: bool) -> list[dict]:
    "One row for each size."
    warnings.filterwarnings('ignore')
    torch.set_num_threads(os.cpu_count() or 1)
    found = []
    for size in ('1 M',) if quick else SIZES:
        found.append(row(size, quick))
        gc.collect()
    return found
