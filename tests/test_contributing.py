"""What a contributor types: the commands of CONTRIBUTING.md in a fresh clone, the scaffold, the git hooks, the workflows.

The clone is of a small book, made from files of this tree: the appendix that the guide edits, one chapter, and the tools.
The commands do in it what they do here, in seconds. That the whole tree keeps the house rules has a test of its own.
"""
import json, os, re, shutil, subprocess, sys
from difflib import ndiff
from pathlib import Path

import env, hooks, nb, scaffold
import pytest
import yaml
from check import Book
from conftest import ROOT
from prove import RINGS
from shared import once

REPOSITORY = 'https://github.com/llm-from-scratch/llm-from-scratch'
GUIDE = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
PERSON = {f'GIT_{who}_{what}': value for who in ('AUTHOR', 'COMMITTER') for what, value in (('NAME', 'A contributor'), ('EMAIL', 'contributor@example.org'))}
SMALL = ['CONTRIBUTING.md', 'README.md', 'LICENSE', 'CITATION.cff', 'Makefile', '_quarto.yml', 'settings.ini', 'pyproject.toml', 'constraints.txt', 'references.bib',
         '.gitattributes', '.gitignore', '.github/**/*', 'llm_from_scratch/__init__.py', 'llm_from_scratch/py.typed', 'llm_from_scratch/figures.py',
         'nbs/figures.ipynb', 'nbs/references.qmd', 'nbs/images/*', 'tests/test_figures.py', 'tools/chapter.md', 'tools/book.lua', 'tools/*.py']
WHOLE = ['*', '.ci/*', '.github/**/*', 'benchmarks/**/*', 'llm_from_scratch/**/*', 'nbs/**/*', 'tests/*', 'tools/**/*']
needs_make = pytest.mark.skipif(not (shutil.which('make') and shutil.which('bash') and shutil.which('git')), reason='needs make, bash and git')
of_the_whole_tree = pytest.mark.parametrize('whole', [True], ids=['the whole tree'])


def INPUTS(whole=False, **_):
    "What the small book is made of; tests with the parameter `whole` depend on every file."
    return WHOLE if whole else SMALL


def copy(paths, folder):
    "Copy files of this tree to the same places in another."
    for path in paths:
        there = folder/path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)


# A small book and its clones --------------------------------------------------------------------------------------

PAGES = '''  chapters:
    - index.qmd
    - part: "I  Text to numbers"
      chapters:
        - nbs/01_first.ipynb
    - nbs/references.qmd
  appendices:
    - nbs/figures.ipynb
    - nbs/symbols.qmd

'''


def write_small_book(folder):
    "A book of two notebooks in which everything is in step, in one commit; its chapter is what the scaffold starts from."
    known = {p for pattern in SMALL for p in ROOT.glob(pattern)}
    copy([p for p in Book(ROOT).files if p in known], folder)
    (folder/'index.qmd').write_text('# Start here {.unnumbered}\n\nBegin with @sec-first.\n', encoding='utf-8')
    change(folder/'README.md', r'^.*\]\(nbs/(?!figures|images)[^)]*\.(?:ipynb|qmd)\).*\n', '')               # the map, and a line on the command
    change(folder/'_quarto.yml', r'^  chapters:\n.*?(?=^bibliography:)', PAGES)
    rules = folder/'tools'/'check.py'
    before, start, waiting = rules.read_text(encoding='utf-8').partition('\nWAITING = {\n')
    waiting, end, after = waiting.partition('}\n')
    rules.write_text(before + start + ''.join(re.findall(r"^    'figures'.*\n", waiting, re.M)) + end + after, encoding='utf-8')      # the other pages are not here
    template = (folder/'tools'/'chapter.md').read_text(encoding='utf-8')
    (folder/'.work').mkdir()
    (folder/'.work'/'01_first.md').write_text(template.replace('<<name>>', 'first').replace('<<title>>', 'First'), encoding='utf-8')
    for command in ('update', 'execute'): subprocess.run([sys.executable, 'tools/nb.py', command, '01_first'], cwd=folder, check=True)
    shutil.rmtree(folder/'.work')
    for command in (['init', '-q', '-b', 'main'], ['add', '-A'], ['commit', '-q', '-m', 'As it is']):
        subprocess.run(['git', *command], cwd=folder, check=True, env={**os.environ, **PERSON})


