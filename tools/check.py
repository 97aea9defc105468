#!/usr/bin/env python3
"""The house rules: `make check` reads every notebook, page and test, and says in seconds what is wrong and how to mend it.

    check.py            every rule
    check.py figures    only the rule of that name (several may be named)
    check.py --mend     first mend what a machine can: clean the notebooks, write the library and the symbol index
    check.py --rules    list the rules with their reasons

A rule is a function below with `@rule`; the docstring is its reason, printed when it fails.
"""
import ast, json, os, re, subprocess, sys, tempfile
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = 'llm_from_scratch'
TEMPLATE = 'tools/chapter.md'             # what tools/scaffold.py starts a chapter from
RULES = {}

# Pages that still wait for the second edition: by the name of a chapter or appendix, the rules that excuse it, and the terms of the
# glossary (`term:...`) that their home does not say in bold yet. The list only shrinks: what has no fault left must be struck.
WAITING = {
    'optim': 'core, width, diagrams, form, term-ablation, term-gradient-clipping, term-gradient-descent, term-learning-rate-schedule, term-moment, term-optimizer',
    'training': 'core, width, diagrams, form, term-batch-size, term-checkpoint, term-fine-tuning, term-gradient-accumulation, term-hyperparameter, term-loss-curve, term-micro-batch, term-mixed-precision, term-nan, term-overfitting, term-resume, term-throughput, term-underfitting',
    'evaluation': 'core, width, diagrams, form, term-baseline, term-generalize, term-scaling-law',
    'generation': 'core, width, diagrams, form, term-greedy-decoding, term-inference, term-log-probability, term-logit-bias, term-nucleus-sampling, term-penalty, term-prompt, term-sampling',
    'command': 'width',
    'constraints': 'width',
    'costs': 'width',
    'distributed': 'width',
    'families': 'width',
    'figures': 'width',
    'files': 'width',
    'formats': 'width',
    'weight_maps': 'width',
}


@cache
def walk(tree):
    "Every node of a tree: most rules ask, so the answer is kept."
    return tuple(ast.walk(tree))


def rule(check):
    "Register a house rule: a function from a `Book` to sentences `where: what is wrong; how to mend it`."
    RULES[check.__name__] = check
    return check


def waits(stem, item): return item in WAITING.get(chapter_name(stem), '').split(', ')


def due(book, item, found):
    "Of faults, as pairs of a page's stem and a sentence, those of pages that do not wait for `item`; and each page that waits for nothing."
    found = list(found)
    waiting = {stem for stem in book.pages if waits(stem, item)}
    yield from (sentence for stem, sentence in found if stem not in waiting)
    for stem in sorted(waiting - {stem for stem, _ in found}): yield f'{stem}: has no fault left; strike `{item}` from its line in WAITING (tools/check.py)'


WRITTEN = re.compile(r'# %% \S*/(?P<page>\w+)\.ipynb #(?P<id>\w+)')       # the line that nbdev writes above each exported cell


# What is read -----------------------------------------------------------------------------------------------------

OPTION = re.compile(r'#\|\s*([\w-]+):\s*(.*)$')            # #| label: fig-x
BARE = re.compile(r'#\|\s*(\w+)(?:\s+[^:]*)?$')            # #| export
BARE_KNOWN = {'default_exp', 'export', 'exporti', 'exports', 'hide', 'slow', 'timing', 'experiment'}
OPTIONS_KNOWN = {'label', 'echo', 'eval', 'output', 'warning', 'include', 'classes', 'column', 'layout', 'layout-ncol', 'layout-nrow', 'code-fold', 'code-summary',
                 'code-overflow', 'fig-cap', 'fig-alt', 'fig-subcap', 'fig-align', 'fig-width', 'fig-height', 'fig-column', 'tbl-cap', 'tbl-subcap', 'tbl-colwidths',
                 'lst-cap', 'lst-label'}


@dataclass
class Cell:
    "A cell of a notebook, its options and directives split from its text."
    page: str                      # stem of the notebook
    number: int
    kind: str                      # code, markdown, raw
    source: str
    outputs: list = field(default_factory=list)
    raw: dict = field(default_factory=dict)

    @property
    def where(self): return f'{self.page}: cell {self.number}'

    @cached_property
    def head(self):
        "The `#|` lines at the top of a code cell."
        lines = self.source.splitlines() if self.kind == 'code' else []
        end = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
        return lines[:end]

    @cached_property
    def body(self): return '\n'.join(self.source.splitlines()[len(self.head):])

    @cached_property
    def options(self): return {m[1]: m[2].strip().strip('"\'') for m in map(OPTION.match, self.head) if m}

    @cached_property
    def directives(self): return {m[1] for m in map(BARE.match, self.head) if m}

    @cached_property
    def plain_code(self):
        "The code with each magic turned into `pass`."
        return re.sub(r'^(\s*)[%!].*$', r'\1pass', self.body, flags=re.M)

    @cached_property
    def tree(self):
        "The code parsed; None where it does not (an error on purpose)."
        try: return ast.parse(self.plain_code)
        except SyntaxError: return None

    @property
    def exported(self): return bool(self.directives & {'export', 'exporti', 'exports'})

    @property
    def solution(self): return self.options.get('code-summary', '').startswith('Solution')

    @property
    def mimes(self): return {mime for out in self.outputs for mime in out.get('data', {})}

    @property
    def has_image(self): return any(mime.startswith('image/') for mime in self.mimes)

    @property
    def makes_prose(self): return self.options.get('echo') == 'false' and 'Markdown(' in self.body

    @cached_property
    def prose(self):
        "What a reader reads here: Markdown, typed or made by code."
        if self.kind == 'markdown': return self.source
        return '\n\n'.join(''.join(out['data']['text/markdown']) for out in self.outputs if 'text/markdown' in out.get('data', {}))


class Book:
    "Everything the rules look at, read once."
    def __init__(self, root): self.root = Path(root).resolve()

    @cached_property
    def paths(self): return [p for p in sorted((self.root/'nbs').glob('*.ipynb')) if not p.name.startswith(('.', '_'))]

    @cached_property
    def notebooks(self): return {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in self.paths}

    @cached_property
    def pages(self):
        "The cells of each notebook."
        return {stem: [Cell(stem, i, c['cell_type'], ''.join(c['source']), c.get('outputs', []), c) for i, c in enumerate(nb['cells'])]
                for stem, nb in self.notebooks.items()}

    @property
    def cells(self): return [cell for cells in self.pages.values() for cell in cells]

    @property
    def code(self): return [cell for cell in self.cells if cell.kind == 'code']

    @cached_property
    def chapters(self): return {stem: cells for stem, cells in self.pages.items() if re.match(r'\d\d_', stem)}

    @cached_property
    def files(self):
        "Paths of the files that git tracks or would track; outside a repository, all that are not hidden."
        try: names = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=self.root, capture_output=True, check=True).stdout.decode().split('\0')
        except (OSError, subprocess.CalledProcessError):
            names = [p.relative_to(self.root).as_posix() for p in self.root.rglob('*')]
        return [p for p in (self.root/name for name in sorted(names) if name) if p.is_file()]

    @cached_property
    def texts(self):
        "The text of each of those files that is text, by its path from the root."
        found = {}
        for path in self.files:
            data = path.read_bytes()
            if b'\0' not in data[:4096]: found[path.relative_to(self.root).as_posix()] = data.decode('utf-8', 'replace')
        return found

    @cached_property
    def documents(self): return {name: text for name, text in self.texts.items() if name.endswith(('.qmd', '.md')) and name != TEMPLATE}

    @cached_property
    def tests(self): return {name: ast.parse(text) for name, text in self.texts.items() if re.fullmatch(r'tests/.*\.py', name)}

    @cached_property
    def trees(self): return [c.tree for c in self.code if c.tree] + list(self.tests.values())

    @cached_property
    def checkers(self): return checking_functions(self.trees)

    def prose(self, skip_code=True):
        "Where and what: all Markdown of the book, code fences and code spans blanked."
        for cell in self.cells:
            if cell.prose: yield cell.where, plain(cell.prose) if skip_code else cell.prose, cell
        for name, text in self.documents.items():
            if name.endswith('.qmd'): yield name, plain(text) if skip_code else text, None


