"""One element of a Slurm array, run by a batch script as `python -m mtrl.sweep.element …`.

    <sweep> <file with the names of the array's runs> <retries>

- A failed run is retried from its latest checkpoint.
- On SIGUSR1, which Slurm sends before the time limit, and after --max-runtime, the run writes a
  checkpoint and the element is requeued.
- On SIGTERM, from preemption or `scancel`, it writes a checkpoint. After preemption, Slurm itself
  requeues the element; a cancelled element is not requeued.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from mtrl.errors import UsageError
from mtrl.folder import newest_or_none
from mtrl.sweep.attempt import Job, attempt
from mtrl.sweep.folder import State, SweepFolder, read_state, write_state
from mtrl.sweep.jobs import job_of

MAX_STALLS = 3
"""Number of times an element is requeued without a newer checkpoint before it counts as failed."""


class Signals:
    """Records which signal came first."""

    def __init__(self) -> None:
        self.first: int | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number


def main(arguments: list[str]) -> int:
    """Run the element; return the exit code."""
    sweep, names, retries = arguments
    signals = Signals()
    folder = SweepFolder(Path(sweep))
    contents = folder.contents()
    name = Path(names).read_text(encoding="utf-8").split()[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    entry = next((entry for entry in contents.runs if entry.name == name), None)
    if entry is None:
        raise UsageError(f"sweep: {name} is not started, because the sweep no longer has it")
    job = job_of(folder, entry, contents.rules, Path.cwd())
    for _ in range(int(retries) + 1):
        ending = attempt(job, stop=lambda: signals.first is not None)
        print("\n    ".join([f"{ending.name} {ending.what}", *ending.lines]), flush=True)
        if ending.what != "failed":
            break
    if ending.what == "stopped" and signals.first in (None, signal.SIGUSR1):
        return _requeue(job)
    return 1 if ending.what == "failed" else 0


def _requeue(job: Job) -> int:
    """Requeue the element; Slurm then ends this process."""
    number = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    checkpoint = newest_or_none(job.run_dir)
    newest = checkpoint.name if checkpoint else ""
    state = read_state(job.state) or State(what="queued")
    before, count = state.newest
    count = count + 1 if newest == before else 0
    changes: dict[str, Any] = {"what": "queued", "newest": (newest, count)}
    if count >= MAX_STALLS:
        why = f"ran out of time {count + 1} times without a newer checkpoint; increase its time"
        print(why, flush=True)
        changes |= {"what": "failed", "lines": (why,)}
    write_state(job.state, state.model_copy(update=changes))
    if count >= MAX_STALLS:
        return 1
    print(f"{job.name} is requeued as {number}", flush=True)
    return subprocess.run(["scontrol", "requeue", number], check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        sys.exit(f"mtrl.sweep.element: error: {error}")