def change(path, pattern, new):
    "Replace in a file what matches, which must be there."
    text, n = re.subn(pattern, lambda _: new, path.read_text(encoding='utf-8'), flags=re.M | re.S if '.*?' in pattern else re.M)
    assert n, f'{path.name} has nothing like {pattern}'
    path.write_text(text, encoding='utf-8')


@pytest.fixture(scope='session')
def repository(tmp_path_factory): return once(tmp_path_factory, 'small-book', write_small_book)


@pytest.fixture(scope='session')
def venv(tmp_path_factory):
    "This environment, marked as made for the project, so that no command installs anything."
    real, stamp = Path(sys.prefix), '.made-for-dev'
    if (real/stamp).exists() and (real/stamp).read_text(encoding='utf-8') == env.fingerprint('dev'): return real

    def make(folder):
        for part in real.iterdir():
            if not part.name.startswith('.made-for'): (folder/part.name).symlink_to(part)
        (folder/stamp).write_text(env.fingerprint('dev'), encoding='utf-8')
    return once(tmp_path_factory, 'venv', make)


@pytest.fixture(scope='session')
def shell(repository, venv, tmp_path_factory):
    "Run lines in bash, as a person with this environment whose clone of the project comes from `repository`."
    home = tmp_path_factory.mktemp('home')
    clone = {'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': f'url.{repository.as_posix()}.insteadOf', 'GIT_CONFIG_VALUE_0': REPOSITORY}
    mine = {k: v for k, v in os.environ.items() if not k.startswith(('GIT_', 'PYTEST_', 'MAKE', 'MFLAGS')) and k not in ('args', 'n', 'ring')}      # not as a part of `make test args=...`
    settings = {**mine, **PERSON, **clone, 'HOME': str(home), 'VENV': venv.as_posix(), 'PYTHON': Path(sys.executable).as_posix()}

    def run(script, where, **more):
        done = subprocess.run(['bash', '-c', script], cwd=where, env={**settings, **more}, capture_output=True, text=True, encoding='utf-8', timeout=1800)
        return done.returncode, done.stdout + done.stderr
    return run


@pytest.fixture(scope='session')
def followed(shell, tmp_path_factory):
    "The clone of somebody who typed every `bash` block of the guide; each must succeed. It is shared, so it is only read."
    assert REPOSITORY in GUIDE
    blocks = re.findall(r'^```bash\n(.*?)^```', GUIDE, re.M | re.S)

    def follow(folder):
        code, said = shell('set -ex\n' + ''.join(blocks), folder)
        assert code == 0, said
    return once(tmp_path_factory, 'followed', follow)/'llm-from-scratch'


@pytest.fixture
def copied(followed, tmp_path):
    "A copy of that clone, to change."
    return Path(shutil.copytree(followed, tmp_path/followed.name, symlinks=True))


@pytest.mark.long(10)
@of_the_whole_tree
def test_the_house_is_in_order(whole, tmp_path):
    "`make check` finds nothing in the files that git knows."
    copy(Book(ROOT).files, tmp_path)
    done = subprocess.run([sys.executable, 'tools/check.py'], cwd=tmp_path, capture_output=True, text=True, encoding='utf-8')
    assert (done.returncode, done.stdout) == (0, 'The house is in order.\n'), done.stdout + done.stderr


@needs_make
@pytest.mark.long(10)
def test_the_guide_can_be_followed(followed):
    "Each command did what the guide says it does."
    assert 'A figure that answers no question is left out.' in (followed/'nbs'/'figures.ipynb').read_text(encoding='utf-8')
    log = subprocess.run(['git', 'log', '--format=%s', '--stat'], cwd=followed, capture_output=True, text=True).stdout
    assert 'Say when a figure is left out' in log and 'nbs/figures.ipynb' in log.partition('As it is')[0]


@needs_make
def test_a_new_chapter_is_there(followed):
    "`make chapter` wrote, ran, exported and listed the chapter; `make check`, the next line of the guide, found nothing."
    cells = json.loads((followed/'nbs'/'31_smoothing.ipynb').read_text(encoding='utf-8'))['cells']
    assert ''.join(cells[0]['source']).startswith('# Smoothing {#sec-smoothing}')
    assert any('image/svg+xml' in out.get('data', {}) for cell in cells for out in cell.get('outputs', []))
    assert not re.search(r'<<\w+>>', (followed/'nbs'/'31_smoothing.ipynb').read_text(encoding='utf-8'))
    assert 'def smoothing_example(' in (followed/'llm_from_scratch'/'smoothing.py').read_text(encoding='utf-8')
    assert '- nbs/31_smoothing.ipynb\n' in (followed/'_quarto.yml').read_text(encoding='utf-8')
    assert 'smoothing_example' in (followed/'nbs'/'symbols.qmd').read_text(encoding='utf-8')