def plain(text):
    "Markdown without its code and comments, line for line."
    text = re.sub(r'^(?P<f>`{3,}|~{3,}).*?^(?P=f)\s*$|<!--.*?-->', lambda m: '\n' * m[0].count('\n'), text, flags=re.M | re.S)
    return re.sub(r'(`+)(?!`)(.+?)(?<!`)\1(?!`)', ' ', text)


# Ruff -------------------------------------------------------------------------------------------------------------

MEND = {'D': 'add one sentence that says what it does', 'ANN': 'annotate it', 'S101': 'raise ValueError or TypeError naming the value', 'T201': 'return the text, or use `logging`',
        'F403': 'name what is imported'}


@rule
def ruff(book):
    "Ruff finds none of the faults that pyproject.toml lists, such as a name that nothing defines or a comparison that nobody looks at: a machine sees in a second what a reader stumbles over."
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format=json', '--exit-zero'], cwd=book.root, capture_output=True, text=True, encoding='utf-8')
    if done.returncode: yield f'pyproject.toml: ruff did not run: {done.stderr.strip()}; mend what it names, or let `make check` install it'
    for fault in json.loads(done.stdout or '[]'):
        code, fix = fault['code'], (fault['fix'] or {}).get('message')
        mend = next((mend for start, mend in MEND.items() if code.startswith(start)), fix or f'`ruff rule {code}` says why')
        yield f"{place(book, fault)}: {fault['message']} ({code}); {mend}"


def place(book, fault):
    "Where a fault of ruff's stands: in a file, in a cell, or in the cell that wrote this line of the library."
    path, row = Path(fault['filename']).resolve().relative_to(book.root), fault['location']['row']
    if path.suffix == '.ipynb': return f"{path.stem}: cell {fault['cell'] - 1}: line {row}"
    lines = book.texts[path.as_posix()].splitlines()[:row]
    above = [m for m in map(WRITTEN.match, lines) if m]
    if above:
        cells = [c for c in book.pages.get(above[-1]['page'], []) if c.exported and lines[-1] in c.source.splitlines()]
        cells.sort(key=lambda c: c.raw.get('id') != above[-1]['id'])                  # a class that grew has lines of several cells
        if cells: return f'{cells[0].where}: line {cells[0].source.splitlines().index(lines[-1]) + 1}'
    return f'{path.as_posix()}: line {row}'


# Names ------------------------------------------------------------------------------------------------------------

def public_names(book):
    "What `#| export` makes part of the library's interface, as pairs of name and cell; the methods of a private class are not."
    for cell in book.code:
        if cell.directives & {'export', 'exports'} and cell.tree:
            for node in (n for n in cell.tree.body if hasattr(n, 'name') and not n.name.startswith('_')):
                yield node.name, cell
                yield from ((f'{node.name}.{n.name}', cell) for n in node.body if isinstance(node, ast.ClassDef) and hasattr(n, 'name') and not n.name.startswith('_'))


@rule
def names(book):
    "Public names have a check: a name no check uses may be wrong unseen."
    checked = checked_names(book)
    for name, cell in public_names(book):
        called_as = name.removesuffix('.forward').rpartition('.')[2]               # a module's `forward` is run by calling the module
        if called_as not in checked: yield f'{cell.where}: no check uses `{name}`; assert something about it in the chapter or in tests/'


def checked_names(book):
    "Every identifier that stands in a cell or test file that checks something."
    return {word for tree in book.trees if checks(tree, book.checkers) for word in identifiers(tree)}


def identifiers(tree):
    for node in walk(tree):
        if isinstance(node, ast.Name): yield node.id
        elif isinstance(node, ast.Attribute): yield node.attr
        elif isinstance(node, ast.keyword) and node.arg: yield node.arg


# Checks -----------------------------------------------------------------------------------------------------------

def checks(tree, checkers=frozenset()):
    "Whether some statement in here can fail a test: an assertion, an expected error, a call of a function that asserts."
    by_itself, calls = chances(tree)
    return by_itself or not checkers.isdisjoint(calls)


@cache
def chances(tree):
    "Whether a tree checks something by itself, and the names that it calls."
    calls = {called(node) for node in walk(tree) if isinstance(node, ast.Call)}
    return shows_an_error(tree) or any(map(CHECKING.match, calls)) or any(map(can_fail, walk(tree))), calls


CHECKING = re.compile(r'assert|raises$|warns$|fail$|expect$|check_(call|output)$')


def can_fail(node):
    if isinstance(node, ast.keyword): return node.arg == 'check' and getattr(node.value, 'value', False) is True                # subprocess.run(..., check=True)
    return isinstance(node, ast.Assert) or (isinstance(node, ast.Raise) and 'AssertionError' in ast.unparse(node))


def shows_an_error(tree):
    "Whether a cell catches an error to print it: the message is stored, and compared with that of a fresh run."
    found = list(tree.body) if isinstance(tree, ast.Module) else []
    found += [n for outer in found if isinstance(outer, (ast.For, ast.With)) for n in outer.body]
    return any(isinstance(n, ast.Try) and n.handlers for n in found)


def called(call): return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, 'id', '')


def checking_functions(trees):
    "The names of functions that assert, themselves or through another."
    functions = {n.name: n for tree in trees for n in walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    found = set()
    while True:
        more = {name for name, node in functions.items() if name not in found and checks(node, found)}
        if not more: return found
        found |= more


COMPARING = {'equal', 'allclose', 'isclose', 'array_equal', 'isinstance', 'issubclass'}


def dropped_comparisons(tree, text):
    "Comparisons whose result nobody looks at and that ruff does not know: calls, and the last line of a cell where a semicolon hides it."
    hidden = tree.body[-1:] if text.rstrip().endswith(';') else []
    shown = [] if hidden else tree.body[-1:]
    for n in (n for n in walk(tree) if isinstance(n, ast.Expr) and n not in shown):
        if (isinstance(n.value, ast.Call) and called(n.value) in COMPARING) or (n in hidden and isinstance(n.value, (ast.Compare, ast.BoolOp))): yield n


def empty_assertions(tree):
    "Assertions that hold whatever the code does."
    for node in (n for n in walk(tree) if isinstance(n, ast.Assert)):
        test = node.test
        if isinstance(test, ast.Constant) and test.value: yield node, 'asserts a constant'
        elif (isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Eq, ast.Is)) and not any(isinstance(n, (ast.Call, ast.Await)) for n in walk(test))
              and [ast.dump(test.left)] == [ast.dump(c) for c in test.comparators]): yield node, 'compares a value with itself'


