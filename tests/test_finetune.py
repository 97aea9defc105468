"""`llmfs finetune`: from a file of conversations to a model that `llmfs chat` talks to, with adapters and without."""
import io
import json
from pathlib import Path

import pytest
import torch

from llm_from_scratch import cli
from llm_from_scratch.bpe import load_tokenizer
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.instruction import CHAT_TEMPLATE
from llm_from_scratch.lora import LoRAConfig
from llm_from_scratch.pretrained import ChatTemplate, load_chat_template
from llm_from_scratch.training import TrainConfig, Trainer, read_log

INPUTS = ['nbs/command.ipynb']
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]
PLACES = 'river', 'forest', 'market'
ASKED = 'Mia went to the {}. Where is Mia?'
SHORT = '--precision float32 --batch-size 2 --lr 0.01'.split()


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    "A command in this process, in a folder with a base model and examples: output, errors and exit status."
    monkeypatch.chdir(tmp_path)
    table = load_tokenizer('storyland')
    config = GPTConfig(table.vocab_size, 64, 32, 2, 2, d_ff=64, positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False)
    GPT(config, generator=torch.Generator().manual_seed(0)).save_pretrained('base', table)
    examples = [json.dumps({'prompt': ASKED.format(place), 'completion': place}) for place in PLACES * 8]
    Path('examples.jsonl').write_text('\n'.join(examples), encoding='utf-8')

    def run(*words, given=''):
        with monkeypatch.context() as m:
            m.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(given.encode()), encoding='utf-8'))
            status = cli.main([*map(str, words)])
        return (*capfd.readouterr(), status)
    return run


def tune(call, *words): return call('finetune', '--model', 'base', *SHORT, *words)


def test_every_choice_is_a_flag(call):
    page = call('finetune', '--help')[0]
    from dataclasses import fields
    for field in [*fields(TrainConfig), *fields(LoRAConfig)]: assert f'--{field.name.replace("_", "-")}' in page
    for flag in ('full', 'validation', 'template', 'context-length', 'pad', 'cut', 'resume', 'overwrite'): assert f'--{flag}' in page


def test_a_model_learns_to_answer_and_is_talked_to(call):
    out, err, status = tune(call, '--full', '--steps', 100, '--batch-size', 6)
    assert status == 0 and out.startswith('ended by steps: 100 steps'), err
    for place in PLACES:
        assert call('chat', '--model', 'tuned', '--temperature', 0, given=ASKED.format(place))[0].strip() == place
    assert call('runs')[0].rstrip().endswith('llmfs chat --model tuned')
    assert not Path('tuned/adapter').exists()


def test_adapters_are_merged_and_new_rows_are_trained(call):
    base = GPT.from_pretrained('base')
    assert tune(call, '--rank', 4, '--steps', 4)[2] == 0
    tuned = GPT.from_pretrained('tuned')
    assert tuned.config.vocab_size > base.config.vocab_size and not any('.A' in name for name in tuned.state_dict())
    assert not torch.equal(tuned.blocks[0].attention.output.weight, base.blocks[0].attention.output.weight)
    marks = [load_tokenizer('tuned').special_tokens[mark] for mark in ('<|user|>', '<|end|>')]
    assert not torch.equal(*tuned.token_embedding.weight[marks])             # frozen, both would be the mean
    assert torch.equal(tuned.norm.weight, base.norm.weight)
    assert not Path('tuned/adapter').exists()                                # without its embedding it would be half of the change


def test_an_assistant_is_tuned_further_by_an_adapter_that_stays_apart(call):
    from llm_from_scratch.lora import load_adapter, merge, remove_lora
    assert tune(call, '--full', '--steps', 2)[2] == 0
    first = GPT.from_pretrained('tuned')
    assert call('finetune', '--model', 'tuned', '--out', 'again', *SHORT, '--steps', 3)[2] == 0
    again = GPT.from_pretrained('again')
    assert torch.equal(first.token_embedding.weight, again.token_embedding.weight)     # nothing was new
    with_adapter = remove_lora(merge(load_adapter(first, 'again/adapter')))
    for name, weight in again.state_dict().items(): torch.testing.assert_close(with_adapter.state_dict()[name], weight)


@pytest.mark.parametrize('how', [['--full'], ['--rank', 2]])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(call, monkeypatch, how):
    assert tune(call, *how, '--steps', 6, '--out', 'whole')[2] == 0
    step = Trainer.train_step
    def killed(self):
        if self.step == 4: raise KeyError('killed')
        return step(self)
    with monkeypatch.context() as m:
        m.setattr(Trainer, 'train_step', killed)
        assert tune(call, *how, '--steps', 6, '--save-every', 3, '--out', 'broken')[2] == 1
    assert 'llmfs finetune --out broken --resume' in call('runs')[0]
    assert call('generate', '--model', 'broken', '--max-new-tokens', 2)[2] == 0        # its checkpoint is a model, too
    assert 'llmfs finetune --resume' in call('train', '--out', 'broken', '--resume')[1]
    out, err, status = call('finetune', '--out', 'broken', '--resume')
    assert status == 0, err
    whole, broken = (GPT.from_pretrained(name).state_dict() for name in ('whole', 'broken'))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert [r['loss'] for r in read_log('whole/log.jsonl')] == [r['loss'] for r in read_log('broken/log.jsonl')]


