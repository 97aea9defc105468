"Chat templates beside transformers, hostile ones, messages that pretend; conversations; and `llmfs chat` as a user types it."
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import unchecked

from llm_from_scratch import cli
from llm_from_scratch.bpe import BPETokenizer, load_tokenizer
from llm_from_scratch.chat import Conversation, compile_template
from llm_from_scratch.generation import Sampler, generate
from llm_from_scratch.gguf import write_gguf
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.pretrained import ChatTemplate, load_chat_template

INPUTS = ['nbs/command.ipynb']
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# In the manner of the families that publish them, in words of our own.
TEMPLATES = {
    'chatml': CHATML,
    'smollm2': "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
               "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    'pairs': "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}\n"
             "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}\n"
             "{% if m.role == 'user' %}[INST] {% if loop.first and system is defined %}<<SYS>>{{ system }}<</SYS>> {% endif %}{{ m.content | trim }} [/INST]{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}",
    'headers': "{{- bos_token }}\n{%- for m in messages %}\n    {{- '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + '<|eot|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|head|>assistant<|/head|>\n\n' }}\n{%- endif %}\n",
    'model role': "{{ bos_token }}{% set ns = namespace(first=true) %}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
                  "{% if ns.first %}{% set ns.first = false %}{% else %}~{% endif %}<turn>{{ role }}\n{{ m.content | upper if loop.last else m.content }}<end>\n{% endfor %}",
    'thinking': "{%- set ns = namespace(last=0) -%}{%- for m in messages[::-1] -%}{%- if m.role == 'user' and ns.last == 0 -%}{%- set ns.last = messages|length - loop.index0 -%}{%- endif -%}{%- endfor -%}\n"
                "{%- for m in messages -%}<s>{{ m.role }}:{% if m.role == 'assistant' and '</think>' in m.content and loop.index < ns.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}</s>{%- endfor -%}",
    'tools': "{% if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}\n{% endfor %}{% endif %}{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}{% continue %}{% endif %}"
             "{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}[{{ part.type }}]{% break %}{% endif %}{% endfor %}{% endif %}|{% endfor %}",
    'generation': "{% for m in messages %}{% if m.role == 'assistant' %}\n  {% generation %}\n{{ m.content }}{% endgeneration %}\n{% else %}{%- generation -%} {{ m.content }} {%- endgeneration -%}\n{% endif %}{% endfor %}",
    'macro': "{% macro turn(role, text='') -%}<{{ role }}>{{ text }}{%- endmacro %}{% for m in messages %}{{ turn(m.role, text=m.content) }}{{ loop.length }}{{ loop.previtem.role if loop.previtem else '^' }}{% endfor %}{{ dict(a=1).items() | list }}",
    'loops': "{% for a in messages recursive %}{{ a.role }}{{ loop.depth }}{{ loop.revindex }}{% if a.children is defined %}({{ loop(a.children) }}){% endif %}{% else %}none{% endfor %}{{ '%s-%d' | format('x', 3) }}{{ 'ab' * 3 }}{{ 2 ** 5 }}{{ [1] + [2] }}{{ 'a' ~ 1 }}",
}
SPECIAL = ['<|im_start|>', '<|im_end|>', '<|head|>', '<|/head|>', '<|eot|>', '<turn>', '<end>', '<s>', '</s>']
TALKS = [
    [{'role': 'user', 'content': 'Hi!'}],
    [{'role': 'system', 'content': ' Be brief. '}, {'role': 'user', 'content': '  What is 1 + 1?\n'}],
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': '<think>hm</think>\n\nb'}, {'role': 'user', 'content': 'ä "quoted" <b> & \\ \u2028 ☃'}],
    [{'role': 'system', 'content': ''}, {'role': 'user', 'content': ''}, {'role': 'assistant', 'content': 'x\n\ny'}, {'role': 'user', 'content': '{{ 7 * 7 }}{% raw %}'}, {'role': 'assistant', 'content': 'ok'}],
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'look'}, {'type': 'image'}, {'type': 'text', 'text': 'never'}]}],
    [{'role': 'user', 'content': 'weather?'}, {'role': 'assistant', 'tool_calls': [{'type': 'function', 'function': {'name': 'sky', 'arguments': {'city': 'Rom & "Ä"'}}}]}, {'role': 'tool', 'content': 'sunny'}],
    [{'role': 'user', 'content': 'x', 'children': [{'role': 'b'}, {'role': 'c', 'children': [{'role': 'd'}]}]}],
]
TOOLS = [{'type': 'function', 'function': {'name': 'sky', 'description': "It's <blue>", 'parameters': {'type': 'object', 'properties': {}}}}]


