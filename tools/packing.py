"""What a build adds to the packages: the chapters without their outputs, in one file, from which `llmfs workbook` is made.

setuptools calls these classes (pyproject.toml). In a clone the file is made from `nbs/`; the source distribution brings it,
and the wheel that is built from that takes it from there.
"""
import json, zipfile
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent.parent
NAME = 'llm_from_scratch/notebooks.zip'
BEGINNING = 1980, 1, 1, 0, 0, 0                          # of the calendar of zip files: the same notebooks give the same bytes


def without_outputs(text):
    "A notebook as its cells alone."
    cells = [{key: cell[key] for key in ('cell_type', 'id', 'source')} for cell in json.loads(text)['cells']]
    return json.dumps({'cells': cells}, ensure_ascii=False, separators=(',', ':'))


def pack(file, root=ROOT):
    "Write the chapters below `root` into a file, where there are any."
    chapters = sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb'))
    if not chapters: return
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, 'w') as packed:
        for path in chapters:
            packed.writestr(zipfile.ZipInfo(path.name, BEGINNING), without_outputs(path.read_text(encoding='utf-8')), zipfile.ZIP_DEFLATED, 9)


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode: pack(Path(self.build_lib)/NAME)


class Sdist(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        pack(Path(base_dir)/NAME)
