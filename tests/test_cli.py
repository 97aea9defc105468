"""The command `llmfs` as a user types it: help, pipes, errors in a sentence, exit statuses, a run that is interrupted."""
import io
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from shapes import unchecked

from llm_from_scratch import cli
from llm_from_scratch.data import BatchLoader, TokenFile
from llm_from_scratch.generation import Sampler, stream
from llm_from_scratch.gpt import GPT, GPTConfig, load_tokenizer
from llm_from_scratch.training import TrainConfig, Trainer, checkpoints, read_log

INPUTS = ['nbs/command.ipynb']
ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, '-m', 'llm_from_scratch.cli']
ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'COLUMNS': '80'}
for name in ('PYTHONIOENCODING', 'PYTHONUNBUFFERED'): ENVIRONMENT.pop(name, None)      # the command must flush what it says
TINY = '--optimizer adamw --preset nano --context-length 16 --d-model 16 --n-heads 2 --n-layers 1 --batch-size 4 --precision float32'.split()
WITHOUT_EXAMPLES = {'info'}
pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.portable]
posix = pytest.mark.skipif(os.name != 'posix', reason='needs signals and pipes as POSIX has them')


@pytest.fixture(autouse=True)
def signals():
    "Signals as they are for a person at a terminal, here and in processes started from here; a script's job in the background ignores them."
    usual = {getattr(signal, name): handler for name, handler in (('SIGINT', signal.default_int_handler), ('SIGTERM', signal.SIG_DFL), ('SIGHUP', signal.SIG_DFL)) if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items(): signal.signal(number, handler)


def typed(*words, given=b'', folder=None, **environment):
    "A command in a process of its own: what it wrote, as bytes, and its exit status."
    return subprocess.run([*COMMAND, *map(str, words)], input=given, cwd=folder, capture_output=True, env={**ENVIRONMENT, **environment}, timeout=600)


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    "A command in this process, which spares the imports: output, errors and exit status."
    monkeypatch.chdir(tmp_path)

    def run(*words, given=''):
        with monkeypatch.context() as m:
            m.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(given.encode()), encoding='utf-8'))
            status = cli.main([*map(str, words)])
        return (*capfd.readouterr(), status)
    return run


@pytest.fixture
def quick():
    "Without checks of types and shapes, for texts of many tokens; `test_a_story_comes_piece_by_piece` and `test_a_run_from_start_to_story` check them."
    with unchecked(): yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A folder of token files, and the tokenizer they were made with."
    folder = tmp_path_factory.mktemp('data')
    made = typed('tokenizer', 'train', '--kind', 'words', '--n', 300, '--out', 'words.json', folder=folder)
    assert (made.returncode, made.stderr) == (0, b'')
    made = typed('data', '--n', 200, '--tokenizer', 'words.json', '--out', 'data', '--json', folder=folder)
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert facts['train']['documents'] == 200 and facts['test']['documents'] == facts['validation']['documents'] == 11
    return folder/'data'


# Pages ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', cli.COMMANDS)
def test_every_command_has_a_page(call, name):
    out, err, status = call(*name.split(), '--help')
    assert (err, status) == ('', 0)
    assert out.startswith(f'usage: llmfs {name} ')
    assert (f'\nExamples:\n  llmfs {name}' in out) == (name not in WITHOUT_EXAMPLES)
    assert max(map(len, out.splitlines()[1:])) <= 80


def test_the_front_page_lists_every_command(call):
    out, err, status = call('--help')
    assert (err, status) == ('', 0) and call()[0] == out
    for name in cli.COMMANDS: assert re.search(rf'^  {name} +[A-Z].*\.$', out, re.M), name
    assert max(map(len, out.splitlines())) <= 80
    assert 'tokenizer decode' in call('tokenizer')[0] and 'generate' not in call('tokenizer', '--help')[0]


@pytest.mark.parametrize('command, kind, hidden', [('generate', Sampler, set()), ('train', TrainConfig, set()), ('train', GPTConfig, {'vocab_size', 'rope_scaling', 'layers', 'options'})])
def test_every_field_is_a_flag(call, command, kind, hidden):
    out = call(command, '--help')[0]
    shown = {f.name for f in fields(kind) if re.search(rf'--{f.name.replace("_", "-")}\b', out) or f'--no-{f.name.replace("_", "-")}' in out}
    assert shown == {f.name for f in fields(kind)} - hidden


def test_the_page_of_train_has_its_flags_in_parts(call):
    page = call('train', '--help')[0]
    assert re.findall(r'─ ([a-z]+) options? ─|─ (options) ─', page)[:4] == [('', 'options'), ('length', ''), ('learning', ''), ('evaluation', '')]
    assert page.index('--steps INT') < page.index('--batch-size INT') < page.index('--on-nan') < page.index('--betas') < page.index('--d-model')


def test_the_defaults_of_train_are_a_recipe():
    settings = cli._run_defaults([])['settings']
    assert settings == {'optimizer': 'muon', 'lr': .01, 'batch_size': 8, 'seconds': 120.0} and TrainConfig(**settings)
    for end in ('--steps', '9'), ('--tokens=9',), ('--seconds', '7'): assert 'seconds' not in cli._run_defaults(end)['settings']


def test_another_optimizer_has_its_own_defaults(tmp_path):
    assert cli._run_defaults(['--optimizer=adamw'])['settings'] == {'seconds': 120.0}
    (tmp_path/'c.json').write_text('{"optimizer": "adamw", "steps": 3}', encoding='utf-8')
    assert cli._run_defaults(['--config', str(tmp_path/'c.json')])['settings'] == {'optimizer': 'adamw', 'steps': 3}
    (tmp_path/'c.json').write_text('{"batch_size": 3}', encoding='utf-8')
    assert cli._run_defaults(['--config', str(tmp_path/'c.json')])['settings'] == {'optimizer': 'muon', 'lr': .01, 'batch_size': 3, 'seconds': 120.0}


def test_version(call):
    from llm_from_scratch import __version__
    assert call('--version') == (f'llmfs {__version__}\n', '', 0)


@pytest.mark.parametrize('words', [['--help'], ['tokenizer', '--help'], ['tokenizer', 'encode', '--help'], ['tokenizer', 'encode', 'Once upon a time'],
                                   ['tokenizer', 'train', '--n', '20', '--kind', 'words', '--out', os.devnull]])