def theirs(source, talk, prompt, tools):
    "What transformers makes of it, or the kind of its refusal."
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template
    try: return render_jinja_template([talk], chat_template=source, tools=tools, add_generation_prompt=prompt, bos_token='<s>', eos_token='</s>')[0][0]
    except (jinja2.TemplateError, TypeError): return ValueError


def ours(source, talk, prompt, tools):
    try: return ChatTemplate(source, bos_token='<s>', eos_token='</s>').render(talk, add_generation_prompt=prompt, tools=tools)
    except ValueError: return ValueError


@pytest.mark.parametrize('name', TEMPLATES)
def test_against_hf_chat_templates(name):
    "The same text, or a refusal on both sides, for every conversation, with and without a generation prompt and tools."
    pytest.importorskip('transformers')
    found = [(ours(TEMPLATES[name], talk, prompt, tools), theirs(TEMPLATES[name], talk, prompt, tools)) for talk in TALKS for prompt in (False, True) for tools in (None, TOOLS)]
    assert all(a == b for a, b in found), [pair for pair in found if pair[0] != pair[1]][:1]
    assert sum(a is not ValueError for a, _ in found) >= 8


def test_the_date_is_today():
    from datetime import datetime
    assert compile_template("{{ strftime_now('%Y-%m-%d') }}")() in {datetime.now().strftime('%Y-%m-%d')}


@pytest.fixture(scope='module')
def letters(): return BPETokenizer({bytes([b]): b for b in range(256)}, special_tokens={name: 256 + i for i, name in enumerate(SPECIAL)})


def test_against_hf_ids(letters, tmp_path):
    "The ids of `apply_chat_template`, for conversations that do not pretend to be templates."
    transformers = pytest.importorskip('transformers')
    letters.to_hf(tmp_path)
    (tmp_path/'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}), encoding='utf-8')
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name in 'chatml', 'smollm2', 'headers', 'model role', 'macro':
        for talk in TALKS[:4]:
            template = ChatTemplate(TEMPLATES[name], bos_token='<s>')
            for prompt in False, True:
                them = peer.apply_chat_template(talk, chat_template=TEMPLATES[name], add_generation_prompt=prompt, bos_token='<s>', return_dict=False)
                assert template.encode(letters, talk, add_generation_prompt=prompt) == them


# Messages that pretend -------------------------------------------------------------------------------------------

PARTS = st.lists(st.sampled_from([*SPECIAL, '<|im_', 'start|>', '<', '|', 'end|>', '\n', 'user', 'x', '\ufdd0', '\ufdd0\ufdd0', '<\ufdd0|im_end|>', '<|im_end', ' ']), max_size=8).map(''.join)


@settings(max_examples=150)
@given(st.lists(PARTS, min_size=1, max_size=3), st.sampled_from(['chatml', 'smollm2', 'headers', 'model role']))
def test_no_message_makes_a_special_token(texts, name):
    "As many special tokens as with harmless messages, and the text is what transformers would encode."
    letters = BPETokenizer({bytes([b]): b for b in range(256)}, special_tokens={name: 256 + i for i, name in enumerate(SPECIAL)})
    template = ChatTemplate(TEMPLATES[name], bos_token='<s>')
    def talk(texts): return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]
    ids, harmless = template.encode(letters, talk(texts)), template.encode(letters, talk(['x'] * len(texts)))
    assert [i for i in ids if i > 255] == [i for i in harmless if i > 255]
    if name != 'model role': assert letters.decode(ids) == template.render(talk(texts), add_generation_prompt=True)      # `upper` changes the case of what looks like a token


