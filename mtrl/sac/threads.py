"""Choice of the number of CPU threads, by timing the first updates of a run."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

ROUNDS = 8
"""Timed steps per number of threads, after one step of warm-up."""
WORTH = 0.9
"""More threads are used only if they take at most this fraction of the time: they occupy cores that
others could use."""


class ThreadChoice:
    """Tries 1, 2, 4, … threads in turn, each for one step of the loop, and keeps the fastest.

    The measured time is from the start of one step to the start of the next, simulators included:
    a thread that takes a core from a simulator may speed up the update but slow down the loop.

    Args:
        maximum: Maximum number of threads; default: `torch.get_num_threads()`.
        clock: Returns the time [s].

    Attributes:
        chosen: Number of threads, once it is chosen; set it to skip the trials.
    """

    def __init__(
        self, maximum: int | None = None, clock: Callable[[], float] = perf_counter
    ) -> None:
        maximum = maximum or torch.get_num_threads()
        powers = (2**i for i in range(maximum.bit_length()))
        self._counts = [n for n in powers if n < maximum] + [maximum]
        self._clock = clock
        self._times: dict[int, list[float]] = {n: [] for n in self._counts}
        self._started: float | None = None
        self._current = -1
        self.chosen: int | None = maximum if maximum == 1 else None

    def begin(self) -> None:
        """Set the number of threads at the start of a step."""
        if self.chosen is not None:
            if torch.get_num_threads() != self.chosen:
                torch.set_num_threads(self.chosen)
            return
        now = self._clock()
        if self._started is not None:
            self._times[self._counts[self._current]].append(now - self._started)
        self._current = (self._current + 1) % len(self._counts)
        if all(len(times) > ROUNDS for times in self._times.values()):
            self.chosen = self._best()
        torch.set_num_threads(self.chosen or self._counts[self._current])
        self._started = now

    def _best(self) -> int:
        best, *others = self._counts
        medians = {count: median(times[1:]) for count, times in self._times.items()}
        for count in others:
            if medians[count] < WORTH * medians[best]:
                best = count
        return best
