"""Choice of the number of threads, with a clock that simulates the time of each."""

import pytest
import torch

from mtrl.sac.threads import ROUNDS, ThreadChoice


@pytest.fixture
def as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chosen(most: int, seconds) -> tuple[int | None, list[int]]:
    """Return the chosen number, and the numbers set in each step."""
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
        (2, {1: 1.0, 2: 0.95}, 1),  # not worth another core
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.5}, 4),
        (6, {1: 1.0, 2: 0.98, 4: 0.5, 6: 0.44}, 6),
    ],
)
def test_more_threads_are_chosen_if_worth_it(most, seconds, expected):
    found, seen = chosen(most, lambda n, _: seconds[n])
    assert found == expected == seen[-1]
    assert set(seen) == set(seconds)


@pytest.mark.usefixtures("as_before")
def test_a_single_slow_step_has_no_effect():
    """Such as the first step, an evaluation or a checkpoint."""
    found, _ = chosen(2, lambda n, step: 100.0 if step in (2, 9) else {1: 1.0, 2: 0.6}[n])
    assert found == 2


@pytest.mark.usefixtures("as_before")
def test_one_core_needs_no_trials():
    found, seen = chosen(1, lambda n, _: 1.0)
    assert found == 1 and len(set(seen)) == 1


@pytest.mark.usefixtures("as_before")
def test_a_previous_choice_is_kept():
    choice = ThreadChoice(4)
    choice.chosen = 2
    choice.begin()
    assert torch.get_num_threads() == 2
