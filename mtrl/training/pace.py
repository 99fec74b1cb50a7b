"""How fast a run goes, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("act", "learn", "wait", "store")
"""What a vector step of the loop consists of, in this order."""


class Pace:
    """How fast training is and what it spends its time on, evaluations and logging left out.

    On a GPU, updates are only launched in `learn`. The loop waits in `act`, for the updates of the
    step before the last: the policy that acts was copied behind them.
    """

    def __init__(self, steps: int, updates: int) -> None:
        self._begin(steps, updates)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of what is done inside."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def lap(self, steps: int, updates: int) -> dict[str, float]:
        """`time/` tags: rates since the last lap, and each stage's share of the time."""
        total = sum(self._seconds.values())
        found = {
            "time/fps": (steps - self._steps) / total,
            "time/updates_per_second": (updates - self._updates) / total,
        }
        found |= {f"time/share/{name}": part / total for name, part in self._seconds.items()}
        self._begin(steps, updates)
        return found

    def _begin(self, steps: int, updates: int) -> None:
        self._steps, self._updates = steps, updates
        self._seconds = dict.fromkeys(STAGES, 0.0)
