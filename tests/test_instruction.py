"Chapter 22: what is masked is read and not learned, packing changes no loss, old tokens stay what they were, what cannot be trained is refused, answers are those of the world, and `trl` finds the same loss."
import json, random
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from small import LLAMA, model as small, randomized

from llm_from_scratch.bpe import BPETokenizer, load_tokenizer
from llm_from_scratch.chat import Conversation
from llm_from_scratch.data import IGNORE
from llm_from_scratch.generation import Sampler
from llm_from_scratch.gpt import GPT
from llm_from_scratch.instruction import (
    CHAT_TEMPLATE, CHAT_TOKENS, NOT_SAID, ConversationRows, add_tokens, cohen_kappa, encode_conversation, missing_words, pack_rows, read_conversations,
    save_assistant, story_chat, story_tasks)
from llm_from_scratch.pretrained import ChatTemplate, load_chat_template
from llm_from_scratch.storyland import questions, stories
from llm_from_scratch.text import CharTokenizer
from llm_from_scratch.training import TrainConfig, Trainer, lm_loss

pytestmark = pytest.mark.usefixtures('one_thread')
TEMPLATE = ChatTemplate(CHAT_TEMPLATE)
BYTES = BPETokenizer({bytes([i]): i for i in range(256)}, special_tokens={name: 256 + i for i, name in enumerate(('<|endoftext|>', *CHAT_TOKENS))})
TEXTS = st.text('ab <|>end/', min_size=1, max_size=12).filter(str.strip)
TALKS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def talk(*pairs): return [{'role': role, 'content': text} for pair in pairs for role, text in zip(('user', 'assistant'), pair)]


def learned(tokenizer, ids, trained):
    "What is trained, answer by answer."
    found, end = [[]], tokenizer.special_tokens['<|end|>']
    for i, on in zip(ids, trained):
        if on: found[-1].append(i)
        if on and i == end: found.append([])
    return [tokenizer.decode(answer) for answer in found[:-1]]


# The mask ---------------------------------------------------------------------------------------------------------

@settings(max_examples=30)
@given(pairs=TALKS)
def test_what_is_trained_are_the_answers_and_their_ends(pairs):
    ids, trained = encode_conversation(BYTES, TEMPLATE, talk(*pairs))
    assert learned(BYTES, ids, trained) == [f' {answer.strip()}<|end|>' for _, answer in pairs]
    assert ids == TEMPLATE.encode(BYTES, talk(*pairs), add_generation_prompt=False)
    assert sum(i == BYTES.special_tokens['<|end|>'] for i in ids) == 2 * len(pairs), 'a text became a special token'


@settings(max_examples=30)
@given(pairs=TALKS)
def test_before_each_answer_stands_what_the_model_gets_in_use(pairs):
    messages = talk(*pairs)
    ids, trained = encode_conversation(BYTES, TEMPLATE, messages)
    starts = [i for i, on in enumerate(trained) if on and not trained[i - 1]]
    assert [ids[:start] for start in starts] == [TEMPLATE.encode(BYTES, messages[:2 * i + 1]) for i in range(len(pairs))]


def test_a_template_that_changes_the_past_is_refused():
    source = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    with pytest.raises(ValueError, match='before message 1'): encode_conversation(BYTES, ChatTemplate(source), talk(('a', 'b'), ('c', 'd')))


@pytest.mark.parametrize('messages', [[{'role': 'user', 'content': 'a'}], [{'role': 'assistant', 'content': 'a'}]])
def test_without_an_answer_there_is_nothing_to_train(messages):
    with pytest.raises(ValueError, match='nothing to train on'): encode_conversation(BYTES, TEMPLATE, messages)


# Rows -------------------------------------------------------------------------------------------------------------

