"""Acting in episodes such that a task's results do not depend on the tasks evaluated with it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from mtrl.devices import cpu_threads
from mtrl.envs.vector import TaskVectorEnv
from mtrl.policy.policy import Policy

ROWS = 10
"""Number of rows whose actions are computed together.

Matrix products round differently with another number of rows or of threads, and an episode soon
diverges from a difference in the last digit. With a fixed number of rows and one thread, the
actions in a task do not depend on the other tasks.
"""


class Step(NamedTuple):
    """One step of one environment."""

    observation: np.ndarray  # [d]
    action: np.ndarray  # [A]
    reward: float
    following: np.ndarray  # [d], before any reset
    terminated: bool
    truncated: bool
    success: bool


class Play:
    """An episode in progress.

    Args:
        name: Task name.
        seed: Seed of the goals.
        episode: Number of the episode and of its goal.

    Attributes:
        first_success: First successful step, counted from 1; 0 if there was none.
        total_reward: Sum of the rewards, once the episode has ended.
    """

    def __init__(self, name: str, seed: int, episode: int) -> None:
        self.name, self.seed, self.episode = name, seed, episode
        self.first_success, self.total_reward = 0, 0.0
        self.actions: list[np.ndarray] = []
        self._generator = np.random.default_rng([seed, zlib.crc32(name.encode()), episode])

    def noise(self, size: int) -> np.ndarray:
        """Draw standard normal noise, `[size]`."""
        return self._generator.standard_normal(size, np.float32)

    def note(self, step: Step) -> None:
        """Record a step."""
        self.actions.append(step.action)
        if step.success and not self.first_success:
            self.first_success = len(self.actions)


AnyPlay = TypeVar("AnyPlay", bound=Play)
Choose = Callable[[np.ndarray, Sequence[Play]], np.ndarray]
"""Function that returns actions `[n, A]` for observations `[n, d]` of episodes in progress."""


def played(
    envs: TaskVectorEnv,
    seed: int,
    episodes: Sequence[int],
    choose: Choose,
    *,
    begin: Callable[[str, int, int], AnyPlay],
    tick: Callable[[int], object] = int,
) -> Iterator[AnyPlay]:
    """Play the first episodes of each task, and yield each when it ends.

    An episode restarts if its simulator process fails.

    Args:
        envs: Environments, which are reset first.
        seed: Seed of the goals.
        episodes: Number of episodes of each task.
        choose: Function that chooses actions.
        begin: Function that makes a `Play`, or an object of a subclass, from task, seed and number.
        tick: Called after each vector step with its number of environment steps.
    """
    copies = envs.envs_per_task
    plays = [begin(name, seed, copy) for name in envs.names for copy in range(copies)]
    wanted = np.repeat(episodes, copies).tolist()
    observations, _ = envs.reset(seed=seed)
    while any(play.episode < n for play, n in zip(plays, wanted, strict=True)):
        actions = choose(observations, plays)
        before = observations
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        ended = infos.get("_final_obs", np.zeros(len(plays), bool))
        following = observations
        if ended.any():
            following = np.where(ended[:, None], infos["final_obs"], observations)
        columns = (before, actions, rewards, following, terminated, truncated, infos["success"])
        for play, *step in zip(plays, *columns, strict=True):
            play.note(Step(*step))
        for row in np.flatnonzero(infos.get("restarted", ())).tolist():
            plays[row] = begin(plays[row].name, seed, plays[row].episode)
        for row in np.flatnonzero(ended).tolist():
            play = plays[row]
            play.total_reward = float(infos["final_info"]["episode"]["r"][row])
            plays[row] = begin(play.name, seed, play.episode + copies)
            if play.episode < wanted[row]:
                yield play
        tick(len(plays))


def act(
    policy: Policy, observations: np.ndarray, tasks: np.ndarray, noise: np.ndarray | None
) -> np.ndarray:
    """Compute actions `[n, A]` for rows of any tasks, `ROWS` at a time."""

    def blocks(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        missing = np.zeros((-len(rows) % ROWS, *rows.shape[1:]), rows.dtype)
        return torch.from_numpy(np.concatenate([rows, missing])).to(policy.device).split(ROWS)

    noises = repeat(None) if noise is None else blocks(noise)
    inputs = zip(blocks(observations), blocks(tasks), noises, strict=False)
    with cpu_threads(1):
        return torch.cat([policy.act(*block) for block in inputs])[: len(tasks)].cpu().numpy()
