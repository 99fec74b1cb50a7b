"""How fast a run goes, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtrl.config.train import Schedule

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


class TimeLeft:
    """Time to the end of a run, from how fast its parts have gone so far.

    Steps of random actions, steps with updates, and evaluations have rates of their own, the last
    ones known counting most.

    Args:
        schedule: The run's step counts.
        evaluation: Environment steps of an evaluation on the way.
        final: Environment steps of the last.
    """

    def __init__(self, schedule: Schedule, evaluation: int, final: int) -> None:
        self._schedule, self._evaluation, self._final = schedule, evaluation, final
        self._rates: dict[str, float] = {}

    def training(self, steps: int, n: int, rate: float) -> None:
        """Note that the `n` environment steps before `steps` were made at so many per second."""
        start = self._schedule.learning_starts
        if steps <= start:
            self._note("random", rate)
        elif steps - n >= start:
            self._note("learning", rate)

    def judging(self, n: int, seconds: float) -> None:
        """Note that an evaluation of `n` environment steps took so long."""
        self._note("evaluation", n / max(seconds, 1e-9))

    def _note(self, part: str, rate: float) -> None:
        before = self._rates.get(part, rate)
        self._rates[part] = 0.5 * (before + rate)

    def seconds(self, steps: int) -> float | None:
        """From `steps` to the end [s]; None before updates have been timed."""
        schedule, learning = self._schedule, self._rates.get("learning")
        if learning is None:
            return None
        left = (schedule.total_timesteps - steps) / learning
        last = schedule.total_timesteps - 1  # the end has its own
        evaluations = last // schedule.eval_every - min(steps, last) // schedule.eval_every
        return left + (evaluations * self._evaluation + self._final) / self._judged(learning)

    def last_evaluation(self) -> float | None:
        """How long the last evaluation will take [s], once something has been timed."""
        learning = self._rates.get("learning")
        return None if learning is None else self._final / self._judged(learning)

    def _judged(self, learning: float) -> float:
        """Steps of an evaluation per second, by its own rate or that of the nearest part."""
        return self._rates.get("evaluation") or self._rates.get("random") or learning


def shown(seconds: float | None) -> str:
    """A duration for people."""
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))