@needs_make
def test_a_new_chapter_passes_the_tests(followed, shell):
    "Executed again from a clean kernel it gives what is stored, and its types are clean."
    code, said = shell('"$PYTHON" tools/nb.py verify 31 && "$PYTHON" -m basedpyright llm_from_scratch/smoothing.py', followed)
    assert code == 0, said


@needs_make
@pytest.mark.parametrize('arguments, words', [
    ('n=31 name=other title=Other', 'chapter 31 exists already'), ('n=32 name=smoothing title=Other', 'a notebook named smoothing exists already'),
    ('n=32 name=figures title=Other', 'a notebook named figures exists already'), ('n=32 name=Two-Words title=Other', 'cannot name a Python module'), ('n=32 name=class title=Other', 'cannot name a Python module'),
    ('n=0 name=other title=Other', 'not a chapter number'), ('n=abc name=other title=Other', 'not a chapter number'), ('n=32 name=other', 'title='), ('', 'write: make chapter n=31')])
def test_what_the_scaffold_refuses(copied, shell, arguments, words):
    "One clear sentence, another exit code, and nothing was written."
    before = sorted(Book(copied).files)
    code, said = shell(f'make chapter {arguments}', copied)
    assert code and words in said and 'No chapter was started' in said and 'Traceback' not in said
    assert sorted(Book(copied).files) == before


@needs_make
@pytest.mark.parametrize('file, good, bad', [('tools/chapter.md', 'rises = ', 'rises = 1 / 0 + '), ('tools/nbfilter.py', 'import ast\n', 'import ast\n1 / 0\n')], ids=['as it runs', 'as it is listed'])
def test_a_scaffold_that_fails_leaves_nothing(copied, shell, file, good, bad):
    "When a step raises, early or late, the tree is as it was."
    state = 'git status --porcelain --untracked-files=all && git diff && cat llm_from_scratch/_modidx.py'
    before = shell(state, copied)
    text = (copied/file).read_text(encoding='utf-8')
    assert good in text
    try:
        (copied/file).write_text(text.replace(good, bad, 1), encoding='utf-8')
        code, said = shell('make chapter n=32 name=broken title=Broken', copied)
    finally: (copied/file).write_text(text, encoding='utf-8')
    assert code and 'ZeroDivisionError' in said
    assert shell(state, copied) == before
    assert not (copied/'.work'/'32_broken.md').exists()


# The line in _quarto.yml ------------------------------------------------------------------------------------------

CONTENTS = '''# The book.
book:
  chapters:
    - index.qmd
    - nbs/00_tour.ipynb
    - part: "I  Text to numbers"   # a comment
      chapters:
        - nbs/01_tensors.ipynb
        - nbs/03_bpe.ipynb   # another
    - part: "III  Learning"
      chapters:
        - nbs/10_optim.ipynb
    - nbs/references.qmd
  appendices:
    - nbs/figures.ipynb
'''


def chapters_of(text):
    "The numbered chapters by part."
    return {entry['part']: [c[4:6] for c in entry['chapters']] for entry in yaml.safe_load(text)['book']['chapters'] if isinstance(entry, dict)}


ONE, TWO, THREE, FOUR = 'I  Text to numbers', 'II  The transformer', 'III  Learning', 'IV  Real models'


@pytest.mark.parametrize('n, wanted', [
    (2, {ONE: ['01', '02', '03'], THREE: ['10']}), (5, {ONE: ['01', '03', '05'], THREE: ['10']}), (11, {ONE: ['01', '03'], THREE: ['10', '11']}),
    (6, {ONE: ['01', '03'], TWO: ['06'], THREE: ['10']}), (14, {ONE: ['01', '03'], THREE: ['10'], FOUR: ['14']}), (99, {ONE: ['01', '03'], THREE: ['10'], 'VII  Scale': ['99']})])