def test_no_torch_where_none_is_needed(words, tmp_path):
    code = ('import sys; from llm_from_scratch import cli; status = cli.main(sys.argv[1:]); '
            'sys.exit(3 if {"torch", "matplotlib", "IPython"} & {*sys.modules} else status)')
    words = [str(tmp_path/'out.json') if word == os.devnull else word for word in words]
    done = subprocess.run([sys.executable, '-c', code, *words], env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words, said, status', [
    (['generat'], "there is no command 'generat': did you mean generate?", 2),
    (['tokenizer', 'encod'], "there is no command 'encod': did you mean encode?", 2),
    (['xyzzy'], "there is no command 'xyzzy': expected tokenizer, data, train, finetune, runs, generate, serve, chat, pull, workbook, eval, info", 2),
    (['generate', '--temprature', '1'], 'unrecognized options: --temprature, 1; did you mean --temperature?', 2),
    (['generate', '--temperature', 'hot'], "--temperature cannot be 'hot'", 2),
    (['generate', '--top-k', 'x'], "--top-k cannot be 'x'", 2),
    (['generate', '--top-p', '1.5'], 'top_p must be a number in (0, 1] or None, got 1.5', 2),
    (['generate', '--device', 'tpu'], f"there is no device 'tpu' here, only {', '.join(['cpu', *cli._accelerators()])}", 2),
    (['eval', '--device', 'cuda:77'], f"there is no device 'cuda:77' here, only {', '.join(['cpu', *cli._accelerators()])}", 2),
    (['generate', '--overflow', 'burst'], "invalid choice 'burst' for argument '--overflow'. Expected one of ('slide', 'error')", 2),
    (['generate', '--prompt'], "missing value for argument '--prompt'. Expected 1 values", 2),
    (['tokenizer', 'decode', 'seven'], "token ids are whole numbers, got 'seven'", 2),
    (['tokenizer', 'decode', '100000'], 'id 100000 at position 0 is outside the vocabulary 0..447', 1),
    (['tokenizer', 'encode', 'Zorro'], "word 'Zorro' at position 0 is not in the vocabulary of 447", 1),
    (['tokenizer', 'encode', '--tokenizer', 'nowhere', 'a'], "there is no tokenizer 'nowhere': expected a file, a folder with tokenizer.json, or storyland, storyland-chat", 1),
    (['tokenizer', 'train', '--vocab-size', '9'], 'vocab_size=9 is too small: 256 bytes and 1 special tokens need 257', 1),
    (['tokenizer', 'train', '--kind', 'chars', '--vocab-size', '9'], 'characters are as many as the text has: no --vocab-size', 2),
    (['data', '--corpus', 'nowhere'], "there is no corpus or path 'nowhere'; known are storyland, pydoc, shakespeare, the-verdict, and any text file or folder of them", 1),
    (['train', '--data', 'nowhere', '--steps', '1'], 'nowhere has no train.tok: llmfs data --out nowhere makes it', 1),
    (['train', '--data', 'nowhere'], 'nowhere has no train.tok: llmfs data --out nowhere makes it', 1),
    (['train', '--steps', '1', '--lr', '0'], 'lr must be a number above 0, got 0.0', 2),
    (['train', '--steps', '1', '--optimizer', 'adam'], "invalid choice 'adam' for argument '--optimizer'. Expected one of ('adamw', 'muon')", 2),
    (['train', '--steps', '1', '--n-heads', '3'], 'd_model must be a multiple of n_heads unless d_head is given, got 128 and 3', 2),
    (['train', '--resume', '--out', 'nowhere'], f"there is no run to resume: {Path('nowhere', 'run.json')} does not exist", 1),
    (['generate', '--model', 'nowhere'], "there is no model 'nowhere': expected a folder, or one of storyland, storyland-chat, smollm2, smollm2-bf16, gpt2, stories260k", 1),
    (['data', '--n', '0'], '--n must be at least 1, got 0', 2),
    (['eval', '--model', 'nowhere'], "there is no model 'nowhere': expected a folder, or one of storyland, storyland-chat, smollm2, smollm2-bf16, gpt2, stories260k", 1),
])
def test_an_error_is_one_sentence(call, words, said, status):
    assert call(*words) == ('', f'llmfs: {said}\n', status)


def test_an_error_through_a_real_process():
    done = typed('tokenizer', 'encode', '--tokenizer', 'nowhere', 'a')
    assert (done.returncode, done.stdout, done.stderr.count(b'\n')) == (1, b'', 1) and done.stderr.startswith(b'llmfs: there is no tokenizer')
    assert typed('generat').returncode == 2


def test_debug_shows_where(call):
    out, err, status = call('tokenizer', 'decode', '100000', '--debug')
    assert (out, status) == ('', 1) and err.startswith('Traceback') and 'ValueError: id 100000' in err
    assert call('--debug', 'tokenizer', 'decode', 'x')[2] == 2


@pytest.mark.parametrize('words, debug, kept', [
    ('info --debug', True, ['info']), ('--debug info', True, ['info']), ('info --json --debug', True, ['info', '--json']), ('generate --prompt --debug', False, ['generate', '--prompt=--debug']),
    ('tokenizer encode --debug', False, ['tokenizer', 'encode', '--', '--debug']), ('tokenizer encode a --debug', True, ['tokenizer', 'encode', 'a']),
    ('tokenizer encode --debug -- --debug', True, ['tokenizer', 'encode', '--', '--debug'])])
def test_debug_may_be_a_text(words, debug, kept): assert cli._take_debug(words.split()) == (debug, kept)


def test_a_text_may_look_like_a_flag_or_like_nothing(call):
    for text in 'None', '--debug', '-1':
        assert f"'{text[0] if text[0] == '-' else text}' at position 0" in call('generate', '--prompt', text)[1]
    assert "'-' at position 0" in call('tokenizer', 'encode', '--debug')[1] and "'None'" in call('tokenizer', 'encode', 'None')[1]


def test_a_mistake_of_ours_is_a_sentence_too(call, monkeypatch):
    def broken(): raise KeyError('lost')
    monkeypatch.setitem(cli.COMMANDS, 'info', cli._Command(lambda: broken(), lambda words: {}))
    assert call('info') == ('', "llmfs: unexpected KeyError: 'lost'; --debug shows where\n", 1)


def test_a_folder_that_cannot_be_written(call, data, tmp_path):
    (tmp_path/'file').write_text('in the way')
    for words in (['tokenizer', 'train', '--n', 9, '--kind', 'words', '--out', tmp_path/'file'/'t.json'],
                  ['data', '--n', 9, '--out', tmp_path/'file'/'data'],
                  ['train', '--data', data, '--steps', 1, *TINY, '--out', tmp_path/'file'/'run']):
        out, err, status = call(*words)
        assert (out, status) == ('', 1) and re.fullmatch(r'llmfs: not a directory: .*file.*\n', err.splitlines(True)[-1]), err


