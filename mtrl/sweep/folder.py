"""A sweep's folder, which is all that its parts know of each other, on however many machines.

<sweep>/
├── sweep.json            the runs, and the rules that may end them early
├── configs/              copies of the files that runs start from
├── runs/<run>/           an ordinary run folder each; `tensorboard --logdir <sweep>/runs`
├── logs/<run>.txt        what the run's processes printed
├── states/<run>.json     what became of them: see `State`; touched while one is at work
├── optuna.log            what a search or successive halving remembers
├── slurm/                the array scripts that were submitted
└── report/               figures, table, report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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

BEAT = 10.0
"""A process at work touches its run's state so often [seconds]."""
SILENCE = 6 * BEAT
"""After so long without, it is taken for dead [seconds]."""

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
    """What became of a run so far.

    Attributes:
        what: `queued`: in a scheduler's hands; `stopped`: asked to, with a checkpoint; `ended
            early`: by a rule, for good.
        why: Of `ended early`: the rule.
        job: The scheduler's number of it, if it was given to one.
        lines: The last that a process printed that failed.
        attempts: Its processes, the latest last.
        newest: Its newest checkpoint when it last went back into a queue, and how often it did so
            without a newer one.
    """

    model_config = ConfigDict(frozen=True)
    what: What
    why: str | None = None
    job: str | None = None
    lines: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    newest: tuple[str, int] = ("", 0)


def read_state(path: Path) -> State | None:
    """The state that was written; None if there is none, or it cannot be read."""
    try:
        return State.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_state(path: Path, state: State) -> None:
    """What `read_state` gives back."""
    write_text(path, state.model_dump_json(indent=1) + "\n")


def is_finished(run_dir: Path) -> bool:
    """Whether a run has its final evaluation, of as many steps as it is to have."""
    try:
        stored = read_final(run_dir)
        total = TrainConfig.from_yaml(run_dir / "config.yaml").total_timesteps if stored else None
        return stored is not None and total is not None and stored["total_timesteps"] >= total
    except BROKEN:
        return False


class Entry(BaseModel):
    """A run of a sweep, as sweep.json lists it.

    Attributes:
        name: Of its folder.
        method: What runs of other seeds share.
        label: The method, for people; empty if there is one alone.
        seed: Of the run.
        total: Its length [environment steps over all tasks].
        tasks: What is trained on: runs of equal tasks can be compared.
        arguments: Of `mtrl-train`.
        trial: Of a search: its number.
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


@dataclass(frozen=True)
class SweepFolder:
    """The folder at `path`, which is absolute."""

    path: Path

    def run_dir(self, name: str) -> Path:
        """The run's own folder."""
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        """What its processes printed."""
        return self.path / "logs" / f"{name}.txt"

    def state(self, name: str) -> Path:
        """What became of it."""
        return self.path / "states" / f"{name}.json"

    @property
    def storage(self) -> Path:
        """Optuna's journal."""
        return self.path / "optuna.log"

    def make(self) -> None:
        """Make it and what is inside.

        Raises:
            UsageError: if that cannot be, or something else is there.
        """
        record = self.path / "sweep.json"
        with suppress(OSError):
            if not record.exists() and any(self.path.glob("[!.]*")):
                raise UsageError(f"out: expected a sweep or an empty folder, got {self.path}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                self.record([], Rules())
            for name in ("configs", "runs", "logs", "states"):
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"out: cannot make {self.path}: {one_line(error)}") from None

    def entries(self) -> list[Entry]:
        """The runs.

        Raises:
            UsageError: if this is no sweep's folder.
        """
        path = self.path / "sweep.json"
        try:
            return [Entry(**row) for row in json.loads(path.read_text(encoding="utf-8"))["runs"]]
        except (OSError, *BROKEN) as error:
            reason = f"expected a sweep's folder, got {self.path} ({one_line(error)})"
            raise UsageError(f"sweep: {reason}") from None

    def rules(self) -> Rules:
        """What may end runs early."""
        tree = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
        return Rules.model_validate(tree["rules"])

    def record(self, entries: Sequence[Entry], rules: Rules) -> None:
        """List these runs, and those before that have begun though the grid has them no more."""
        new = {entry.name for entry in entries}
        before = self.entries() if (self.path / "sweep.json").exists() else []
        kept = [e for e in before if e.name not in new and self.run_dir(e.name).exists()]
        rows = [entry.model_dump(mode="json") for entry in (*entries, *kept)]
        tree = {"rules": rules.model_dump(mode="json"), "runs": rows}
        text = json.dumps(tree, indent=1)
        write_text(self.path / "sweep.json", text + "\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second sweep out.

        Raises:
            UsageError: if another process is at it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"out: expected a sweep that nobody is at, got {self.path}; `mtrl-sweep status "
                f"{self.path}` shows how it goes"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        try:
            yield
        finally:
            lock.release()

    def now(self) -> float:
        """The time by the clock that the files' times are of, which may be a server's [seconds]."""
        clock = self.path / ".clock"
        try:
            clock.touch()
            return clock.stat().st_mtime
        except OSError:  # somebody else's sweep
            return time.time()

    def is_at_work(self, name: str, now: float) -> bool:
        """Whether a process has told lately that it is at this run."""
        state, path = read_state(self.state(name)), self.state(name)
        return (
            state is not None and state.what == "running" and now - path.stat().st_mtime < SILENCE
        )