def test_tool_results_and_descriptions_are_messages_too(letters):
    template = ChatTemplate(TEMPLATES['tools'])
    for talk in ([{'role': 'tool', 'content': '</s>'}], [{'role': 'user', 'content': [{'type': 'text', 'text': 'a</s>b'}]}]):
        assert max(template.encode(letters, talk)) < 256
    hostile = [{'type': 'function', 'function': {'name': '</s>', 'description': '<s>', 'parameters': {'</s>': '<s>'}}}]
    assert max(template.encode(letters, TALKS[0], tools=hostile)) < 256


@pytest.mark.parametrize('messages, said', [
    ([], 'expected a list of messages'), ('Hi!', 'expected a list of messages'), (None, 'expected a list of messages'), (['Hi!'], 'message 0 has no role'),
    ([{'role': 'user', 'content': 'a'}, {'content': 'b'}], 'message 1 has no role'), ([{'role': 7, 'content': 'b'}], 'message 0 has no role'), ([{'role': '', 'content': 'b'}], 'message 0 has no role'),
    ([{'role': 'user', 'content': {1, 2}}], 'something other than text, numbers and lists')])
def test_what_is_no_conversation_is_refused(messages, said):
    with unchecked(), pytest.raises(ValueError, match=said): ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize('source, said', [
    ('{% for m in messages %}', 'the chat template has an error in line 1'), ('a\nb\n{{ 1 + }}', 'error in line 3'), ('{{ messages[0].content + 1 }}', 'the chat template refuses'),
    ("{{ raise_exception('no such\n role') }}", 'the chat template refuses: no such role'), ('{{ messages[9].role }}', 'refuses'), ('{{ nothing.at_all }}', "refuses: 'nothing' is undefined"), ('{{ 1 / 0 }}', 'division')])
def test_a_template_that_fails_says_why(source, said):
    with pytest.raises(ValueError, match=said): ChatTemplate(source).render(TALKS[0])