def test_the_line_goes_where_the_map_says(n, wanted):
    text = scaffold.insert(CONTENTS, n, 'new')
    assert chapters_of(text) == wanted and list(chapters_of(text)) == list(wanted)
    assert all(change[0] != '-' for change in ndiff(CONTENTS.splitlines(), text.splitlines())), 'other lines changed'


def test_a_chapter_before_all_others():
    text = CONTENTS.replace('    - part: "I  Text to numbers"   # a comment\n      chapters:\n        - nbs/01_tensors.ipynb\n        - nbs/03_bpe.ipynb   # another\n', '')
    assert chapters_of(scaffold.insert(text, 1, 'new')) == {ONE: ['01'], THREE: ['10']}


def test_contents_without_parts_are_left_to_a_person():
    with pytest.raises(scaffold.Refused, match='by hand'): scaffold.insert('book:\n  chapters:\n    - index.qmd\n', 6, 'new')


def test_the_real_contents_take_every_chapter_of_the_map():
    text = (ROOT/'_quarto.yml').read_text(encoding='utf-8')
    there = {int(number) for numbers in chapters_of(text).values() for number in numbers}
    for n in sorted(set(range(1, 31)) - there, reverse=True): text = scaffold.insert(text, n, 'new')
    assert sorted(c for numbers in chapters_of(text).values() for c in numbers) == [f'{n:02d}' for n in range(1, 31)]
    assert [c for numbers in chapters_of(text).values() for c in numbers] == [f'{n:02d}' for n in range(1, 31)]


# Git --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def clone(shell, tmp_path):
    "A clone of the small book with the hooks."
    code, said = shell(f'git clone -q {REPOSITORY} clone && cd clone && "$VENV"/{Path(sys.executable).parent.name}/python tools/hooks.py', tmp_path)
    assert code == 0 and 'merge cell by cell' in said, said
    return tmp_path/'clone'


def edit(clone, cell, **changes):
    "Change one cell of the figures notebook."
    path = clone/'nbs'/'figures.ipynb'
    book = json.loads(path.read_text(encoding='utf-8'))
    book['cells'][cell].update(changes)
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


def code_cell(clone):
    cells = json.loads((clone/'nbs'/'figures.ipynb').read_text(encoding='utf-8'))['cells']
    return next(i for i, c in enumerate(cells) if c['cell_type'] == 'code' and c['outputs'] and 'text' in c['outputs'][0])


@needs_make
def test_a_commit_against_the_rules_is_refused(clone, shell):
    edit(clone, code_cell(clone), execution_count=7)
    code, said = shell('git commit -qam "With an execution count"', clone)
    assert code and 'execution counts' in said and 'to mend' in said
    code, said = shell('git commit --no-verify -qam "All the same"', clone)
    assert code == 0, said


@needs_make
@pytest.mark.parametrize('driver', [True, False], ids=['with the driver', 'git alone'])
def test_two_outputs_of_one_cell_merge(clone, shell, driver):
    "Two people ran the same cell: git alone gives a notebook that no editor opens; with the driver the merge keeps one output and is whole."
    if not driver: shell('"$PYTHON" tools/hooks.py --remove', clone)
    i = code_cell(clone)
    def output(text): return [{'name': 'stdout', 'output_type': 'stream', 'text': [text]}]
    shell('git switch -qc other', clone)
    edit(clone, i, outputs=output('theirs\n'))
    shell('git commit --no-verify -qam theirs && git switch -q main', clone)
    edit(clone, i, outputs=output('ours\n'))
    code, said = shell('git commit --no-verify -qam ours && git merge -q --no-edit other', clone)
    merged = (clone/'nbs'/'figures.ipynb').read_text(encoding='utf-8')
    assert ('<<<<<<<' in merged) == (code != 0) == (not driver), said
    if driver: assert json.loads(merged)['cells'][i]['outputs'] == output('ours\n')


@needs_make
def test_what_a_machine_can_mend(clone, shell):
    "A notebook with an execution count, a module edited by hand and a stale index are as before after `--mend`."
    for name in ('llm_from_scratch/figures.py', 'llm_from_scratch/_modidx.py', 'nbs/symbols.qmd'): (clone/name).write_text('x = 1\n', encoding='utf-8')
    edit(clone, code_cell(clone), execution_count=7)
    broken, _ = shell('"$PYTHON" tools/check.py', clone)
    mended, said = shell('"$PYTHON" tools/check.py --mend && git diff --exit-code', clone)
    assert (broken, mended) == (1, 0), said


