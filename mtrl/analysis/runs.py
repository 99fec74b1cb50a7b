"""Run folders as plain arrays."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, one_line
from mtrl.folder import COSINES, STEP, read_benchmark, read_rows

Axis = Literal["steps", "updates", "hours"]
Score = Literal["success_rate", "return"]
BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError)
"""What a damaged log raises while it is read."""


Rows = Sequence[Mapping[str, Any]]


class Unevaluated(UsageError):
    """A folder without an evaluation: a run that has just begun, or no run at all."""


@dataclass(frozen=True)
class Final:
    """The full evaluation of a finished run.

    Attributes:
        scores: Success rate or mean return of each task, `[T]`.
        episodes: Of each task.
    """

    scores: np.ndarray
    episodes: int

    @property
    def solved(self) -> np.ndarray:
        """Solved episodes of each task, int `[T]`; only where scores are success rates."""
        return np.rint(self.scores * self.episodes).astype(int)


@dataclass(frozen=True)
class Run:
    """What the logs of one run say.

    Attributes:
        path: Its folder.
        config: Its configuration.
        tasks: T task names.
        steps: When it was evaluated [environment steps over all tasks], `[P]`, increasing.
        scores: Success rates or mean returns found then, `[P, T]`.
        clock: Steps, updates and hours of its log rows, `[3, L]`.
        final: None if the run has not reached its end.
        score: What `scores` are.
    """

    path: Path
    config: TrainConfig
    tasks: tuple[str, ...]
    steps: np.ndarray
    scores: np.ndarray
    clock: np.ndarray
    final: Final | None
    score: Score = "success_rate"

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

    def reordered(self, tasks: tuple[str, ...]) -> Run:
        """The same run with its tasks in another order."""
        order = [self.tasks.index(task) for task in tasks]
        final = self.final and replace(self.final, scores=self.final.scores[order])
        return replace(self, tasks=tasks, scores=self.scores[:, order], final=final)


def read_run(path: Path, score: Score | None = None) -> Run:
    """Read a run folder.

    Args:
        path: With config.yaml, and progress.json or progress.csv.
        score: What to read: success rates, of the tasks that have one; or returns. Default: success
            rates if every task has one, else returns.

    Raises:
        Unevaluated: if it is no run folder, or nothing was evaluated in it yet.
        UsageError: if it is not there, its logs are damaged, or they lack this score.
    """
    config, rows = _log(path)
    found = [row for row in rows if any(tag.startswith("eval/") for tag in row)]
    if not found:
        raise Unevaluated(
            f"runs: expected a run with an evaluation in its logs, got none in {path}"
        )
    try:
        stored = _final_file(path)
        tasks = _tasks(path, config, stored, found)
        total = config.schedule(len(tasks)).total_timesteps
        if score is None:
            told = all(f"eval/success_rate/{task}" in found[-1] for task in tasks)
            score = "success_rate" if told else "return"
        tasks = tuple(task for task in tasks if f"eval/{score}/{task}" in found[-1])
        if not tasks:
            raise UsageError(f"score: expected eval/{score}/ in the logs, got none in {path}")
        tags = [f"eval/{score}/{task}" for task in tasks]
        by_step = {
            float(row[STEP]): [float(row[tag]) for tag in tags]
            for row in found
            if all(tag in row for tag in tags)  # a task may tell its success later than others
        }  # the last, if a step is there twice
        steps = np.array(sorted(by_step))
        scores = np.array([by_step[step] for step in steps])
        if not (np.isfinite(steps).all() and np.isfinite(scores).all()):
            raise ValueError("a number that is not finite")
        clock = [
            (float(row[STEP]), float(row["time/updates"]), float(row["time/elapsed"]) / 3600)
            for row in rows
            if "time/updates" in row
        ]
        final = None
        # One from before the run was extended is not about its end.
        if stored and stored["total_timesteps"] >= total:
            final = _final(stored, tasks, score)
            end = float(stored["total_timesteps"]), float(stored["updates"])
            clock.append((*end, stored["seconds"] / 3600))
    except UsageError:
        raise
    except BROKEN as error:
        raise UsageError(f"runs: cannot read the logs in {path}: {error!r}") from None
    times = np.array(clock or [(np.nan,) * 3]).T
    return Run(path, config, tasks, steps, scores, times, final, score)


def read_cosines(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[str, ...]]:
    """Cosines between the tasks' gradients over a run.

    Returns:
        When they were measured [environment steps over all tasks], `[D]`; them, `[D, T, T]` for
        each network, NaN where there was none; T task names.

    Raises:
        UsageError: if there are none in the folder, or they are damaged.
    """
    config, rows = _log(path)
    try:
        lines = read_rows(path / COSINES)
        if not lines:
            every = config.diagnose_every
            why = (
                "its --diagnose-every is 0. Train with --diagnose-every N to measure them every N "
                "steps"
                if every == 0
                else f"they are measured every {every:,} steps (--diagnose-every) once it learns, "
                "if there is more than one task"
                if every
                else "they are measured every --diagnose-every steps"
            )
            raise UsageError(
                f"cosine: expected the cosines between tasks' gradients, got none in {path}: {why}"
            )
        tasks = _tasks(path, config, _final_file(path), rows)
        steps = np.array([float(line[STEP]) for line in lines])
        cosines = {
            network: np.array([line[network] for line in lines], float)
            for network in sorted(lines[0].keys() - {STEP})
        }
        shape = (len(steps), len(tasks), len(tasks))
        for network, values in cosines.items():
            if values.shape != shape:
                raise ValueError(f"expected {shape} cosines of {network}, got {values.shape}")
        if not np.isfinite(steps).all():
            raise ValueError("a step that is not finite")
    except UsageError:
        raise
    except BROKEN as error:
        raise UsageError(f"cosine: cannot read {path / COSINES}: {error!r}") from None
    return steps, cosines, tasks


def _final_file(path: Path) -> dict[str, Any]:
    """What eval.json holds; nothing if there is none."""
    file = path / "eval.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _final(stored: Mapping[str, Any], tasks: Sequence[str], score: Score) -> Final:
    by_task = {row["task"]: row for row in stored["tasks"]}
    rows = [by_task[task] for task in tasks]
    episodes = int(rows[0]["episodes"])
    if score == "return":
        scores = np.array([float(row["return_mean"]) for row in rows])
    else:
        scores = np.array([int(row["successes"]) for row in rows]) / episodes
    if not np.isfinite(scores).all():
        raise ValueError("eval.json: a score that is not finite")
    return Final(scores, episodes)


def _tasks(
    path: Path, config: TrainConfig, stored: Mapping[str, Any], rows: Rows
) -> tuple[str, ...]:
    """The tasks' names: as they were recorded, or else as older runs' files list them."""
    if (record := read_benchmark(path)) is not None:
        return record.names
    if config.tasks is not None:
        return config.tasks
    if stored:
        return tuple(row["task"] for row in stored["tasks"])
    for prefix in ("eval/return/", "eval/success_rate/", "train/critic_loss/"):
        for row in rows:
            names = [tag.removeprefix(prefix) for tag in row if tag.startswith(prefix)]
            if names:
                return tuple(name for name in names if name not in ("mean", "worst"))
    raise UsageError(f"runs: expected logs that name the tasks, got none in {path}")


def _log(path: Path) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """The configuration; the rows of progress.json, or of progress.csv if that was kept alone."""
    lines, table = path / "progress.json", path / "progress.csv"
    if not path.exists():
        raise UsageError(f"runs: no such folder: {path}")
    if not (path / "config.yaml").is_file() or not (lines.is_file() or table.is_file()):
        expected = "a run folder with config.yaml and progress.json or progress.csv"
        raise Unevaluated(f"runs: expected {expected}, got {path}")
    config = TrainConfig.from_yaml(path / "config.yaml")
    try:
        if lines.is_file():
            return config, read_rows(lines)
        text = table.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()  # a killed process leaves part of a line
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(whole)]
        return config, rows
    except BROKEN as error:
        raise UsageError(f"runs: cannot read the logs in {path}: {one_line(error)}") from None
