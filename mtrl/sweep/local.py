"""Backend for this machine: several runs in parallel, each on its own cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from mtrl.sweep.attempt import Ending, Job, attempt


def cores() -> list[int]:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares(jobs: int, each: int) -> list[list[int]]:
    """Return disjoint sets of `each` neighbouring cores for `jobs` parallel runs."""
    mine = cores()
    return [mine[each * job : each * (job + 1)] for job in range(jobs)]


class Local:
    """Backend with a thread per running process.

    Args:
        cores: CPU cores of each parallel run.

    Attributes:
        running: Number of current runs.
    """

    def __init__(self, cores: Sequence[Sequence[int]]) -> None:
        self.running = 0
        self._shares = list(map(tuple, cores))
        self._endings: SimpleQueue[tuple[tuple[int, ...], Ending | BaseException]] = SimpleQueue()
        self._stop = threading.Event()

    @property
    def has_room(self) -> bool:
        """Whether another run may start now."""
        return bool(self._shares)

    def start(self, job: Job) -> None:
        """Start a run."""
        share = self._shares.pop()
        self.running += 1
        # A daemon thread, so that a second Ctrl-C ends the sweep, and `LEASH` its runs.
        threading.Thread(target=self._attempt, args=(job, share), daemon=True).start()

    def _attempt(self, job: Job, share: tuple[int, ...]) -> None:
        try:
            found: Ending | BaseException = attempt(job, share, self._stop.is_set)
        except BaseException as error:  # raised again in the waiting thread
            found = error
        self._endings.put((share, found))

    def endings(self, timeout: float) -> list[Ending]:
        """Return runs that have ended, after waiting up to `timeout` seconds for the first."""
        try:
            share, found = self._endings.get(timeout=timeout)
        except Empty:
            return []
        self.running -= 1
        self._shares.append(share)
        if isinstance(found, BaseException):
            raise found
        return [found]

    def stop(self) -> None:
        """Ask all runs to stop cleanly."""
        self._stop.set()

    def close(self) -> None:
        """Do nothing, because there are no resources to release."""
