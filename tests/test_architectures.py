"Chapter 14: published models are settings of one GPT. Their sizes against what their makers count, their plans against transformers' own defaults, tiny copies of them cached and saved; and the picture of their blocks."
import json, re, subprocess, sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT
from shapes import unchecked

from llm_from_scratch.architectures import ARCHITECTURES, deltas
from llm_from_scratch.figures import COLORS, families_svg
from llm_from_scratch.generation import Sampler, generate
from llm_from_scratch.gpt import GPT, GPTConfig, blueprint

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')

PUBLISHED = {'llama-3.1-8b': 8_030_261_248, 'smollm3-3b': 3_075_098_624, 'qwen3-0.6b': 596_049_920, 'qwen3-30b-a3b': 30_532_122_624, 'gemma-3-1b': 999_885_952,
             'olmo-3-7b': 7_298_011_136, 'gpt-oss-20b': 20_914_757_184, 'deepseek-v3': 671_026_404_352, 'qwen3-next-80b': 79_674_391_296}
# what a tiny copy has instead: widths, ranks, experts and windows; the choices stay
OPTIONS = {'moe': {'n_experts': 6, 'top_k': 2}, 'latent': {'q_rank': 10, 'kv_rank': 6, 'd_nope': 4, 'd_rope': 4, 'd_value': 5},
           'gated_delta': {'n_key_heads': 2, 'n_value_heads': 4, 'd_key': 4, 'd_value': 5}}


@pytest.fixture(autouse=True)
def without_checks_of_shapes():
    "The chapters' own tests check the types and shapes of these calls."
    with unchecked(): yield


def each(test): return pytest.mark.parametrize('name', ARCHITECTURES)(test)


@pytest.fixture(scope='module')
def plans():
    with unchecked(): return {name: blueprint(GPTConfig(**said)) for name, said in ARCHITECTURES.items()}


def tiny(name):
    "The same choices, small: experts in groups, shared ones and windows included."
    said = ARCHITECTURES[name]
    layers = [{**layer, **({'window': 3} if 'window' in layer else {}), **({'d_ff': 20} if 'd_ff' in layer else {})} for layer in said.get('layers', ())]
    options = {part: {**given, **{k: v for k, v in OPTIONS.get(part, {}).items() if k in given}} for part, given in said.get('options', {}).items()}
    moe = options.get('moe', {})
    if 'n_groups' in moe: moe |= {'n_groups': 3, 'top_groups': 2}
    if 'shared' in moe: moe |= {'shared': 7}
    n_layers = 5 if name == 'deepseek-v3' else len(layers) or 2                  # three dense layers, and two with experts
    return GPTConfig(**{**said, 'vocab_size': 23, 'context_length': 32, 'd_model': 16, 'n_layers': n_layers, 'n_heads': 4, 'n_kv_heads': min(said['n_kv_heads'], 2) if 'latent' not in options else 4,
                        'd_head': 4 if 'rope_fraction' not in said else 8, 'd_ff': 12, 'layers': layers[:n_layers], 'options': options})


def random_model(config, seed=0):
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=generator) * 0.4
    return model.eval()


def test_counts_against_their_makers(plans):
    assert {name: sum(p.numel() for p in plan.parameters()) for name, plan in plans.items()} == PUBLISHED


def hf_config(kind, **settings):
    transformers = pytest.importorskip('transformers', reason='the judge is an extra: dev')
    return transformers.AutoConfig.for_model(kind, **settings)


@pytest.mark.parametrize('name, kind', [('gemma-3-1b', 'gemma3_text'), ('olmo-3-7b', 'olmo3'), ('gpt-oss-20b', 'gpt_oss')])
def test_windows_against_the_default_plans_of_hf(name, kind):
    ours = GPTConfig(**ARCHITECTURES[name])
    theirs = hf_config(kind, num_hidden_layers=ours.n_layers)
    assert ['sliding_attention' if ours.layer(i).window else 'full_attention' for i in range(ours.n_layers)] == theirs.layer_types


def test_layers_without_rope_and_with_states_against_the_default_plans_of_hf():
    smol, qwen = (GPTConfig(**ARCHITECTURES[name]) for name in ('smollm3-3b', 'qwen3-next-80b'))
    assert [int(smol.layer(i).positions == 'rope') for i in range(36)] == hf_config('smollm3').no_rope_layers
    assert [{'gated_delta': 'linear_attention', 'attention': 'full_attention'}[qwen.layer(i).mixer] for i in range(48)] == hf_config('qwen3_next').layer_types


@pytest.mark.parametrize('name, kind, contexts', [('deepseek-v3', 'deepseek_v3', {'context_length', 'rope_scaling', 'attention_scale'}), ('qwen3-next-80b', 'qwen3_next', {'context_length', 'rope_base'}),
                                                  ('smollm3-3b', 'smollm3', {'context_length', 'rope_base'})])
def test_choices_and_sizes_against_the_defaults_of_hf(name, kind, contexts):
    "The defaults of these three are the published models, before their contexts were extended."
    from llm_from_scratch.pretrained import config_from_hf
    ours, theirs = GPTConfig(**ARCHITECTURES[name]), config_from_hf(hf_config(kind).to_dict())
    sizes = ('vocab_size', 'd_model', 'n_layers', 'n_heads', 'kv_heads', 'is_gated')
    assert [getattr(ours, size) for size in sizes] == [getattr(theirs, size) for size in sizes]
    one, other = (blueprint(replace(config, n_layers=5)) for config in (ours, theirs))
    assert {k: p.shape for k, p in one.state_dict().items()} == {k: p.shape for k, p in other.state_dict().items()}
    unsaid = {'qkv_bias', 'output_bias', 'mlp_bias', 'options', 'layers'}          # as `bias`, or said in another way: the shapes above hold them
    assert set(deltas(ours, theirs)) <= contexts | unsaid