def errors_of_any_kind(tree):
    "`raises(Exception)` without `match`."
    for node in walk(tree):
        if isinstance(node, ast.Call) and called(node) == 'raises' and not any(k.arg == 'match' for k in node.keywords):
            if {ast.unparse(e) for a in node.args[:1] for e in getattr(a, 'elts', [a])} & {'Exception', 'BaseException'}: yield node


def reasonless_skips(tree):
    "Skips that do not say why."
    for node in walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) and called(node) in ('skip', 'xfail', 'skipif') else ''
        if name in ('pytest.skip', 'pytest.xfail', 'pytest.mark.skip', 'pytest.mark.skipif', 'pytest.mark.xfail'):
            given = [k.value for k in node.keywords if k.arg in ('reason', 'msg')] + (node.args if not name.endswith('skipif') else [])
            if not any(not (isinstance(v, ast.Constant) and not v.value) for v in given): yield node
    for node in (d for n in walk(tree) for d in getattr(n, 'decorator_list', [])):
        if ast.unparse(node) in ('pytest.mark.skip', 'pytest.mark.xfail'): yield node


@rule
def vacuous(book):
    "No vacuous test: a check that cannot fail promises what nobody looked at."
    places = [(c.where, c.tree, c.plain_code, len(c.head)) for c in book.code if c.tree]
    for where, tree, text, above in places + [(name, tree, ';', 0) for name, tree in book.tests.items()]:
        def line(node): return f'{where}: line {node.lineno + above}'
        for node in dropped_comparisons(tree, text): yield f'{line(node)}: `{ast.unparse(node)[:60]}` compares and asserts nothing; write `assert` before it'
        for node, what in empty_assertions(tree): yield f'{line(node)}: `{ast.unparse(node)[:60]}` {what}; assert what the code computes'
        for node in errors_of_any_kind(tree): yield f'{line(node)}: `{ast.unparse(node)[:60]}` passes with any error, a misspelt name in the test included; name the kind, or say `match=`'
        for node in reasonless_skips(tree): yield f'{line(node)}: a skip without a reason; say `reason="needs ..."`'
        for node in walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith('test_') and not checks(node, book.checkers):
                yield f'{line(node)}: `{node.name}` asserts nothing; assert what it promises, or drop it'


# The library's code -----------------------------------------------------------------------------------------------

QUIET = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.Try, ast.Delete)


@rule
def exported(book):
    "Importing the library does nothing and shows nothing: definitions only."
    for cell in (c for c in book.code if c.exported):
        if cell.tree is None:
            yield f'{cell.where}: exported code does not parse; mend it, or keep magics out of exported cells'
            continue
        for node in cell.tree.body:
            if not isinstance(node, QUIET) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                yield f'{cell.where}: `{ast.unparse(node).splitlines()[0][:60]}` would run on import; move it to a cell of its own, without `#| export`'



# Figures ----------------------------------------------------------------------------------------------------------

IMAGE = re.compile(r'!\[(?P<caption>[^\]]*)\]\((?P<target>[^)\s]*)[^)]*\)(?P<attributes>\{[^}]*\})?')


@rule
def figures(book):
    "Figures have a caption and alt text, tables a caption: who cannot see a picture, or meets it in a list of figures, must not lose the thread. (A drawing with a title of its own, such as the pipeline at a chapter's head, needs no more.)"
    from nbfilter import drawing_title
    for cell in book.code:
        if 'hide' in cell.directives: continue
        label = cell.options.get('label', '')
        if cell.has_image and not label.startswith('fig-') and not drawing_title(cell.outputs):
            if not cell.solution: yield f'{cell.where}: draws a picture without a label; add `#| label: fig-{chapter_name(cell.page)}-...`, `#| fig-cap:` and `#| fig-alt:`'
            elif not cell.options.get('fig-alt'): yield f'{cell.where}: the picture of this solution has no alt text; add `#| fig-alt: "..."`'
        if label.startswith('fig-'): yield from figure_faults(cell, label)
        if label.startswith('tbl-') and not cell.options.get('tbl-cap'): yield f'{cell.where}: table {label} has no caption; add `#| tbl-cap: "..."`'
    for where, text, _ in book.prose():
        for m in IMAGE.finditer(text):
            if not m['caption'].strip() and not re.search(r'(fig-)?alt="[^"]+"', m['attributes'] or ''): yield f"{where}: the image {m['target']} has neither caption nor alt text; write ![caption](...){{fig-alt=\"...\"}}"
        for m in re.finditer(r'^(.*)\{#(tbl-[\w-]+)[^}]*\}', text, re.M):
            if not re.match(r'\s*(:|Table:)\s*\S', m[1]) and '#tbl' not in m[1] and not m[1].lstrip().startswith(':::'): yield f'{where}: table {m[2]} has no caption; write `: What it shows {{#{m[2]}}}`'


def figure_faults(cell, label):
    caption, alt = (cell.options.get(k, '') for k in ('fig-cap', 'fig-alt'))
    if not caption: yield f'{cell.where}: figure {label} has no caption; add `#| fig-cap: "the question it answers"`'
    if not alt: yield f'{cell.where}: figure {label} has no alt text; add `#| fig-alt: "what is seen"`'
    if alt and alt == caption: yield f'{cell.where}: the alt text of {label} repeats the caption; say what is seen'
    if not cell.has_image and 'text/html' not in cell.mimes: yield f'{cell.where}: figure {label} has no stored picture; `make execute n={cell.page}` draws it'


def chapter_name(page): return re.sub(r'^\d\d_', '', page)


# References -------------------------------------------------------------------------------------------------------

REFERENCE = re.compile(r'(?<![\w\\])@((?:fig|tbl|eq|sec|lst)-[\w-]*\w)')


@cache
def workshop(book):
    "The pages as the builder reads them; what has not changed since is remembered."
    from book import load_book
    from pandoc import Workshop
    work = Workshop(load_book(book.root), book.root/'.cache'/'book')
    work.parse()
    return work


@rule
def references(book):
    "References resolve: a reader who follows one must arrive."
    from book import BookError
    try: work = workshop(book)
    except BookError as e:
        yield f'_quarto.yml: the book cannot be read: {e}'
        return
    for page, name, sentence in work.problems(): yield f'{speaking(book, page, name)}: {sentence}'
    for cell in (c for c in book.code if c.exported and c.tree):
        for label in (m for doc in docstrings(cell.tree) for m in REFERENCE.findall(doc)):
            if label not in work.refs: yield f'{cell.where}: a docstring names @{label}, which is defined nowhere'
    used = {name for parsed in work.parsed for name in parsed.cited}
    for label, place in work.refs.items():
        panel = label.rpartition('-')[0] in work.refs                                # @fig-x-a-2 is the second picture of @fig-x-a
        if label.startswith('fig-') and label not in used and not panel and re.match(r'nbs/\d\d_', place['page']):
            yield f"{speaking(book, place['page'], label)}: no sentence refers to figure {label}; say what to see in @{label}, or drop it"
    for key, n in Counter(work.bibliography_keys()).items():
        if n > 1: yield f'references.bib: {key} is defined {n} times; keep one'


