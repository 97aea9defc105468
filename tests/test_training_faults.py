"What can happen to a run: a kill at any moment, a damaged checkpoint, a full disk, no number, a spike, Ctrl-C."
import errno, json, logging, os, random, shutil, signal, subprocess, sys, tempfile
from pathlib import Path

import pytest
import torch
from killed_training import SAVING
from shapes import unchecked
from test_training import make, same_model

from llm_from_scratch import files, training
from llm_from_scratch.training import DamagedCheckpoint, append_line, checkpoints, latest_checkpoint, load_checkpoint, read_log, save_checkpoint

INPUTS = ['imports:tests/killed_training.py']
HERE = Path(__file__).parent
pytestmark = [pytest.mark.filterwarnings('ignore::DeprecationWarning'), pytest.mark.usefixtures('one_thread'), pytest.mark.portable]


@pytest.fixture(autouse=True)
def shapes_were_checked():
    "By test_training.py, of the same runs where nothing goes wrong."
    with unchecked(): yield


# Killed -----------------------------------------------------------------------------------------------------------

def kill(folder, points, seed):
    "Have runs killed at random points and resumed; what the killer reports. In memory where possible: a kill does not empty the disk's cache."
    if os.access('/dev/shm', os.W_OK): folder = tempfile.mkdtemp(dir='/dev/shm', prefix=folder.name)
    env = os.environ | {'PYTHONPATH': str(HERE.parent), 'OMP_NUM_THREADS': '1'}
    try: done = subprocess.run([sys.executable, HERE/'killed_training.py', folder, str(points), str(seed)], capture_output=True, text=True, env=env, encoding='utf-8')
    finally: shutil.rmtree(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='runs are forked, to be killed by the dozen')
def test_killed_at_11_points_a_run_ends_as_if_nothing_had_happened(tmp_path):
    found = kill(tmp_path, 11, 0)
    assert found['deaths'] >= 11 and found['resumed'] >= 5 and set(SAVING) < set(found['where']), found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='runs are forked, to be killed by the dozen')
def test_killed_at_a_thousand_random_points(tmp_path):
    found = kill(tmp_path, 1000, 1)
    assert found['deaths'] >= 1000 and set(SAVING) <= set(found['where']) and len(found['where']) >= 50, found


@pytest.mark.parametrize('name', ['_write_state', 'sync_folder', '_thin', '_discard'])
def test_an_error_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, name):
    save_checkpoint(tmp_path, 1, {'model': {'w': torch.ones(3)}}, keep=1)
    def fail(*args): raise KeyboardInterrupt
    monkeypatch.setattr(training, name, fail)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(tmp_path, 2, {'model': {'w': torch.zeros(3)}}, keep=1)
    assert load_checkpoint(tmp_path).step in (1, 2) and not list(tmp_path.glob('.step*'))


def test_checkpoints_that_a_kill_kept_go_when_the_run_is_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(training, '_thin', lambda *args: None)
        make(tmp_path, steps=6, save_every=2, keep=1).fit()
    (tmp_path/'.step-00000004.0123abcd.tmp').mkdir()               # one that was on its way out
    make(tmp_path, steps=6, save_every=2, keep=1).resume()
    assert [p.name for p in tmp_path.glob('*step-*')] == ['step-00000006']


def test_what_a_kill_left_is_never_taken_for_a_checkpoint_and_is_swept(tmp_path):
    half = tmp_path/'.step-00000009.0123abcd.tmp'
    half.mkdir(); (half/'model.safetensors').write_bytes(b'half')
    assert checkpoints(tmp_path) == [] and latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 3, {'model': {}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000003']


# Damaged ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    "A finished run of 6 steps with checkpoints after 2, 4 and 6."
    made = make(tmp_path, steps=6, save_every=2)
    made.fit()
    return made


def test_every_flipped_byte_is_noticed_and_named(run, tmp_path):
    last, draw = latest_checkpoint(tmp_path), random.Random(0)
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        places = {0, 8, len(whole) - 1} | {draw.randrange(len(whole)) for _ in range(15)}
        for at in places:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:])
            with pytest.raises(DamagedCheckpoint, match=rf'step-00000006 is damaged: {path.name}.*the one before is step-00000004: resume\(step=4\)'): load_checkpoint(last)
        path.write_bytes(whole)
    assert load_checkpoint(last).step == 6