def test_deltas_are_choices_and_no_sizes():
    llama, qwen = (GPTConfig(**ARCHITECTURES[name]) for name in ('llama-3.1-8b', 'qwen3-0.6b'))
    assert deltas(llama) == {} and set(deltas(qwen)) == {'rope_base', 'rope_scaling', 'norm_eps', 'qk_norm', 'tie_embeddings'}
    assert deltas(llama, qwen)['qk_norm'] is False and deltas(qwen)['rope_scaling'] is None


@each
def test_cached_and_ragged_equals_uncached(name):
    model = random_model(tiny(name))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    greedy = Sampler(temperature=0)
    assert generate(model, prompts, 9, greedy) == [generate(model, [prompt], 9, greedy, cache=None)[0] for prompt in prompts]


@each
def test_every_part_of_a_tiny_copy_learns(name):
    model = random_model(tiny(name)).train()
    ids = torch.randint(23, (6, 20), generator=torch.Generator().manual_seed(0))
    model(ids, ids.roll(-1, 1)).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]


def test_json_and_a_fresh_process_that_imports_no_chapter_14(tmp_path):
    "A saved model of each family, opened by a program that knows GPT alone."
    ids, expected = torch.tensor([[3, 1, 4, 1, 5]]), {}
    for name in ARCHITECTURES:
        model = random_model(tiny(name))
        assert GPTConfig.from_json(model.config.to_json()) == model.config
        model.save_pretrained(tmp_path/name)
        with torch.no_grad(): expected[name] = model(ids)[0, -1].tolist()
    code = ('import json, sys, pathlib, torch; torch.set_num_threads(1)\nfrom llm_from_scratch.gpt import GPT\nassert "llm_from_scratch.architectures" not in sys.modules\n'
            'print(json.dumps({p.name: GPT.from_pretrained(p)(torch.tensor([[3, 1, 4, 1, 5]]))[0, -1].tolist() for p in pathlib.Path(sys.argv[1]).iterdir()}))')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, encoding='utf-8', cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == expected.keys()
    for name in found: torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('part, option', [('moe', 'experts'), ('latent', 'rank'), ('gated_delta', 'heads'), ('attention', 'gate')])
def test_an_unknown_option_is_refused_by_its_name(part, option):
    home = next(name for name, said in ARCHITECTURES.items() if part in said.get('options', {}))
    said = ARCHITECTURES[home]
    with pytest.raises(ValueError, match=re.escape(f"no option of {part!r}, {option!r}") + '|' + re.escape(f"no option of {part!r}, is called {option!r}") + f"|{part}.*{option}"):
        GPTConfig(**{**said, 'options': {**said['options'], part: {**said['options'][part], option: 1}}})
    with pytest.raises(ValueError, match='attentoin'): GPTConfig(**{**said, 'mixer': 'attentoin'})


# the picture

def texts_of(svg): return [(t.text, t.get('fill')) for t in ElementTree.fromstring(str(svg)).iter('{http://www.w3.org/2000/svg}text')]


def lit(svg): return {text for text, fill in texts_of(svg) if fill == COLORS[1]}


def test_the_picture_lights_what_the_first_model_lacks(plans):
    llama = plans['llama-3.1-8b']
    def against(name): return lit(families_svg({'Llama': llama, name: plans[name]}))
    assert lit(families_svg({'Llama': llama, 'again': llama})) == set()
    assert against('qwen3-0.6b') == {'QK-norm'}
    assert against('smollm3-3b') == {'9 × no RoPE'}
    assert against('olmo-3-7b') == {'QK-norm', '24 × window 4,096', 'RMSNorm'}
    assert against('gpt-oss-20b') == {'sinks', '12 × window 128', '4 of 32 experts'}
    assert against('gemma-3-1b') == {'RMSNorm, 1 + w', 'QK-norm', '22 × window 512', 'GeGLU 6,912'}
    assert against('deepseek-v3') == {'latent attention', 'latents of 512', '58 × 8 of 256 experts', 'a shared expert'}
    assert against('qwen3-next-80b') == {'RMSNorm, 1 + w', '36 × gated DeltaNet', 'RoPE on 64 of 256', 'QK-norm', 'output gate', '10 of 512 experts', 'a shared expert'}


def test_the_picture_fits_a_phone_and_shows_every_layer(plans):
    svg = families_svg(plans)
    root = ElementTree.fromstring(str(svg))
    assert float(root.get('width')) <= 344
    boxes = [r for r in root.iter('{http://www.w3.org/2000/svg}rect') if r.get('rx') is None]
    assert len(boxes) == 2 * sum(len(plan.blocks) for plan in plans.values())                    # what mixes, and what follows
    for text, _ in texts_of(svg): assert len(text) * 5.5 < 172, text
    assert all(float(t.get('font-size')) >= 11 for t in root.iter('{http://www.w3.org/2000/svg}text'))
    names = [text for text, _ in texts_of(svg)]
    assert all(name in names for name in plans) and '671.0 B parameters, 61 layers' in names
