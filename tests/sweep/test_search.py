"""Points drawn by Optuna, and runs ended by it."""

import json
import math

import pytest
from fake_runs import write_run

from mtrl.errors import UsageError
from mtrl.sweep.folder import State, SweepFolder, write_state
from mtrl.sweep.grid import points
from mtrl.sweep.jobs import Known, placed
from mtrl.sweep.judge import Judge
from mtrl.sweep.plan import Plan
from mtrl.sweep.rules import Halving, Rules, Threshold
from mtrl.sweep.search import Search, best_points, corners

pytest.importorskip("optuna")
TASKS = ("reach-v3", "push-v3")
TAG = "eval/success_rate/mean"
YAML = """
seeds: [0, 1]
grid: {tasks: [reach-v3, push-v3], total_timesteps: 40_000, learning_starts: 2_000,
       eval_every: 10_000, log_every: 10_000, checkpoint_every: 10_000, diagnose_every: 0}
search:
  learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}
  batch_size: {low: 32, high: 256, step: 32}
  hidden_sizes: [[32, 32], [64]]
  surgery: [none, pcgrad]
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "grid.yaml").write_text(YAML)
    return Plan.read(tmp_path / "grid.yaml", {})


@pytest.fixture
def folder(tmp_path):
    made = SweepFolder(tmp_path / "sweep")
    made.make()
    return made


def run_points(folder, plan, search, numbers):
    """Draw points and write their runs."""
    entries = list(folder.contents().runs)
    for number in numbers:
        found = points(plan, "cpu", search.drawn(number))
        known = {point.method: Known(40_000, TASKS) for point in found}
        planned = placed(folder, found, 1, known=known, rules=Rules(), trial=number)
        for each in planned:
            write_run(folder.run_dir(each.entry.name), each.point.config)
        entries += [each.entry for each in planned]
        folder.record(entries, Rules())
    return entries


def test_points_are_in_their_ranges_and_stored(folder, plan):
    search = Search(folder, plan, TAG)
    entries = run_points(folder, plan, search, range(5))
    assert len(entries) == 10 and len({entry.name for entry in entries}) == 10
    drawn = [search.drawn(number) for number in range(5)]
    for point in drawn:
        assert 1e-5 <= point["learning_rate"] <= 1e-2
        assert point["batch_size"] in range(32, 257, 32)
        assert point["hidden_sizes"] in ([32, 32], [64]) and point["surgery"] in ("none", "pcgrad")
    assert len({math.floor(math.log10(point["learning_rate"])) for point in drawn}) > 1
    again = Search(folder, plan, TAG)  # another process
    assert [again.drawn(number) for number in range(5)] == drawn
    assert best_points(folder, 8) == []  # no search is recorded
    folder.record(entries, Rules(), TAG)
    best = again.best(8)
    assert best_points(folder, 3) == best[:3]  # from the folder alone, as for a report
    assert [score for _, score, _ in best] == sorted((s for _, s, _ in best), reverse=True)
    assert len(best) == 5 and {number for number, _, _ in best} == set(range(5))
    assert all(fields == drawn[number] for number, _, fields in best)


def test_other_ranges_require_another_folder(folder, plan):
    run_points(folder, plan, Search(folder, plan, TAG), [0])
    fewer = plan.model_copy(update={"search": {"surgery": ["none", "pcgrad"]}})
    with pytest.raises(UsageError, match="search: expected ranges of learning_rate, batch_size"):
        Search(folder, fewer, TAG).drawn(0)
    other = plan.model_copy(update={"search": plan.search | {"surgery": ("none", "famo")}})
    with pytest.raises(UsageError, match="use another --out for a new search"):
        Search(folder, other, TAG).drawn(1)


def test_ends_and_choices_are_checked_before_the_search(plan):
    found = list(corners(plan))
    assert {point["learning_rate"] for point in found} == {1e-5, 1e-2}
    assert {point["surgery"] for point in found} == {"none", "pcgrad"}
    for drawn in found:
        assert len(points(plan, "cpu", drawn)) == 2


def test_a_point_that_was_drawn_in_part_is_completed(folder, plan):
    """As a sweep leaves it that is killed between the values of a point."""
    search = Search(folder, plan, TAG)
    first = search._study.ask()
    first._suggest("surgery", search._distributions["surgery"])
    again = Search(folder, plan, TAG)
    drawn = again.drawn(0)
    assert drawn.keys() == plan.search.keys() and again.drawn(0) == drawn
    assert drawn["surgery"] == json.loads(first.params["surgery"])
    run_points(folder, plan, again, [0])
    fewer = plan.model_copy(update={"search": {"surgery": plan.search["surgery"]}})
    more = Search(folder, fewer, TAG)
    with pytest.raises(UsageError, match="search: expected ranges of"):
        more.drawn(0)


@pytest.mark.parametrize(
    ("field", "space", "message"),
    [
        ("surgery", {"low": 0, "high": 1}, "surgery: expected a list of choices, got a range"),
        ("batch_size", {"low": 0.5, "high": 4}, "batch_size: expected whole numbers, got 0.5"),
    ],
)
def test_a_range_that_is_invalid_for_its_field_is_rejected(folder, plan, field, space, message):
    wrong = plan.model_copy(update={"search": {field: space}})
    with pytest.raises(UsageError, match=message):
        Search(folder, wrong, TAG)


def test_halving_continues_the_best_third(folder, plan, tmp_path):
    """Like Optuna's pruner on the same numbers, in any order of runs."""
    rules = Rules(halving=Halving(tag=TAG, start=100, by=3))
    scores = {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.4, "e": 0.2, "f": 0.8}
    ended = {}
    for name, score in scores.items():
        run_dir = folder.run_dir(name)
        run_dir.mkdir()
        row = f'{{"time/total_timesteps": 100, "{TAG}": {score}}}\n'
        (run_dir / "progress.json").write_text(row)
        ended[name] = Judge(rules, folder.storage).verdict(name, run_dir)
    # Each is compared with earlier ones: a is the first; c and f are in the best third.
    assert {name for name, why in ended.items() if why is None} == {"a", "c", "f"}
    why = "successive halving on eval/success_rate/mean from 100 by 3: 0.1 at 100 is not in the"
    assert ended["b"] == f"{why} best 1/3"
    again = Judge(rules, folder.storage)  # of the next sweep, had this one been killed just then
    assert {n: again.verdict(n, folder.run_dir(n)) for n in scores} == ended
    assert rules.hold(ended["b"]) and not rules.hold(None)
    assert not Rules(halving=Halving(tag=TAG, start=100, by=2)).hold(ended["b"])


