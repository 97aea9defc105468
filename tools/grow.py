"""Classes that grow in a notebook stand once in the library.

A notebook explains a class method by method; each cell adds to what stands already:

    class Trainer(Trainer):            # the class so far, and one thing more
        def train_step(self): ...

In a kernel that is ordinary Python: each slice inherits from the one before. In the module, `merged` makes one `class`
statement of all slices, in the place of the first. The two must mean the same, so a slice may only add: what would make them
differ (a method defined twice, `super()` that would have met the slice before, another decorator) is refused.
"""
import ast, re

from nbfilter import grows

MARKER = re.compile(r'# %% \S+ #\S+\n')            # the line that nbdev writes above each exported cell


class Refused(ValueError):
    "A slice that does more than add, in a sentence."


def merged(source, name='the module'):
    "The text of a module, with the slices of each class merged into one statement."
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    growing = families(tree, name)
    if not growing: return source
    for first, *slices in reversed(growing):
        check(first, slices, tree, name)
        bodies = [body(lines, s) for s in slices]
        for s in reversed(slices): lines[start(s) - 1:s.end_lineno] = ['\0'] * (s.end_lineno - start(s) + 1)
        lines[first.end_lineno - 1] = lines[first.end_lineno - 1].rstrip('\n') + '\n' + ''.join(f'\n{b}' for b in bodies)
        only_doc = len(first.body) == 1 and isinstance(first.body[0], ast.Pass)
        if only_doc: lines[first.body[0].lineno - 1] = '\0'
    return tidy(''.join(line for line in lines if line != '\0'))


def families(tree, name):
    "Each class that grows: its first statement and its slices, in order."
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef): continue
        if grows(node):
            if node.name not in found: raise Refused(f'{name}: `class {node.name}({node.name})` adds to a class that no cell before it begins')
            found[node.name].append(node)
        elif node.name in found: raise Refused(f'{name}: class {node.name} is defined twice; write `class {node.name}({node.name}):` to add to it')
        else: found[node.name] = [node]
    return [family for family in found.values() if len(family) > 1]


def start(node): return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def members(node):
    "The names that the body of a class binds."
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): yield item.name
        elif isinstance(item, ast.Assign): yield from (t.id for t in item.targets if isinstance(t, ast.Name))
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name): yield item.target.id


def check(first, slices, tree, name):
    "Refuse what would mean one thing in a kernel and another in the module."
    here = f'{name}: class {first.name}'
    known = {m: first for m in members(first)}
    for node in slices:
        if len(node.bases) > 1 or node.keywords: raise Refused(f'{here}: a slice has `{first.name}` as its only base; the first statement names the others')
        decorated = [ast.dump(d) for d in node.decorator_list]
        if decorated and decorated != [ast.dump(d) for d in first.decorator_list]: raise Refused(f'{here}: a slice is decorated otherwise than the first statement')
        if not decorated and first.decorator_list and any(isinstance(item, ast.AnnAssign) for item in node.body):
            raise Refused(f'{here}: a slice has a field that its first statement\'s decorator would see only in the module; decorate the slice as well')
        if ast.get_docstring(node) is not None: raise Refused(f'{here}: a slice has a docstring; the class has one, in its first statement')
        again = sorted(set(members(node)) & set(known))
        if again: raise Refused(f'{here}: {again[0]} is defined twice; a slice only adds')
        hidden = sorted(supers(node) & set(known))
        if hidden: raise Refused(f'{here}: `super().{hidden[0]}` means the slice before in a notebook and the base class in the module')
        known |= {m: node for m in members(node)}
    below = bound_between(first, slices[-1], tree)
    late = needed_at_once(slices) & below
    if late: raise Refused(f'{here}: a slice needs {sorted(late)[0]} while the class is made, and it is defined below the first statement; move it up')
    if not postponed(tree) and (late := annotated_with(slices) & (below | {first.name})):
        raise Refused(f'{here}: the type {sorted(late)[0]} is not defined yet where the class is made; begin the first exported cell with `from __future__ import annotations`')


def supers(node):
    "The names asked of `super()`."
    return {a.attr for a in ast.walk(node) if isinstance(a, ast.Attribute) and isinstance(a.value, ast.Call) and isinstance(a.value.func, ast.Name) and a.value.func.id == 'super'}


def needed_at_once(slices):
    "Names that are looked up while a class statement runs: in values, defaults and decorators, not inside functions."
    found = set()
    for node in slices:
        for item in node.body:
            parts = [*item.decorator_list, *item.args.defaults, *filter(None, item.args.kw_defaults)] if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) else [getattr(item, 'value', None)]
            found |= {n.id for p in parts if p is not None for n in ast.walk(p) if isinstance(n, ast.Name)}
    return found


def postponed(tree): return any(isinstance(n, ast.ImportFrom) and n.module == '__future__' and n.names[0].name == 'annotations' for n in tree.body)


def annotated_with(slices):
    "Names that stand in the types of parameters, results and fields, outside quotes."
    parts = [p for node in slices for n in ast.walk(node) for p in (getattr(n, 'annotation', None), getattr(n, 'returns', None)) if isinstance(p, ast.AST)]
    return {n.id for p in parts for n in ast.walk(p) if isinstance(n, ast.Name)}


def bound_between(first, last, tree):
    "Names that the module binds between two statements."
    found = set()
    for node in tree.body:
        if not first.lineno < node.lineno < last.lineno: continue
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.add(node.name)
        else: found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found - {first.name}


def body(lines, node):
    "The lines of a class below its header, comments and all."
    if node.body[0].lineno == node.lineno:                                     # class X(X): y = 1
        line = lines[node.lineno - 1]
        return '    ' + line[node.body[0].col_offset:].rstrip('\n') + '\n'
    header = next(i for i in range(node.lineno, node.end_lineno + 1) if lines[i - 1].split('#')[0].rstrip().endswith(':'))
    return ''.join(lines[header:node.end_lineno])


def tidy(source):
    "No marker without code below it, and no more than one blank line before the next."
    parts = re.split(r'(?m)^(?=# %% )', source)
    kept = [p for p in parts if p and not MARKER.fullmatch(p.strip() + '\n')]
    return ''.join(p.rstrip('\n') + '\n\n' for p in kept).rstrip('\n') + '\n'
