"""Training episodes: returns and success of those that have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

WINDOW = 20
"""Number of training episodes per task over which `rollout/` values are averaged."""


class Episode(NamedTuple):
    """A training episode that has ended."""

    task: str
    total_reward: float
    length: int
    success: bool


def episodes_of(tasks: Sequence[str], infos: dict[str, Any]) -> list[Episode]:
    """Return the episodes that ended, from the `infos` of `TaskVectorEnv.step`."""
    ended = infos.get("_final_info", np.zeros(0, bool))
    found = infos["final_info"]["episode"] if ended.any() else {}
    copies = len(ended) // len(tasks)
    return [
        Episode(
            tasks[row // copies],
            float(found["r"][row]),
            int(found["l"][row]),
            bool(found["s"][row]),
        )
        for row in np.flatnonzero(ended).tolist()
    ]


class EpisodeStatistics:
    """Return and success of each task's last training episodes, including exploration."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._returns: list[deque[float]] = [deque(maxlen=WINDOW) for _ in tasks]
        self._success: list[deque[bool]] = [deque(maxlen=WINDOW) for _ in tasks]

    def add(self, episodes: Sequence[Episode]) -> None:
        """Add episodes that ended."""
        for episode in episodes:
            t = self._tasks.index(episode.task)
            self._returns[t].append(episode.total_reward)
            self._success[t].append(episode.success)

    def values(self, tells_success: np.ndarray) -> dict[str, float]:
        """Return the `rollout/` values of tasks that have finished an episode.

        Args:
            tells_success: Which tasks have ever reported success or failure, `[T]`; only these
                have a success rate.
        """
        found = {}
        for t, task in enumerate(self._tasks):
            if self._returns[t]:
                found[f"rollout/ep_rew_mean/{task}"] = float(np.mean(self._returns[t]))
                if tells_success[t]:
                    found[f"rollout/success_rate/{task}"] = float(np.mean(self._success[t]))
        return found

    def take_over(self, other: EpisodeStatistics, tasks: Sequence[tuple[int, int]]) -> None:
        """Copy the statistics of some tasks, given each one's index here and in `other`."""
        for here, there in tasks:
            self._returns[here].extend(other._returns[there])
            self._success[here].extend(other._success[there])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "returns": list(map(list, self._returns)),
            "success": list(map(list, self._success)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        for row in range(len(self._tasks)):
            self._returns[row].extend(state["returns"][row])
            self._success[row].extend(state["success"][row])
