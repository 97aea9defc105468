"""What the tests cost, held against the budgets of the book in a table that `make test` prints at its end.

Costs are processor seconds, of a test and of the processes it waited for: other work on the machine moves them little. The
first test that uses a shared fixture pays for it. Only the run as a whole is measured by the clock.
"""
import os, re, time
from collections import defaultdict

import nb
import pytest

TESTS = 15                     # processor seconds for the test files of one chapter
CLOCK = 15 * 60                # seconds for everything, on two quiet cores
MODULES = {p.stem.partition('_')[2]: p.stem for p in sorted(nb.NBS.glob('[0-9][0-9]_*.ipynb'))}


def spent():
    own = os.times()
    return own.user + own.system + nb.children_seconds()


class Costs:
    "Measures in the processes that run tests, adds up in the one that reports."
    def __init__(self):
        self.mark, self.start = 0.0, time.monotonic()
        self.notebooks, self.tests, self.total = {}, defaultdict(float), 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        self.mark = spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = spent()
        report.user_properties = [*report.user_properties, ('processor', now - self.mark)]
        self.mark = now
        return report

    def pytest_runtest_logreport(self, report):
        seconds = [v for k, v in report.user_properties if k == 'processor'][-1:]
        self.total += sum(seconds)
        file, name = re.match(r'(?:.*/)?test_(\w+)\.py::(.*)', report.nodeid).groups()
        whole = re.search(r'fresh_run_gives\[(\w+)\]', name)
        if whole: self.notebooks[whole[1]] = self.notebooks.get(whole[1], 0.0) + sum(seconds)
        if not whole: self.tests[next((c for m, c in MODULES.items() if file == m or file.startswith(f'{m}_')), file)] += sum(seconds)

    def rows(self):
        "(what, budget, spent) of each line; tests of no single chapter have no budget of their own, only their share of the clock."
        for stem, seconds in sorted(self.notebooks.items()): yield f'executing {stem}', nb.budget(nb.NBS/f'{stem}.ipynb'), seconds
        for name, seconds in sorted(self.tests.items()): yield f'the tests of {name}', TESTS if name in MODULES.values() else None, seconds

    def pytest_terminal_summary(self, terminalreporter):
        if not self.total: return
        rows = list(self.rows())
        say = terminalreporter.write_line
        say('\nprocessor seconds   spent  budget')
        for what, budget, seconds in rows: say(f"{what:<28}{seconds:8.1f}{budget or '':8}{'   over' if budget and seconds > budget else ''}")
        clock = time.monotonic() - self.start
        say(f"{'everything':<28}{self.total:8.0f}\n{'everything, by the clock':<28}{clock:8.0f}{CLOCK:8}{'   over' if clock > CLOCK else ''}")