@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 20), max_size=40), room=st.integers(20, 60))
def test_rows_hold_everything_once_and_no_more_than_they_can(lengths, room):
    rows = pack_rows(lengths, room)
    assert sorted(i for row in rows for i in row) == [*range(len(lengths))]
    assert all(sum(lengths[i] for i in row) <= room for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // room) + 1


def some_conversations(n=7, seed=0):
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        k = rng.randint(2, 6)
        made.append(([rng.randrange(23) for _ in range(k)], [False] + [rng.random() < .5 for _ in range(k - 2)] + [True]))
    return made


@pytest.mark.parametrize('kind', [{}, LLAMA])
def test_packed_and_padded_rows_have_the_same_loss_and_gradients(kind):
    model, coded = randomized(small(**kind)).double(), some_conversations()
    padded = ConversationRows(coded, 12, 7, pack=False, shuffle=False)
    packed = ConversationRows(coded, 12, 3, shuffle=False)
    rows = len(packed.rows)
    packed = ConversationRows(coded, 12, rows, shuffle=False)
    found = []
    for batch in padded.batch(0), (*packed.batch(0), packed.segments(0)):
        model.zero_grad()
        loss = lm_loss(model, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    leaks = lm_loss(model, packed.batch(0)).detach()
    assert abs(leaks - found[0][0]) > 1e-6, 'without segments the conversations of a row must see each other'


def test_targets_are_shifted_by_one_and_no_border_is_crossed():
    loader = ConversationRows([([5, 6, 7], [False, False, True]), ([8, 9], [True, True])], 6, 1)
    x, y = loader.batch(0)
    assert x.tolist() == [[5, 6, 8, 0, 0, 0]] and y.tolist() == [[IGNORE, 7, 9, IGNORE, IGNORE, IGNORE]]
    assert loader.segments(0).tolist() == [[0, 0, 1, -1, -1, -1]]


def test_a_batch_is_a_function_of_seed_and_step_and_ranks_share_it():
    coded = some_conversations(20)
    def batch(step, **options): return ConversationRows(coded, 12, 4, **options).batch(step)[0].tolist()
    assert batch(3) == batch(3) != batch(3, seed=1)
    assert batch(2, rank=0, world_size=2) + batch(2, rank=1, world_size=2) == batch(2)


def test_masked_tokens_are_read_and_not_learned():
    model = randomized(small()).double()
    ids, trained = [3, 4, 5, 6], [False, False, False, True]
    x, y = ConversationRows([(ids, trained)], 8, 1).batch(0)
    other_input = x.clone()
    other_input[0, 0] = 9
    first = lm_loss(model, (x, y))
    assert abs(first - lm_loss(model, (other_input, y))) > 1e-6
    alone = torch.nn.functional.cross_entropy(model(x)[0, 2:3], torch.tensor([6]))
    torch.testing.assert_close(first, alone)


@pytest.mark.parametrize('coded, cut, said', [
    ([([1, 2, 3], [True, False, False])], False, 'conversation 0 has no token to train on'),
    ([([1, 2], [False, True]), ([1] * 9, [False] * 8 + [True])], False, 'conversation 1 has 9 tokens, more than a row of 4'),
    ([([1] * 9, [False] * 8 + [True])], True, 'conversation 0 has no token to train on'),
    ([], False, 'no conversations')])
def test_what_cannot_be_trained_is_refused(coded, cut, said):
    with pytest.raises(ValueError, match=said): ConversationRows(coded, 4, 1, cut=cut)


def test_what_is_cut_keeps_its_beginning():
    x, y = ConversationRows([([1, 2, 3, 4, 5, 6], [False, True] * 3)], 3, 1, cut=True).batch(0)
    assert x.tolist() == [[1, 2, 3]] and y.tolist() == [[2, IGNORE, 4]]


def test_a_trainer_learns_an_answer():
    model = small(**LLAMA)
    loader = ConversationRows([([1, 2, 3], [False, False, True]), ([1, 4, 5], [False, False, True])], 6, 1)
    losses = Trainer(model, TrainConfig(steps=40, batch_size=1, lr=0.02, document_mask=True, precision='float32'), loader).fit().column('loss')[1]
    assert losses[-1] < 0.2 < losses[0]
    assert model(torch.tensor([[1, 2]]))[0, -1].argmax() == 3


# The vocabulary ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tied', [True, False])
def test_old_tokens_stay_and_new_ones_begin_at_the_mean(tied):
    words = load_tokenizer('storyland')
    model = randomized(small(vocab_size=448, tie_embeddings=tied))
    old = deepcopy(model)
    larger = add_tokens(model, words, [' Where', ' the', ' Where', ' has'])
    assert larger.vocab_size == model.config.vocab_size == 448 + 2 + 4
    text = 'Once upon a time there was a girl called Mia.'
    assert words.encode(text) == larger.encode(text)
    end, moved = words.special_tokens['<|endoftext|>'], larger.special_tokens['<|endoftext|>']
    assert end != moved and larger.special_tokens.keys() == {'<|endoftext|>', *CHAT_TOKENS}
    a, b = old(torch.tensor([[end, *words.encode(text)[:8]]])), model(torch.tensor([[moved, *larger.encode(text)[:8]]]))
    torch.testing.assert_close(b[..., :447], a[..., :447])
    torch.testing.assert_close(b[..., moved], a[..., end])
    torch.testing.assert_close(b[..., 447], a.mean(-1), rtol=1e-4, atol=1e-4)


def test_byte_pairs_get_special_tokens_only_and_what_is_there_is_not_added_twice():
    model = randomized(small(vocab_size=300))
    before = model.token_embedding.weight.detach().clone()
    plain = BPETokenizer(BYTES.vocab, special_tokens={'<|endoftext|>': 256})
    larger = add_tokens(model, plain)
    assert larger.special_tokens == BYTES.special_tokens and model.config.vocab_size == 300
    torch.testing.assert_close(model.token_embedding.weight[:257], before[:257], rtol=0, atol=0)
    assert add_tokens(model, larger) == larger
    with pytest.raises(ValueError, match='special tokens alone'): add_tokens(model, plain, [' new'])
    with pytest.raises(TypeError, match='CharTokenizer'): add_tokens(model, CharTokenizer.train(['ab']))


# Files ------------------------------------------------------------------------------------------------------------

GOOD = {'messages': talk(('a', 'b'))}


@pytest.mark.parametrize('line, said', [
    ('{', 'line 2'), ('[1]', 'line 2'), ('{"text": "a"}', 'got the keys text'), ('{}', 'got the keys none'), (b'\xff', 'line 2'),
    (json.dumps({'messages': 'hello'}), 'a list of two messages'),
    (json.dumps({'messages': talk(('a', 'b'))[:1]}), 'a list of two messages'),
    (json.dumps({'messages': talk(('a', 'b'))[::-1]}), 'message 0 is no answer'),
    (json.dumps({'messages': talk(('a', 'b'), ('c', 'd'))[:3]}), 'the last message is of the user'),
    (json.dumps({'messages': talk(('a', ' '))}), 'message 1 is no answer'),
    (json.dumps({'messages': [{'role': 'pirate', 'content': 'a'}] * 2}), 'expected a role'),
    (json.dumps({'prompt': 'a', 'completion': None}), 'expected a role'),
    (json.dumps({'instruction': 'a', 'output': 3}), 'expected a role')])
def test_a_wrong_line_is_named(tmp_path, line, said):
    path = tmp_path/'talks.jsonl'
    path.write_bytes(json.dumps(GOOD).encode() + b'\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n')
    with pytest.raises(ValueError, match='talks.jsonl, line 2') as e: read_conversations(path)
    assert said in str(e.value)


def test_three_forms_are_read_and_an_empty_file_is_not(tmp_path):
    path = tmp_path/'talks.jsonl'
    forms = [{**GOOD, 'source': 'me'}, {'prompt': 'a', 'completion': 'b'}, {'instruction': 'a', 'input': '', 'output': 'b'}, {'instruction': 'a', 'input': 'more', 'output': 'b'}]
    path.write_text('\ufeff' + '\n\n'.join(map(json.dumps, forms)), encoding='utf-8')
    assert read_conversations(path) == [talk(('a', 'b'))] * 3 + [talk(('a\nmore', 'b'))]
    path.write_text('\n')
    with pytest.raises(ValueError, match='holds no conversation'): read_conversations(path)


def assistant(folder):
    "A small model of words with a template, and its folder."
    pairs = [('Where is Mia?', 'river'), ('Who has the ball?', 'nobody')]
    model, words = randomized(small(**LLAMA, vocab_size=448, context_length=64)), load_tokenizer('storyland')
    words = add_tokens(model, words, missing_words(words, TEMPLATE, [talk(*pairs)]))
    save_assistant(model, words, TEMPLATE, folder)
    return model, words, [talk(*pairs), talk(*pairs[1:])]


def test_a_saved_assistant_opens_and_answers(tmp_path):
    model, words, talks = assistant(tmp_path/'a')
    opened, table, template = GPT.from_pretrained(tmp_path/'a'), load_tokenizer(tmp_path/'a'), load_chat_template(tmp_path/'a')
    assert table == words and template.render(talks[0]) == TEMPLATE.render(talks[0])
    assert template.end_tokens(table) == (words.special_tokens['<|end|>'],)
    chat = Conversation(opened, table, template, sampler=Sampler(temperature=0), max_new_tokens=3)
    said = ''.join(chat.say('Where is Mia?'))
    again = Conversation(model, words, TEMPLATE, sampler=Sampler(temperature=0), max_new_tokens=3)
    assert said == ''.join(again.say('Where is Mia?'))


def test_a_template_without_an_end_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match='no special token'): save_assistant(small(), BYTES, ChatTemplate('{% for m in messages %}{{ m.content }}{% endfor %}'), tmp_path/'a')
    assert not (tmp_path/'a').exists()


# The world --------------------------------------------------------------------------------------------------------

def test_answers_are_those_of_the_world_and_refusals_are_of_what_it_does_not_say():
    coin = random.Random(0)
    for story in stories(25, seed=11):
        n = coin.randint(2, len(story.sentences))
        known = {task.question: task.answer for task in questions(story, n)}
        for task in story_tasks(story, n, coin):
            if task.kind in ('where', 'who', 'how many', 'why'): assert known[task.question] == task.answer
            if task.kind == 'refuse': assert task.question not in known and task.answer == NOT_SAID
            if task.kind == 'copy': assert task.answer in story.text
            if task.kind == 'rewrite': assert task.answer not in story.text
            if task.kind == 'count': assert len({*story.states[n - 1].people}) == 'no one two three four'.split().index(task.answer)


def test_a_conversation_takes_turns_and_a_seed_tells_it():
    for i, story in enumerate(stories(20, seed=12)):
        lesson = story_chat(story, random.Random(i))
        assert lesson == story_chat(story, random.Random(i))
        assert [m['role'] for m in lesson.messages] == ['user', 'assistant'] * len(lesson.kinds)


def test_the_assistant_that_ships_answers():
    from llm_from_scratch.bpe import model_folder
    if not model_folder('storyland-chat').is_dir(): pytest.skip('the assistant is not made yet')
    model, words, template = GPT.from_pretrained('storyland-chat'), load_tokenizer('storyland-chat'), load_chat_template('storyland-chat')
    assert template.source == CHAT_TEMPLATE
    right, asked, coin = 0, 0, random.Random(0)
    for story in stories(12, seed=13, split='test'):
        ids, trained = encode_conversation(words, template, story_chat(story, coin, 8).messages)
        with torch.no_grad(): said = model(torch.tensor([ids]))[0].argmax(-1).tolist()
        for start in (i for i, on in enumerate(trained) if on and not trained[i - 1]):
            asked, right = asked + 1, right + (said[start - 1] == ids[start])
    assert right > 0.6 * asked


# Others -----------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=12).filter(lambda p: len({x for pair in p for x in pair}) > 1))
def test_kappa_against_sklearn(pairs):
    metrics = pytest.importorskip('sklearn.metrics')
    one, other = map(list, zip(*pairs))
    np.testing.assert_allclose(cohen_kappa(one, other), metrics.cohen_kappa_score(one, other), atol=1e-12)


def test_kappa_needs_two_judges_and_two_verdicts():
    with pytest.raises(ValueError, match='got 1 and 2'): cohen_kappa([1], [1, 0])
    with pytest.raises(ValueError, match='0 / 0'): cohen_kappa([1, 1], [1, 1])


def test_against_trl(tmp_path, hf):
    trl, datasets = pytest.importorskip('trl'), pytest.importorskip('datasets')
    model, talks = randomized(small(**LLAMA, vocab_size=261, context_length=128)), [talk(('Where is Mia?', 'river'), ('Who?', 'nobody')), talk(('Why?', 'so'))]
    save_assistant(model, BYTES, TEMPLATE, tmp_path/'a')
    peer = hf.AutoModelForCausalLM.from_pretrained(tmp_path/'a').double()
    table = hf.AutoTokenizer.from_pretrained(tmp_path/'a')
    settings = trl.SFTConfig(output_dir=str(tmp_path/'out'), assistant_only_loss=True, per_device_train_batch_size=2, max_length=128, report_to=[], use_cpu=True,
                             bf16=False, disable_tqdm=True, dataloader_pin_memory=False)
    trainer = trl.SFTTrainer(peer, settings, train_dataset=datasets.Dataset.from_list([{'messages': t} for t in talks]), processing_class=table)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = peer.eval()(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], labels=batch['labels']).loss.detach()
    coded, ours = [encode_conversation(BYTES, TEMPLATE, t) for t in talks], []
    assert sorted((batch['labels'] != IGNORE).sum(1).tolist()) == sorted(sum(trained) for _, trained in coded)
    for pack, rows in (False, 2), (True, 1):
        loader = ConversationRows(coded, 128, rows, pack=pack)
        ours.append(lm_loss(model.double(), (*loader.batch(0), loader.segments(0))).detach())
    torch.testing.assert_close(ours, [theirs.double()] * 2, rtol=1e-6, atol=1e-6)            # theirs computes it in float32
