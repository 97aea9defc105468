"""Models with experts, latent attention and a recurrent state beside `transformers`: `rows(quick)` is what `make bench` runs.

Both sides have the same weights (ours are read from the folder that the peer writes) and run in one process, in turn.
"""
import tempfile, time, warnings

import torch

from llm_from_scratch.generation import SimpleCache
from llm_from_scratch.gpt import GPT

SHAPE = dict(vocab_size=4_096, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=2_048,
             tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=None)
EXPERTS = dict(moe_intermediate_size=128, num_experts_per_tok=2)
MODELS = {  # the class of `transformers`, and what its configuration adds
    'Qwen3-MoE': ('Qwen3Moe', dict(EXPERTS, num_experts=16, norm_topk_prob=True)),
    'DeepSeek V3': ('DeepseekV3', dict(EXPERTS, num_key_value_heads=8, n_routed_experts=16, n_group=4, topk_group=2, first_k_dense_replace=1, intermediate_size=512, q_lora_rank=96,
                                       kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, head_dim=16, v_head_dim=32)),
    'Qwen3-Next': ('Qwen3Next', dict(EXPERTS, num_experts=16, norm_topk_prob=True, shared_expert_intermediate_size=128, linear_num_key_heads=4, linear_num_value_heads=8,
                                     linear_key_head_dim=32, linear_value_head_dim=32))}
B, T, KEPT = 4, 256, 1_000


def pair(name, folder):
    "The peer's model and ours, with the same weights."
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, more = MODELS[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(**SHAPE | more)).eval()
    theirs.save_pretrained(folder)
    return GPT.from_pretrained(folder), theirs


def alternate(a, b, runs):
    "Seconds of each, in turn; the order changes every time, and the first of each warms up."
    seconds = {a: [], b: []}
    for i in range(runs + 1):
        for f in ((a, b), (b, a))[i % 2]:
            start = time.perf_counter()
            f()
            seconds[f].append(time.perf_counter() - start)
    return {'ours': seconds[a][1:], 'peer': seconds[b][1:]}


def learning(name, ours, theirs, runs):
    "Loss and gradients of a batch."
    ids = torch.randint(SHAPE['vocab_size'], (B, T), generator=torch.Generator().manual_seed(0))
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    def mine(): ours(ids, targets).backward(); ours.zero_grad()
    def peers(): theirs(ids, labels=ids, use_cache=False).loss.backward(); theirs.zero_grad()
    with torch.no_grad(): torch.testing.assert_close(ours(ids, targets), theirs(ids, labels=ids).loss, rtol=1e-4, atol=1e-4)
    return {'name': f'{name}, loss and gradients', 'what': f'{sum(p.numel() for p in ours.parameters()) / 1e6:.0f} M parameters, {B} × {T} tokens, float32', **alternate(mine, peers, runs),
            'peer_name': 'transformers', 'unit': 'tokens/s', 'work': B * T, 'target': 'at least 1.0 × the tokens/s of transformers', 'ratio_limit': 1.0}


@torch.inference_mode()
def writing(name, ours, theirs, runs, n=16):
    "The next tokens after a text that a cache holds."
    ids = torch.randint(SHAPE['vocab_size'], (1, KEPT), generator=torch.Generator().manual_seed(1))
    def mine():
        cache = SimpleCache()
        ours(ids, positions=torch.arange(KEPT), cache=cache)
        start = time.perf_counter()
        for t in range(n): logits = ours(ids[:, t:t + 1], positions=torch.tensor([KEPT + t]), cache=cache)
        return time.perf_counter() - start, logits
    def peers():
        cache = theirs(ids, use_cache=True).past_key_values
        start = time.perf_counter()
        for t in range(n): logits = theirs(ids[:, t:t + 1], past_key_values=cache, use_cache=True).logits
        return time.perf_counter() - start, logits
    torch.testing.assert_close(mine()[1], peers()[1], rtol=1e-3, atol=1e-3)
    found = [(mine()[0], peers()[0]) for _ in range(runs)]
    return {'name': f'{name}, {n} tokens after {KEPT}', 'what': 'one at a time, with a cache, float32', 'ours': [a for a, _ in found], 'peer': [b for _, b in found], 'peer_name': 'transformers',
            'unit': 'tokens/s', 'work': n, 'target': 'at least 1.0 × the tokens/s of transformers', 'ratio_limit': 1.0}


def rows(quick: bool) -> list[dict]:
    "Two rows for each model."
    torch.set_num_threads(1)
    found = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            models = pair(name, folder)
            found += [learning(name, *models, 2 if quick else 7), writing(name, *models, 2 if quick else 7)]
    return found