def speaking(book, page, name):
    "The last cell of a page that names a label, or the page."
    return [page, *(c.where for c in book.pages.get(Path(page).stem, []) if name in c.source or name in c.prose)][-1]


def docstrings(tree):
    return [doc for n in walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and (doc := ast.get_docstring(n))]


def slug(heading):
    "The address pandoc gives to a heading."
    text = re.sub(r'\{[^}]*\}|[`*$]', '', heading).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', text)))


LINK = re.compile(r'(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)')
DEFINED = re.compile(r'\{[^}\n]*#([\w-]+)[^}\n]*\}')


def anchors(text): return set(DEFINED.findall(text)) | {slug(h) for h in re.findall(r'^#{1,6}\s+(.+)$', text, re.M)}


@rule
def links(book):
    "Local links and files exist: a page that moved takes its visitors along."
    places = [(where, text, book.root/'nbs' if cell else (book.root/where).parent) for where, text, cell in book.prose()]
    places += [(name, plain(text), (book.root/name).parent) for name, text in book.documents.items() if name.endswith('.md')]
    labels = {c.options.get('label') for c in book.code}
    by_page = {f'nbs/{stem}.ipynb': '\n\n'.join(c.prose for c in cells) for stem, cells in book.pages.items()} | book.documents
    for where, text, folder in places:
        for target in LINK.findall(text) + [m['target'] for m in IMAGE.finditer(text)]:
            if re.match(r'[a-z][a-z0-9+.-]*:|//', target) or '{{' in target: continue
            path, _, anchor = target.partition('#')
            file = Path(os.path.normpath(book.root/path.lstrip('/') if path.startswith('/') else folder/path)) if path else None
            if file and not file.exists(): yield f'{where}: the link to {target} leads to no file; mend the path'
            elif anchor:
                name = file.relative_to(book.root).as_posix() if file else f"nbs/{where.partition(':')[0]}.ipynb" if folder.name == 'nbs' and ': cell' in where else where
                if name in by_page and anchor not in anchors(by_page[name]) and not re.match(r'(api|cell)-', anchor) and anchor not in labels:
                    yield f'{where}: {name} has no place called #{anchor}; mend the link'


# What must not be in a file ---------------------------------------------------------------------------------------

REMOTE = [
    re.compile(r'<(?:img|script|iframe|source|video|audio|embed|track|object|image|use)\b[^>]*?\s(?:src|srcset|data|poster|(?:xlink:)?href)\s*=\s*["\']?\s*(?:https?:)?//[^\s"\'>]+', re.I),
    re.compile(r'<link\b(?![^>]*\brel\s*=\s*["\']?(?:canonical|license|alternate|author|me|search)\b)[^>]*?\shref\s*=\s*["\']?\s*(?:https?:)?//[^\s"\'>]+', re.I),
    re.compile(r'!\[[^\]]*\]\(\s*<?(?:https?:)?//[^\s)]+'),
    re.compile(r'(?:@import\s+(?:url\()?|\burl\(|\bsrc:\s*url\()\s*["\']?(?:https?:)?//[^\s"\')]+', re.I),
    re.compile(r'\b(?:fetch|import)\s*\(\s*["\'`]https?://[^"\'`]+|\bfrom\s+["\']https?://[^"\']+', re.I),
]
SHOWN = ('.qmd', '.html', '.css', '.scss', '.js', '.lua', '.yml', '.svg')


@rule
def remote(book):
    "Nothing is loaded from another host: the book must read on a train, and a reader must not be counted by others."
    places = [(where, plain(text)) for where, text, _ in book.prose(skip_code=False)]
    places += [(cell.where, ''.join(''.join(out['data'][mime]) for mime in ('text/html', 'image/svg+xml') if mime in out.get('data', {}))) for cell in book.code for out in cell.outputs]
    places += [(name, text) for name, text in book.texts.items() if name.endswith(SHOWN) and not name.endswith('.qmd') and not name.startswith(('.github/', 'tests/'))]
    places += [(name, plain(text)) for name, text in book.documents.items() if name.endswith('.md')]
    for where, text in places:
        for pattern in REMOTE:
            for m in pattern.finditer(text): yield f'{where}: loads from another host: {m[0][-80:]}; store the file in the repository'


LOCAL = [
    (re.compile(r'(?<![\w.])/(?:home|Users|root)/(?!runner\b)[\w.-]+/\S*|(?<!\w)[A-Za-z]:\\+Users\\+\w+'), 'a path of one machine', 'write it relative to the repository'),
    (re.compile(r'(?<![\w.])/[\w./-]*/site-packages/\S*'), 'a path of one machine', 'silence the warning that prints it, or write it relative'),
    (re.compile(r'https?://[^\s"\'<>]+/simple(?![\w-])|https?://[^\s/"\'<>:@]+:[^\s/"\'<>@]+@'), 'the address of a registry', "each user's pip knows its own"),
]


@rule
def machine(book):
    "No path of one machine and no address of a registry: the repository must work elsewhere, and say nothing about where it was written."
    own = re.compile(re.escape(str(book.root)) + r'(?![\w-])')
    for name, text in book.texts.items():
        for pattern, what, mend in [(own, 'the path of this checkout', 'write it relative to the repository'), *LOCAL]:
            for m in pattern.finditer(text):
                place = f"line {text.count(chr(10), 0, m.start()) + 1}"
                yield f'{name}: {place}: {what}: {m[0][:60]}; {mend}'


# Notebooks as files -----------------------------------------------------------------------------------------------

@rule
def clean(book):
    "Notebooks are clean and were run: a change shows in the diff as the change it is, and what a reader sees is what the code gives."
    for path in book.paths:
        nb = book.notebooks[path.stem]
        yield from unclean(book, path)
        ids = Counter(c.get('id') for c in nb['cells'])
        for cell_id, n in ids.items():
            if n > 1: yield f'{path.stem}: {n} cells have the id {cell_id}; give each its own'
        if 'stored_with' not in nb['metadata']: yield f'{path.stem}: cell 0: was never run as a whole; `make execute n={path.stem}` runs it and stores its outputs'
    for cell in book.code: yield from output_faults(cell)
    yield from stale_pictures(book)


def stale_pictures(book):
    "Stored pictures that another code has drawn, or other results: on any processor, whatever the digits in them."
    from nb import drawn_from
    for cell in (c for c in book.code if c.has_image and 'drawn_from' in c.raw['metadata']):
        if cell.raw['metadata']['drawn_from'] != drawn_from(book.root/'nbs'/f'{cell.page}.ipynb', cell.source):
            yield f'{cell.where}: its picture is older than its code or the results it shows; `make execute n={cell.page}` draws it again'


@rule
def anywhere(book):
    "Every notebook begins with the same hidden cell, which brings the library where it is missing, in the version of the page: a reader opens it in Colab, or alone in an empty folder."
    from anywhere import ID, first_cell
    from finish import read_settings
    wanted = first_cell(read_settings(book.root))
    for stem, cells in book.pages.items():
        found = [c for c in cells if c.kind == 'code']
        if not found or found[0].source != wanted or [c.raw.get('id') for c in found].count(ID) != 1:
            yield f'{stem}: does not begin with the cell of tools/anywhere.py; `python tools/check.py --mend` writes it'