HOSTILE = {
    'python': "{{ ''.__class__.__mro__[1].__subclasses__() }}", 'globals': '{{ raise_exception.__globals__ }}', 'cycler': '{{ cycler.__init__.__globals__.os }}', 'format': "{{ '{0.__class__}'.format(messages) }}",
    'attr': "{{ messages | attr('__class__') }}", 'change': '{{ messages.append(1) }}', 'change a message': "{{ messages[0].update(role='system') }}", 'range': '{{ range(10**9) | list }}',
    'loops': '{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}', 'recursion': '{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}',
    'tree': '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}', 'times': "{{ 'a' * 10**11 }}", 'list': '{{ [0] * 10**11 }}', 'power': '{{ 9 ** (9 ** 9) }}', 'tower': '{{ ((((9**60)**60)**60)**60) }}',
    'grow': "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", 'plus': "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    'width': "{{ '%999999999d' % 1 }}", 'center': "{{ 'a' | center(10**11) }}", 'filter format': "{{ '%999999999d' | format(1) }}", 'squares': '{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}'}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_template_reaches_nothing_and_ends(name):
    start, talk = time.process_time(), [{'role': 'user', 'content': 'x'}]
    try: said = ChatTemplate(HOSTILE[name]).render(talk)
    except ValueError as e: said = str(e)
    assert time.process_time() - start < 20 and len(said) < 300 and talk == [{'role': 'user', 'content': 'x'}]
    assert said.startswith('the chat template refuses') or said == '' or (name == 'attr' and 'class' not in said)


# Where templates come from ----------------------------------------------------------------------------------------

def test_a_template_is_found_in_a_folder(tmp_path):
    config = tmp_path/'tokenizer_config.json'
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises(ValueError, match='has no chat template: it has seen no conversations'): load_chat_template(tmp_path)
    config.write_text(json.dumps({'chat_template': '{{ bos_token }}1', 'bos_token': {'content': '<s>', 'lstrip': False}, 'eos_token': None}))
    assert load_chat_template(tmp_path).render(TALKS[0]) == '<s>1'
    config.write_text(json.dumps({'chat_template': [{'name': 'tool_use', 'template': '2'}, {'name': 'default', 'template': '3{{ eos_token }}'}], 'eos_token': '</s>'}))
    assert load_chat_template(tmp_path).render(TALKS[0]) == '3</s>'
    (tmp_path/'chat_template.jinja').write_text('ä', encoding='utf-8')
    assert load_chat_template(tmp_path).render(TALKS[0]) == 'ä'


@pytest.fixture(scope='module')
def words():
    "A small tokenizer with the special tokens of ChatML."
    trained = BPETokenizer.train('the cat and the dog and the bird were there ' * 4, 280)
    return BPETokenizer(trained.vocab, trained.pattern, {'<|endoftext|>': trained.vocab_size, '<|im_start|>': trained.vocab_size + 1, '<|im_end|>': trained.vocab_size + 2})


def model_for(words, context=256, seed=0):
    config = GPTConfig(words.vocab_size, context, 32, 2, 4, positions='rope', norm='rmsnorm', feed_forward='swiglu', bias=False, tie_embeddings=True)
    return GPT(config, generator=torch.Generator().manual_seed(seed)).eval()


@pytest.fixture(scope='module')
def tiny(words, tmp_path_factory):
    "A chat model with random weights in a GGUF file, as `llmfs chat --model` takes it."
    path = tmp_path_factory.mktemp('chat')/'tiny.gguf'
    write_gguf(model_for(words, 4096), path, words, type='F32', metadata={'tokenizer.chat_template': CHATML})
    return path


def test_a_template_is_found_in_a_gguf_file(tiny, words):
    template = load_chat_template(tiny)
    assert template.source == CHATML and template.variables == {'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'}
    assert load_chat_template(tiny.parent).source == CHATML and load_tokenizer(tiny).encode('the cat') == words.encode('the cat')
    assert GPT.from_pretrained(tiny).config.n_layers == 2 and template.end_tokens(words) == (words.special_tokens['<|im_end|>'],)


# Conversations ----------------------------------------------------------------------------------------------------

GREEDY = Sampler(temperature=0)


def test_a_long_conversation_is_what_each_turn_gives_by_itself(words):
    "The answers with one cache kept over all turns are those of a model that reads the same ids anew."
    model, template = model_for(words), ChatTemplate(CHATML)
    with unchecked():
        chat, ids = Conversation(model, words, template, sampler=GREEDY, max_new_tokens=9), []
        for question in 'the cat', 'and the dog?', 'who':
            before = list(chat._kept.ids) if chat._kept else []
            said = ''.join(chat.say(question))
            ids = chat._read[2]
            prompt = ids[: len(ids) - 9]
            fresh, = generate(model, [prompt], 9, GREEDY, end_tokens=template.end_tokens(words))
            assert ids[len(prompt):] == fresh and said == words.decode(fresh)
            assert prompt[: len(before)] == before                     # what was read before is not read again
    assert [m['role'] for m in chat.messages] == ['user', 'assistant'] * 3


def test_the_cache_is_begun_anew_where_the_beginning_has_changed(words):
    model = model_for(words)
    with unchecked():
        chat = Conversation(model, words, ChatTemplate(CHATML), sampler=GREEDY, max_new_tokens=5)
        ''.join(chat.say('the cat'))
        chat.messages[0]['content'] = 'the bird'
        ''.join(chat.say('and'))
        told = chat.messages[-1]['content']
        again = Conversation(model, words, ChatTemplate(CHATML), sampler=GREEDY, max_new_tokens=5)
        again.messages = chat.messages[:2]
        assert told == ''.join(again.say('and'))


def test_a_conversation_that_is_reset_is_a_new_one(words):
    def first(chat): return ''.join(chat.say('who'))
    chat, new = (Conversation(model_for(words), words, ChatTemplate(CHATML), system=system, sampler=GREEDY, max_new_tokens=5) for system in (None, 'the'))
    with unchecked():
        ''.join(chat.say('the cat'))
        chat.reset('the')
        assert chat.messages == new.messages == [{'role': 'system', 'content': 'the'}]
        assert first(chat) == first(new)
        chat.reset()
    assert chat.messages == [] and not chat.truncated


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(words):
    chat = Conversation(model_for(words), words, ChatTemplate(CHATML), max_new_tokens=20)
    with unchecked():
        answer = chat.say('the cat')
        first = next(answer)
        answer.close()
        assert chat.messages[1:] == [{'role': 'assistant', 'content': first}]
        model, chat.model = chat.model, None
        with pytest.raises(AttributeError): ''.join(chat.say('and'))   # whatever goes wrong before the first token
        assert len(chat.messages) == 2
        chat.model = model
        ''.join(chat.say('and'))
    assert len(chat.messages) == 4


def test_the_oldest_turns_are_dropped_and_the_system_prompt_stays(words):
    chat = Conversation(model_for(words, 64), words, ChatTemplate(CHATML), system='the', max_new_tokens=8)
    with unchecked():
        dropped = 0
        for i in range(6):
            ''.join(chat.say(f'the cat {i}'))
            dropped += chat.dropped
            assert len(chat._read[2]) <= 64 and chat.messages[0] == {'role': 'system', 'content': 'the'} and chat.messages[-2]['content'] == f'the cat {i}'
        assert dropped and len(chat.messages) == 1 + 2 * (6 - dropped)
        before = list(chat.messages)
        with pytest.raises(ValueError, match='the context holds 64'): ''.join(chat.say('x' * 99))
        assert chat.messages == before


# The command ------------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, '-m', 'llm_from_scratch.cli', 'chat']
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'COLUMNS': '80'}


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    "A command in this process: output, errors and exit status."
    monkeypatch.chdir(tmp_path)

    def run(*words, given=''):
        with monkeypatch.context() as m, unchecked():
            m.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(given.encode()), encoding='utf-8'))
            status = cli.main([*map(str, words)])
        return (*capfd.readouterr(), status)
    return run