def test_every_truncation_and_every_missing_file_is_named(run, tmp_path):
    last = latest_checkpoint(tmp_path)
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        for size in (0, 1, 8, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(DamagedCheckpoint, match=path.name): load_checkpoint(last)
        path.unlink()
        with pytest.raises(DamagedCheckpoint, match=f'{path.name} is missing'): load_checkpoint(last)
        path.write_bytes(whole)


def test_a_damaged_checkpoint_offers_the_one_before(run, tmp_path, caplog):
    (tmp_path/'step-00000006'/'model.safetensors').write_bytes(b'')
    again = make(tmp_path, steps=6, save_every=2)
    with pytest.raises(DamagedCheckpoint, match=r'resume\(step=4\)'): again.resume()
    assert again.resume(step=4) == 4
    again.fit()
    assert same_model(again, run)
    assert (tmp_path/'step-00000006').is_dir() and len(list(tmp_path.glob('aside-step-00000006-*'))) == 1


def test_damaged_checkpoints_are_skipped_where_that_is_asked_for(run, tmp_path):
    for step in 6, 4: (tmp_path/f'step-{step:08d}'/'state.json').write_text('{}')
    again = make(tmp_path, steps=6, save_every=2)
    assert again.resume(skip_damaged=True) == 2
    again.fit()
    assert same_model(again, run)
    for path in tmp_path.glob('step-*'): (path/'state.json').unlink()
    with pytest.raises(DamagedCheckpoint, match='there is none before it'): make(tmp_path, steps=6).resume(skip_damaged=True)


def test_a_log_with_a_torn_line_is_read_up_to_it(tmp_path):
    for step in 1, 2, 3: append_line(tmp_path/'log.jsonl', {'step': step})
    with open(tmp_path/'log.jsonl', 'a') as f: f.write('{"step": 4, "lo')
    assert [r['step'] for r in read_log(tmp_path/'log.jsonl')] == [1, 2, 3]
    assert [r['step'] for r in read_log(tmp_path/'log.jsonl', until=2)] == [1, 2]
    with open(tmp_path/'log.jsonl', 'a') as f: f.write('\n{"lost": 1}\n{"step": []}\n' + '[' * 100_000 + '\n')
    assert [r['step'] for r in read_log(tmp_path/'log.jsonl', until=4)] == [1, 2, 3]
    assert read_log(tmp_path/'none.jsonl') == []


# The disk ---------------------------------------------------------------------------------------------------------

def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    resource = pytest.importorskip('resource')
    made = make(tmp_path, steps=8, save_every=2)
    def fill(record):                              # from step 3 on no file may grow beyond 1,000 bytes
        if record['step'] == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    made.listeners.append(fill)
    try: result = made.fit()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.reason == 'save error' and 'cannot save' in str(result) and 'the last checkpoint is step-00000002' in str(result)
    assert result.step == 4 and load_checkpoint(tmp_path).step == 2 and not list(tmp_path.glob('.step*'))


class FullDisk:
    "A writer that has room for so many bytes."
    def __init__(self, room): self.room, self.put = room, training._put
    def __call__(self, file, crc, data, other):
        self.room -= len(data)
        if self.room < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.put(file, crc, data, other)


@pytest.mark.parametrize('room', [0, 100, 5_000])
def test_a_full_disk_is_survived_where_that_is_asked_for(tmp_path, monkeypatch, caplog, room):
    made = make(tmp_path, steps=8, save_every=2, on_save_error='skip')
    def fill(record):
        if record['step'] == 3: monkeypatch.setattr(training, '_put', FullDisk(room))
        if record['step'] == 7: monkeypatch.undo()
    made.listeners.append(fill)
    result = made.fit()
    assert result.reason == 'steps' and result.step == 8 and 'No space left' in caplog.text
    assert load_checkpoint(tmp_path).step == 8 and not (tmp_path/'step-00000004').exists()


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    def fail(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    made = make(tmp_path, steps=8)
    monkeypatch.setattr(training, 'append_line', fail)
    assert made.fit().reason == 'save error' and made.step == 1


# The folder of a run ----------------------------------------------------------------------------------------------

def test_a_fresh_run_is_refused_where_a_run_is_and_changes_nothing(run, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with pytest.raises(FileExistsError, match='holds a run already, with step-00000006: resume it'): make(tmp_path, steps=3).fit()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}


def test_a_run_without_a_checkpoint_is_begun_anew_with_a_fresh_log(tmp_path):
    for step in 1, 2, 3, 4: append_line(tmp_path/'log.jsonl', {'step': step})          # killed before it saved
    make(tmp_path, steps=3).fit()
    assert [r['step'] for r in read_log(tmp_path/'log.jsonl')] == [1, 2, 3]


def test_a_second_run_in_the_same_folder_is_refused_before_it_writes(tmp_path):
    with open(tmp_path/'.lock', 'ab') as other:                    # as another process would have it
        assert files._take(other)
        with pytest.raises(BlockingIOError, match='in use by another process'): make(tmp_path).fit()
    assert [path.name for path in tmp_path.iterdir()] == ['.lock'] and make(tmp_path, steps=1).fit().step == 1


# No number, spikes ------------------------------------------------------------------------------------------------

class Poison:
    "A model whose loss is multiplied at some calls."
    def __new__(cls, model, factors):
        forward, calls = model.forward, iter(range(1, 10**6))
        model.forward = lambda x, y: forward(x, y) * factors.get(next(calls) if model.training else 0, 1.0)
        return model


@pytest.mark.parametrize('poison', [float('nan'), float('inf')])
def test_no_number_ends_the_run_with_the_last_good_weights(tmp_path, poison):
    made = make(tmp_path/'a', steps=8, schedule='constant'); Poison(made.model, {5: poison})
    good = make(steps=4, schedule='constant'); good.fit()
    result = made.fit()
    assert result.reason == 'nan' and f'step 5: the loss is {poison}' in str(result) and same_model(made, good)
    saved = load_checkpoint(tmp_path/'a')
    assert saved.step == 5 and all(torch.equal(saved.tensors['model'][k], v) for k, v in good.model.state_dict().items())


def test_no_number_in_the_gradient_alone_is_named(tmp_path):
    made = make(steps=8)
    made.model.token_embedding.weight.register_hook(lambda g: g * float('inf') if made.step == 3 else g)
    result = made.fit()
    assert result.reason == 'nan' and 'step 4' in str(result) and 'token_embedding.weight' in str(result)


@pytest.mark.parametrize(('at', 'kept'), [(1, []), (4, [1, 2, 3])])
def test_ruined_weights_are_not_saved(tmp_path, caplog, at, kept):
    "An update that is too large shows only in the next loss."
    made = make(tmp_path, steps=9, save_every=1, keep=9, schedule='constant', validation=False)
    def ruin(record):
        if record['step'] == at: made.model.head.weight.data.mul_(float('inf'))
    made.callbacks.insert(0, type('Ruin', (training.Callback,), {'step': lambda self, trainer, record: ruin(record)})())
    result = made.fit()
    last = f'step-{kept[-1]:08d}' if kept else 'not there'
    assert result.reason == 'nan' and result.step == at + 1 and str(result).endswith(f'its weights give no finite loss and are not saved; the last checkpoint is {last}')
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == kept


def test_the_last_weights_of_a_run_are_judged_as_well(tmp_path):
    made = make(tmp_path, steps=3, validation=False)
    made.callbacks.insert(0, type('Ruin', (training.Callback,), {'step': lambda self, trainer, record: trainer.model.head.weight.data.fill_(float('nan'))})())
    assert made.fit().reason == 'nan' and not checkpoints(tmp_path)


def test_saving_disturbs_nothing(tmp_path):
    "The weights are tried on a batch before they are saved; a batch norm and the dropout must not notice."
    quiet, saving = make(steps=8), make(tmp_path, steps=8, save_every=1)
    for made in quiet, saving: made.model.norm.register_buffer('seen', torch.zeros(())); made.model.norm.register_forward_pre_hook(lambda norm, _: print(norm.seen.add_(norm.training), end=''))
    quiet.fit(), saving.fit()
    assert same_model(quiet, saving) and saving.model.norm.seen == 8


def test_where_no_target_counts_there_is_no_loss_and_a_sentence(tmp_path, caplog):
    made = make(tmp_path, steps=20, max_skips=3)
    for loader in made.train, made.validation:
        batch = loader.batch
        loader.batch = lambda step, batch=batch: (batch(step)[0], torch.full_like(batch(step)[1], -100))
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    result = made.fit()
    assert result.reason == 'nan' and 'step 3: no target of its batch counts' in str(result) and result.column('loss') == ([], [])
    assert [r['loss'] for r in read_log(tmp_path/'log.jsonl')] == [None] * 3 and all(torch.equal(before[k], v) for k, v in made.model.state_dict().items())
    empty = make(steps=2); empty.validation = made.validation
    result = empty.fit()
    assert result.best is None and result.column('validation') == ([], []) and 'no target of the validation data counts' in caplog.text


def test_skipping_leaves_out_the_step_and_goes_on(tmp_path):
    made = make(steps=8, on_nan='skip'); Poison(made.model, {3: float('nan'), 6: float('inf')})
    result = made.fit()
    assert result.reason == 'steps' and [r['step'] for r in result.history if r.get('event') == 'nan'] == [3, 6]
    assert all(p.isfinite().all() for p in made.model.parameters())


def test_too_many_skips_in_a_row_end_the_run():
    made = make(steps=30, on_nan='skip', max_skips=3); Poison(made.model, {2: float('nan'), **{i: float('nan') for i in range(5, 30)}})
    result = made.fit()
    assert result.reason == 'nan' and result.step == 7 and 'for 3 steps in a row' in str(result)


@pytest.mark.parametrize(('wish', 'reason', 'steps'), [('stop', 'spike', 25), ('skip', 'steps', 30), ('ignore', 'steps', 30)])
def test_a_spike_is_treated_as_configured(wish, reason, steps):
    made = make(steps=30, on_spike=wish); Poison(made.model, {25: 50.0})
    before = {}
    made.listeners.append(lambda r: before.update({k: v.clone() for k, v in made.model.state_dict().items()}) if r['step'] == 24 else None)
    after = {}
    made.listeners.append(lambda r: after.update({k: v.clone() for k, v in made.model.state_dict().items()}) if r['step'] == 25 else None)
    result = made.fit()
    assert (result.reason, result.step) == (reason, steps)
    assert (wish == 'ignore') != all(torch.equal(before[k], after[k]) for k in before)


# Ctrl-C -----------------------------------------------------------------------------------------------------------

HANGUP = [signal.SIGHUP] if hasattr(signal, 'SIGHUP') else []


@pytest.fixture
def signals():
    "Signals as they are for a person at a terminal, whatever the process that runs the tests does with them."
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, **{number: signal.SIG_DFL for number in HANGUP}}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items(): signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, *HANGUP])
def test_a_signal_ends_the_run_after_the_step_and_it_can_be_resumed(tmp_path, signals, number):
    whole = make(steps=8); whole.fit()
    made = make(tmp_path, steps=8)
    made.listeners.append(lambda r: r['step'] == 3 and signal.raise_signal(number))
    try: result, handler = made.fit(), signal.getsignal(number)
    except KeyboardInterrupt: pytest.fail('Ctrl-C ended the run at once')
    assert result.reason == 'interrupted' and result.step == 3 and signal.Signals(number).name in str(result)
    assert handler is signals[number]
    again = make(tmp_path, steps=8)
    assert again.resume() == 3
    again.fit()
    assert same_model(again, whole)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, *HANGUP])