def unclean(book, path):
    "Cells that `nbdev_clean` would change."
    from execnb.nbio import nb2str
    text = path.read_text(encoding='utf-8')
    wanted = cleaned(book, json.loads(text))
    mend = f'`python tools/check.py --mend` or `make execute n={path.stem}` cleans it'
    changed = [i for i, (a, b) in enumerate(zip(json.loads(text)['cells'], wanted['cells'])) if a != b]
    for i in changed: yield f'{path.stem}: cell {i}: carries execution counts or editor metadata; {mend}'
    if not changed and nb2str(wanted) != text: yield f'{path.stem}: cell 0: the file is not as nbdev_clean writes it; {mend}'


def cleaned(book, nb):
    "The notebook as nbdev's cleaner leaves it, with the keys that settings.ini allows."
    from configparser import ConfigParser
    from nbdev.clean import clean_nb
    config = ConfigParser(default_section='')
    config.read(book.root/'settings.ini', encoding='utf-8')
    settings = config['DEFAULT'] if config.has_section('DEFAULT') else {}
    nb = deepcopy(nb)
    clean_nb(nb, allowed_metadata_keys=settings.get('allowed_metadata_keys', '').split(),
             allowed_cell_metadata_keys=settings.get('allowed_cell_metadata_keys', '').split(), clean_ids=False)
    return nb


def output_faults(cell):
    tags = cell.raw.get('metadata', {}).get('tags', [])
    for out in cell.outputs:
        if out['output_type'] == 'error' and 'raises-exception' not in tags:
            yield f"{cell.where}: its stored output is an error ({out.get('ename')}); mend it, or catch the error and print it"
        if out['output_type'] == 'stream' and out.get('name') == 'stderr':
            yield f"{cell.where}: wrote to stderr ({''.join(out['text']).strip()[:50]!r}); silence the warning or the progress bar"
        shown = ''.join(''.join(v) for k, v in out.get('data', {}).items() if k.startswith('text/')) + ''.join(out.get('text', ''))
        if re.search(r'\bat 0x[0-9a-fA-F]{6,}', shown): yield f'{cell.where}: its output shows the address of an object, another at every run; print something that stays'
    if 'timing' in cell.directives and not cell.outputs: yield f'{cell.where}: is marked `#| timing` and has no output to exempt; drop the mark'


@rule
def options(book):
    "Cell options are spelled right and stand at the top of their cell, one to a line: elsewhere nbdev and Quarto take them for comments, and nobody hears of it."
    for cell in book.code:
        for line in cell.head:
            option, bare = OPTION.match(line), BARE.match(line)
            if option and option[1] in BARE_KNOWN: yield f'{cell.where}: `{line}` has a colon; write `#| {option[1]}`'
            elif option and option[1] not in OPTIONS_KNOWN: yield f'{cell.where}: `{line}` is no option this book knows; see CONTRIBUTING.md'
            elif option and not option[2].strip(): yield f'{cell.where}: `{line}` has no value on its line; write it on one line'
            elif not option and (not bare or bare[1] not in BARE_KNOWN): yield f'{cell.where}: `{line}` is no directive this book knows; see CONTRIBUTING.md'
        for line in cell.body.splitlines():
            if re.match(r'#\s*\|', line): yield f'{cell.where}: `{line.strip()}` stands below code and is ignored; move it to the top of the cell'


# Step -------------------------------------------------------------------------------------------------------------

@rule
def step(book):
    "The library, the contents, the symbol index and the plan of a course are in step with the notebooks: there is one source."
    yield from library_faults(book)
    yield from contents_faults(book)
    yield from symbol_faults(book)
    yield from course_faults(book)


def library_faults(book):
    "Export everything into another folder; each module must be there, and the same."
    with tempfile.TemporaryDirectory() as folder:
        fresh = export_copy(book, Path(folder))
        if isinstance(fresh, str):
            yield fresh
            return
        stored = {p.name: p.read_text(encoding='utf-8') for p in (book.root/LIBRARY).glob('*.py')}
    for name in sorted(stored.keys() | fresh.keys()):
        if name not in fresh: yield f'{LIBRARY}/{name}: no notebook exports it; delete it, or restore its notebook'
        elif name not in stored: yield f'{LIBRARY}/{name}: is missing; `make export` writes it'
        elif stored[name] != fresh[name]: yield f'{LIBRARY}/{name}: differs from what its notebook exports; edit the notebook, then `make export`'


def export_copy(book, folder):
    "The modules that nbdev exports from a copy of the notebooks, or a sentence on why it cannot."
    import shutil
    (folder/'nbs').mkdir()
    (folder/LIBRARY).mkdir()
    for path in book.paths: shutil.copy(path, folder/'nbs')
    for name in ('settings.ini', f'{LIBRARY}/__init__.py'): shutil.copy(book.root/name, folder/name)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PYTHONUTF8': '1'}
    write = f'import sys; from pathlib import Path; sys.path.append({str(Path(__file__).resolve().parent)!r}); import nb; nb.write_library(Path.cwd())'
    done = subprocess.run([sys.executable, '-c', write], cwd=folder, env=env, capture_output=True, text=True, encoding='utf-8')
    if done.returncode: return f'nbs: cannot be exported: {done.stderr.strip().splitlines()[-1]}; mend the cell it names'
    return {p.name: p.read_text(encoding='utf-8') for p in (folder/LIBRARY).glob('*.py')}


def contents_faults(book):
    "Every page stands in the contents once, and the chapters in their order."
    if not (book.root/'_quarto.yml').exists():
        yield '_quarto.yml: is missing; the contents of the book stand there'
        return
    from finish import listed_files
    pages = listed_files(book.root)
    for path in book.paths:
        if f'nbs/{path.name}' not in pages: yield f'_quarto.yml: does not list nbs/{path.name}; add its line (`make chapter` does)'
    for page, n in Counter(pages).items():
        if n > 1: yield f'_quarto.yml: lists {page} {n} times; keep one line'
        if not (book.root/page).exists(): yield f'_quarto.yml: lists {page}, which does not exist; drop the line or restore the file'
    numbers = [page for page in pages if re.match(r'nbs/\d\d_', page)]
    if numbers != sorted(numbers): yield '_quarto.yml: the chapters are not in the order of their numbers; sort the lines'


def symbol_faults(book):
    "nbs/symbols.qmd is what the filter would write."
    from nbfilter import symbol_index
    page = book.root/'nbs'/'symbols.qmd'
    with suppress(SyntaxError):                            # of an exported cell: `exported` tells
        if page.exists() and page.read_text(encoding='utf-8') != symbol_index(page.parent): yield 'nbs/symbols.qmd: is out of step with the notebooks; `make export` writes it'


def course_faults(book):
    "The numbers in nbs/educators.qmd are those of the chapters."
    import course
    page = book.root/'nbs'/'educators.qmd'
    if page.exists() and page.read_text(encoding='utf-8') != course.plan(page.parent): yield 'nbs/educators.qmd: its reading times, exercises and workbooks are not those of the chapters; `make export` writes them'


# Classes ----------------------------------------------------------------------------------------------------------

