"""One process of a run, from its start to its outcome; the same on every backend."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

import mtrl
from mtrl.sweep.folder import BEAT, Attempt, State, is_finished, read_state, write_state

LOOK = 1.0
"""Interval at which a process is polled [seconds]."""

LINES = 8
"""Number of last output lines of a failed process to keep."""

LEASH = """
import ctypes, os, signal, sys
parent, cores, program = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
if os.getppid() != parent:
    sys.exit(128 + signal.SIGTERM)
os.execv(program[0], program)
"""
"""Launcher of the run: pins it to its cores, and makes sure that it gets a SIGTERM if its parent
dies (Linux), on which it writes a checkpoint and exits."""


class Rule(Protocol):
    """Stops unpromising runs early."""

    def verdict(self, name: str, run_dir: Path) -> str | None:
        """Return the reason why the run should stop, or None."""


@dataclass(frozen=True)
class Job:
    """A run to be started.

    Attributes:
        name: Name of the run.
        arguments: Arguments of `mtrl-train`, with --resume-if-exists, so that they start or resume
            the run.
        run_dir: Run folder.
        log: File to which the output of its processes is appended.
        state: File with the state of the run.
        variables: Additional environment variables.
        folder: Working directory, which is also searched for users' modules.
        rule: Rule that may stop it early.
    """

    name: str
    arguments: tuple[str, ...]
    run_dir: Path
    log: Path
    state: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path.cwd)
    rule: Rule | None = None


@dataclass(frozen=True)
class Ending:
    """Outcome of a process of a run.

    Attributes:
        name: Name of the run.
        what: `stopped`: on request or after --max-runtime, with a checkpoint; `lost`: together
            with its machine.
        lines: Last lines of its output if it failed, or the reason if it ended early.
    """

    name: str
    what: Literal["finished", "failed", "stopped", "ended early", "lost"]
    lines: tuple[str, ...] = ()


def command_line(arguments: Sequence[str]) -> str:
    """Return the command line for a shell."""
    return shlex.join(["mtrl-train", *arguments])


def attempt(
    job: Job, cores: Sequence[int] | None = None, stop: Callable[[], bool] = lambda: False
) -> Ending:
    """Start or resume the run, and wait for its end.

    Args:
        cores: CPU cores to pin it to (Linux).
        stop: Polled every second; returns whether to stop it cleanly.
    """
    before = read_state(job.state) or State(what="queued")
    before = before.model_copy(update={"why": None, "lines": ()})
    if not _wait_until_free(job.run_dir, stop):
        return Ending(job.name, "stopped")
    if is_finished(job.run_dir):
        _note(job, before, what="finished")
        return Ending(job.name, "finished")
    if (why := _verdict(job)) is not None:
        _note(job, before, what="ended early", why=why)
        return Ending(job.name, "ended early", (why,))
    with job.log.open("a", encoding="utf-8") as log:
        log.write(f"$ {command_line(job.arguments)}\n")
        log.flush()
        start = log.tell()
        process = _start(job, cores, log.fileno())
        this = Attempt(
            host=platform.node(),
            pid=process.pid,
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            commit=commit(),
            cores=None if cores is None else tuple(cores),
        )
        _note(job, before, what="running", attempts=(*before.attempts, this))
        try:
            code, asked, why = _look_after(process, job, stop)
        except BaseException:  # do not leave the run behind
            process.terminate()
            raise
    if is_finished(job.run_dir):
        ending = Ending(job.name, "finished")
    elif why is not None:
        ending = Ending(job.name, "ended early", (why,))
    elif asked or code == 0:
        ending = Ending(job.name, "stopped")
    else:
        ending = Ending(job.name, "failed", _last_lines(job.log, start, code))
    attempts = (*before.attempts, this.model_copy(update={"code": code}))
    lines = ending.lines if ending.what == "failed" else ()
    _note(job, before, what=ending.what, why=why, lines=lines, attempts=attempts)
    return ending


def _note(job: Job, before: State, **changes: Any) -> None:
    write_state(job.state, before.model_copy(update=changes))


def _start(job: Job, cores: Sequence[int] | None, log: int) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "mtrl.cli.train", *job.arguments]
    shown = "" if cores is None else ",".join(map(str, cores))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LEASH, str(os.getpid()), shown, *program],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=job.folder,
        env={**os.environ, **job.variables},
        start_new_session=True,  # the sweep passes on Ctrl-C, once
    )


def _look_after(
    process: subprocess.Popen[bytes], job: Job, stop: Callable[[], bool]
) -> tuple[int, bool, str | None]:
    """Wait for a process; return exit code, whether it was asked to stop, and a rule's reason."""
    asked, why, beat = False, None, time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(LOOK), asked, why
        if time.monotonic() - beat > BEAT:
            beat = time.monotonic()
            os.utime(job.state)
        if not asked and stop():
            asked = True
            process.terminate()
        elif not asked and why is None and (why := _verdict(job)) is not None:
            process.terminate()


def _verdict(job: Job) -> str | None:
    return None if job.rule is None else job.rule.verdict(job.name, job.run_dir)


def _wait_until_free(run_dir: Path, stop: Callable[[], bool]) -> bool:
    """Wait while another process trains there; return False if asked to stop meanwhile.

    It may be one of a sweep or a node that was just lost.
    """
    while (run_dir / ".owner").exists():
        try:
            with FileLock(run_dir / ".lock").acquire(timeout=0):
                return True
        except Timeout:
            if stop():
                return False
            time.sleep(LOOK)
        except (NotImplementedError, OSError):  # the file system has no locks
            return True
    return True


def _last_lines(log: Path, start: int, code: int) -> tuple[str, ...]:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(start, file.tell() - 20_000))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-LINES:]
    if code < 0:
        lines.append(f"killed by {signal.Signals(-code).name}")
    return tuple(lines or [f"exit code {code}, without output"])


@cache
def commit() -> str | None:
    """Return the commit of mtrl's checkout, with `-dirty` if modified; None if it is not one."""
    here = Path(str(mtrl.__file__)).parent
    known = ["ls-files", "--error-unmatch", "__init__.py"]  # not an enclosing project
    told = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for words in (known, told):
            git = ["git", "-C", str(here), *words]
            done = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