def test_an_ignored_signal_stays_ignored(signals, number):
    "A job that a script starts in the background ignores Ctrl-C: it is meant for the script."
    signal.signal(number, signal.SIG_IGN)
    made, seen = make(steps=4), []
    made.listeners.append(lambda r: seen.append(signal.getsignal(number)) or signal.raise_signal(number))
    assert made.fit().reason == 'steps' and seen == [signal.SIG_IGN] * 4 and signal.getsignal(number) is signal.SIG_IGN


def test_a_second_ctrl_c_stops_at_once(signals):
    made = make(steps=8)
    def impatient(record):
        for _ in range(2): signal.raise_signal(signal.SIGINT)
    made.listeners.append(impatient)
    with pytest.raises(KeyboardInterrupt): made.fit()
    assert made.step == 1


def test_in_another_thread_signals_are_left_alone(signals):
    from threading import Thread
    made, results, seen = make(steps=2), [], []
    made.listeners.append(lambda r: seen.append(signal.getsignal(signal.SIGINT)))
    thread = Thread(target=lambda: results.append(made.fit())); thread.start(); thread.join()
    assert results[0].reason == 'steps' and seen == [signal.default_int_handler] * 2


# Another run ------------------------------------------------------------------------------------------------------

def test_other_data_or_another_model_is_refused_and_another_configuration_is_said(tmp_path, caplog):
    make(tmp_path, steps=2).fit()
    with pytest.raises(ValueError, match='another data: batch_size was 4 and is 6'): make(tmp_path, steps=2, batch_size=6).resume()
    with pytest.raises(ValueError, match='another data: seed was 0 and is 3$'): make(tmp_path, steps=2, seed=3).resume()
    with pytest.raises(ValueError, match='another model: d_model was 8 and is 16'): make(tmp_path, steps=2, d_model=16).resume()
    with caplog.at_level(logging.WARNING): assert make(tmp_path, steps=9, lr=.5).resume() == 2
    assert 'another lr: it was 0.01 and is 0.5' in caplog.text and 'another steps: it was 2 and is 9' in caplog.text


