"""How many CPU threads learning is worth, found out while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

ROUNDS = 8
"""Steps by which each number of threads is judged, after one that does not count."""
WORTH = 0.9
"""More threads are taken where they need at most this part of the time: they are others' cores."""


class ThreadChoice:
    """Tries 1, 2, 4, … threads in turn, each for a step of the loop, and keeps the best.

    Judged is the time from one step's beginning to the next one's, simulators and all: a thread
    that takes a core from a simulator may make the update faster and the loop slower.

    Args:
        most: Threads at most; default: as many as torch has taken for itself.
        clock: Tells the time [s].

    Attributes:
        chosen: How many, once that is known; to be set where it is known from before.
    """

    def __init__(self, most: int | None = None, clock: Callable[[], float] = perf_counter) -> None:
        most = most or torch.get_num_threads()
        self._counts = [n for n in (2**i for i in range(most.bit_length())) if n < most] + [most]
        self._clock = clock
        self._times: dict[int, list[float]] = {n: [] for n in self._counts}
        self._begun: float | None = None
        self._current = -1
        self.chosen: int | None = most if most == 1 else None

    def begin(self) -> None:
        """A step begins: set the number of threads for it."""
        if self.chosen is not None:
            if torch.get_num_threads() != self.chosen:
                torch.set_num_threads(self.chosen)
            return
        now = self._clock()
        if self._begun is not None:
            self._times[self._counts[self._current]].append(now - self._begun)
        self._current = (self._current + 1) % len(self._counts)
        if all(len(times) > ROUNDS for times in self._times.values()):
            self.chosen = self._best()
        torch.set_num_threads(self.chosen or self._counts[self._current])
        self._begun = now

    def _best(self) -> int:
        best, *others = self._counts
        medians = {count: median(times[1:]) for count, times in self._times.items()}
        for count in others:
            if medians[count] < WORTH * medians[best]:
                best = count
        return best
