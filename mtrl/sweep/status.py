"""Status of a sweep, read from its folder on any machine, during or after the sweep."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtrl.folder import STEP, read_rows
from mtrl.progress import duration
from mtrl.sweep.folder import SILENCE, Entry, SweepFolder, is_finished, read_state
from mtrl.training.console import say

ORDER = ("running", "waiting", "queued", "stopped", "failed", "ended early", "finished")
TAIL = 200_000
"""Size of the end of a log that is read [bytes]."""


@dataclass(frozen=True)
class Row:
    """Current status of a run.

    Attributes:
        entry: The run.
        what: A state in `ORDER`.
        steps: Last logged step [environment steps over all tasks].
        success: Mean success rate of the last evaluation, or mean return if there is none.
        speed: Speed in the last rows [environment steps per second].
        seconds: Time so far [s].
        why: Reason, if it failed, ended early or is queued.
        host: Machine it runs on, or last ran on.
    """

    entry: Entry
    what: str
    steps: int = 0
    success: float | None = None
    speed: float | None = None
    seconds: float = 0.0
    why: str = ""
    host: str = ""

    @property
    def left(self) -> float | None:
        """Time left at the average speed so far, including evaluations [s]."""
        if self.what in ("finished", "ended early"):
            return 0.0
        if not self.steps or not self.seconds:
            return None
        return (self.entry.total - self.steps) * self.seconds / self.steps


def read(folder: SweepFolder) -> list[Row]:
    """Read the status of every run of a sweep.

    Raises:
        UsageError: If it is not the folder of a sweep.
    """
    entries, now = folder.contents().runs, folder.now()
    return [_row(folder, entry, now) for entry in entries]


def _row(folder: SweepFolder, entry: Entry, now: float) -> Row:
    path, run_dir = folder.state(entry.name), folder.run_dir(entry.name)
    state = read_state(path)
    what, why, host = "waiting", "", ""
    if state is not None:
        what, why = state.what, state.why or "".join(state.lines[-1:])
        host = state.attempts[-1].host if state.attempts else ""
        if what == "running" and now - path.stat().st_mtime >= SILENCE:
            what, why = "waiting", f"lost on {host}"
    if what != "finished" and is_finished(run_dir):  # by hand, or not yet recorded
        what = "finished"
    rows = read_rows(run_dir / "progress.json", last=TAIL)
    last = rows[-1] if rows else {}
    return Row(
        entry=entry,
        what=what,
        steps=int(last.get(STEP, 0)),
        success=newest(rows, "eval/success_rate/mean", "eval/return/mean"),
        speed=newest(rows, "time/fps"),
        seconds=newest(rows, "time/elapsed") or 0.0,
        why=why,
        host=host,
    )


def newest(rows: Sequence[Mapping[str, Any]], *tags: str) -> float | None:
    """Return the last value of the first tag that has any."""
    for tag in tags:
        for row in reversed(rows):
            if tag in row:
                return float(row[tag])
    return None


def time_left(rows: Sequence[Row]) -> float | None:
    """Estimate the time left in the sweep at the current parallelism [s]; None if unknown."""
    timed = [row for row in rows if row.steps and row.seconds]
    at_a_time = sum(row.what == "running" for row in rows)
    if not timed or not at_a_time:
        return None
    pace = sum(row.seconds for row in timed) / sum(row.steps for row in timed)
    lefts = [
        pace * row.entry.total if row.left is None else row.left
        for row in rows
        if row.what not in ("finished", "ended early", "failed")
    ]
    return max(sum(lefts) / at_a_time, max(lefts, default=0.0))


def summary(rows: Sequence[Row]) -> str:
    """Return one line with counts and the time left."""
    counts = Counter(row.what for row in rows)
    parts = [f"{counts[what]} {what}" for what in ORDER if counts[what]]
    left = time_left(rows)
    about = [] if left is None else [f"about {duration(left)} left"]
    return f"{len(rows)} runs: " + ", ".join([*parts, *about])


def table(rows: Sequence[Row], max_lines: int | None = None, width: int = 1000) -> str:
    """Return a summary and a line per run, running ones first.

    Args:
        max_lines: Maximum number of lines.
        width: Maximum length of a line [characters].
    """
    ordered = sorted(rows, key=lambda row: ORDER.index(row.what))
    shown = ordered if max_lines is None else ordered[: max(0, max_lines - 3)]
    head = ("run", "state", "steps", "score", "steps/s", "left", "about")
    cells = [head, *(_cells(row) for row in shown)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            f"{text:>{w}}" if 2 <= i <= 5 else f"{text:<{w}}"
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()[:width]
        for line in cells
    ]
    if len(shown) < len(rows):
        lines.append(f"… and {len(rows) - len(shown)} more"[:width])
    return "\n".join([summary(rows)[:width], *lines])


def _cells(row: Row) -> tuple[str, ...]:
    score = "–" if row.success is None else f"{row.success:.2f}"
    speed = "–" if row.speed is None or row.what != "running" else f"{row.speed:,.0f}"
    left = duration(row.left if row.what == "running" else None)
    about = row.why or (f"on {row.host}" if row.what == "running" else "") or row.entry.label
    steps = f"{row.steps:,}/{row.entry.total:,}"
    return (row.entry.name, row.what, steps, score, speed, left, about)


class Live:
    """Live table on a terminal, redrawn in place; does nothing without a terminal."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder, self._lines, self._next = folder, 0, 0.0
        try:
            self._shows = sys.stderr.isatty()
        except (AttributeError, ValueError):
            self._shows = False

    def __call__(self) -> None:
        """Redraw the table, but not too often, because reading many logs takes time."""
        start = time.monotonic()
        if not self._shows or start < self._next:
            return
        size = shutil.get_terminal_size()
        self.clear()
        text = table(read(self._folder), size.lines - 1, size.columns - 1)
        self._write(text + "\n")
        self._lines = text.count("\n") + 1
        end = time.monotonic()
        self._next = end + max(1.0, 50 * (end - start))

    def tell(self, text: str) -> None:
        """Print a line above the table."""
        self.clear()
        self._next = 0.0
        say(text)

    def clear(self) -> None:
        """Erase the table, before other output."""
        if self._lines:
            self._write(f"\x1b[{self._lines}F\x1b[J")  # move to its first line, and erase below
            self._lines = 0

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):
            self._shows = False