def test_other_data_of_the_same_length_are_named(tmp_path):
    make(tmp_path, steps=2).fit()
    other = make(tmp_path, steps=4)
    ids = other.train.ids.copy(); ids[[0, 1]] = ids[0] + 1, ids[1] + 1
    other.train.ids = ids
    with pytest.raises(ValueError, match="another data: the checksum of its ids was '[0-9a-f]{8}' and is '[0-9a-f]{8}'"): other.resume()


def test_a_token_file_is_known_by_its_header(tmp_path):
    from llm_from_scratch.data import TokenFile
    from llm_from_scratch.text import CharTokenizer
    about = []
    for name, text in (('a', 'abcabcabcabc'), ('b', 'abcabcabcacb')):
        file = TokenFile.from_texts(tmp_path/name, [text], CharTokenizer.train(['abc']))
        made = make(); made.train.source = file
        about.append(training._about(made)['data'])
    assert about[0]['ids'] != about[1]['ids'] and about[0]['tokenizer'] == about[1]['tokenizer'] == file.header.fingerprint.hex()


def test_another_optimizer_is_refused(tmp_path):
    make(tmp_path, steps=2).fit()
    with pytest.raises(ValueError, match="another optimizer: it was 'adamw' and is 'muon'"): make(tmp_path, steps=4, optimizer='muon').resume()