def test_a_template_of_ones_own(call):
    own = CHAT_TEMPLATE.replace('<|assistant|>', 'There ')
    Path('own.jinja').write_text(own, encoding='utf-8')
    status = tune(call, '--full', '--steps', 1, '--template', 'own.jinja')
    assert status[2] == 1 and 'template' in status[1]                        # nothing would end an answer: no such tokens in the base
    assert tune(call, '--full', '--steps', 1)[2] == 0
    Path('own.jinja').write_text(CHAT_TEMPLATE + '\n', encoding='utf-8')
    assert call('finetune', '--model', 'tuned', '--out', 'own', '--template', 'own.jinja', '--full', *SHORT, '--steps', 1)[2] == 0
    assert load_chat_template('own').source == ChatTemplate(CHAT_TEMPLATE + '\n').source


@pytest.mark.parametrize('line, said', [
    ('{"prompt": "Who?"}', 'examples.jsonl, line 25: expected {"messages"'),
    ('{"prompt": "Who?", "completion": ""}', 'examples.jsonl, line 25: message 1 is no answer'),
    ('no', 'examples.jsonl, line 25: ')])
def test_a_bad_line_is_named_and_nothing_is_written(call, line, said):
    with open('examples.jsonl', 'a') as file: file.write(f'\n{line}')
    out, err, status = tune(call, '--steps', 1)
    assert (out, status, err.count('\n')) == ('', 1, 1) and said in err and not Path('tuned').exists()


@pytest.mark.parametrize('words, said, status', [
    (['--data', 'nowhere.jsonl'], 'no such file or directory: nowhere.jsonl', 1),
    (['--context-length', 65], '--context-length 65: base reads 64 tokens at most', 2),
    (['--context-length', 8], 'more than a row of 8', 1),
    (['--rank', 0], 'rank', 2),
    (['--targets', 'nix.*'], "no linear layer is called 'nix.*'", 1),
    (['--resume'], 'there is no run to resume', 1)])
def test_what_cannot_be_is_one_sentence(call, words, said, status):
    out, err, found = tune(call, '--steps', 1, *words)
    assert (out, found, err.count('\n')) == ('', status, 1) and said in err, err
    assert not Path('tuned').exists()


def test_what_is_too_long_may_be_cut(call):
    assert tune(call, '--full', '--steps', 1, '--context-length', 14, '--cut')[2] == 0
    assert tune(call, '--full', '--steps', 1, '--pad', '--out', 'padded')[2] == 0


def test_a_finished_assistant_is_not_written_over(call):
    assert tune(call, '--full', '--steps', 1)[2] == 0
    before = Path('tuned/model.safetensors').read_bytes()
    assert 'tuned holds a finished run' in tune(call, '--full', '--steps', 2)[1] and Path('tuned/model.safetensors').read_bytes() == before
    assert tune(call, '--rank', 2, '--steps', 2, '--overwrite')[2] == 0 and Path('tuned/model.safetensors').read_bytes() != before


def test_a_model_of_no_family_is_an_assistant_too(call):
    "`transformers` has no place for it; our own folder has."
    table = load_tokenizer('storyland')
    GPT(GPTConfig(table.vocab_size, 64, 16, 1, 1, positions='rope', feed_forward='gelu')).save_pretrained('odd', table)
    out, err, status = call('finetune', '--model', 'odd', '--full', *SHORT, '--steps', 1)
    assert status == 0, err
    assert call('chat', '--model', 'tuned', '--max-new-tokens', 2, given=ASKED.format('river'))[2] == 0


def test_a_run_is_resumed_from_another_folder_with_all_that_it_was_made_from(call, monkeypatch):
    "Base, examples and template are found as seen from the run, wherever all have been moved to."
    import os
    Path('talk.jinja').write_text(CHAT_TEMPLATE, encoding='utf-8')
    assert tune(call, '--full', '--steps', 1)[2] == 0
    Path('here').mkdir()
    words = ['--template', 'talk.jinja', '--validation', 'examples.jsonl', '--rank', 2, '--steps', 2, '--save-every', 1]
    assert call('finetune', '--model', 'tuned', '--out', 'here/run', *SHORT, *words)[2] == 0
    for name in ('talk.jinja', 'examples.jsonl', 'tuned', 'base'): os.rename(name, Path('here', name))
    run = json.loads(Path('here/run/run.json').read_text(encoding='utf-8'))
    Path('here/run/run.json').write_text(json.dumps(run).replace('../../', '../'), encoding='utf-8')
    monkeypatch.chdir('here')
    out, err, status = call('finetune', '--out', 'run', '--resume', '--steps', 3)
    assert status == 0, err
    assert '/' not in run['tuning']['template'].replace('../', '')                  # no place of this machine


@pytest.mark.parametrize('number', [1, 20, 24])
def test_what_is_wrong_with_a_conversation_is_said_of_its_place_in_the_file(call, number):
    lines = Path('examples.jsonl').read_text(encoding='utf-8').splitlines()
    lines[number - 1] = json.dumps({'prompt': 'Mia ' * 99, 'completion': 'river'})
    Path('examples.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    err = tune(call, '--steps', 1)[1]
    assert f'examples.jsonl, conversation {number}: it has 1' in err and err.endswith('more than a row of 64 holds; --cut drops the end\n')
