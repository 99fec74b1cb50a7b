"""Which number of threads is kept, under a clock that says how long each takes."""

import pytest
import torch

from mtrl.sac.threads import ROUNDS, ThreadChoice


@pytest.fixture
def as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chosen(most: int, seconds) -> tuple[int | None, list[int]]:
    """What is kept, and what was set in each step."""
    now, seen = [0.0], []
    choice = ThreadChoice(most, clock=lambda: now[0])
    for _ in range(4 * (ROUNDS + 2)):
        choice.begin()
        seen.append(torch.get_num_threads())
        now[0] += seconds(seen[-1], len(seen))
    return choice.chosen, seen


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("most", "seconds", "expected"),
    [
        (2, {1: 1.0, 2: 0.6}, 2),
        (2, {1: 1.0, 2: 1.3}, 1),
        (2, {1: 1.0, 2: 0.95}, 1),  # not worth a core
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.5}, 4),
        (6, {1: 1.0, 2: 0.98, 4: 0.5, 6: 0.44}, 6),
    ],
)
def test_more_threads_are_kept_where_they_are_worth_it(most, seconds, expected):
    found, seen = chosen(most, lambda n, _: seconds[n])
    assert found == expected == seen[-1]
    assert set(seen) == set(seconds)


@pytest.mark.usefixtures("as_before")
def test_a_slow_step_among_them_decides_nothing():
    """The first of all, an evaluation, a checkpoint."""
    found, _ = chosen(2, lambda n, step: 100.0 if step in (2, 9) else {1: 1.0, 2: 0.6}[n])
    assert found == 2


@pytest.mark.usefixtures("as_before")
def test_of_one_core_there_is_no_choice():
    found, seen = chosen(1, lambda n, _: 1.0)
    assert found == 1 and len(set(seen)) == 1


@pytest.mark.usefixtures("as_before")
def test_a_choice_from_before_is_kept():
    choice = ThreadChoice(4)
    choice.chosen = 2
    choice.begin()
    assert torch.get_num_threads() == 2
