"""The replay buffer samples only transitions that happened, and all with equal probability."""

import copy

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mtrl.errors import UsageError
from mtrl.sac.replay import ReplayBuffer

T = 3


def fill(buffer: ReplayBuffer, steps: int, ends, start: int = 0) -> list[list[list[tuple]]]:
    """Write numbered transitions; `ends(step, env)` says which environments' episodes end. Each
    one's observation is (environment, episode, step in the episode); returns all transitions of
    each vector step, by task."""
    n, envs_per_task = T * buffer.envs_per_task, buffer.envs_per_task
    env, episode, elapsed = np.arange(n), np.zeros(n), np.zeros(n)
    truth = []
    for step in range(start, start + steps):
        observation = np.stack([env, episode, elapsed], -1)
        following = observation + [0, 0, 1]
        action = np.full((n, 2), step % 97 / 97)
        reward = env * 1000.0 + step
        done = np.array([ends(step, i) for i in range(n)])
        terminated = done & (env == 1)  # environment 1 terminates
        buffer.add(observation, action, reward, terminated, following, done=done)
        rows = np.column_stack([reward, observation, following, terminated])
        tasks = rows.reshape(T, envs_per_task, -1).tolist()
        truth.append([[tuple(row) for row in task] for task in tasks])
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


@pytest.mark.parametrize("envs_per_task", [1, 3])
@pytest.mark.parametrize("steps", [5, 99, 100, 101, 250, 1000])
@pytest.mark.parametrize(
    "ends",
    [
        lambda step, env: False,
        lambda step, env: step % 100 == 99,
        lambda step, env: (step + 7 * env) % 13 == 0,
        lambda step, env: True,
    ],
    ids=["endless", "together", "apart", "always"],
)
def test_samples_are_the_latest_true_transitions(steps, ends, envs_per_task):
    buffer = ReplayBuffer(100 * envs_per_task, T, 3, 2, envs_per_task=envs_per_task)
    truth = fill(buffer, steps, ends)
    kept, rest = divmod(len(buffer), envs_per_task)
    together = len({ends(0, i) for i in range(T * envs_per_task)}) == 1 and not ends(0, 0)
    if together:
        assert kept == min(steps, 100)
    assert rest == 0 and kept >= min(steps, 50)
    for t, rows in enumerate(read(buffer)):
        assert set(rows) == {row for step in truth[-kept:] for row in step[t]}


@pytest.mark.parametrize("envs_per_task", [1, 4])
def test_sampling_is_uniform_and_independent_between_tasks(envs_per_task):
    """Over vector steps and copies, after the ring has wrapped around."""
    buffer = ReplayBuffer(20, T, 3, 2, envs_per_task=envs_per_task)
    steps = 20 // envs_per_task
    fill(buffer, 53 + steps, lambda step, env: step == 54)
    assert len(buffer) == 20
    draws = 40_000
    batch = buffer.sample(draws)
    env = batch.observations[..., 0]
    ages = batch.rewards - env * 1000 - 53
    first = envs_per_task * torch.arange(T)[:, None]
    which = (ages * envs_per_task + env - first).long()  # of the task's 20 transitions
    for t in range(T):
        counts = torch.bincount(which[t], minlength=20).double()
        assert len(counts) == 20
        chi_squared = ((counts - draws / 20).square() / (draws / 20)).sum().item()
        assert chi_squared < 43.8  # 99.9% quantile, 19 degrees of freedom
    correlation = torch.corrcoef(which.float())[0, 1].abs().item()
    assert correlation < 4 / draws**0.5


def test_sampling_uses_no_changing_number_from_the_host(monkeypatch):
    """Like a CUDA graph, a trace repeats operations with the Python numbers of its capture."""
    bits = torch.randint(2**63 - 1, (T, 16), generator=torch.Generator().manual_seed(0))
    # torch before 2.12 cannot trace a generator.
    monkeypatch.setattr("mtrl.sac.replay.torch.randint", lambda *a, **k: bits.clone())
    buffer = ReplayBuffer(50, T, 3, 2, envs_per_task=2)
    fill(buffer, 5, lambda step, env: False)
    traced = make_fx(lambda: buffer.sample(16).rewards)()
    for steps in (3, 60, 1):
        before = buffer.sample(16).rewards
        fill(buffer, steps, lambda step, env: step == 20)
        rewards = buffer.sample(16).rewards
        assert torch.equal(traced(), rewards) and not torch.equal(before, rewards)


