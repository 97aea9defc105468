"""The front page and the notation: the recorded story, the times of the reading paths, what the search knows of terms, the letters of shapes."""
import re
from pathlib import Path

import pytest

import letters
import paths
import story
import terms

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ['index.qmd', 'nbs/notation.qmd', 'nbs/glossary.qmd', 'nbs/results/storyland_small.json', 'llm_from_scratch/models/storyland/*']
PAGE = (ROOT/'index.qmd').read_text(encoding='utf-8')


# The story --------------------------------------------------------------------------------------------------------

def test_the_model_writes_the_story_of_the_front_page():
    "And none of its draws was close: another processor, which rounds otherwise, writes the same."
    assert story.fault(PAGE) is None


@pytest.fixture
def known(monkeypatch):
    "The story of the page, as if the model had just written it; another for another seed."
    page = story.PLACE.search(PAGE)
    seed = int(re.search(r'--seed (\d+)', page['note'])[1])
    monkeypatch.setattr(story, 'written', lambda s: (page['text'].replace('*', '') if s == seed else 'Once upon a time.', 0.01))
    assert story.fault(PAGE) is None


@pytest.mark.parametrize('old, new, words', [
    (r'(?<=a time\*\* )', 'not ', 'writes other words'), (r'called (\w+)', r'named \1', 'writes other words'), (r'--seed (\d+)', r'--seed 1\1', 'writes other words'),
    (r'in \w+ minutes', 'in no minutes', 'another'), (r'--seed \d+', '', 'no story with a seed')])
def test_a_story_that_was_not_written_is_found(known, old, new, words):
    place = story.PLACE.search(PAGE)
    changed = re.sub(old, new, place[0], count=1)
    assert changed != place[0] and words in story.fault(PAGE.replace(place[0], changed))


def test_a_draw_that_was_close_is_found(known, monkeypatch):
    monkeypatch.setattr(story, 'MARGIN', 1.0)
    assert 'too close' in story.fault(PAGE)


# Reading paths ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('minutes, said', [(7, '7 minutes'), (44, '45 minutes'), (89, '90 minutes'), (90, '1½ hours'), (104, '1½ hours'), (106, '2 hours'), (135, '2½ hours'), (655, '11 hours')])
def test_times_are_said_without_false_precision(minutes, said): assert paths.hours(minutes) == said


@pytest.mark.parametrize('box', ['<div class="path">{}</div>', '<section id="new" class="level3 path unnumbered"><h3>New</h3>{}</section>'])
def test_a_path_says_how_long_its_chapters_take(tmp_path, box):
    (tmp_path/'nbs').mkdir()
    for name, words in (('a', 4000), ('b', 16400)): (tmp_path/'nbs'/f'{name}.ipynb').write_text('{"cells": [{"cell_type": "markdown", "source": "%s"}]}' % ('word ' * words), encoding='utf-8')
    steps = ''.join(f'<li><a href="nbs/{name}.html">{name}</a></li>\n' for name in 'abc')
    text = paths.add_times(box.format(f'<ol>{steps}</ol>'), tmp_path)
    assert re.findall(r'data-minutes="(\d+)"><a href="nbs/(\w)', text) == [('20', 'a'), ('82', 'b')] and '<li><a href="nbs/c' in text
    assert re.findall(r'"minutes">(.*?)<', text) == ['20 min', '82 min'] and 'About <span class="hours">1½ hours</span>' in text
    assert paths.add_times(text, tmp_path) == text


def test_every_path_leads_through_pages_of_the_book():
    listed = (ROOT/'_quarto.yml').read_text(encoding='utf-8')
    found = [re.findall(r'^1\. \[.+\]\((.+)\)$', part, re.M) for part in PAGE.split('::: {.path}')[1:]]
    assert len(found) == 3 and all(len(steps) > 5 and all(f'- {step}' in listed for step in steps) for steps in found)
    assert found[0] == sorted(found[0]), 'a newcomer reads the chapters in their order'


# The glossary, as the search knows it -----------------------------------------------------------------------------

def test_a_term_has_its_names_its_sentence_and_its_home():
    page = ('<dl><dt><span id="term-a">attention &amp; head</span> <span class="also">(also head, heads)</span></dt>\n<dd>\nOne of <strong>several</strong>. '
            'Defined in <a href="06_attention.html#sec-a" class="quarto-xref">Section 6.1</a>.\nElsewhere: <code>n_head</code>.\n</dd>\n'
            '<dt><span id="term-b">bias</span></dt>\n<dd>\n<p>A constant. Defined in <a href="#sec-b">Glossary</a>.</p></dd></dl>')
    one, two = terms.terms(page)
    assert one == {'names': ['attention & head', 'head', 'heads'], 'sentence': 'One of several.', 'home': 'nbs/06_attention.html#sec-a', 'section': 'Section 6.1'}
    assert two['names'] == ['bias'] and two['home'] == 'nbs/glossary.html#sec-b'


def test_a_book_without_a_glossary_has_no_terms(tmp_path):
    (tmp_path/'assets').mkdir()
    terms.write_terms(tmp_path)
    assert (tmp_path/'assets'/'terms.json').read_text() == '[]'


# Letters ----------------------------------------------------------------------------------------------------------

def test_each_letter_of_shapes_has_its_picture():
    page = (ROOT/'nbs'/'notation.qmd').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w)` \| !\[(.+)\]\(images/(shape-[\w-]+\.svg)\) \|', page, re.M)
    drawn = letters.drawings()
    assert ''.join(letter for letter, *_ in rows) == 'BTSVDFLHKdE' and [name for *_, name in rows] == list(drawn)
    for letter, alt, name in rows:
        assert re.search(rf'\b{letter}\b', alt) and f'>{letter}</text>' in drawn[name]
