"""What training looked like of late: its episodes, and how fast it went."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
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


class Pace:
    """Environment steps and updates per second of training, what is done in between left out."""

    def __init__(self, steps: int, updates: int) -> None:
        self._mark = (time.monotonic(), steps, updates)

    def lap(self, steps: int, updates: int) -> tuple[float, float]:
        """Both rates since the last lap."""
        now = time.monotonic()
        begin, steps_before, updates_before = self._mark
        self._mark = (now, steps, updates)
        return (steps - steps_before) / (now - begin), (updates - updates_before) / (now - begin)

    def pause(self, work: Callable[[], object]) -> None:
        """Do something that is not training."""
        begin = time.monotonic()
        work()
        mark, steps, updates = self._mark
        self._mark = (mark + time.monotonic() - begin, steps, updates)
