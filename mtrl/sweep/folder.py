"""Folder of a sweep, through which its processes communicate, on any number of machines.

<sweep>/
├── sweep.json            runs, rules that may stop them early, and goal of a search
├── configs/              copies of the files that runs start from
├── runs/<run>/           ordinary run folders; `tensorboard --logdir <sweep>/runs`
├── logs/<run>.txt        output of the run's processes
├── states/<run>.json     state of the run, see `State`; touched while a process runs
├── optuna.log            storage of a search or of successive halving
├── slurm/                array scripts that were submitted
└── report/               figures, table, report.html
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from mtrl.analysis.logs import BROKEN, read_final
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, one_line
from mtrl.folder import write_text
from mtrl.sweep.rules import Rules
from mtrl.training.lock import NO_LOCKS
from mtrl.training.place import quoted

BEAT = 10.0
"""Interval at which a running process touches its run's state [seconds]."""
SILENCE = 6 * BEAT
"""Time without a touch after which a process counts as dead [seconds]."""

What = Literal["running", "finished", "failed", "stopped", "ended early", "queued"]


class Attempt(BaseModel):
    """One process of a run."""

    host: str
    pid: int
    started: str
    commit: str | None = None
    cores: tuple[int, ...] | None = None
    code: int | None = None


class State(BaseModel):
    """State of a run.

    Attributes:
        what: `queued`: submitted to a scheduler; `stopped`: on request, with a checkpoint; `ended
            early`: by a rule, for good.
        why: The rule, if it ended early.
        job: Job id of the scheduler, if it was submitted to one.
        lines: Last output lines of a failed process.
        attempts: Its processes, the latest last.
        newest: Latest checkpoint when the run was last requeued, and number of times it was
            requeued without a later one.
    """

    model_config = ConfigDict(frozen=True)
    what: What
    why: str | None = None
    job: str | None = None
    lines: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    newest: tuple[str, int] = ("", 0)


def read_state(path: Path) -> State | None:
    """Read a state; None if there is none, or it cannot be read."""
    try:
        return State.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_state(path: Path, state: State) -> None:
    """Write a state, which `read_state` reads."""
    write_text(path, state.model_dump_json(indent=1) + "\n")


def is_finished(run_dir: Path) -> bool:
    """Return whether a run has its final evaluation at its full length."""
    try:
        stored = read_final(run_dir)
        total = TrainConfig.from_yaml(run_dir / "config.yaml").total_timesteps if stored else None
        return stored is not None and total is not None and stored["total_timesteps"] >= total
    except BROKEN:
        return False


class Entry(BaseModel):
    """A run of a sweep in sweep.json.

    Attributes:
        name: Name of its folder.
        method: Identifier shared by runs that differ only in the seed.
        label: Name of the method for display; empty if there is only one.
        seed: Seed of the run.
        total: Length of the run [environment steps over all tasks].
        tasks: Task names; runs with equal tasks can be compared.
        arguments: Arguments of `mtrl-train`.
        trial: Number of the point in a search.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    method: str
    label: str
    seed: int
    total: int
    tasks: tuple[str, ...]
    arguments: tuple[str, ...]
    trial: int | None = None


class Contents(BaseModel):
    """Contents of sweep.json.

    Attributes:
        rules: Rules that may stop runs early.
        goal: Tag that a search maximises; None without a search.
        runs: Runs of the grid or search, then earlier ones that are no longer in it.
    """

    model_config = ConfigDict(frozen=True)
    rules: Rules
    goal: str | None = None
    runs: tuple[Entry, ...]


@dataclass(frozen=True)
class SweepFolder:
    """Folder of a sweep at the absolute path `path`."""

    path: Path

    def run_dir(self, name: str) -> Path:
        """Return the run folder."""
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        """Return the file with the output of its processes."""
        return self.path / "logs" / f"{name}.txt"

    def state(self, name: str) -> Path:
        """Return the file with its state."""
        return self.path / "states" / f"{name}.json"

    @property
    def storage(self) -> Path:
        """Optuna's journal."""
        return self.path / "optuna.log"

    def make(self) -> None:
        """Create the missing parts of the folder.

        Raises:
            UsageError: If it cannot be created, or holds something else.
        """
        self._expect_ours()
        try:
            if not (self.path / "sweep.json").exists():
                self.record([], Rules())
            for name in ("configs", "runs", "logs", "states"):
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from None

    def _expect_ours(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            is_ours = (self.path / "sweep.json").exists() or not any(self.path.glob("[!.]*"))
        except OSError as error:
            raise self._cannot_write(error) from None
        if not is_ours:
            raise UsageError(f"out: expected a sweep or an empty folder, got {self.path}")

    def _cannot_write(self, error: OSError) -> UsageError:
        return UsageError(f"out: cannot write in {self.path}: {one_line(error)}")

    def contents(self) -> Contents:
        """Read sweep.json.

        Raises:
            UsageError: If this is not the folder of a sweep.
        """
        try:
            return Contents.model_validate_json((self.path / "sweep.json").read_bytes())
        except (OSError, ValidationError) as error:
            reason = f"expected the folder of a sweep, got {self.path} ({one_line(error)})"
            raise UsageError(f"sweep: {reason}") from None

    def record(self, entries: Sequence[Entry], rules: Rules, goal: str | None = None) -> None:
        """Write these runs, and earlier ones that have started but are no longer in the grid."""
        new = {entry.name for entry in entries}
        before = self.contents().runs if (self.path / "sweep.json").exists() else ()
        kept = [e for e in before if e.name not in new and self.run_dir(e.name).exists()]
        contents = Contents(rules=rules, goal=goal, runs=(*entries, *kept))
        write_text(self.path / "sweep.json", contents.model_dump_json(indent=1) + "\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder against a second sweep, and create its missing parts.

        Raises:
            UsageError: If another process runs this sweep; see also `make`.
        """
        self._expect_ours()  # before a lock is left there
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"out: expected a sweep that is not running, got {self.path}; `mtrl-sweep status "
                f"{quoted(self.path)}` shows its progress"
            ) from None
        except NotImplementedError:  # the file system has no locks
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise self._cannot_write(error) from None
        try:
            self.make()
            yield
        finally:
            lock.release()

    def now(self) -> float:
        """Return the time of the file system, which may be that of a server [seconds]."""
        clock = self.path / ".clock"
        try:
            clock.touch()
            return clock.stat().st_mtime
        except OSError:  # another user's sweep
            return time.time()
