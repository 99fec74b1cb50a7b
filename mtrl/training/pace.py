"""Speed of a run, time per stage, and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtrl.config.schedule import Schedule

STAGES = ("act", "learn", "wait", "store")
"""Stages of a vector step of the loop, in order."""


class Pace:
    """Measures the speed of training and the time per stage, without evaluations and logging.

    On a GPU, `learn` only launches updates. The loop waits for them in `act`: the acting policy was
    copied after the updates of the step before the last.
    """

    def __init__(self, steps: int, updates: int) -> None:
        self._begin(steps, updates)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Return a context whose time counts for a stage."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def lap(self, steps: int, updates: int) -> dict[str, float]:
        """Return `time/` values: rates since the last lap, and each stage's share of the time."""
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
    """Estimates the time left in a run from the speed of its parts so far.

    Random steps, steps with updates, and evaluations have separate rates, with more weight on
    recent measurements.

    Args:
        schedule: Step counts of the run.
        evaluation: Environment steps of an evaluation during training.
        final: Environment steps of the final evaluation.
    """

    def __init__(self, schedule: Schedule, evaluation: int, final: int) -> None:
        self._schedule, self._evaluation, self._final = schedule, evaluation, final
        self._rates: dict[str, float] = {}

    def training(self, steps: int, n: int, rate: float) -> None:
        """Record the rate of the `n` environment steps before `steps` [steps/s]."""
        start = self._schedule.learning_starts
        if steps <= start:
            self._note("random", rate)
        elif steps - n >= start:
            self._note("learning", rate)

    def judging(self, n: int, seconds: float) -> None:
        """Record the time of an evaluation of `n` environment steps [s]."""
        self._note("evaluation", n / max(seconds, 1e-9))

    def _note(self, part: str, rate: float) -> None:
        before = self._rates.get(part, rate)
        self._rates[part] = 0.5 * (before + rate)

    def seconds(self, steps: int) -> float | None:
        """Return the time from `steps` to the end [s]; None before updates have been timed."""
        schedule, learning = self._schedule, self._rates.get("learning")
        if learning is None:
            return None
        left = (schedule.total_timesteps - steps) / learning
        last = schedule.total_timesteps - 1  # the end has its own evaluation
        evaluations = last // schedule.eval_every - min(steps, last) // schedule.eval_every
        return left + (evaluations * self._evaluation + self._final) / self._judged(learning)

    def last_evaluation(self) -> float | None:
        """Return the expected time of the final evaluation [s]; None before updates are timed."""
        learning = self._rates.get("learning")
        return None if learning is None else self._final / self._judged(learning)

    def _judged(self, learning: float) -> float:
        """Return the rate of evaluations [steps/s], by their own or the most similar rate."""
        return self._rates.get("evaluation") or self._rates.get("random") or learning