@rule
def classes(book):
    "One class, one statement: a private base with a single heir is a slice of a class; what a reader looks up must stand in one place."
    for path in sorted((book.root/LIBRARY).glob('*.py')):
        found = [n for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, ast.ClassDef)]
        heirs = Counter(ast.unparse(base) for n in found for base in n.bases)
        for n in found:
            if n.name.startswith('_') and heirs[n.name] == 1: yield f'{LIBRARY}/{path.name}: class {n.name} has one heir; let the class grow in the notebook instead: `class Name(Name):` (tools/grow.py)'
        for name, count in Counter(n.name for n in found).items():
            if count > 1: yield f'{LIBRARY}/{path.name}: class {name} stands {count} times; one name, one class'


# Chapters ---------------------------------------------------------------------------------------------------------

LONG, SCREEN = 40, 60                      # lines of a cell; of one that is a single class


@rule
def anatomy(book):
    "Every chapter has the same parts in the same order, so that a reader finds the question, the errors and the exercises where the last chapter had them."
    for stem, cells in book.chapters.items():
        name, text = chapter_name(stem), '\n\n'.join(c.source for c in cells if c.kind == 'markdown')
        if not cells or not re.match(rf'# \S.*\{{#sec-{name}( \.unnumbered)?\}}\s*(\n|$)', cells[0].source): yield f'{stem}: cell 0: does not open with `# Title {{#sec-{name}}}`; begin the first cell with it'
        if len(re.findall(r'^# ', plain(text), re.M)) > 1: yield f'{stem}: has a second title; one `#` heading, the rest begin with `##`'
        if f'default_exp {name}' not in '\n'.join(c.source for c in cells if c.kind == 'code').replace('#| ', ''): yield f'{stem}: has no cell `#| default_exp {name}`; add it below the title'
        if not re.search(r':::\s*\{[^}]*title="You will build"', text): yield f'{stem}: has no "You will build" callout; add ::: {{.callout-note title="You will build"}}'
        for heading in ('What can go wrong', 'Exercises', 'Recap'):
            if not re.search(rf'^## {heading}\b', text, re.M): yield f'{stem}: has no section `## {heading}`; add it'
        yield from exercise_faults(stem, cells)
        yield from rhythm_faults(cells)


def section(cells, heading):
    "The cells under a heading of level two, the heading's own cell first."
    starts = [i for i, c in enumerate(cells) if c.kind == 'markdown' and re.search(r'^## ', plain(c.source), re.M)]
    first = next((i for i in starts if re.search(rf'^## {heading}\b', cells[i].source, re.M)), None)
    if first is None: return []
    return cells[first:next((i for i in starts if i > first), len(cells))]


def exercise_faults(stem, cells):
    "Four to eight exercises, each with a folded solution that asserts its target."
    checkers = checking_functions([c.tree for c in cells if c.kind == 'code' and c.tree])
    part = section(cells, 'Exercises')
    if not part: return
    found = []                                             # (number, solution cells)
    for cell in part:
        if cell.kind == 'markdown': found += [(m, []) for m in re.findall(r'^(?:#{3,4}\s+(?:Exercise\s+)?|\*\*(?:Exercise\s+)?)(\d+)\b', plain(cell.source), re.M)]
        elif found and cell.solution: found[-1][1].append(cell)
    if not 4 <= len(found) <= 8: yield f'{part[0].where}: has {len(found)} exercises; write four to eight, each beginning `**1.**`'
    for number, solutions in found:
        if not solutions: yield f'{part[0].where}: exercise {number} has no solution; add a cell with `#| code-summary: "Solution"` below it'
        elif not any(c.tree and checks(c.tree, checkers) for c in solutions): yield f'{solutions[0].where}: the solution of exercise {number} does not assert its target; a machine must see that it is met'
        for c in solutions:
            if c.options.get('code-fold') != 'true': yield f'{c.where}: a solution lies open; add `#| code-fold: true`'


def rhythm_faults(cells):
    "Code in small pieces: no third cell in a row without a sentence, none too long to read at once."
    run = 0
    for cell in cells:
        shown = cell.kind == 'code' and not cell.directives & {'hide', 'default_exp'} and cell.options.get('echo') != 'false' and cell.options.get('code-fold') != 'true'
        run = 0 if cell.prose or cell.makes_prose else run + shown
        if shown and run == 3: yield f'{cell.where}: is the third code cell in a row; put a sentence between them'
        lines = [line for line in cell.body.splitlines() if line.strip()]
        limit = SCREEN if cell.tree and [type(n) for n in cell.tree.body] == [ast.ClassDef] else LONG
        if shown and len(lines) > limit: yield f'{cell.where}: has {len(lines)} lines; a reader takes in about 20 at once, {limit} is the limit: cut it in two'


FILLER = re.compile(r"\b(simply|just(?! (?:as|like|before|after|above|below|under|over|enough|in time|short|right|large|big|small|once|one|two|what|how|that|this|now|the)\b)|powerful|seamless(?:ly)?|leverag(?:e|es|ing)|delv(?:e|es|ing)"
                    r"|div(?:e|ing) (?:deep(?:er)? )?into|in this (?:section|chapter),? (?:we|you) will|it is (?:worth noting|important to note)|needless to say)\b", re.I)


WIDTH, WIDEST = 80, 96                     # characters that fit beside the two lists of the site on a laptop; what a page that waits may have

@rule
def width(book):
    "Code fits its box: what a reader must scroll sideways to see, most readers never see."
    yield from due(book, 'width', wide_cells(book, WIDTH))
    yield from (sentence for stem, sentence in wide_cells(book, WIDEST) if waits(stem, 'width'))


def wide_cells(book, limit):
    for cell in book.code:
        if 'hide' in cell.directives or cell.options.get('echo') == 'false': continue
        wide = [line for line in cell.body.splitlines() if len(line) > limit]
        if wide: yield cell.page, f'{cell.where}: {len(wide)} line(s) of more than {limit} characters, such as `{wide[0].strip()[:50]}...`; break them'


@rule
def words(book):
    "No filler: each of these words can be struck and the sentence says the same, shorter."
    for where, text, _ in book.prose():
        text = re.sub(r'\]\([^)]*\)|\{[^}]*\}|\$[^$]*\$', ' ', text)
        for m in FILLER.finditer(text): yield f'{where}: "{m[0]}"; strike it'


# The second edition -----------------------------------------------------------------------------------------------

CORE = 300                                 # lines of visible code that a newcomer reads in an hour, with the prose around them


@rule
def core(book):
    "The core path, which is everything before `## Going deeper`, has at most 300 lines of visible code: a newcomer reads it in about an hour. Folded code does not count."
    from reading import lengths
    long = {stem: lengths(book.notebooks[stem]['cells'])[0].lines for stem in book.chapters}
    yield from due(book, 'core', ((stem, f'{stem}: its core path has {n} lines of visible code, the limit is {CORE}; move what the idea does not need below `## Going deeper`')
                                  for stem, n in long.items() if n > CORE))


@rule
def diagrams(book):
    """Two figures of a chapter explain its idea: drawn with the diagram helpers of `figures`, from values that the chapter has computed.

    The rule sees a labelled figure whose code calls a helper (any public function of the figures appendix that returns an `SVG` or a piece of one),
    itself or through a function of the chapter, and which reads a name that an earlier cell has computed. It cannot see whether that value
    is drawn, what the picture explains, or a diagram that matplotlib draws. The pipeline at the head reads nothing, so it does not count."""
    helpers = drawing_helpers(book)
    def few():
        for stem, cells in book.chapters.items():
            n = sum(1 for cell in explaining(cells, helpers))
            if n < 2: yield stem, f'{stem}: has {n} diagram(s); explain the idea in two figures that helpers of the figures appendix draw from the values of the chapter'
    yield from due(book, 'diagrams', few())


