"""The picture that a link to the book is shown with elsewhere: its title above its front picture, set by typst as a PNG."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

CARD = "assets/card.png"
PICTURE = Path("nbs/images/road.svg")
FRAME = """#let facts = json("card.json")
#set page(width: 1200pt, height: 630pt, margin: (x: 70pt, y: 62pt), fill: rgb("#fffefb"), background: place(left, rect(width: 18pt, height: 100%, fill: rgb("#12507b"))))
#set text(font: ("Libertinus Serif", "DejaVu Serif"), fill: rgb("#24292f"))
#text(size: 74pt, weight: "bold", fill: rgb("#12507b"), facts.title)
#v(-34pt)
#text(size: 27pt, fill: rgb("#57606a"), facts.words)
#v(1fr)
#if facts.picture != "" { align(center, image("card.svg", height: 300pt)) }
"""


def write_card(site: Path, root: Path, settings: dict[str, str], memory: Path) -> bool:
    "Write the card into the site, from `memory` if it was drawn before; whether the site has one (without typst, none)."
    try:
        import typst
    except ImportError:
        return False
    drawing = (root / PICTURE).read_text(encoding="utf-8") if (root / PICTURE).exists() else ""
    facts = json.dumps({"title": settings.get("title", "The book"), "words": settings.get("description", ""), "picture": drawing})
    known = memory / f"{hashlib.sha256((FRAME + facts).encode()).hexdigest()[:20]}.png"
    if not known.exists():
        memory.mkdir(parents=True, exist_ok=True)
        for name, text in (("card.typ", FRAME), ("card.json", facts), ("card.svg", drawing)):
            (memory / name).write_text(text, encoding="utf-8")
        known.write_bytes(typst.compile(str(memory / "card.typ"), root=str(memory), format="png", ppi=72.0))
    (site / CARD).parent.mkdir(parents=True, exist_ok=True)
    (site / CARD).write_bytes(known.read_bytes())
    return True
