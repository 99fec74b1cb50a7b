"""Acting in episodes such that a task's results do not depend on the tasks evaluated with it."""

from __future__ import annotations

import zlib
from itertools import repeat

import numpy as np
import torch

from mtrl.devices import cpu_threads
from mtrl.policy.policy import Policy

ROWS = 10
"""Number of rows whose actions are computed together.

Matrix products round differently with another number of rows or of threads, and an episode soon
diverges from a difference in the last digit. With a fixed number of rows and one thread, the
actions in a task do not depend on the other tasks.
"""


class Play:
    """An episode in progress.

    Args:
        name: Task name.
        seed: Seed of the goals.
        episode: Number of the episode and of its goal.
        action_size: Length A of an action.
    """

    def __init__(self, name: str, seed: int, episode: int, action_size: int) -> None:
        self._key, self._size = (seed, zlib.crc32(name.encode())), action_size
        self.begin(episode)

    def begin(self, episode: int) -> None:
        """Start another episode, or restart the same one."""
        self.episode = episode
        self.first_success = 0
        self.actions: list[np.ndarray] = []
        self._generator = np.random.default_rng([*self._key, episode])

    def noise(self) -> np.ndarray:
        """Draw standard normal noise, `[A]`."""
        return self._generator.standard_normal(self._size, np.float32)

    def note(self, action: np.ndarray, success: bool) -> None:
        """Record an action and the success flag of its step."""
        self.actions.append(action)
        if success and not self.first_success:
            self.first_success = len(self.actions)


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