def drawing_helpers(book):
    "Public functions of the figures appendix that return a drawing or a piece of one."
    nodes = [n for cell in book.pages.get('figures', []) if cell.exported and cell.tree for n in cell.tree.body if isinstance(n, ast.FunctionDef)]
    return {n.name for n in nodes if not n.name.startswith('_') and n.returns is not None and ast.unparse(n.returns).strip("'") in ('SVG', 'str')}


def explaining(cells, helpers):
    "The labelled figures of a chapter that draw computed values with helpers."
    drawing, computed = set(), set()
    for cell in (c for c in cells if c.kind == 'code' and c.tree):
        drawing |= {a.asname or a.name for n in walk(cell.tree) if isinstance(n, ast.ImportFrom) and n.module == f'{LIBRARY}.figures' for a in n.names if a.name in helpers}
        read = {n.id for n in walk(cell.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        if cell.options.get('label', '').startswith('fig-') and calls(cell.tree) & drawing and read & computed: yield cell
        drawing |= {n.name for n in cell.tree.body if isinstance(n, ast.FunctionDef) and drawing & calls(n)}
        computed |= set(computed_names(cell.tree))


def calls(tree): return {called(n) for n in walk(tree) if isinstance(n, ast.Call)}


def computed_names(tree):
    "Names that a cell binds to something other than a constant."
    for node in walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.AugAssign)) and node.value is not None:
            if not any(isinstance(n, (ast.Call, ast.Name, ast.Subscript, ast.BinOp)) for n in ast.walk(node.value)): continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        elif isinstance(node, ast.For): targets = [node.target]
        else: continue
        yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


NUMBERED = re.compile(r'\b[Cc]hapters?(?:\s|~|&nbsp;)+(?P<numbers>\d+(?:(?:,\s*|\s+and\s+|,\s+and\s+|\s+to\s+|\s*[–-]\s*)\d+)*)')
PARTED = re.compile(r'\bParts?\s+(?P<numbers>[IVX]+(?:(?:,\s*|\s+and\s+|\s+to\s+)[IVX]+)*)\b')


@rule
def absent(book):
    "Nobody is sent to a chapter or a part that is not there yet: a promise that the reader cannot follow is worse than none. (`@sec-` of a missing page: rule `references`.)"
    last = max((int(stem[:2]) for stem in book.chapters), default=0)
    parts = set(re.findall(r'part: *["\']?([IVX]+)\W', book.texts.get('_quarto.yml', '')))
    def promises():
        for where, page, text in promising(book):
            for m in NUMBERED.finditer(text):
                if any(int(n) > last for n in re.findall(r'\d+', m['numbers'])): yield page, f'{where}: "{m[0]}", but the last chapter is {last}; say it without the number, or not yet'
            for m in PARTED.finditer(text):
                if not set(re.findall('[IVX]+', m['numbers'])) <= parts: yield page, f'{where}: "{m[0]}" is not in _quarto.yml; say it without the number, or not yet'
    yield from due(book, 'absent', promises())


def promising(book):
    "Where, on which page, and the words: prose, captions, docstrings and comments."
    for where, text, cell in book.prose(): yield where, cell.page if cell else '', text
    for cell in book.code: yield cell.where, cell.page, cell.source


ENTRY = re.compile(r'^\[(?P<term>[^\]]+)\]\{#(?P<id>[\w-]+)\}(?: \[\(also (?P<also>[^\]]+)\)\]\{\.also\})?\n:   (?P<sentence>.+) Defined in @(?P<home>sec-[\w-]*\w)\.$', re.M)


@rule
def glossary(book):
    "Every term of the glossary has a home: a section that defines it, and says it in bold. A reader who has met the word in a paper must find where this book explains it."
    text = book.documents.get('nbs/glossary.qmd', '')
    found, terms = [m.groupdict() for m in ENTRY.finditer(text)], []
    for start in re.findall(r'^\[([^\]]+)\]\{#term-', text, re.M):
        if start not in {m['term'] for m in found}: yield f'nbs/glossary.qmd: `{start}` is no entry; write `[{start}]{{#term-...}}`, below it `:   A sentence. Defined in @sec-....`'
    for glued in re.findall(r'(?<=[^\n])\n\[([^\]]+)\]\{#term-', text): yield f'nbs/glossary.qmd: `{glued}` follows the entry before it without an empty line, and would be read as a part of it; add one'
    for entry in found: yield from entry_faults(entry)
    for one, two in zip(found, found[1:]):
        if not order(one['term']) < order(two['term']): yield f"nbs/glossary.qmd: `{two['term']}` stands behind `{one['term']}`; keep the order of the alphabet, each term once"
    for entry in found:
        page, said = home(book, entry['home'])
        waiting = page and waits(page, entry['id'])
        terms.append((page, entry['id']))
        if page is None: yield f"nbs/glossary.qmd: the home of `{entry['term']}`, @{entry['home']}, is no section of the book; correct it"
        elif said & names_of(entry):
            if waiting: yield f"{page}: @{entry['home']} says `{entry['term']}` in bold; strike `{entry['id']}` from its line in WAITING (tools/check.py)"
        elif not waiting: yield f"{page}: @{entry['home']} never says **{entry['term']}** in bold, where the glossary sends its readers; say it where it is defined, or correct the home"
    for stem in book.pages:
        for item in WAITING.get(chapter_name(stem), '').split(', '):
            if item.startswith('term-') and (stem, item) not in terms: yield f'{stem}: `{item}` has another home, or none; strike it from its line in WAITING (tools/check.py)'


def entry_faults(entry):
    "An entry has the anchor of its term, and one sentence."
    where = f"nbs/glossary.qmd: `{entry['term']}`"
    if entry['id'] != f"term-{order(entry['term'])}": yield f"{where} has the anchor #{entry['id']}; write #term-{order(entry['term'])}"
    if not re.fullmatch(r'[^a-z].*[^.]\.', entry['sentence']) or re.search(r'[.!?] [A-Z]', entry['sentence']): yield f'{where} is not defined in one sentence; begin with a capital, end with a period'


def order(term):
    "A term as its anchor, and as it is sorted."
    return re.sub(r'[^a-z0-9]+', '-', term.lower().replace("'", '')).strip('-')


def names_of(entry):
    "What a home may call a term: its name or another of its names, also in the plural."
    names = [entry['term'].lower(), *(entry['also'] or '').lower().split(', ')]
    return {form for name in names if name for form in (name, name + 's', name + 'es')}


@cache
def prose_of_pages(book):
    "Each page's name and words, without code."
    places = [(stem, [c.prose for c in cells]) for stem, cells in book.pages.items()] + [(name, [text]) for name, text in book.documents.items() if name.endswith('.qmd')]
    return [(page, '\n\n'.join(map(plain, texts))) for page, texts in places]


