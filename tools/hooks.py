#!/usr/bin/env python3
"""`make hooks`: let git merge notebooks cell by cell, trust them after a merge, and check the house rules before a commit.

The merge driver (`nbdev_merge`) and the trust after a merge (`nbdev_trust`) are nbdev's. Its own installer is not used: it
names the commands without their folder, which fails unless the environment is active, and it edits the Jupyter settings in
the user's home. Here everything stays in this clone's `.git`. To undo: `python tools/hooks.py --remove`.
"""
import subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = '# written by `make hooks`'
IGNORED = 'nbs/.last_checked'                   # where nbdev_trust remembers its last visit


def git(*args):
    "What git answers, without the line end."
    return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def command(name):
    "A console script of this environment, quoted for the shell that git starts."
    suffix = '.exe' if sys.platform == 'win32' else ''
    return f'"{(Path(sys.executable).parent/(name + suffix)).as_posix()}"'


def hooks():
    "The text of each hook."
    python = f'"{Path(sys.executable).as_posix()}"'
    # GIT_DIR and its kin describe the commit in progress; the check asks git about the folder it stands in.
    return {'pre-commit': f'unset $(git rev-parse --local-env-vars)\nexec {python} tools/check.py', 'post-merge': f'exec {command("nbdev_trust")}'}


def hook_path(name): return ROOT/git('rev-parse', '--git-path', f'hooks/{name}')


def is_ours(path): return path.exists() and MARK in path.read_text(encoding='utf-8')


def install():
    "Write the hooks and the merge driver into this clone; a hook that someone else wrote is left alone."
    git('config', '--local', 'merge.nbdev-merge.name', 'merge notebooks cell by cell (nbdev_merge)')
    git('config', '--local', 'merge.nbdev-merge.driver', f'{command("nbdev_merge")} %O %A %B %P')
    for name, body in hooks().items():
        path = hook_path(name)
        if path.exists() and not is_ours(path): sys.exit(f'{path} exists and is not ours: move it away, then run `make hooks` again.')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\n{MARK}\n{body}\n', encoding='utf-8', newline='\n')
        path.chmod(0o755)
    ignore()
    print('Notebooks merge cell by cell, and a commit checks the house rules first (`git commit --no-verify` skips it once).')


def ignore():
    exclude = ROOT/git('rev-parse', '--git-path', 'info/exclude')
    text = exclude.read_text(encoding='utf-8') if exclude.exists() else ''
    exclude.parent.mkdir(parents=True, exist_ok=True)
    if IGNORED not in text: exclude.write_text(f'{text}{IGNORED}\n', encoding='utf-8')


def remove():
    "Take back what `install` wrote."
    subprocess.run(['git', 'config', '--local', '--remove-section', 'merge.nbdev-merge'], cwd=ROOT, capture_output=True)
    for path in map(hook_path, hooks()):
        if is_ours(path): path.unlink()
    print('The hooks are gone.')


if __name__ == '__main__':
    try: remove() if sys.argv[1:] == ['--remove'] else install()
    except (subprocess.CalledProcessError, FileNotFoundError): sys.exit('Hooks need git and a clone made by it: `git clone` the repository and run `make hooks` there.')
