"""One process of one run, from its start to what became of it: the same on every backend."""

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
"""How often a process is looked after [seconds]."""

LINES = 8
"""How many of the last lines of a process that failed are kept."""

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
"""Becomes the run's process, once it is on its cores, and sure to get a SIGTERM if its parent dies
(Linux): it writes a checkpoint then, and leaves."""


class Rule(Protocol):
    """Ends runs that are not worth their time."""

    def verdict(self, name: str, run_dir: Path) -> str | None:
        """Why the run is to end, or None."""


@dataclass(frozen=True)
class Job:
    """A run that is to be made.

    Attributes:
        name: Of the run.
        arguments: Of `mtrl-train`, with --resume-if-exists: they start it and go on with it.
        run_dir: Its folder.
        log: What its processes print is added to this file.
        state: What becomes of it is written here.
        variables: Of the environment, beside those there are.
        folder: Working directory; modules of the user's are looked for here.
        rule: May end it early.
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
    """How a process of a run ended.

    Attributes:
        name: Of the run.
        what: `stopped`: asked to, or after --max-runtime, with a checkpoint; `lost`: with the
            machine it ran on.
        lines: The last that it printed, if it failed; or why it ended early.
    """

    name: str
    what: Literal["finished", "failed", "stopped", "ended early", "lost"]
    lines: tuple[str, ...] = ()


def command_line(arguments: Sequence[str]) -> str:
    """As typed in a shell."""
    return shlex.join(["mtrl-train", *arguments])


def attempt(
    job: Job, cores: Sequence[int] | None = None, stop: Callable[[], bool] = lambda: False
) -> Ending:
    """Start the run or go on with it, and wait for its end.

    Args:
        job: The run.
        cores: What it is pinned to (Linux).
        stop: Asked every second whether to stop it in good order.
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
        except BaseException:  # whoever waits is interrupted: the run is not left alone
            process.terminate()
            raise
    lines: tuple[str, ...] = ()
    what: Literal["finished", "failed", "stopped", "ended early"]
    if is_finished(job.run_dir):
        what = "finished"
    elif why is not None:
        what, lines = "ended early", (why,)
    elif asked or code == 0:
        what = "stopped"
    else:
        what, lines = "failed", _last_lines(job.log, start, code)
    done = this.model_copy(update={"code": code})
    kept = lines if what == "failed" else ()
    _note(job, before, what=what, why=why, lines=kept, attempts=(*before.attempts, done))
    return Ending(job.name, what, lines)


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
        start_new_session=True,  # a Ctrl-C is the sweep's to pass on, once
    )


def _look_after(
    process: subprocess.Popen[bytes], job: Job, stop: Callable[[], bool]
) -> tuple[int, bool, str | None]:
    """Returns its exit code, whether it was asked to stop, and why a rule ended it, if one did."""
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
    """Wait while another process trains there, as one does whose sweep or node was lost just now.

    Returns:
        Whether it is free; False if asked to stop.
    """
    while (run_dir / ".owner").exists():
        try:
            with FileLock(run_dir / ".lock").acquire(timeout=0):
                return True
        except Timeout:
            if stop():
                return False
            time.sleep(LOOK)
        except (NotImplementedError, OSError):  # no locks there
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
    return tuple(lines or [f"exit code {code}, without a word"])


@cache
def commit() -> str | None:
    """The commit of mtrl's own checkout, with `-dirty` if files differ; None if it is not one."""
    here = Path(str(mtrl.__file__)).parent
    known = ["ls-files", "--error-unmatch", "__init__.py"]  # not a project around an environment
    told = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for words in (known, told):
            git = ["git", "-C", str(here), *words]
            done = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