@needs_make
def test_hooks_of_others_are_left_alone(clone, shell):
    hook = clone/'.git'/'hooks'/'pre-commit'
    hook.write_text('#!/bin/sh\nexit 0\n', encoding='utf-8')
    code, said = shell('"$PYTHON" tools/hooks.py', clone)
    assert code and 'is not ours' in said and hook.read_text(encoding='utf-8') == '#!/bin/sh\nexit 0\n'


@needs_make
def test_the_hooks_can_be_removed(clone, shell):
    code, _ = shell('"$PYTHON" tools/hooks.py --remove', clone)
    assert code == 0 and not any((clone/'.git'/'hooks'/name).exists() for name in hooks.hooks())
    assert 'nbdev-merge' not in (clone/'.git'/'config').read_text(encoding='utf-8')


# What hosted machines read ----------------------------------------------------------------------------------------

YAMLS = sorted(p.relative_to(ROOT).as_posix() for p in [*(ROOT/'.github').rglob('*.yml'), ROOT/'CITATION.cff'])


@pytest.mark.parametrize('name', YAMLS)
def test_settings_can_be_read(name): assert isinstance(yaml.safe_load((ROOT/name).read_text(encoding='utf-8')), dict)


def workflow(name): return yaml.safe_load((ROOT/'.github'/'workflows'/f'{name}.yml').read_text(encoding='utf-8'))


def targets(): return set(re.findall(r'^([a-z-]+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M))


def steps(name): return [step for job in workflow(name)['jobs'].values() for step in job['steps']]


@pytest.mark.parametrize('name', ['test', 'book', 'links'])
def test_actions_are_pinned_and_run_targets_that_exist(name):
    used = [step['uses'] for step in steps(name) if 'uses' in step]
    assert used and [action for action in used if not re.fullmatch(r'[\w-]+/[\w/-]+@v\d+', action)] == []
    called = {target for step in steps(name) for target in re.findall(r'\bmake ([a-z]+)', str(step.get('run', '')))}
    assert called <= targets() and (called or name == 'links')


def matrix_of_tests(): return workflow('test')['jobs']['test']['strategy']['matrix']


def test_everything_runs_on_one_system_and_every_ring_on_some_other():
    matrix = matrix_of_tests()
    rings = {(row['os'], row['python']): row['ring'] for row in matrix['include']}
    assert set(rings) == {(system, python) for system in matrix['os'] for python in matrix['python']} and len(rings) == len(matrix['include'])
    assert list(rings.values()).count('') == 1 and set(rings.values()) == {'', *RINGS}
    assert steps('test')[-4]['run'] == 'make test ring=${{ matrix.ring }}'


def test_the_matrix_is_what_the_package_promises():
    matrix = matrix_of_tests()
    promised = re.findall(r'Python :: (3\.\d+)"', (ROOT/'pyproject.toml').read_text(encoding='utf-8'))
    assert matrix['python'] == promised == ['3.10', '3.11', '3.12', '3.13']
    assert {system.partition('-')[0] for system in matrix['os']} == {'ubuntu', 'macos', 'windows'}


def test_the_site_is_published_only_after_both_builders_agree():
    jobs = workflow('book')['jobs']
    assert set(jobs['publish']['needs']) == {'quarto', 'same'} and set(jobs['same']['needs']) == {'quarto', 'embedded'}
    assert any('quarto render' in str(step.get('run')) for step in jobs['quarto']['steps'])


# The guide --------------------------------------------------------------------------------------------------------

@of_the_whole_tree
def test_the_guide_names_targets_and_files_that_exist(whole):
    named, files = set(re.findall(r'(?:^|`)make ([a-z]+)', GUIDE, re.M)), set(re.findall(r'`((?:tools|tests|\.github)/[\w./]+\.\w+)`', GUIDE))
    assert {'check', 'test', 'hooks', 'chapter'} <= named <= targets()
    assert len(files) > 2 and [file for file in sorted(files) if not (ROOT/file).exists()] == []


def test_the_guide_states_the_tolerance_that_is_used():
    said = re.findall(r'one\s+unit\s+in\s+their\s+last\s+printed\s+place\s+or\s+([\d.]+)\s*%', GUIDE)
    assert [float(percent) / 100 for percent in said] == [nb.RELATIVE]
    assert nb.same_text('loss 100.00', 'loss 100.09') and not nb.same_text('loss 100.00', 'loss 100.11')
