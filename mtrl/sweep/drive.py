"""The loop of a sweep: start runs while there is room, hear of their ends, try some again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from mtrl.sweep.attempt import Ending, Job
from mtrl.training.console import say
from mtrl.training.interrupt import Interrupt

LOSSES = 10
"""So often a run may be lost with a machine without having got any further."""


class Backend(Protocol):
    """Where runs are made."""

    running: int

    @property
    def has_room(self) -> bool:
        """Whether another run may start now."""

    def start(self, job: Job) -> None:
        """Start a run."""

    def endings(self, timeout: float) -> list[Ending]:
        """Runs that have ended by now; waits so long for the first [seconds]."""

    def stop(self) -> None:
        """Ask all runs to stop in good order."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass
class Summary:
    """How a sweep went.

    Attributes:
        ended: What became of each run that was at work, by its name.
        signal: What interrupted the sweep, or None.
    """

    ended: dict[str, Ending] = field(default_factory=dict)
    signal: int | None = None

    def having(self, what: str) -> list[Ending]:
        """Those of one kind."""
        return [ending for ending in self.ended.values() if ending.what == what]


def drive(
    jobs: Iterator[Job],
    backend: Backend,
    retries: int = 0,
    show: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = say,
) -> Summary:
    """Make runs until there are no more. One that fails stops no other.

    Args:
        jobs: Taken one by one, when there is room: a search decides then what comes next.
        backend: Where.
        retries: How often a run that fails is tried again, from its newest checkpoint.
        show: Called every second, and at each end.
        tell: Called with a line for people.
    """
    summary, again, exhausted = Summary(), deque[Job](), False
    working: dict[str, Job] = {}
    failures: Counter[str] = Counter()
    losses: dict[str, tuple[str, int]] = {}
    with Interrupt() as interrupt:
        try:
            while True:
                if interrupt.wanted and summary.signal is None:
                    summary.signal = interrupt.signal
                    tell("interrupted: runs write a checkpoint and stop")
                    backend.stop()
                while summary.signal is None and backend.has_room and not (exhausted and not again):
                    job = again.popleft() if again else next(jobs, None)
                    if job is None:
                        exhausted = True
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
        finally:
            backend.close()


def _is_tried_again(
    job: Job,
    ending: Ending,
    retries: int,
    *,
    failures: Counter[str],
    losses: dict[str, tuple[str, int]],
    tell: Callable[[str], None],
) -> bool:
    if ending.what == "failed":
        failures[job.name] += 1
        if failures[job.name] <= retries:
            times = f"{failures[job.name]} of {retries}"
            tell(f"{job.name} failed, is tried again ({times}): {ending.lines[-1]}")
            return True
    if ending.what == "lost":
        newest = max((p.name for p in job.run_dir.glob("checkpoints/step_*")), default="")
        before, count = losses.get(job.name, ("", 0))
        losses[job.name] = newest, count + 1 if newest == before else 1
        if losses[job.name][1] <= LOSSES:
            where = f"from {newest.partition('.')[0]}" if newest else "from its beginning"
            tell(f"{job.name} was lost with its machine, goes on {where}")
            return True
    return False


def _line(ending: Ending) -> str:
    if ending.what in ("failed", "lost"):
        return "\n    ".join([f"{ending.name} {ending.what}:", *ending.lines])
    return ": ".join([f"{ending.name} {ending.what}", *ending.lines])
