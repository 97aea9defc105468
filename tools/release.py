#!/usr/bin/env python3
"""Make a release: `make release` builds the source distribution and the wheel, tries both, and writes the notes.

    release.py                   all of it; what is built is in dist/
    release.py --tag v0.2.0      first make sure that this is the tag of the version
    release.py --python PATH     also try with this Python (may be given several times)

The wheel is built from the source distribution, so that what builds here builds for everyone. Both are installed into empty
environments of the oldest and of the newest Python that is here, and asked for a story. Nothing is published: pushing the tag does
that (.github/workflows/release.yml).
"""
import argparse, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

import env
from check import Book
from finish import read_settings

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT/'dist'
HEADING = r'^## {version} \((\d{{4}}-\d\d-\d\d)\)\n'
SMOKE = '''import sys, llm_from_scratch
from llm_from_scratch.files import stored_runs
assert llm_from_scratch.__version__ == sys.argv[1], llm_from_scratch.__version__
assert llm_from_scratch.__file__.startswith(sys.prefix), llm_from_scratch.__file__
assert stored_runs("storyland_small")'''


class Refused(Exception):
    "A sentence on why there is no release."


def run(*command, **options):
    "Run a command; its output. `Refused` with its last lines where it fails."
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding='utf-8', **options)
    if done.returncode: raise Refused(f"`{' '.join(map(str, command))[:100]}` failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout


# What is released -------------------------------------------------------------------------------------------------

def notes(version, root=ROOT):
    "What CHANGELOG.md says of a version, without its heading."
    text = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    found = re.search(HEADING.format(version=re.escape(version)) + r'(.*?)(?=^## |\Z)', text, re.M | re.S)
    if not found or not found[2].strip(): raise Refused(f'CHANGELOG.md has no entry `## {version} (YYYY-MM-DD)` with what a reader would notice')
    return found[2].strip() + '\n'


def ready(tag=None, root=ROOT):
    "The version to release. `Refused` where it is in development, has no notes, or is not the one of the tag."
    version = read_settings(root)['version']
    if not re.fullmatch(r'\d+\.\d+\.\d+', version): raise Refused(f'version {version} in settings.ini is not one to release, like 0.2.0')
    if tag not in (None, f'v{version}'): raise Refused(f'the tag is {tag} and settings.ini has version {version}; the tag of that is v{version}')
    notes(version, root)
    return version


def committed(root=ROOT):
    "`Refused` where the files are not those that the tag would hold."
    changed = run('git', 'status', '--porcelain', cwd=root).splitlines()
    if changed: raise Refused(f'{changed[0][3:]} is not committed, so the tag would hold something else; commit first')


# Building ---------------------------------------------------------------------------------------------------------

def build(out, root=ROOT):
    "The source distribution of the files that git knows, and the wheel made from it. Needs no network."
    with tempfile.TemporaryDirectory() as folder:
        tree, unpacked = Path(folder)/'tree', Path(folder)/'unpacked'
        for path in Book(root).files:
            there = tree/path.relative_to(root)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
        sdist = backend('build_sdist', tree, out)
        shutil.unpack_archive(sdist, unpacked)
        wheel = backend('build_wheel', next(unpacked.iterdir()), out)
    return sdist, wheel


def backend(hook, source, out):
    "Call a hook of setuptools, as pip does; the path of what it built."
    call = f'import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]), file=sys.__stderr__)'
    done = subprocess.run([sys.executable, '-c', call, str(out)], cwd=source, capture_output=True, text=True, encoding='utf-8')
    if done.returncode: raise Refused(f'setuptools cannot {hook.replace("_", " a ")}:\n{done.stderr[-2000:]}')
    return Path(out)/done.stderr.strip().splitlines()[-1]


# Trying -----------------------------------------------------------------------------------------------------------

def supported(root=ROOT):
    "The versions of Python that the package says it supports, oldest first."
    found = re.findall(r'Python :: (3\.\d+)"', (root/'pyproject.toml').read_text(encoding='utf-8'))
    return sorted(found, key=lambda v: int(v[2:]))


def pythons(more=()):
    "The interpreters of supported versions that are here and can make an environment, by version, oldest first."
    found = {}
    for python in [*more, *(f'python{v}' for v in supported()), sys.executable]:
        asked = [python, '-c', 'import ensurepip, sys, venv; print("{}.{}".format(*sys.version_info))']
        try: version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError): continue
        if version in supported(): found.setdefault(version, python)
    return dict(sorted(found.items(), key=lambda item: int(item[0][2:])))


def attempt(python, packages, version):
    "Install each package into an environment of its own, and ask it for a story."
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)/'venv'
        run(python, '-m', 'venv', place)
        programs = place/('Scripts' if os.name == 'nt' else 'bin')
        pip = [programs/'python', '-m', 'pip', '--disable-pip-version-check', 'install', '-q', '-c', ROOT/'constraints.txt']
        run(*pip, env.pinned('torch'))                   # asked for by itself, pip takes the build meant for this machine
        for package in packages:
            run(*pip, '--force-reinstall', '--no-deps', package)
            run(*pip, package)                           # what it depends on
            smoke(programs, version, folder)


def smoke(programs, version, folder):
    "Import, `llmfs info`, a story, in an environment and a folder that have nothing else."
    alone = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    run(programs/'python', '-c', SMOKE, version, cwd=folder, env=alone)
    if version not in run(programs/'llmfs', 'info', cwd=folder, env=alone): raise Refused(f'`llmfs info` does not name version {version}')
    story = run(programs/'llmfs', 'generate', '--prompt', 'Once upon a time', '--seed', '4', cwd=folder, env=alone, stdin=subprocess.DEVNULL)
    if not story.startswith('Once upon a time ') or len(story.split()) < 30: raise Refused(f'the model tells no story: {story[:200]!r}')


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tag', help='the tag that must be the one of the version')
    parser.add_argument('--python', action='append', default=[], metavar='PATH', help='another Python to choose from')
    args = parser.parse_args(argv)
    version = ready(args.tag)
    committed()
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    packages = build(DIST)
    here = pythons(args.python)
    missing = [v for v in supported() if v not in here]
    for v in dict.fromkeys([next(iter(here)), next(reversed(here))]):
        attempt(here[v], packages, version)
        print(f'Python {v}: source distribution and wheel install, and tell a story.', flush=True)
    if missing: print(f"Not tried, because not on the path: Python {', '.join(missing)}.")
    (DIST/'NOTES.md').write_text(notes(version), encoding='utf-8')
    print(f'dist/ holds {", ".join(p.name for p in packages)} and NOTES.md.\nTo publish: git tag v{version} && git push origin v{version}')


if __name__ == '__main__':
    try: main(sys.argv[1:])
    except Refused as refusal: sys.exit(f'No release: {refusal}')