def test_a_pipe_is_a_conversation(call, tiny, tmp_path):
    lines = 'the cat\n\n  and?  \n/save talk.json\n/reset\nwho\n/load talk.json\n/save again.json\n'
    out, err, status = call('chat', '--model', tiny, '--max-new-tokens', 6, '--system', 'the', given=lines)
    saved = json.loads((tmp_path/'talk.json').read_text(encoding='utf-8'))['messages']
    assert status == 0 and [(m['role'], m['content']) for m in saved if m['role'] != 'assistant'] == [('system', 'the'), ('user', 'the cat'), ('user', 'and?')]
    answers = [m['content'] for m in saved if m['role'] == 'assistant']
    assert out.startswith(f'{answers[0]}\n{answers[1]}\n') and 'llmfs: 5 messages are in talk.json\n' in err and '--max-new-tokens' in err
    assert (tmp_path/'again.json').read_bytes() == (tmp_path/'talk.json').read_bytes()


def test_the_same_seed_says_the_same_and_flags_reach_the_sampler(call, tiny):
    one, two, other = (call('chat', '--model', tiny, '--max-new-tokens', 9, '--seed', seed, '--temperature', 1, given='the cat\n')[0] for seed in (1, 1, 2))
    assert one == two != other
    assert call('chat', '--model', tiny, '--temperature', -1)[1:] == ('llmfs: temperature must be a number that is 0 or at least 0.001, got -1.0\n', 2)


@pytest.mark.parametrize('given, said', [
    ('/nothing\n', '/quit'), ('/help\n', '/save FILE'), ('/save\n', '/save FILE'), ('/save nowhere/x.json\n', 'no such file or directory'), ('/load none.json\n', 'no such file or directory'), ('x' * 5000 + '\n', 'the context holds 4096')])
def test_an_order_that_cannot_be_done_says_so_and_the_chat_goes_on(call, tiny, given, said):
    out, err, status = call('chat', '--model', tiny, '--max-new-tokens', 3, given=f'{given}the\n/quit\nnever\n')
    assert status == 0 and said in err and out.count('\n') == 1


def test_what_is_no_saved_chat_is_named(call, tiny, tmp_path):
    for text in '{"messages": [{"role": 1}]}', '[]', 'no', '{}':
        (tmp_path/'bad.json').write_text(text)
        assert 'bad.json is not a saved chat: ' in call('chat', '--model', tiny, given='/load bad.json\n')[1]


@pytest.mark.parametrize('words, said, status', [
    (['--model', 'storyland'], 'storyland has no chat template: it has seen no conversations', 1),
    (['--model', 'nowhere'], "there is no model 'nowhere': expected a folder, or one of storyland, storyland-chat, smollm2, smollm2-bf16, gpt2, stories260k", 1),
    (['--model', 'gpt2'], 'the weights of gpt2 are not here: llmfs pull gpt2 gets them; storyland and storyland-chat come with the library', 1),
    ([], 'the weights of smollm2 are not here: llmfs pull smollm2 gets them; storyland and storyland-chat come with the library', 1)])
