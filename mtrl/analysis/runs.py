"""Run folders as plain arrays."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtrl.config.train import TrainConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.errors import UsageError, one_line
from mtrl.folder import COSINES, STEP, read_rows

Axis = Literal["steps", "updates", "hours"]
SUCCESS = "eval/success_rate"


@dataclass(frozen=True)
class Final:
    """The full evaluation of a finished run: solved `[T]` of so many episodes."""

    solved: np.ndarray
    episodes: int


@dataclass(frozen=True)
class Run:
    """What the logs of one run say.

    Attributes:
        path: Its folder.
        config: Its configuration.
        tasks: T task names, in the order of the benchmark.
        steps: When it was evaluated [environment steps over all tasks], `[P]`, increasing.
        success: Success rates found then, `[P, T]`.
        clock: Steps, updates and hours of its log rows, `[3, L]`.
        final: None if the run has not reached its end.
    """

    path: Path
    config: TrainConfig
    tasks: tuple[str, ...]
    steps: np.ndarray
    success: np.ndarray
    clock: np.ndarray
    final: Final | None

    @property
    def last_step(self) -> float:
        """How far its logs go [environment steps over all tasks]."""
        return float(np.fmax(self.steps[-1], self.clock[0, -1]))

    def axis(self, name: Axis) -> np.ndarray:
        """When it was evaluated, in steps, updates or hours, `[P]`.

        Updates and hours are linear between log rows; NaN for what was evaluated outside them.
        """
        if name == "steps":
            return self.steps
        row = self.clock["steps updates hours".split().index(name)]
        return np.interp(self.steps, self.clock[0], row, left=np.nan, right=np.nan)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UsageError: if it is none, or nothing was evaluated in it.
    """
    rows = _log(path)
    config = TrainConfig.from_yaml(path / "config.yaml")
    tasks = _tasks(config, rows)
    found = {row[STEP]: row for row in rows if f"{SUCCESS}/mean" in row}  # the last, if twice
    if not found:
        raise UsageError(f"runs: expected a run with an evaluation in its logs, got none in {path}")
    try:
        success = [[found[step][f"{SUCCESS}/{task}"] for task in tasks] for step in sorted(found)]
        clock = [
            (row[STEP], row["time/updates"], row["time/elapsed"] / 3600)
            for row in rows
            if "time/updates" in row
        ]
        final = None
        if (path / "eval.json").exists():
            stored = json.loads((path / "eval.json").read_text(encoding="utf-8"))
            # One from before the run was extended is not about its end.
            if stored["total_timesteps"] >= config.schedule(len(tasks)).total_timesteps:
                by_task = {row["task"]: row for row in stored["tasks"]}
                solved = np.array([by_task[task]["successes"] for task in tasks])
                final = Final(solved, by_task[tasks[0]]["episodes"])
                hours = stored["seconds"] / 3600
                clock.append((stored["total_timesteps"], stored["updates"], hours))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UsageError(f"runs: cannot read the logs in {path}: {error!r}") from None
    steps = np.array(sorted(found), float)
    return Run(
        path, config, tasks, steps, np.array(success), np.array(clock or [(np.nan,) * 3]).T, final
    )


def read_cosines(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[str, ...]]:
    """Cosines between the tasks' gradients over a run.

    Returns:
        When they were measured [environment steps over all tasks], `[D]`; them, `[D, T, T]` for
        each network; T task names.

    Raises:
        UsageError: if the folder holds none.
    """
    rows = read_rows(path / COSINES)
    if not rows:
        raise UsageError(
            f"cosine: expected a run folder with {COSINES}, which is written every "
            f"--diagnose-every steps, got {path}"
        )
    config = TrainConfig.from_yaml(path / "config.yaml")
    tasks = _tasks(config, _log(path))
    networks = sorted(rows[0].keys() - {STEP})
    steps = np.array([row[STEP] for row in rows], float)
    return steps, {name: np.array([row[name] for row in rows]) for name in networks}, tasks


def _tasks(config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The tasks' names; those of a benchmark that would have to be imported as they were logged."""
    if ":" not in config.benchmark or config.benchmark.startswith("mt1:"):
        return get_benchmark(config.benchmark, config.tasks).tasks
    first: Mapping[str, Any] = next((row for row in rows if f"{SUCCESS}/mean" in row), {})
    names = [tag.removeprefix(f"{SUCCESS}/") for tag in first if tag.startswith(f"{SUCCESS}/")]
    return tuple(name for name in names if name not in ("mean", "worst"))


def _log(path: Path) -> list[dict[str, Any]]:
    """The rows of progress.json, or of progress.csv if that is all that was kept."""
    lines, table = path / "progress.json", path / "progress.csv"
    if not (path / "config.yaml").is_file() or not (lines.is_file() or table.is_file()):
        expected = "a run folder with config.yaml and progress.json or progress.csv"
        raise UsageError(f"runs: expected {expected}, got {path}")
    try:
        if lines.is_file():
            return read_rows(lines)
        text = table.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()  # a killed process leaves part of a line
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(whole)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"runs: cannot read the logs in {path}: {one_line(error)}") from None
