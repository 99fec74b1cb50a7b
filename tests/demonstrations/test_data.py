"""Files of transitions: round trips, and rejection of invalid ones."""

import re

import numpy as np
import pytest

from mtrl import Demonstrations
from mtrl.errors import UsageError

LENGTHS = (3, 2, 4)  # the last two belong to one task
TASK = np.repeat([1, 0, 0], LENGTHS)


def made(**changes) -> Demonstrations:
    n, rng = sum(LENGTHS), np.random.default_rng(0)
    truncated = np.zeros(n, bool)
    truncated[[4, 8]] = True
    columns = {
        "tasks": ("open", "close"),
        "task": TASK,
        "observations": rng.normal(size=(n, 5)),
        "actions": rng.uniform(-1, 1, (n, 2)),
        "rewards": rng.normal(size=n),
        "next_observations": rng.normal(size=(n, 5)),
        "terminated": np.arange(n) == 2,
        "truncated": truncated,
        "success": np.arange(n) == 7,
    }
    return Demonstrations(**columns | changes)


def test_a_file_restores_what_was_written(tmp_path):
    before = made()
    before.save(tmp_path / "a.npz")
    after = Demonstrations.load(tmp_path / "a.npz")
    assert after.tasks == before.tasks and after.digest() == before.digest()
    np.testing.assert_array_equal(after.success, before.success)
    assert made(rewards=np.ones(9)).digest() != before.digest()


def test_a_single_task_needs_no_task_column(tmp_path):
    one = made().select(["open"])
    columns = {name: value for name, value in vars(one).items() if name not in ("task", "success")}
    np.savez(tmp_path / "a.npz", **columns)
    found = Demonstrations.load(tmp_path / "a.npz")
    assert found.digest() == one.digest() and found.solved("open") is None


def test_episodes_end_at_flags_and_between_tasks():
    found = made()
    assert found.episodes("close") == [slice(0, 3)]
    assert found.episodes("open") == [slice(3, 5), slice(5, 9)]
    assert (found.solved("open"), found.solved("close")) == (1, 0)
    assert str(found) == "open 2 episodes, 1 solved; close 1 episode, 0 solved"
    unmarked = made(terminated=np.zeros(9, bool), truncated=np.zeros(9, bool))
    assert unmarked.episodes("close") == [slice(0, 3)]
    assert unmarked.episodes("open") == [slice(3, 9)]


def test_select_and_join_keep_the_task_of_every_row():
    whole = made()
    parts = [whole.select([task]) for task in ("close", "open")]
    again = Demonstrations.joined(parts)
    assert again.tasks == ("close", "open")
    for task in again.tasks:
        ours, theirs = (d.select([task]) for d in (whole, again))
        assert ours.digest() == theirs.digest()
    assert Demonstrations.joined([parts[0], made(success=None)]).success is None


BAD = {
    "finite observations": {"observations": np.full((9, 5), np.nan)},
    "finite rewards": {"rewards": np.full(9, 1e300)},
    "actions in [-1, 1], got one of magnitude 1.5": {"actions": np.full((9, 2), -1.5)},
    "actions as 9 rows of numbers, got float64 of shape (8, 2)": {"actions": np.zeros((8, 2))},
    "rewards as 9 values of numbers": {"rewards": np.zeros((9, 1))},
    "rewards as 9 values of numbers, got <U1": {"rewards": np.full(9, "a")},
    "terminated as true or false": {"terminated": np.full(9, 2)},
    "next_observations of length 5, got 4": {"next_observations": np.zeros((9, 4))},
    "task below 2": {"task": np.full(9, 2)},
    "task as 9 integers, got float64": {"task": np.zeros(9)},
    "every task once": {"tasks": ("open", "open")},
    "at least one transition, got none": {
        name: np.zeros((0, 2)[: 1 + (name in ("observations", "actions", "next_observations"))])
        for name in "observations actions rewards next_observations terminated truncated".split()
    }
    | {"task": np.zeros(0, int), "success": None},
}


@pytest.mark.parametrize("expected", BAD)
def test_inconsistent_arrays_are_rejected(expected):
    with pytest.raises(UsageError, match=re.escape(expected)):
        made(**BAD[expected])


def test_other_files_are_rejected(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        Demonstrations.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UsageError, match="cannot read"):
        Demonstrations.load(path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(UsageError, match="expected several arrays"):
        Demonstrations.load(tmp_path / "b.npy")
    columns = vars(made())
    np.savez(path, **columns | {"tasks": np.array([object()])})
    with pytest.raises(UsageError, match="cannot read"):  # pickled, and therefore not executed
        Demonstrations.load(path)
    np.savez(path, **{name: value for name, value in columns.items() if name != "rewards"})
    with pytest.raises(UsageError, match=r"a\.npz: expected an array 'rewards', got none"):
        Demonstrations.load(path)
    np.savez(path, **{name: value for name, value in columns.items() if name != "task"})
    with pytest.raises(UsageError, match="an array 'task' for several tasks"):
        Demonstrations.load(path)