def test_a_journal_whose_last_line_is_cut_is_continued(folder, plan):
    """As left by a full disk, or a sweep killed while it wrote."""
    drawn = Search(folder, plan, TAG).drawn(0)
    with folder.storage.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    again = Search(folder, plan, TAG)
    second = again.drawn(1)
    last = Search(folder, plan, TAG)
    assert [last.drawn(0), last.drawn(1)] == [drawn, second]
    lines = folder.storage.read_bytes().splitlines(keepends=True)
    folder.storage.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[3:]]))
    with pytest.raises(UsageError, match="search: expected Optuna's journal in"):
        Search(folder, plan, TAG)


def test_points_of_failed_and_early_ended_runs_are_reported(folder, plan):
    from optuna.trial import TrialState

    search = Search(folder, plan, TAG)
    for number, what in enumerate(("ended early", "failed")):
        entry = run_points(folder, plan, search, [number])[-1]
        (folder.run_dir(entry.name) / "eval.json").unlink()
        write_state(folder.state(entry.name), State(what=what))
    assert search.best(8) == []
    states = [trial.state for trial in search._study.get_trials()]
    assert states == [TrialState.PRUNED, TrialState.FAIL]


def test_a_threshold_ends_a_run_below_it(folder, tmp_path):
    rules = Rules(stop_when=(Threshold.parse(f"{TAG} < 0.5 at 100"),))
    (tmp_path / "progress.json").write_text(f'{{"time/total_timesteps": 100, "{TAG}": 0.25}}\n')
    judge = Judge(rules, folder.storage)
    assert judge.verdict("a", tmp_path) == f"{TAG} < 0.5 at 100: it was 0.25 at 100"
