"""Main loop of a sweep: start runs while there is room, collect outcomes, and retry some."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mtrl.folder import newest_or_none
from mtrl.sweep.attempt import Ending, Job
from mtrl.training.console import say
from mtrl.training.interrupt import Interrupt

LOSSES = 10
"""Maximum number of times a run may be lost with its machine without progress."""


class Backend(Protocol):
    """Executes runs."""

    running: int

    @property
    def has_room(self) -> bool:
        """Whether another run may start now."""

    def start(self, job: Job) -> None:
        """Start a run."""

    def endings(self, timeout: float) -> list[Ending]:
        """Return runs that have ended, after waiting up to `timeout` seconds for the first."""

    def stop(self) -> None:
        """Ask all runs to stop cleanly."""

    def close(self) -> None:
        """Release resources."""


@dataclass
class Summary:
    """Outcome of a sweep.

    Attributes:
        ended: Outcome of each run that was started, by name.
        signal: Number of the signal that interrupted the sweep, or None.
    """

    ended: dict[str, Ending] = field(default_factory=dict)
    signal: int | None = None

    def having(self, what: str) -> list[Ending]:
        """Return the outcomes of one kind."""
        return [ending for ending in self.ended.values() if ending.what == what]


def drive(
    jobs: Iterator[Job],
    backend: Backend,
    retries: int = 0,
    show: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = say,
) -> Summary:
    """Execute all runs. A failed run does not stop others.

    Args:
        jobs: Runs, taken one by one when there is room; a search chooses the next one then.
        retries: Number of times a failed run is retried from its latest checkpoint.
        show: Called every second, and when a run ends.
        tell: Called with each line to print.
    """
    summary, again = Summary(), deque[Job]()
    working: dict[str, Job] = {}
    failures: Counter[str] = Counter()
    losses: dict[str, tuple[Path | None, int]] = {}
    with Interrupt() as interrupt, closing(backend):
        while True:
            if interrupt.wanted and summary.signal is None:
                summary.signal = interrupt.signal
                tell("interrupted: runs write a checkpoint and stop")
                backend.stop()
            while summary.signal is None and backend.has_room:
                job = again.popleft() if again else next(jobs, None)
                if job is None:
                    break
                working[job.name] = job
                backend.start(job)
            if not backend.running:
                return summary
            for ending in backend.endings(timeout=1.0):
                job = working.pop(ending.name)
                if summary.signal is None and _is_tried_again(
                    job, ending, retries, failures=failures, losses=losses, tell=tell
                ):
                    again.append(job)
                else:
                    summary.ended[ending.name] = ending
                    tell(_line(ending))
            show()


def _is_tried_again(
    job: Job,
    ending: Ending,
    retries: int,
    *,
    failures: Counter[str],
    losses: dict[str, tuple[Path | None, int]],
    tell: Callable[[str], None],
) -> bool:
    if ending.what == "failed":
        failures[job.name] += 1
        if failures[job.name] <= retries:
            times = f"{failures[job.name]} of {retries}"
            tell(f"{job.name} failed and is retried ({times}): {ending.lines[-1]}")
            return True
    if ending.what == "lost":
        newest = newest_or_none(job.run_dir)
        before, count = losses.get(job.name, (None, 0))
        losses[job.name] = newest, count + 1 if newest == before else 1
        if losses[job.name][1] <= LOSSES:
            where = f"from {newest.stem}" if newest else "from the start"
            tell(f"{job.name} was lost with its machine and continues {where}")
            return True
    return False


def _line(ending: Ending) -> str:
    if ending.what in ("failed", "lost"):
        return "\n    ".join([f"{ending.name} {ending.what}:", *ending.lines])
    return ": ".join([f"{ending.name} {ending.what}", *ending.lines])