def test_data_that_cannot_be_made_leaves_what_was_there(call, tmp_path):
    "A text too short for a validation part, and documents of another tokenizer: the old four files stay, and no folder is made."
    (tmp_path/'tiny.txt').write_text('ab')
    call('tokenizer', 'train', '--kind', 'chars', '--corpus', '-', '--out', 't.json', given='ab' * 99)
    assert call('data', '--corpus', 'tiny.txt', '--tokenizer', 't.json', '--out', 'new')[2] == 1 and not (tmp_path/'new').exists()
    assert call('data', '--n', 5)[2] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path/'data').iterdir()}
    assert sorted(before) == ['test.tok', 'tokenizer.json', 'train.tok', 'validation.tok']
    out, err, status = call('data', '--corpus', 'tiny.txt', '--tokenizer', 't.json', '--out', 'data')
    assert (out, status) == ('', 1) and 'too short to have a validation part' in err
    assert {path.name: path.read_bytes() for path in (tmp_path/'data').iterdir()} == before


@pytest.mark.parametrize('text, said', [('{"steps": 3, "batchsize": 4}', "a configuration has no field 'batchsize': did you mean 'batch_size'?"),
                                        ('{"steps": -3}', 'steps must be a whole number of at least 1 or None, got -3'),
                                        ('[3]', 'settings.json: expected a JSON object, got list'), ('{', 'settings.json: not JSON: ')])
def test_what_is_wrong_in_a_settings_file(call, tmp_path, text, said):
    (tmp_path/'settings.json').write_text(text, encoding='utf-8')
    out, err, status = call('train', '--config', 'settings.json')
    assert out == '' and said in err and 'settings.json' in err and err.count('\n') == 1 and status == (2 if 'steps' in text else 1)


# Tokenizers and pipes -------------------------------------------------------------------------------------------

TEXTS = ['Once upon a time', 'Zoë ate 3 crêpes — 東京, 🦜!', ' two  spaces ', '']


def test_pieces_of_words_keep_every_line(call, tmp_path):
    out, err, status = call('tokenizer', 'train', '--vocab-size', 300, '--corpus', '-', '--out', 'bpe.json', '--json', given='one two three\n' * 90)
    assert status == 0 and re.fullmatch(r'(.*merges.*\n)?', err)
    assert json.loads(out) == {'path': 'bpe.json', 'kind': 'bpe', 'vocab_size': json.loads(out)['vocab_size']}
    lines = ''.join(f'{text}\n' for text in TEXTS)
    ids = call('tokenizer', 'encode', '--tokenizer', 'bpe.json', given=lines)[0]
    assert ids.count('\n') == len(TEXTS) and call('tokenizer', 'decode', '--tokenizer', 'bpe.json', given=ids)[0] == lines
    lists = call('tokenizer', 'encode', '--tokenizer', 'bpe.json', '--json', given=lines)[0]
    assert [json.loads(line) for line in lists.splitlines()] == [[int(i) for i in line.split()] for line in ids.splitlines()]
    back = call('tokenizer', 'decode', '--tokenizer', 'bpe.json', '--json', given=lists)[0]
    assert [json.loads(line) for line in back.splitlines()] == TEXTS


@pytest.mark.parametrize('kind', ['words', 'chars'])
def test_other_kinds(call, kind):
    call('tokenizer', 'train', '--kind', kind, '--n', 30, '--out', 'made.json')
    ids = call('tokenizer', 'encode', '--tokenizer', 'made.json', 'Once upon a time')[0]
    assert call('tokenizer', 'decode', '--tokenizer', 'made.json', *ids.split())[0] == 'Once upon a time\n'
    assert len(ids.split()) == {'words': 4, 'chars': 16}[kind]


@pytest.mark.parametrize('environment', [{}, {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}])
def test_text_is_utf8_in_any_locale(tmp_path, environment):
    text = 'Zoë — 東京 🦜\n'.encode()
    made = typed('tokenizer', 'train', '--kind', 'chars', '--corpus', '-', '--out', 'chars.json', given=text * 30, folder=tmp_path, **environment)
    assert made.returncode == 0, made.stderr
    ids = typed('tokenizer', 'encode', '--tokenizer', 'chars.json', given=text, folder=tmp_path, **environment)
    back = typed('tokenizer', 'decode', '--tokenizer', 'chars.json', given=ids.stdout, folder=tmp_path, **environment)
    assert (back.stdout, back.stderr, back.returncode) == (text, b'', 0)
    ascii = typed('tokenizer', 'decode', '--tokenizer', 'chars.json', given=ids.stdout, folder=tmp_path, PYTHONIOENCODING='ascii')
    assert ascii.stdout == text.decode().encode('ascii', 'backslashreplace') and ascii.returncode == 0
    page = typed('tokenizer', 'train', '--help', PYTHONIOENCODING='ascii')
    assert page.returncode == 0 and page.stdout.isascii() and b'--vocab-size' in page.stdout


def test_bytes_that_are_no_text(tmp_path):
    done = typed('tokenizer', 'encode', given=b'Once upon a time\n\xff\n')
    assert done.stdout.count(b'\n') == 1 and done.stderr.startswith(b'llmfs: line 2 of standard input is not UTF-8') and done.returncode == 1
    done = typed('tokenizer', 'train', '--corpus', '-', given=b'\xff', folder=tmp_path)
    assert done.stderr == b'llmfs: standard input is not UTF-8 text: byte 0xff at 0\n' and done.returncode == 1


