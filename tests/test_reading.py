"""What counts when the site says how long a page takes to read, and where it says so."""
import json

import finish
import pytest
import reading

INPUTS = []


def md(text): return {"cell_type": "markdown", "source": text}


def code(text, *outputs): return {"cell_type": "code", "source": text, "outputs": list(outputs)}


WRITTEN = {"output_type": "display_data", "data": {"text/markdown": "four words by code"}}


@pytest.mark.parametrize("cell, words, lines", [
    (md("Three plain words."), 3, 0),
    (md("A [link](../far/away.ipynb#x) and `code` — here {#sec-x}"), 5, 0),
    (md("With $a + b$ in it\n\n$$\na = b\n$$ {#eq-x}"), 4 + reading.FORMULA, 0),
    (md("<!-- a comment -->Seen."), 1, 0),
    (md("Code:\n\n```python\na = 1\n\nb = 2\n```"), 1, 2),
    (md('Ask.\n\n::: {.callout-tip collapse="true" title="Hint"}\nFolded away.\n:::\n\nAgain.'), 2, 0),
    (md('::: {.callout-note title="Open"}\nRead this.\n:::'), 2, 0),
    (code("#| export\na = 1\n\n# why\nb = 2"), 0, 3),
    (code("#| hide\na = 1"), 0, 0), (code("#| default_exp x"), 0, 0), (code("#| include: false\na = 1"), 0, 0),
    (code('#| code-fold: true\n#| fig-cap: "What is seen?"\nplot()'), 3, 0),
    (code("#| echo: false\nMarkdown(text)", WRITTEN), 4, 0),
    (code("print(1)", {"output_type": "stream", "text": "one two three"}), 0, 1)])
def test_what_is_read(cell, words, lines):
    core, deeper = reading.lengths([cell])
    assert (core.words, core.lines, deeper) == (words, lines, None)


def test_the_core_path_ends_where_the_heading_stands():
    deep = md("One two.\n\n## Going deeper {#sec-x-deeper}\n\nThree.\n\n```python\n## no heading\n```\n\n### Four\n")
    core, deeper = reading.lengths([deep, code("a = 1"), md("More\n\n## Recap\n\nFive"), code("b = 2")])
    assert (core.words, core.lines) == (2, 0) and (deeper.words, deeper.lines) == (5, 2)


@pytest.mark.parametrize("text", ["### Going deeper", "## Going deeper into the woods", "Text about\nGoing deeper", "```\n# x\n```\n\nGoing deeper"])
def test_other_headings_end_nothing(text): assert reading.lengths([md(text)])[1] is None


def test_two_hundred_words_or_twelve_lines_are_a_minute():
    assert reading.Length(600, 24).minutes == 5 and reading.Length(0, 0).minutes == 1
    assert [reading.spoken(n) for n in (1, 9, 12, 13, 61)] == ["1 minute", "9 minutes", "10 minutes", "15 minutes", "60 minutes"]


# In the pages -----------------------------------------------------------------------------------------------------

EMBEDDED = ('<nav class="toc"><ol><li><a href="#one">One</a></li><li><a href="#sec-x-deeper">Going deeper</a></li></ol></nav>'
            '<main id="content"><h1 id="sec-x">X</h1>\n<p>Words.</p><h2 id="one">One</h2><h2 id="sec-x-deeper" data-number="1.2"><span class="header-section-number">1.2</span> Going deeper</h2>\n<p>More.</p><h2 id="recap" data-number="1.3"><span class="header-section-number">1.3</span> Recap</h2></main>')
QUARTO = ('<nav id="TOC"><ul><li><a href="#one" class="nav-link">One</a></li><li><a href="#sec-x-deeper" id="toc-sec-x-deeper" class="nav-link">Going deeper</a></li></ul></nav>'
          '<main class="content"><header id="title-block-header"><h1 class="title">X</h1></header><section id="one" class="level2"><h2 class="anchored">One</h2></section>'
          '<section id="sec-x-deeper" class="level2" data-number="1.2"><h2 data-number="1.2" class="anchored" data-anchor-id="sec-x-deeper"><span class="header-section-number">1.2</span> Going deeper</h2>\n<p>More.</p></section>'
          '<section id="recap" class="level2" data-number="1.3"><h2 data-number="1.3" class="anchored"><span class="header-section-number">1.3</span> Recap</h2></section></main>')


@pytest.fixture
def notebook(tmp_path):
    def write(*cells):
        (tmp_path / "x.ipynb").write_text(json.dumps({"cells": list(cells)}), encoding="utf-8")
        return tmp_path / "x.ipynb"
    return write


@pytest.mark.parametrize("page", [EMBEDDED, QUARTO], ids=["embedded", "quarto"])
def test_both_builders_show_where_the_core_path_ends(notebook, page):
    path = notebook(md("word " * 2400), md("## Going deeper {#sec-x-deeper}\n\n" + "word " * 1000))
    once = finish.add_reading_time(page, path)
    assert 'Reading time: about 10 minutes for the core path; <a href="#sec-x-deeper">Going deeper</a>: 5 minutes more.</p>' in once
    assert once.count('<li class="deeper"><a href="#sec-x-deeper"') == 1 == once.count('<li class="deeper">')
    assert '1.2</span> Going deeper</h2>\n<p class="deeper-note"' in once and 'about 5 minutes. <a href="#recap">Skip to “Recap”</a></p>' in once
    assert once.index("reading-time") > once.index("</h1>") and finish.add_reading_time(once, path) == once


def test_a_chapter_without_that_section_has_one_number(notebook):
    page = finish.add_reading_time(EMBEDDED.replace("Going deeper", "Two"), notebook(md("word " * 3000)))
    assert "Reading time: about 15 minutes.</p>" in page and "deeper-note" not in page and 'li class="deeper"' not in page
