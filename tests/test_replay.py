"""Everything the replay hands out is a transition that happened, and all of them come alike."""

import numpy as np
import pytest
import torch

from mtrl.replay import ReplayBuffer

T = 3


def fill(buffer: ReplayBuffer, steps: int, ends, start: int = 0) -> list[list[tuple]]:
    """Write numbered transitions; `ends(step, task)` says which tasks' episodes end. Each task's
    observation is (task, episode, step in the episode); returns all transitions by task."""
    truth = [[] for _ in range(T)]
    episode, elapsed = np.zeros(T), np.zeros(T)
    for step in range(start, start + steps):
        observation = np.stack([np.arange(T), episode, elapsed], -1)
        following = observation + [0, 0, 1]
        action = np.full((T, 2), step % 97 / 97)
        reward = np.arange(T) * 1000.0 + step
        done = np.array([ends(step, t) for t in range(T)])
        terminated = done & (np.arange(T) == 1)  # task 1's ends are real ones
        buffer.add(observation, action, reward, terminated, following, bool(done.any()))
        for t in range(T):
            truth[t].append((reward[t], *observation[t], *following[t], float(terminated[t])))
        elapsed += 1
        episode[done] += 1
        elapsed[done] = 0
    return truth


def read(buffer: ReplayBuffer, batch_size: int = 4000) -> list[list[tuple]]:
    batch = buffer.sample(batch_size)
    assert batch.observations.shape == (T, batch_size, 3)
    assert batch.actions.shape == (T, batch_size, 2)
    rows = torch.cat(
        [
            batch.rewards[..., None],
            batch.observations,
            batch.next_observations,
            batch.terminated[..., None],
        ],
        -1,
    )
    return [[tuple(row) for row in task] for task in rows.tolist()]


@pytest.mark.parametrize("steps", [5, 99, 100, 101, 250, 1000])
@pytest.mark.parametrize(
    "ends",
    [
        lambda step, task: False,
        lambda step, task: step % 100 == 99,
        lambda step, task: (step + 7 * task) % 13 == 0,
        lambda step, task: True,
    ],
    ids=["endless", "together", "apart", "always"],
)
def test_samples_are_the_newest_true_transitions(steps, ends):
    buffer = ReplayBuffer(100, T, 3, 2)
    truth = fill(buffer, steps, ends)
    kept = len(buffer)
    together = not any(ends(0, t) != ends(0, 0) for t in range(T)) and not ends(0, 0)
    if together:
        assert kept == min(steps, 100)
    assert kept >= min(steps, 50)
    for t, rows in enumerate(read(buffer)):
        assert set(rows) == set(truth[t][-kept:])


def test_sampling_is_uniform_and_independent_between_tasks():
    buffer = ReplayBuffer(20, T, 3, 2)
    fill(buffer, 73, lambda step, task: step == 60)
    assert len(buffer) == 20
    draws = 40_000
    ages = buffer.sample(draws).rewards - torch.arange(T)[:, None] * 1000 - 53
    for t in range(T):
        counts = torch.bincount(ages[t].long(), minlength=20).double()
        chi_squared = ((counts - draws / 20).square() / (draws / 20)).sum().item()
        assert chi_squared < 43.8  # 99.9% quantile, 19 degrees of freedom
    correlation = torch.corrcoef(ages)[0, 1].abs().item()
    assert correlation < 4 / draws**0.5


def test_state_goes_on_exactly():
    first = ReplayBuffer(50, T, 3, 2, seed=4)
    fill(first, 130, lambda step, task: (step + task) % 30 == 0)
    first.sample(7)
    second = ReplayBuffer(50, T, 3, 2, seed=9)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for buffer in (first, second):
        fill(buffer, 20, lambda step, task: step == 140, start=130)
    for _ in range(3):
        for a, b in zip(
            vars(first.sample(16)).values(), vars(second.sample(16)).values(), strict=True
        ):
            assert torch.equal(a, b)


def test_a_look_aside_does_not_move_the_buffers_own_generator():
    a, b = (ReplayBuffer(50, T, 3, 2, seed=1) for _ in range(2))
    for buffer in (a, b):
        fill(buffer, 40, lambda step, task: False)
    a.sample(8, torch.Generator().manual_seed(0))
    assert torch.equal(a.sample(8).rewards, b.sample(8).rewards)


def test_observations_are_stored_once():
    buffer = ReplayBuffer(100_000, 10, 39, 4)
    transition_twice = (39 + 4 + 1 + 1 + 39) * 4
    assert buffer.nbytes < 0.57 * transition_twice * 100_000 * 10
