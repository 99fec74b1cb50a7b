"""How a policy plays episodes so that a task's do not depend on what is played beside them."""

from __future__ import annotations

import zlib
from itertools import repeat

import numpy as np
import torch

from mtrl.devices import cpu_threads
from mtrl.policy.policy import Policy

ROWS = 10
"""Rows whose actions are computed together, always so many.

A product of matrices rounds otherwise with another number of rows, or where threads share them out,
and an episode soon follows the last digit. With a fixed number and one thread, what a policy does
in a task does not depend on the other tasks.
"""


class Play:
    """An episode that is under way.

    Args:
        name: The task.
        seed: Of the goals.
        episode: Its number, and so its goal's.
        action_size: A.
    """

    def __init__(self, name: str, seed: int, episode: int, action_size: int) -> None:
        self._key, self._size = (seed, zlib.crc32(name.encode())), action_size
        self.begin(episode)

    def begin(self, episode: int) -> None:
        """Another one, or the same one anew."""
        self.episode = episode
        self.first_success = 0
        self.actions: list[np.ndarray] = []
        self._dice = np.random.default_rng([*self._key, episode])

    def noise(self) -> np.ndarray:
        """Standard normal, `[A]`."""
        return self._dice.standard_normal(self._size, np.float32)

    def note(self, action: np.ndarray, success: bool) -> None:
        """What was done, and the flag it led to."""
        self.actions.append(action)
        if success and not self.first_success:
            self.first_success = len(self.actions)


def act(
    policy: Policy, observations: np.ndarray, tasks: np.ndarray, noise: np.ndarray | None
) -> np.ndarray:
    """Actions `[n, A]` for rows of any tasks, `ROWS` at a time."""

    def blocks(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        missing = np.zeros((-len(rows) % ROWS, *rows.shape[1:]), rows.dtype)
        return torch.from_numpy(np.concatenate([rows, missing])).to(policy.device).split(ROWS)

    noises = repeat(None) if noise is None else blocks(noise)
    inputs = zip(blocks(observations), blocks(tasks), noises, strict=False)
    with cpu_threads(1):
        return torch.cat([policy.act(*block) for block in inputs])[: len(tasks)].cpu().numpy()
