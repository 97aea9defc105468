"""A notebook runs wherever a reader opens it: the code cell that all of them begin with, and the addresses that open one.

Both name the version of the page. A version in development (`0.3.0.dev0`) is the branch, a released one (`0.2.0`) its tag.
"""
from __future__ import annotations

ID = "anywhere"                                          # of the cell, in every notebook
CELL = '''#| hide
# Runs anywhere: where the library is missing, pip brings this page's version.
import importlib.util, subprocess, sys
if importlib.util.find_spec("llm_from_scratch") is None:
    library = ("llm-from-scratch[notebooks] @ {repository}"
               "{archive}")
    pip = [sys.executable, "-m", "pip", "install", "-q", library]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode: sys.exit(
        "This notebook needs the library llm-from-scratch, and pip could not "
        "install it. Is there a network? (Kaggle: Settings, Internet on.) "
        f"The end of what pip said: {{done.stderr[-300:]}}")
    importlib.invalidate_caches()
from llm_from_scratch.figures import allow_missing_extras
allow_missing_extras()'''


def reference(said: dict[str, str]) -> str:
    "Where in the repository the version of these settings is: its tag, or the branch before it is released."
    version = said.get("version", "dev")
    return said.get("branch", "main") if "dev" in version else f"v{version}"


def first_cell(said: dict[str, str]) -> str:
    "The source of the cell."
    version = reference(said)
    return CELL.format(repository=f"https://github.com/{said['user']}", archive=f"/{said['repo']}/archive/refs/{'tags' if version.startswith('v') else 'heads'}/{version}.zip")


def begin(book: dict, said: dict[str, str]) -> None:
    "Make the cell the first code cell of a notebook, below its title."
    cells = [cell for cell in book["cells"] if cell.get("id") != ID]
    new = {"cell_type": "code", "execution_count": None, "id": ID, "metadata": {}, "outputs": [], "source": first_cell(said).splitlines(True)}
    title = next((i + 1 for i, cell in enumerate(cells) if cell["cell_type"] == "markdown"), 0)
    book["cells"][:] = [*cells[:title], new, *cells[title:]]


def addresses(name: str, said: dict[str, str]) -> dict[str, str]:
    "Where a browser alone runs the notebook `name`, by what the place is called."
    place, version = f"{said['user']}/{said['repo']}", reference(said)
    return {
        "Colab": f"https://colab.research.google.com/github/{place}/blob/{version}/{name}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src=https://github.com/{place}/blob/{version}/{name}",
        "Binder": f"https://mybinder.org/v2/gh/{place}/{version}?labpath={name}",
        "Codespaces": f"https://codespaces.new/{place}/tree/{said.get('branch', 'main')}",
    }