@pytest.mark.parametrize("envs_per_task", [1, 2])
def test_a_restored_state_continues_exactly(envs_per_task):
    first = ReplayBuffer(50, T, 3, 2, seed=4, envs_per_task=envs_per_task)
    fill(first, 130, lambda step, env: (step + env) % 30 == 0)
    first.sample(7)
    second = ReplayBuffer(50, T, 3, 2, seed=9, envs_per_task=envs_per_task)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for buffer in (first, second):
        fill(buffer, 20, lambda step, env: step == 140, start=130)
    for _ in range(3):
        for a, b in zip(
            vars(first.sample(16)).values(), vars(second.sample(16)).values(), strict=True
        ):
            assert torch.equal(a, b)


def test_random_streams_do_not_move_between_kinds_of_devices():
    """A CUDA generator's state is a seed and an offset; a CPU's is much longer."""
    replay = ReplayBuffer(10, 1, 2, 1)
    state = replay.state_dict() | {"generator": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(UsageError, match=r"device: expected that of the run so far, .* got cpu"):
        replay.load_state_dict(state)


def test_sampling_with_another_generator_leaves_the_buffers_unchanged():
    a, b = (ReplayBuffer(50, T, 3, 2, seed=1) for _ in range(2))
    for buffer in (a, b):
        fill(buffer, 40, lambda step, env: False)
    a.sample(8, torch.Generator().manual_seed(0))
    assert torch.equal(a.sample(8).rewards, b.sample(8).rewards)


def test_observations_are_stored_once():
    buffer = ReplayBuffer(100_000, 10, 39, 4)
    transition_twice = (39 + 4 + 1 + 1 + 39) * 4
    assert buffer.nbytes < 0.57 * transition_twice * 100_000 * 10


def test_a_skipped_step_breaks_the_chain():
    """Transitions before and after it keep their successors."""
    buffer, n = ReplayBuffer(50, T, 1, 1, seed=0), T

    def add(here, there):
        rows = [np.full((n, 1), float(value)) for value in (here, there)]
        zeros = np.zeros(n)
        buffer.add(rows[0], np.zeros((n, 1)), zeros, zeros, rows[1], done=np.zeros(n, bool))

    add(0, 1)
    add(1, 2)
    buffer.skip(np.ones(n, bool))  # 2 to 3 is lost
    buffer.skip(np.ones(n, bool))
    add(4, 5)
    batch = buffer.sample(200)
    pairs = torch.stack([batch.observations[0, :, 0], batch.next_observations[0, :, 0]], -1)
    assert {tuple(pair) for pair in pairs.tolist()} == {(0, 1), (1, 2), (4, 5)}
    assert len(buffer) == 3


@pytest.mark.parametrize("wrong", range(6))
def test_rows_of_fewer_environments_are_an_error(wrong):
    """NumPy would give one environment's row to all."""
    buffer = ReplayBuffer(50, T, 2, 1)
    shapes = [(T, 2), (T, 1), (T,), (T,), (T, 2), (T,)]
    rows = [np.zeros((1, *shape[1:]) if i == wrong else shape) for i, shape in enumerate(shapes)]
    with pytest.raises(ValueError, match=r"must match exactly|expected 3 environments, got \{1, 3"):
        buffer.add(*rows[:5], done=rows[5])
    one = [np.zeros((1, *shape[1:])) for shape in shapes]
    with pytest.raises(ValueError, match=r"replay: expected 3 environments, got \{1\}"):
        buffer.add(*one[:5], done=one[5])
    assert len(buffer) == 0


def test_an_empty_buffer_cannot_be_sampled():
    """On CUDA, the remainder of a division by no transitions is any number."""
    buffer, other = ReplayBuffer(50, T, 3, 2), ReplayBuffer(50, T, 3, 2)
    with pytest.raises(ValueError, match="replay: expected transitions of every task, got none"):
        buffer.sample(4)
    fill(other, 3, lambda step, env: False)
    buffer.take_over(other, [(0, 1), (2, 2)])  # task 1 is new
    with pytest.raises(ValueError, match="replay: expected transitions of every task, got none"):
        buffer.sample(4)
