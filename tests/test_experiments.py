"Each long experiment, at reduced size: its story still holds; and what is stored was made by the code that the chapter shows."
import json

import experiments
import pytest

EXPERIMENTS = experiments.found()


def INPUTS(experiment=None, **_):
    "An experiment depends on its own cells, on what its chapter imports, and on what is stored of it."
    if not isinstance(experiment, experiments.Experiment): return ['nbs/results/*'] if experiment is None else []
    return [f'text:{experiment.code}', f'imports:nbs/{experiment.chapter}.ipynb', f'nbs/results/{experiment.name}.json']


def each(test): return pytest.mark.parametrize('experiment', EXPERIMENTS, ids=lambda e: e.name)(test)


@each
def test_the_story_holds_at_reduced_size(experiment): experiment.check(experiment.runs([0], quick=True))


@each
def test_what_is_stored_tells_the_story_and_was_made_by_this_code(experiment):
    assert experiment.stored.is_file(), f'run `make experiments args={experiment.name}`'
    stored = json.loads(experiment.stored.read_text(encoding='utf-8'))
    assert stored['code'] == experiment.code, f'the cell changed after its results were stored: `make experiments args={experiment.name}`'
    assert (stored['chapter'], stored['seeds'], len(stored['runs'])) == (experiment.chapter, experiment.seeds, experiment.seeds)
    experiment.check(stored['runs'])


def test_nothing_is_stored_that_no_chapter_makes():
    assert {p.stem for p in experiments.RESULTS.glob('*')} == {e.name for e in EXPERIMENTS}


@pytest.mark.slow
@each
def test_the_whole_experiment_tells_the_story(experiment): experiment.check(experiment.runs(range(experiment.seeds), quick=False))


def chapter(folder, *cells):
    "A notebook with these code cells."
    path = folder/'99_trial.ipynb'
    path.write_text(json.dumps({'cells': [{'cell_type': 'code', 'source': c} for c in cells]}), encoding='utf-8')
    return path


TRIAL = '#| experiment\nimport math\ndef coin(seed, quick=False): return {"heads": seed % 2}\ncoin.seeds = 2\n'
CHECK = '#| experiment\ndef check_coin(runs): assert math.isclose(sum(r["heads"] for r in runs), len(runs) // 2)\n'


def test_an_experiment_is_found_run_checked_and_stored(tmp_path, monkeypatch):
    found, = experiments.of_notebook(chapter(tmp_path, 'raise RuntimeError("not marked")', TRIAL, CHECK))
    assert (found.name, found.seeds, found.chapter) == ('coin', 2, '99_trial')
    runs = found.runs(range(2), quick=False)
    found.check(runs)
    with pytest.raises(AssertionError): found.check([{'heads': 1}, {'heads': 1}])
    monkeypatch.setattr(experiments, 'RESULTS', tmp_path/'results')
    experiments.store(found, runs, 1.2)
    stored = json.loads(found.stored.read_text(encoding='utf-8'))
    assert stored['runs'] == [{'heads': 0}, {'heads': 1}] and stored['code'] == found.code and stored['seconds'] == 1
    assert experiments.of_notebook(chapter(tmp_path, TRIAL, CHECK + '# changed'))[0].code != found.code


@pytest.mark.parametrize('cells', [[TRIAL], [CHECK]])
def test_an_experiment_and_its_check_come_in_pairs(tmp_path, cells):
    with pytest.raises(ValueError, match='alone: coin'): experiments.of_notebook(chapter(tmp_path, *cells))


def test_a_change_tells_on_the_experiments_that_use_it_and_on_no_other(tmp_path):
    def codes(helper='def side(): return 1', other='def dice(seed, quick=False): return {}'):
        cells = f'#| experiment\nimport math\n{helper}', '#| experiment\ndef coin(seed, quick=False): return side()', f'#| experiment\nimport math\n{other}', \
                '#| experiment\ndef check_coin(runs): pass\ndef check_dice(runs): pass'
        return {e.name: e.code for e in experiments.of_notebook(chapter(tmp_path, *cells))}
    before, helper, other = codes(), codes(helper='def side(): return 2'), codes(other='def dice(seed, quick=False): return {1: 1}')
    assert helper['coin'] != before['coin'] == other['coin']
    assert other['dice'] != before['dice']


CASES = '''#| experiment
from pathlib import Path
def coin(seed, quick=False, case=""):
    with open(HERE, "a") as log: log.write(f"{seed}{case} ")
    if Path(HERE + ".stop").exists() and seed == 1: raise KeyboardInterrupt
    return {"heads": seed + len(case)}
def cases(seed, before, quick): return ["a", "bb"] if seed == 0 else [max(before[0], key=lambda c: before[0][c]["heads"])]
coin.cases, coin.seeds = cases, 2
def check_coin(runs): assert runs[0]["bb"] == {"heads": 2}
'''


@pytest.mark.parametrize('jobs', [1, 2])
def test_an_interrupted_experiment_goes_on_where_it_was(tmp_path, monkeypatch, jobs):
    "Of two seeds, the first with two cases, the second with the better of them: what is done is not done again."
    log = tmp_path/'log'
    (tmp_path/'log.stop').touch()
    for name, place in (('KEPT', tmp_path/'kept'), ('RESULTS', tmp_path/'results')): monkeypatch.setattr(experiments, name, place)
    found, = experiments.of_notebook(chapter(tmp_path, CASES.replace('HERE', repr(str(log)))))
    with pytest.raises(KeyboardInterrupt): found.runs(range(2), quick=False)
    assert log.read_text().split() == ['0a', '0bb', '1bb'] and len([*found.kept.iterdir()]) == 2
    (tmp_path/'log.stop').unlink()
    runs = found.runs(range(2), quick=False, jobs=jobs)
    assert runs == [{'a': {'heads': 1}, 'bb': {'heads': 2}}, {'bb': {'heads': 3}}] and log.read_text().split() == ['0a', '0bb', '1bb', '1bb']
    experiments.store(found, runs, 1.2)
    assert json.loads(found.stored.read_text())['runs'] == runs and not found.kept.exists()


def test_a_quick_run_keeps_and_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, 'KEPT', tmp_path/'kept')
    found, = experiments.of_notebook(chapter(tmp_path, TRIAL, CHECK))
    experiments.write(found.place(0), {'heads': 7})
    assert found.runs([0], quick=True) == [{'heads': 0}] and found.runs([0], quick=False) == [{'heads': 7}]
    assert len([*found.kept.iterdir()]) == 1


def test_what_was_kept_of_other_code_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, 'KEPT', tmp_path/'kept')
    experiments.write(experiments.of_notebook(chapter(tmp_path, TRIAL, CHECK))[0].place(1), {'heads': 7})
    changed, = experiments.of_notebook(chapter(tmp_path, TRIAL, CHECK + '# changed'))
    assert changed.runs([1], quick=False) == [{'heads': 1}]