@cache
def home(book, label):
    "The page that holds a section, and what the section says in bold; None where there is no such section."
    for page, text in prose_of_pages(book):
        if f'{{#{label}' not in text: continue
        start = re.search(rf'^(#+) .*\{{#{label}(?: [^}}]*)?\}}', text, re.M)
        if not start: continue
        rest = text[start.end():]
        end = re.search(rf'^#{{1,{len(start[1])}}} ', rest, re.M)
        bold = re.findall(r'\*\*(?=\S)(.+?)\*\*', rest[:end.start()] if end else rest, re.S)
        return page, {re.sub(r'[$*`_.:,]|\s*\(.*?\)', '', ' '.join(b.lower().split())) for b in bold}
    return None, set()


MINUTES = re.compile(r'[Rr]eading time:?\**:?\s*(?:about\s+)?(\d+)\s*min')
EXERCISE = re.compile(r'^\*\*(\d+)\.\*\*\s*(?:\*(\w+) · (\w+) · (\d+) min\.\*)?', re.M)
KINDS, HARD = {'Predict', 'Paper', 'Explain', 'Implement'}, {'easy', 'medium', 'hard'}


@rule
def form(book):
    "A chapter of the second edition says what it gives, needs and takes; shows where it is in the pipeline; tells what goes deeper; and asks four kinds of questions. A reader of one chapter can read them all."
    yield from due(book, 'form', ((stem, fault) for stem, cells in book.chapters.items() for fault in form_faults(stem, cells)))


def form_faults(stem, cells):
    text = '\n\n'.join(c.prose for c in cells)
    promise = plain(cells[0].source).partition('\n')[2].strip() if cells else ''
    if not promise.startswith('After this chapter') or len(re.findall(r'[.!?](?=\s|$)', promise)) != 1:
        yield f'{stem}: cell 0: below the title stands no promise; write one sentence that begins "After this chapter you can"'
    if not any('pipeline(' in c.body for c in cells[1:7]) and not stem.startswith('00'):
        yield f'{stem}: its head does not show where it is in the pipeline; add a cell `#| echo: false` with `pipeline("ids")` below the title'
    if not stem.startswith('00') and not re.search(r'^## Going deeper[ \t]*(\{[^}\n]*\})?[ \t]*$', text, re.M): yield f'{stem}: has no section `## Going deeper`; the core path ends there'
    yield from callout_faults(stem, cells, text)
    yield from cure_faults(stem, cells)
    yield from kind_faults(stem, cells)


def callout_faults(stem, cells, text):
    "What it needs, how long it runs and how long it takes to read, the last as counted."
    from reading import lengths
    callout = re.search(r':::+\s*\{[^}]*title="You will build"[^}]*\}(.*?)^:::', text, re.M | re.S)
    if not callout: return
    said = callout[1]
    if not re.search(r'\bneeds?\b', said): yield f'{stem}: "You will build" does not say what the reader needs; add `*You need:* ...`'
    if not re.search(r'\b[Rr]unning time\b|\bruns in\b', said): yield f'{stem}: "You will build" does not say how long the chapter runs; add `*Running time:* ... on two cores.`'
    typed, counted = MINUTES.search(said), lengths([c.raw for c in cells])[0].minutes
    if not typed: yield f'{stem}: "You will build" does not give the reading time; add `*Reading time:* {counted} minutes.`'
    elif abs(int(typed[1]) - counted) > max(5, counted / 4): yield f'{stem}: "You will build" says {typed[1]} minutes of reading, the core path takes {counted}; correct it'


def cure_faults(stem, cells):
    "Each trouble as symptom, cause and cure, in this order."
    part = section(cells, 'What can go wrong')
    words = [re.findall(r'\*\*(Symptom|Cause|Cure):\*\*', c.prose) for c in part]
    if part and sum(map(len, words)) < 6: yield f'{part[0].where}: "What can go wrong" tells fewer than two troubles as **Symptom:** ... **Cause:** ... **Cure:** ...'
    for cell, found in zip(part, words):
        if found != ['Symptom', 'Cause', 'Cure'] * (len(found) // 3): yield f"{cell.where}: {', '.join(found)}: a trouble is told as symptom, cause, cure, in this order"


def kind_faults(stem, cells):
    "Each exercise says its kind, difficulty and minutes and has a hint and an idea; all four kinds occur."
    part = section(cells, 'Exercises')
    found = list(told_exercises(part))
    for where, number, kind, difficulty, text, solutions in found:
        if kind not in KINDS or difficulty not in HARD: yield f'{where}: exercise {number} does not begin like `**{number}.** *Implement · medium · 15 min.*`; the kinds are {", ".join(sorted(KINDS))}'
        elif 'title="Hint"' not in text: yield f'{where}: exercise {number} has no hint; add ::: {{.callout-tip collapse="true" title="Hint"}}'
        for c in solutions:
            if not re.search(r'^# Idea: ', c.body, re.M): yield f'{c.where}: the solution of exercise {number} does not say its idea; begin with a comment `# Idea: ...`'
    missing = KINDS - {kind for _, _, kind, *_ in found}
    if part and missing: yield f'{part[0].where}: no exercise of the kind {", ".join(sorted(missing))}; ask all four'


def told_exercises(cells):
    "Where each exercise stands, its number, kind and difficulty, its text to the next one, and its solutions."
    told = []
    for cell in cells:
        if cell.kind == 'markdown':
            before, *parts = re.split(r'^(?=\*\*\d+\.\*\*)', plain(cell.source), flags=re.M)
            if told: told[-1][4] += before
            for part in parts: told.append([cell.where, *EXERCISE.match(part).groups()[:3], part, []])
        elif told and cell.solution: told[-1][5].append(cell)
    return told


@rule
def waiting(book):
    "The list of what waits for the second edition (WAITING in tools/check.py) names pages and rules that exist: a name that nothing has would never be struck."
    pages, excused = {chapter_name(stem) for stem in book.pages}, {'core', 'width', 'diagrams', 'absent', 'form'}
    for name, line in WAITING.items():
        if name not in pages: yield f'tools/check.py: WAITING: `{name}` is no page of the book; strike it'
        for item in line.split(', '):
            if item not in excused and not item.startswith('term-'): yield f'tools/check.py: WAITING: {name}: `{item}` excuses nothing; strike it'


# The command ------------------------------------------------------------------------------------------------------

def mend(root):
    "Mend what needs no thought: clean every notebook, write the library and what lists its names and chapters."
    sys.path.insert(0, str(root/'tools'))
    import nb
    for path in Book(root).paths: nb.clean(path)
    nb.export_all()


def report(book, names=None):
    "Print what each rule finds under its reason; the number of findings."
    total = 0
    for name in names or RULES:
        found = list(dict.fromkeys(RULES[name](book)))
        if found: print(f'\n{name}: {RULES[name].__doc__}', *(f'  {sentence}' for sentence in found), sep='\n')
        total += len(found)
    return total


def main(argv):
    if argv == ['--rules']: return print('\n'.join(f'{name:<12}{check.__doc__}' for name, check in RULES.items()))
    if '--mend' in argv: mend(ROOT)
    names = [a for a in argv if a != '--mend']
    unknown = [n for n in names if n not in RULES]
    if unknown: sys.exit(f"no rule is called {unknown[0]!r}; there are {', '.join(RULES)}")
    total = report(Book(ROOT), names)
    if total: sys.exit(f"\n{total} {'thing' if total == 1 else 'things'} to mend.")
    print('The house is in order.')


if __name__ == '__main__': main(sys.argv[1:])