def test_a_parameter_that_is_frozen_now_is_named_before_the_first_step(tmp_path):
    make(tmp_path, steps=2).fit()
    other = make(); other.model.norm.weight.requires_grad_(False)
    again = training.Trainer(other.model, other.config, other.train, folder=tmp_path, world=other.world)
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['norm.weight'\]"): again.resume()


def test_what_an_earlier_version_wrote_of_the_data_is_understood(tmp_path):
    "It wrote a hash for the seed, no checksum, and not every setting of today."
    make(tmp_path, steps=2, seed=3).fit()
    path = latest_checkpoint(tmp_path)/'state.json'
    state = training._read_state(path)
    state['about']['data'] = {k: v for k, v in state['about']['data'].items() if k != 'ids'} | {'seed': int(make(seed=3).train.plan._seed[0])}
    del state['about']['config']['save_seconds']
    path.unlink(); training._write_state(path, state)
    assert make(tmp_path, steps=2, seed=3).resume() == 2
    with pytest.raises(ValueError, match='another data: seed'): make(tmp_path, steps=2, seed=4).resume()


@pytest.mark.parametrize(('more', 'said'), [({'steps': 20}, True), ({'steps': 20, 'lr': 1e-4}, True), ({'steps': 20, 'schedule': 'constant'}, True), ({'steps': 6}, False), ({'keep': 1}, False)])
def test_a_learning_rate_that_jumps_is_said(tmp_path, caplog, more, said):
    make(tmp_path, steps=6).fit()
    make(tmp_path, **{'steps': 6, **more}).resume()
    assert ('the learning rate goes on at' in caplog.text) == said
    if more == {'steps': 20}: assert 'goes on at 0.0079, where the run that was saved had come to 0.00067' in caplog.text, caplog.text


def test_an_interrupted_run_that_goes_on_says_nothing_of_its_learning_rate(tmp_path, caplog):
    made = make(tmp_path, steps=9, warmup=6); made.listeners.append(lambda r: r['step'] == 2 and made.stop('interrupted')); made.fit()
    assert make(tmp_path, steps=9, warmup=6).resume() == 2 and not caplog.text


def test_a_precision_that_is_asked_for_is_taken(tmp_path, caplog):
    make(tmp_path, steps=2).fit()
    again = make(tmp_path, steps=4, precision='bfloat16'); again.resume()
    assert again.precision.name == 'bfloat16' and "another precision: it was 'float32' and is 'bfloat16'" in caplog.text


def test_auto_stays_what_it_was(tmp_path, monkeypatch):
    for speed in 9, 0:
        monkeypatch.setattr(training, 'bfloat16_speed', lambda device: speed)
        made = make(tmp_path, steps=2, precision='auto')
        assert made.precision.name == ('bfloat16' if speed else 'float32')
        if speed: made.fit()
    made.resume()
    assert made.precision.name == 'bfloat16'


def test_nothing_to_resume_is_a_fresh_start_but_a_step_that_is_not_there_is_an_error(tmp_path):
    assert make(tmp_path).resume() == 0
    with pytest.raises(FileNotFoundError, match='no checkpoint of step 7'): make(tmp_path).resume(step=7)
    with pytest.raises(FileNotFoundError, match='no checkpoint in'): load_checkpoint(tmp_path)


def test_nothing_is_ever_unpickled(run, tmp_path):
    source = Path(training.__file__).read_text(encoding='utf-8')
    assert ' torch.load(' not in source and 'pickle' not in source and 'eval(' not in source.replace('.eval(', '')
    assert {p.suffix for folder in checkpoints(tmp_path) for p in folder.iterdir()} == {'.safetensors', '.json'}