@posix
def test_lines_are_answered_as_they_come():
    "The first line comes back while the pipe is still open, and an interrupt ends it without a word."
    with subprocess.Popen([*COMMAND, 'tokenizer', 'encode'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        process.stdin.write(b'Once upon a time\n'); process.stdin.flush()
        assert select.select([process.stdout], [], [], 600)[0], 'nothing came in ten minutes'
        assert len(process.stdout.readline().split()) == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(600) == 130
        assert process.stderr.read() == b''


@posix
def test_a_closed_pipe_is_no_error(tmp_path):
    line = f'yes "Once upon a time" | {{ "{sys.executable}" -m llm_from_scratch.cli tokenizer encode; echo $? > status; }} 2> said | head -1'
    done = subprocess.run(['sh', '-c', line], cwd=tmp_path, capture_output=True, env=ENVIRONMENT, timeout=600)
    assert done.stdout.count(b'\n') == 1
    assert ((tmp_path/'said').read_text(), (tmp_path/'status').read_text()) == ('', '141\n')


@posix
@pytest.mark.parametrize('words', [['--help'], ['tokenizer', 'train', '--help'], ['tokenizer', 'encode', 'Once upon a time']])
def test_nobody_reads_at_all(words):
    with subprocess.Popen([*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        process.stdout.close()
        assert (process.wait(600), process.stderr.read()) == (141, b'')


CLOSED = '"$PY" -m llm_from_scratch.cli'


def shell(line, folder):
    done = subprocess.run(['sh', '-c', line.replace('llmfs', CLOSED)], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**ENVIRONMENT, 'PY': sys.executable}, timeout=600)
    return done.stdout, done.stderr, done.returncode


@posix
@pytest.mark.parametrize('line, out, err, status', [
    ('llmfs tokenizer encode Once >&-', '', 'llmfs: standard output is closed: there is nowhere to write to\n', 1), ('llmfs --version >&-', '', 'llmfs: standard output is closed: there is nowhere to write to\n', 1),
    ('llmfs tokenizer encode Once 2>&-', '110\n', '', 0), ('llmfs tokenizer encode Zorro 2>&-', '', '', 1), ('llmfs tokenizer encode Zorro >&- 2>&-', '', '', 1),
    ('llmfs tokenizer encode <&-', '', 'llmfs: there is nothing to read: give a text, or send one through a pipe\n', 2),
    ('llmfs tokenizer train --kind chars --n 5 --out t.json >&- 2>&- <&-; cat t.json | head -c 11', '{"format": ', '', 0),
    ('llmfs tokenizer encode Once > /dev/full', '', 'llmfs: no space left on device\n', 1)])
def test_a_closed_or_full_stream(tmp_path, line, out, err, status):
    if '/dev/full' in line and not os.path.exists('/dev/full'): pytest.skip('this system has no /dev/full')
    assert shell(line, tmp_path) == (out, err, status)


def test_a_note_that_nobody_hears_is_no_reason_to_stop(monkeypatch):
    heard = []
    class Broken(io.StringIO):
        def write(self, text): heard.append(text); raise BrokenPipeError
    monkeypatch.setattr('sys.stderr', Broken())
    cli._note('said')
    assert heard == ['llmfs: said\n']


def test_a_byte_order_mark_is_no_text(call):
    once = call('tokenizer', 'encode', given='Once upon\nOnce\n')
    assert call('tokenizer', 'encode', given='\ufeffOnce upon\nOnce\n') == once and once[1:] == ('', 0)
    assert 'ufeff' in call('tokenizer', 'encode', given='Once\n\ufeffOnce\n')[1]              # anywhere else it is one


def test_words_of_any_text_can_be_encoded_and_go_on_from_a_pipe(call, quick):
    text = 'First  line,\n\n\n\tthen another.\n' * 40
    assert call('tokenizer', 'train', '--kind', 'words', '--corpus', '-', '--out', 't.json', given=text)[2] == 0
    assert call('data', '--corpus', '-', '--tokenizer', 't.json', '--out', 'words', given=text)[2] == 0
    words = load_tokenizer('t.json')
    assert words.decode(words.encode(text)) == text and words.decode(words.encode('First Zorro')) == 'First<unk>'
    assert call('generate', '--max-new-tokens', 2, given='Once upon \n') == call('generate', '--max-new-tokens', 2, given='Once upon')
    assert '<unk>' not in load_tokenizer('storyland').special_tokens


# Generation -----------------------------------------------------------------------------------------------------

def test_a_story(call, quick):
    short = '--max-new-tokens', 25
    out, err, status = call('generate', '--prompt', 'Once upon a time', '--seed', 3, *short)
    assert (err, status) == ('', 0) and out.startswith('Once upon a time ') and out.endswith('\n') and len(out) > 60 and cli.END not in out
    tokenizer = load_tokenizer('storyland')
    end = tokenizer.special_tokens[cli.END]
    assert out == 'Once upon a time' + ''.join(stream(GPT.from_pretrained('storyland'), tokenizer, 'Once upon a time', 25, seed=3, start=[end], end_tokens=end)) + '\n'
    other = call('generate', '--prompt', 'Once upon a time', '--seed', 4, *short)[0]
    assert call('generate', '--prompt', 'Once upon a time', '--seed', 3, *short)[0] == out != other
    assert call('generate', '--model', 'storyland', '--seed', 3, *short, given='Once upon a time\n')[0] == out
    assert json.loads(call('generate', '--seed', 3, '--json', *short, given='Once upon a time')[0]) == {
        'prompt': 'Once upon a time', 'text': out.removeprefix('Once upon a time').removesuffix('\n'), 'seed': 3}


def test_a_text_ends_where_the_model_ends_it(call, quick):
    out = call('generate', '--prompt', 'Once upon a time there was a boy', '--temperature', 0, '--max-new-tokens', 300)[0]
    assert cli.END not in out and 30 < len(out.split()) < 200 and out.endswith(('.\n', '!\n'))


def test_how_words_are_chosen_can_be_said(call, quick):
    def said(*words): return call('generate', '--prompt', 'Once upon a time', '--max-new-tokens', 12, *words)[0]
    assert said('--temperature', 0) == said('--temperature', 0, '--seed', 9) == said('--top-k', 1, '--seed', 5)
    first = said('--temperature', 0).removeprefix('Once upon a time').split()[0]
    token = call('tokenizer', 'encode', f'Once upon a time {first}')[0].split()[-1]
    assert said('--temperature', 0, '--banned', token) != said('--temperature', 0) != said('--temperature', 0, '--logit-bias', token, -50)
    assert said('--pattern', ' there (was|lived) a (girl|boy)') in {f'Once upon a time there {verb} a {who}\n' for verb in ('was', 'lived') for who in ('girl', 'boy')}
    assert said('--temperature', 0, '--stop', first) == 'Once upon a time \n'
    assert call('generate', '--max-new-tokens', 0)[0] == '\n'


def test_the_context_may_run_over(call, quick, data):
    assert call('train', '--data', data, *TINY, '--steps', 1)[2] == 0                    # a context of 16
    options = '--model', 'run', '--prompt', 'Once upon a time', '--temperature', 0, '--max-new-tokens', 40
    end = load_tokenizer('run').special_tokens[cli.END]
    out, err, status = call('generate', *options, '--logit-bias', end, -1000)
    assert (err, status) == ('', 0) and len(load_tokenizer('run').encode(out.removesuffix('\n'))) == 4 + 40
    out, err, status = call('generate', *options, '--overflow', 'error')
    assert (out, status, err.count('\n')) == ('', 1, 1) and 'context of ' in err and 'the model has 16' in err


def test_a_story_comes_piece_by_piece(call, monkeypatch):
    pieces = []
    monkeypatch.setattr(cli, '_say', lambda *words, end='\n': pieces.append(' '.join(words) + end))
    call('generate', '--prompt', 'Once upon a time', '--max-new-tokens', 20, '--seed', 3)
    assert len(pieces) > 10 and pieces[0] == 'Once upon a time'


def test_a_result_that_is_no_number(call, quick, tmp_path):
    "A model with NaN: JSON that every reader takes, and an exit status that says so."
    model = GPT.from_pretrained('storyland')
    model.token_embedding.weight.data[5] = float('nan')
    model.save_pretrained(tmp_path/'bad')
    load_tokenizer('storyland').save(tmp_path/'bad'/'tokenizer.json')
    out, err, status = call('eval', '--model', 'bad', '--n', 3, '--json')
    def strict(word): raise ValueError(word)
    facts = json.loads(out, parse_constant=strict)
    assert facts['loss'] is None and facts['tokens'] > 100 and (err, status) == ('llmfs: the loss is nan: the weights of bad are damaged\n', 1)
    assert call('eval', '--model', 'bad', '--n', 3)[0::2] == ('', 1)


# A run ----------------------------------------------------------------------------------------------------------

def weights(run): return (run/'model.safetensors').read_bytes()


SLOWED = """
import sys, time
from llm_from_scratch import cli
from llm_from_scratch.training import Trainer
step, stop, asked = Trainer.train_step, Trainer.stop, []
def wait(self):
    while self.step == 5 and not asked: time.sleep(.01)
    return step(self)
def hear(self, *why, **how):
    asked.append(why)
    return stop(self, *why, **how)
Trainer.train_step, Trainer.stop = wait, hear
sys.exit(cli.main(sys.argv[1:]))
"""


@posix
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(data, tmp_path, call):
    "The process waits in its sixth step until the interrupt comes, however busy the machine is."
    words = ['train', '--data', data, *TINY, '--steps', 14, '--eval-every', 4, '--dropout', '0.1']
    with subprocess.Popen([sys.executable, '-c', SLOWED, *map(str, words), '--out', 'broken'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        while len(read_log(tmp_path/'broken'/'log.jsonl')) < 5 and process.poll() is None: time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and out == b''
    assert err.endswith(b'llmfs: ended by interrupted: step 6: interrupted by SIGINT; llmfs train --out broken --resume goes on\n') and b'Traceback' not in err
    assert checkpoints(tmp_path/'broken')[-1].name == 'step-00000006'
    out, err, status = call('train', '--out', 'broken', '--resume', '--json')
    assert status == 0, err
    result = json.loads(out)
    assert (result['reason'], result['steps'], result['model']) == ('steps', 14, 'broken')
    whole = call(*words, '--out', 'whole', '--json')
    assert json.loads(whole[0]) == {**result, 'model': 'whole'}
    assert weights(tmp_path/'broken') == weights(tmp_path/'whole')
    losses = [[record['loss'] for record in read_log(tmp_path/run/'log.jsonl')] for run in ('broken', 'whole')]
    assert losses[0] == losses[1] and len(losses[0]) == 14


def test_a_run_from_start_to_story(data, call, tmp_path, caplog):
    out, err, status = call('train', '--data', data, *TINY, '--steps', 6, '--save-every', 3)
    assert status == 0 and out.startswith('ended by steps: 6 steps, ') and out.endswith('; saved in run\n'), err
    assert re.fullmatch(r'llmfs: [\d,]+ parameters on \w+, [\d.]+ MB, \d+ s to go\n', err)
    assert {p.name for p in (tmp_path/'run').iterdir()} == {'config.json', 'model.safetensors', 'tokenizer.json', 'run.json', 'log.jsonl', '.lock', 'step-00000003', 'step-00000006'}
    assert call('generate', '--model', 'run', '--max-new-tokens', 5)[2] == 0
    facts = json.loads(call('eval', '--model', 'run', '--n', 12, '--json')[0])
    assert facts['documents'] == 12 and facts['loss_interval'][0] < facts['loss'] < facts['loss_interval'][1]
    again = call('train', '--data', data, *TINY, '--steps', 6)
    assert again == ('', 'llmfs: run holds a finished run: --resume goes on with it, --overwrite begins anew, another --out keeps it\n', 1)
    out, err, status = call('train', '--resume', '--steps', 7, '--keep', 1)
    assert status == 0 and '7 steps' in out and 'resumed with another keep: it was 3 and is 1' in caplog.text
    assert logging.lastResort.formatter.format(caplog.records[-1]) == f'llmfs: {caplog.records[-1].getMessage()}'
    out, err, status = call('train', '--resume', '--seed', 5)
    assert (out, status) == ('', 1) and 'made with another data: seed was' in err


def test_settings_come_from_flags_then_files_then_the_class(data, call, tmp_path):
    (tmp_path/'settings.json').write_text('{"batch_size": 3, "lr": 0.5, "betas": [0.8, 0.9], "eval_batches": 2}', encoding='utf-8')
    call('train', '--data', data, *TINY, '--config', 'settings.json', '--steps', 2, '--lr', 0.25)
    saved = json.loads((tmp_path/'run'/'run.json').read_text(encoding='utf-8'))
    assert saved['settings'] == json.loads(TrainConfig(steps=2, batch_size=4, lr=0.25, betas=(0.8, 0.9), eval_batches=2, precision='float32').to_json())
    assert (saved['shape']['d_model'], saved['shape']['context_length'], saved['shape']['norm']) == (16, 16, 'rmsnorm')
    call('train', '--data', data, '--preset', 'run/config.json', '--dropout', 0.25, '--steps', 1, '--out', 'other')
    config = GPTConfig.from_json((tmp_path/'other'/'config.json').read_text(encoding='utf-8'))
    assert (config.d_model, config.n_layers, config.dropout, config.vocab_size) == (16, 1, 0.25, saved['shape']['vocab_size'])


def test_the_seed_draws_the_first_weights(data, call, tmp_path):
    "After one step too small to be seen, the weights are what they started as."
    first = {}
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        assert call('train', '--data', data, *TINY, '--steps', 1, '--lr', 1e-9, '--seed', seed, '--out', name)[2] == 0
        first[name] = GPT.from_pretrained(tmp_path/name).token_embedding.weight.detach()
    assert first['a'].equal(first['b']) and (first['a'] - first['c']).abs().mean() > 1e-3


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step(data, call, monkeypatch, number, status):
    step = Trainer.train_step
    def asked(self):
        if self.step == 2: signal.raise_signal(number)
        return step(self)
    monkeypatch.setattr(Trainer, 'train_step', asked)
    before = signal.signal(number, signal.default_int_handler)            # also where these tests run with Ctrl-C ignored
    try: out, err, ended = call('train', '--data', data, *TINY, '--steps', 9)
    finally: signal.signal(number, before)
    assert (out, ended) == ('', status) and 'llmfs train --out run --resume goes on' in err
    assert [path.name for path in checkpoints('run')] == ['step-00000003']


def test_a_file_of_settings_changes_a_run_that_goes_on(data, call, tmp_path):
    assert call('train', '--data', data, *TINY, '--steps', 2)[2] == 0
    (tmp_path/'more.json').write_text('{"steps": 5}', encoding='utf-8')
    assert json.loads(call('train', '--resume', '--config', 'more.json', '--json')[0])['steps'] == 5


def test_held_out_batches_are_always_the_same_and_in_order(data, tmp_path, monkeypatch):
    from llm_from_scratch.training import ProcessGroup
    monkeypatch.chdir(tmp_path)
    made, _ = cli._trainer(TrainConfig(steps=1, batch_size=2), GPTConfig(1, 16, 16, 1, 2), data, tmp_path/'run', ProcessGroup())
    plain = BatchLoader(TokenFile.open(data/'validation.tok'), 16, 2, shuffle=False)
    for step in range(3): assert made.validation.batch(step)[0].equal(plain.batch(step)[0])
    assert not made.train.batch(0)[0].equal(BatchLoader(TokenFile.open(data/'train.tok'), 16, 2, shuffle=False).batch(0)[0])


def test_the_best_weights_are_saved(data, call, tmp_path):
    "A learning rate that ruins the model: the last weights are worse than the first evaluation's."
    out = call('train', '--data', data, *TINY, '--steps', 12, '--eval-every', 3, '--lr', 5, '--schedule', 'linear', '--warmup', 10, '--json')[0]
    best = json.loads(out)['best']
    assert best < 12
    from safetensors.torch import load_file
    saved, then = load_file(tmp_path/'run'/'model.safetensors'), load_file(tmp_path/'run'/f'step-{best:08d}'/'model.safetensors')
    assert all(saved[name].equal(tensor) for name, tensor in then.items())


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    "`floor` was the name of `min_lr_ratio`, in run.json and in files of settings."
    run = {'data': 'data', 'shape': {'vocab_size': 9, 'context_length': 4, 'd_model': 4, 'n_layers': 1, 'n_heads': 1}, 'settings': {'steps': 9, 'floor': .1, 'betas': [.9, .95]}}
    (tmp_path/'run.json').write_text(json.dumps(run), encoding='utf-8')
    (tmp_path/'settings.json').write_text('{"floor": 0.2}', encoding='utf-8')
    (tmp_path/'data').mkdir(); (tmp_path/'data'/'train.tok').touch()
    assert cli._run_defaults(['--resume', '--out', str(tmp_path)])['settings'] == {'steps': 9, 'min_lr_ratio': .1, 'betas': (.9, .95)}
    settings = cli._run_defaults(['--config', str(tmp_path/'settings.json')])['settings']
    assert settings['min_lr_ratio'] == .2 and 'floor' not in settings


# The life of a run's folder -------------------------------------------------------------------------------------

def contents(folder): return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def short(name='run', steps=4): return 'train', *TINY, '--save-every', 2, '--steps', steps, '--out', name


@pytest.fixture
def finished(data, call, tmp_path):
    "The folder of a run of 4 steps, with checkpoints after 2 and 4."
    assert call(*short(), '--data', data)[2] == 0
    return tmp_path/'run'


@pytest.mark.parametrize('words, said', [(['--n-layers', 5, '--steps', 6], 'another model: n_layers was 1 and is 5'), (['--optimizer', 'muon', '--steps', 6], "another optimizer: it was 'adamw' and is 'muon'"),
                                         (['--step', 3], 'there is no checkpoint of step 3 in run')])
def test_a_refused_resume_changes_nothing(finished, call, words, said):
    before = contents(finished)
    out, err, status = call('train', '--resume', *words)
    assert (out, status, err.count('\n')) == ('', 1, 1) and said in err and contents(finished) == before
    assert '6 steps' in call('train', '--resume', '--steps', 6)[0]


def test_a_second_process_stops_with_one_sentence(finished, call, data):
    from llm_from_scratch import files
    before = contents(finished)
    with open(finished/'.lock', 'ab') as other:                    # as another process would have it
        assert files._take(other)
        for words in (['--resume'], ['--overwrite', '--data', data], ['--data', data]):
            assert call('train', *words, '--steps', 9) == ('', 'llmfs: run is in use by another process\n', 1)
    assert contents(finished) == before


def test_the_folder_is_ours_from_the_first_write_to_the_last(data, call, tmp_path, monkeypatch):
    from llm_from_scratch import files
    writes, replace = [], os.replace
    def watched(a, b):
        if Path(b).parent == tmp_path/'run': writes.append(((os.getpid(), str(tmp_path/'run'/'.lock')) in files._HELD, Path(b).name))
        replace(a, b)
    monkeypatch.setattr(os, 'replace', watched)
    assert call(*short(tmp_path/'run'), '--data', data)[2] == 0
    assert {name for _, name in writes} == {'run.json', 'tokenizer.json', 'config.json', 'model.safetensors'} and all(held for held, _ in writes)


def test_a_model_is_not_overwritten_unasked(finished, call, data):
    GPT.from_pretrained(finished).save_pretrained('model')
    before = contents(Path('model'))
    assert call(*short('model'), '--data', data) == ('', 'llmfs: model holds a model: --overwrite begins anew, another --out keeps it\n', 1)
    assert 'it holds a model, and no checkpoint' in call('train', '--out', 'model', '--resume')[1] or 'run.json does not exist' in call('train', '--out', 'model', '--resume')[1]
    assert contents(Path('model')) == before
    assert call(*short('model'), '--data', data, '--overwrite')[2] == 0 and contents(Path('model')) != before


def test_overwriting_begins_anew_and_leaves_what_is_no_part_of_a_run(finished, call, data):
    (finished/'notes.txt').write_text('mine')
    assert call(*short(steps=3), '--data', data, '--overwrite')[2] == 0
    assert [r['step'] for r in read_log(finished/'log.jsonl')] == [1, 2, 3] and (finished/'notes.txt').exists() and checkpoints(finished)[-1].name == 'step-00000003'
    before = contents(finished)
    assert call(*short(), '--data', 'nowhere', '--overwrite')[2] == 1 and call(*short(), '--overwrite', '--resume')[2] == 2 and contents(finished) == before


def test_a_run_killed_before_its_first_checkpoint(data, call, tmp_path, monkeypatch):
    "Nothing to resume, and it says so; begun anew, its log begins at 1."
    def killed(self):
        if self.step == 2: raise KeyError('killed')
    with monkeypatch.context() as m:
        step = Trainer.train_step
        m.setattr(Trainer, 'train_step', lambda self: killed(self) or step(self))
        assert call('train', *TINY, '--steps', 4, '--data', data)[2] == 1
    assert [r['step'] for r in read_log('run/log.jsonl')] == [1, 2]
    before = contents(tmp_path/'run')
    assert call('train', '--resume') == ('', 'llmfs: nothing to resume: the run in run ended before its first checkpoint; without --resume, it begins anew\n', 1)
    assert contents(tmp_path/'run') == before
    assert call('train', *TINY, '--steps', 4, '--data', data)[2] == 0 and [r['step'] for r in read_log('run/log.jsonl')] == [1, 2, 3, 4]


def test_a_run_is_resumed_from_another_folder(finished, data, call, monkeypatch, tmp_path):
    "The data are found as seen from the run, wherever both have been moved to."
    import shutil
    shutil.copytree(data, tmp_path/'a'/'data'); shutil.move(finished, tmp_path/'a'/'run')
    run = json.loads((tmp_path/'a'/'run'/'run.json').read_text(encoding='utf-8'))
    monkeypatch.chdir(tmp_path/'a')
    assert call('train', '--resume', '--steps', 5, '--data', 'data')[2] == 0
    assert json.loads(Path('run/run.json').read_text(encoding='utf-8')) == {**run, 'data': '../data', 'settings': {**run['settings'], 'steps': 5}}
    shutil.move(tmp_path/'a', tmp_path/'b'); monkeypatch.chdir(tmp_path)
    assert call('train', '--resume', '--out', 'b/run', '--steps', 6)[2] == 0
    shutil.rmtree(tmp_path/'b'/'data')
    assert call('train', '--resume', '--out', 'b/run') == ('', f"llmfs: the data of {Path('b/run')} are not in {tmp_path/'b'/'run'/'..'/'data'}: --data says where they are now\n", 1)


def test_a_run_goes_on_from_an_earlier_step(finished, call):
    assert call('train', '--resume', '--step', 2, '--steps', 3)[0].startswith('ended by steps: 3 steps')
    assert [r['step'] for r in read_log('run/log.jsonl')] == [1, 2, 3] and [p.name for p in checkpoints('run')] == ['step-00000002', 'step-00000003']
    assert call('train', '--step', 2)[2] == 2


@posix
def test_a_closed_terminal_ends_a_run_with_the_status_of_its_signal(data, call, monkeypatch):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, 'train_step', lambda self: (self.step == 2 and signal.raise_signal(signal.SIGHUP), step(self))[1])
    assert call(*short(steps=9), '--data', data)[2] == 128 + signal.SIGHUP and checkpoints('run')[-1].name == 'step-00000003'


def test_ruined_weights_are_not_the_model(data, call, caplog):
    "A learning rate that ruins the weights in the third step: the model is that of the second."
    from llm_from_scratch.training import load_checkpoint
    step = Trainer.train_step
    def ruin(self):
        record = step(self)
        if self.step == 3: self.model.norm.weight.data.mul_(float('inf'))
        return record
    Trainer.train_step = ruin
    try: out, err, status = call('train', *TINY, '--save-every', 1, '--steps', 9, '--data', data)
    finally: Trainer.train_step = step
    assert status == 1 and 'run holds the last good state' in err
    saved = GPT.from_pretrained('run').state_dict()
    assert all(saved[k].equal(v) for k, v in load_checkpoint('run/step-00000002').tensors['model'].items()) and len(checkpoints('run')) == 2


def as_killed(run):
    "What is left of a run that was killed after its second step."
    import shutil
    saved = json.loads((run/'run.json').read_text(encoding='utf-8'))
    (run/'run.json').write_text(json.dumps(saved | {'ended': None}), encoding='utf-8')
    shutil.rmtree(run/'step-00000004')
    (run/'log.jsonl').write_text(''.join((run/'log.jsonl').read_text().splitlines(True)[:3]))


def test_runs_are_listed_with_what_to_type_next(finished, call, tmp_path):
    import shutil
    from llm_from_scratch import files
    for name in ('deep/er/killed', 'busy', 'begun'): shutil.copytree(finished, name)
    as_killed(tmp_path/'deep/er/killed'); as_killed(tmp_path/'begun'); shutil.rmtree('begun/step-00000002'); Path('begun/model.safetensors').unlink()
    with open('busy/.lock', 'ab') as other:
        files._take(other)
        out, err, status = call('runs')
        rows = [re.split('  +', line) for line in out.splitlines()]
        assert [row[:3] for row in rows] == [['begun', 'begun', 'step 3'], ['busy', 'running', 'step 4'], ['run', 'finished', 'step 4']]
    assert [row[4] for row in rows] == ['llmfs train --out begun …', 'tail -f busy/log.jsonl', 'llmfs generate --model run'] and re.fullmatch(r'loss \d\.\d{4}, validation \d\.\d{4}', rows[2][3])
    facts = json.loads(call('runs', 'deep', '--json')[0])
    assert facts == {**facts, 'run': str(Path('deep/er/killed')), 'state': 'interrupted', 'step': 3, 'validation': None, 'next': f"llmfs train --out {Path('deep/er/killed')} --resume"}
    assert call('runs', 'nowhere') == ('', 'llmfs: there is no run in nowhere\n', 0)


def test_a_run_that_was_killed_can_speak(finished, call, caplog):
    words = 'generate', '--max-new-tokens', 5, '--temperature', 0, '--prompt', 'Once upon a time'
    whole = call(*words, '--model', 'run')
    assert whole[1:] == ('', 0) and call(*words, '--model', 'run/step-00000004') == whole
    then = call(*words, '--model', 'run/step-00000002')
    assert then[1:] == ('', 0)
    as_killed(finished)
    for name in ('model.safetensors', 'config.json'): (finished/name).unlink()
    assert call(*words, '--model', 'run') == (then[0], 'llmfs: the run in run has not ended: this is its step-00000002\n', 0)
    facts = json.loads(call('eval', '--model', 'run', '--n', 3, '--json')[0])
    assert facts['documents'] == 3
    assert call('train', '--resume')[2] == 0 and call(*words, '--model', 'run') == whole


def test_what_cannot_speak_says_why(finished, call, data):
    as_killed(finished)
    call('tokenizer', 'train', '--kind', 'words', '--n', 30, '--out', 'run/tokenizer.json')
    assert 'is not the tokenizer of this run' in call('generate', '--model', 'run')[1] and call('generate', '--model', 'run/step-00000002')[2] == 1
    import shutil
    shutil.rmtree('run/step-00000002')
    assert call('generate', '--model', 'run') == ('', 'llmfs: the run in run has no checkpoint yet\n', 1)


def test_a_run_of_the_last_release_is_a_model_and_goes_on(finished, call):
    "It did not say that it had ended, and had no tokenizer before its end."
    saved = json.loads((finished/'run.json').read_text(encoding='utf-8'))
    del saved['ended'], saved['settings']['save_seconds']
    (finished/'run.json').write_text(json.dumps(saved), encoding='utf-8')
    assert call('generate', '--model', 'run', '--max-new-tokens', 3)[1:] == ('', 0) and 'finished' in call('runs')[0]
    assert call('train', '--resume', '--steps', 5)[2] == 0


def test_a_tokenizer_that_was_replaced_is_named(finished, call):
    call('tokenizer', 'train', '--kind', 'words', '--n', 30, '--out', 'run/tokenizer.json')
    out, err, status = call('generate', '--model', 'run')
    assert (out, status, err.count('\n')) == ('', 1, 1) and 'is not the tokenizer that this model was saved with' in err


def test_a_damaged_checkpoint_is_named_and_can_be_left_out(data, call, tmp_path):
    call('train', '--data', data, *TINY, '--steps', 6, '--save-every', 3)
    (tmp_path/'odd').mkdir()
    (tmp_path/'odd'/'run.json').write_text('{"data": "data"}', encoding='utf-8')
    described = f"llmfs: {Path('odd', 'run.json')} is not the description of a run: "
    assert call('train', '--resume', '--out', 'odd') == ('', f'{described}it has no settings, shape\n', 1)
    for wrong in '[]', '{', '{"data": 5, "shape": {}, "settings": []}', '{"data": "d", "shape": {}, "settings": {"steps": 5}}', '{"data": "d", "shape": {}, "settings": {"lr": "x"}}':
        (tmp_path/'odd'/'run.json').write_text(wrong, encoding='utf-8')
        out, err, status = call('train', '--resume', '--out', 'odd')
        assert (out, status, err.count('\n')) == ('', 1, 1) and err.startswith(described), err
    file = tmp_path/'run'/'step-00000006'/'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1])
    out, err, status = call('train', '--resume', '--steps', 8)
    assert (out, status) == ('', 1) and 'step-00000006 is damaged' in err and 'the one before is step-00000003: --step 3' in err and err.count('\n') == 1
    assert call('train', '--resume', '--steps', 8, '--skip-damaged')[2] == 0


def test_a_run_that_fails_says_so(data, call, caplog):
    out, err, status = call('train', '--data', data, *TINY, '--steps', 30, '--lr', 1e30, '--clip', 'None')
    assert (out, status) == ('', 1) and re.search(r'llmfs: the run ended early \(nan, see above\) at step \d+; run holds the last good state\n$', err)
    assert 'the weights stay as they were' in caplog.text


# Facts ----------------------------------------------------------------------------------------------------------

def test_eval_measures_what_it_says(call):
    "The loss in nats and the bits per byte are those of the same sum; the perplexity is the loss's."
    import math
    facts = json.loads(call('eval', '--n', 6, '--json')[0])
    assert facts['perplexity'] == pytest.approx(math.exp(facts['loss']))
    assert facts['bits_per_byte'] == pytest.approx(facts['loss'] * facts['tokens'] / facts['bytes'] / math.log(2))
    from llm_from_scratch.storyland import log_probability, stories
    texts, tokenizer = [story.text for story in stories(6, split='test')], load_tokenizer('storyland')
    assert facts['bytes'] == sum(len(text.encode()) for text in texts)
    assert facts['tokens'] == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    world = -sum(map(log_probability, texts)) / facts['tokens']
    assert facts['above_floor'] == pytest.approx(facts['loss'] - world) and facts['above_floor'] > 0
    small = json.loads(call('eval', '--n', 6, '--size', 'tiny', '--json')[0])                # another world has another floor
    texts = [story.text for story in stories(6, size='tiny', split='test')]
    assert small['above_floor'] == pytest.approx(small['loss'] + sum(log_probability(text, 'tiny') for text in texts) / small['tokens'])
    page = call('eval', '--n', 6)[0]
    assert re.search(rf"loss +{facts['loss']:.4f} +\[", page) and f"{facts['bytes']:,} bytes" in page


def test_eval_reads_any_text(call):
    from llm_from_scratch.storyland import stories
    text = max((story.text for story in stories(9)), key=len)
    out, err, status = call('eval', '--corpus', '-', '--split', 'train', '--json', given=f'{text}\n')
    assert (err, status) == ('', 0)
    facts = json.loads(out)
    assert (facts['documents'], facts['loss_interval']) == (1, None) and 'above_floor' not in facts
    assert 0.8 * len(text) < facts['bytes'] <= len(text)
    assert '[' not in call('eval', '--corpus', '-', '--split', 'train', given=text)[0]


def test_info_is_for_people_and_programs(call, monkeypatch, tmp_path):
    monkeypatch.setenv('LLM_FROM_SCRATCH_CACHE', str(tmp_path/'here'))
    facts = json.loads(call('info', '--json')[0])
    assert facts['machine']['cores'] == os.cpu_count() and facts['places']['downloads'] == str(tmp_path/'here')
    import torch
    assert facts['versions']['torch'] == torch.__version__ and Path(facts['places']['model storyland']).is_dir()
    assert facts['missing'].keys() <= {*cli._WANTED, *cli._PROGRAMS} and not facts['missing'].keys() & {'pooch', 'tokenizers'}
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    assert cli._missing()['pooch'] == "downloads: pip install 'llm-from-scratch[hub]'"
    monkeypatch.undo(); monkeypatch.setenv('LLM_FROM_SCRATCH_CACHE', str(tmp_path/'here'))
    page = call('info')[0]
    assert all(f'\n  {name} ' in page for rows in facts.values() for name in rows)
