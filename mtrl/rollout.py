"""What the training episodes looked like of late."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW = 20
"""Training episodes per task behind each `rollout/` number."""


class EpisodeStatistics:
    """Return and success of each task's last episodes, exploration included."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._returns: list[deque[float]] = [deque(maxlen=WINDOW) for _ in tasks]
        self._success: list[deque[bool]] = [deque(maxlen=WINDOW) for _ in tasks]

    def add(self, infos: dict[str, Any]) -> None:
        """Take the episodes that ended from the `infos` of `TaskVectorEnv.step`."""
        episode = infos["final_info"]["episode"]
        for row in np.flatnonzero(infos["_final_info"]):
            self._returns[row].append(float(episode["r"][row]))
            self._success[row].append(bool(episode["s"][row]))

    def values(self) -> dict[str, float]:
        """`rollout/` tags of the tasks that have finished an episode."""
        found = {}
        for task, returns, success in zip(self._tasks, self._returns, self._success, strict=True):
            if returns:
                found[f"rollout/ep_rew_mean/{task}"] = float(np.mean(returns))
                found[f"rollout/success_rate/{task}"] = float(np.mean(success))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "returns": list(map(list, self._returns)),
            "success": list(map(list, self._success)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for row in range(len(self._tasks)):
            self._returns[row].extend(state["returns"][row])
            self._success[row].extend(state["success"][row])