def test_without_a_model_to_talk_to_one_sentence(call, monkeypatch, tmp_path, words, said, status):
    monkeypatch.setenv('LLM_FROM_SCRATCH_CACHE', str(tmp_path/'empty'))
    assert call('chat', *words, given='Hi!\n') == ('', f'llmfs: {said}\n', status)


def test_pull_lists_and_refuses(call, monkeypatch, tmp_path):
    monkeypatch.setenv('LLM_FROM_SCRATCH_CACHE', str(tmp_path/'empty'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    out, err, status = call('pull')
    assert (err, status) == ('', 0) and 'smollm2          98 MB  Apache-2.0  -     SmolLM2' in out and max(map(len, out.splitlines())) <= 80
    rows = [json.loads(line) for line in call('pull', '--json')[0].splitlines()]
    assert [r['here'] for r in rows] == [False] * 4 and rows[0]['bytes'] == 98_362_432
    assert call('pull', 'smollm3') == ('', "llmfs: there is no model 'smollm3' to pull: expected one of smollm2, smollm2-bf16, gpt2, stories260k\n", 2)
    assert call('pull', 'gpt2') == ('', 'llmfs: cannot get gpt2: the hub is switched off by HF_HUB_OFFLINE; no package carries it; the model storyland comes with the library (--model storyland)\n', 1)


@pytest.mark.skipif(os.name != 'posix', reason='needs signals and terminals as POSIX has them')
def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(tiny):
    import pty
    mine, theirs_ = pty.openpty()
    child = subprocess.Popen([*COMMAND, '--model', str(tiny), '--max-new-tokens', '3500'], stdin=theirs_, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    def say(text): os.write(mine, text.encode())
    try:
        say('the cat\n')
        seen = b''
        while len(seen) < 9: seen += os.read(child.stdout.fileno(), 4096)          # the prompt, and the answer has begun
        child.send_signal(signal.SIGINT)
        said = b''
        while b'stopped' not in said and b'/quit' not in said: said += os.read(child.stderr.fileno(), 4096)
        assert b'stopped' in said, 'the answer had ended before Ctrl-C came'
        say('/system the\n'); say('/save /dev/stderr\n')
        while b'messages are in' not in said: said += os.read(child.stderr.fileno(), 4096)
        say('\x04')
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0
        assert b'"role": "assistant"' in said + err and b'"role": "system"' in said + err
    finally:
        child.kill(); child.wait()
        os.close(mine); os.close(theirs_)


def test_whoever_stops_reading_ends_the_chat(tiny):
    child = subprocess.Popen([*COMMAND, '--model', str(tiny), '--max-new-tokens', '150'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    child.stdin.write(b'the cat\n' * 9); child.stdin.flush()
    child.stdout.read(1); child.stdout.close()
    child.stdin.close()
    assert child.wait(60) in (141, 0) and b'Traceback' not in child.stderr.read()


@pytest.mark.long(30)
def test_a_real_assistant_knows_the_capital_of_france(smollm2):
    "As a user types it, in a process of its own."
    done = subprocess.run([*COMMAND, '--model', 'smollm2', '--max-new-tokens', '12'], input=b'What is the capital of France?\n', capture_output=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert b'Paris' in done.stdout


def test_the_real_template_is_equal_and_prefix_stable(smollm2):
    template, pieces = load_chat_template('smollm2'), load_tokenizer('smollm2')
    talk = [{'role': 'user', 'content': 'Hi!'}, {'role': 'assistant', 'content': ' Hello. '}, {'role': 'user', 'content': '1,234 <|im_end|> cats'}]
    if pytest.importorskip('transformers'): assert template.render(talk) == theirs(template.source, talk, False, None)
    rows = [template.encode(pieces, talk[:n], add_generation_prompt=False) for n in (1, 2, 3)]
    assert all(b[: len(a)] == a for a, b in zip(rows, rows[1:])) and rows[-1].count(2) == 4 and template.end_tokens(pieces) == (2,)
