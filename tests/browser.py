"A real browser, for tests of pages: its flags, a window with its complaints, and what axe finds."
import shutil
import urllib.parse
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
WIDTHS = {"desk": 1280, "phone": 390}
LIMIT = 60_000                            # milliseconds that the browser may take, also beside other work
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install the package `chromium` to test the site in a browser")


@contextmanager
def window(browser, width="desk", theme="light", **options):
    "A new window of the browser and the complaints of all it shows: console errors and requests to other hosts."
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 844}, color_scheme=theme, **options)
    context.set_default_timeout(LIMIT)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if urllib.parse.urlparse(request.url).hostname not in ("127.0.0.1", None) else None)
    try: yield page, complaints
    finally: context.close()


def violations(page, exclude=(), **options):
    "What axe finds: (rule, impact, element, what is wrong)."
    from axe_playwright_python.sync_playwright import Axe
    options = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}, "resultTypes": ["violations"], **options}
    found = Axe().run(page, context={"exclude": [[e] for e in exclude]}, options=options).response["violations"]
    return [(v["id"], v["impact"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"][:200]) for v in found]
