"""Submission of runs as a Slurm array, from a user's batch script.

Each element of the array executes one run. It is requeued shortly before its time limit (on
SIGUSR1, which Slurm is asked to send) or after --max-runtime; Slurm itself requeues it after
preemption and node failures. In all cases, the run resumes from its latest checkpoint.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mtrl.errors import RunError, UsageError, one_line
from mtrl.folder import write_text
from mtrl.sweep.folder import Entry, State, SweepFolder, read_state, write_state

LEAD = 180
"""Time before the limit at which an element is signalled [seconds]; a checkpoint takes seconds, and
Slurm may be a minute late."""


def waiting(folder: SweepFolder, entries: Sequence[Entry]) -> set[str]:
    """Return the names of runs that are still queued or running from an earlier array.

    Raises:
        RunError: If Slurm does not respond.
    """
    queued: dict[str, str] = {}
    for entry in entries:
        state = read_state(folder.state(entry.name))
        if state is not None and state.job is not None:
            queued[state.job] = entry.name
    if not queued:
        return set()
    shown = _slurm(["squeue", "--me", "--array", "--noheader", "--format=%F_%K"])
    return {queued[job] for job in shown.split() if job in queued}


def script(folder: SweepFolder, names: Path, batch: str, retries: int) -> str:
    """Return the user's batch script with the command of an element.

    Args:
        names: File with the name of each element's run, one per line.
        batch: Script with `{command}`.
        retries: Number of times a failed run is retried.
    """
    words = [sys.executable, "-m", "mtrl.sweep.element", str(folder.path), str(names), str(retries)]
    return batch.replace("{command}", shlex.join(words))


def flags(batch: str, count: int, cpus: int, at_a_time: int | None) -> list[str]:
    """Return the flags of `sbatch`, except those that the script sets itself.

    Args:
        batch: The user's script.
        count: Number of elements of the array.
        cpus: CPUs per element.
        at_a_time: Maximum number of parallel elements; None for no limit.
    """
    bound = "" if at_a_time is None else f"%{at_a_time}"
    found = [
        "--parsable",
        "--hold",
        f"--array=0-{count - 1}{bound}",
        "--requeue",
        "--open-mode=append",
    ]
    found.append(f"--cpus-per-task={cpus}")
    if not re.search(r"^#SBATCH.*--signal", batch, re.MULTILINE):
        found.append(f"--signal=B:USR1@{LEAD}")
    if not re.search(r"^#SBATCH.*(--job-name|-J)", batch, re.MULTILINE):
        found.append("--job-name=mtrl-sweep")
    return found


def submit(
    folder: SweepFolder,
    entries: Sequence[Entry],
    batch: str,
    *,
    cpus: int,
    at_a_time: int | None,
    retries: int,
) -> str:
    """Submit an array to Slurm, and return its job id.

    Raises:
        RunError: If Slurm rejects it, with Slurm's message.
    """
    where = folder.path / "slurm"
    where.mkdir(exist_ok=True)
    number = len(list(where.glob("array-*.sh")))
    names, path = where / f"array-{number}.txt", where / f"array-{number}.sh"
    write_text(names, "".join(f"{entry.name}\n" for entry in entries))
    write_text(path, script(folder, names, batch, retries))
    command = ["sbatch", *flags(batch, len(entries), cpus, at_a_time)]
    if not re.search(r"^#SBATCH.*(--output|-o )", batch, re.MULTILINE):
        command.append(f"--output={where}/%A_%a.txt")
    job = _slurm([*command, str(path)]).strip().split(";")[0]
    for index, entry in enumerate(entries):
        state = read_state(folder.state(entry.name)) or State(what="queued")
        changed = {"what": "queued", "job": f"{job}_{index}", "lines": (), "why": None}
        write_state(folder.state(entry.name), state.model_copy(update=changed))
    _slurm(["scontrol", "release", job])  # no element has written its state before
    return job


def _slurm(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UsageError(f"backend: expected Slurm's {command[0]} here, found none") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or error.stdout.strip() or f"exit code {error.returncode}"
        raise RunError(f"{command[0]}: {one_line(RuntimeError(reason))}") from None
    return done.stdout
