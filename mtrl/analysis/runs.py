"""Run folders read into plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtrl.analysis.logs import BROKEN, Unevaluated, custom_name, read_final, read_log, tasks_of
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.folder import STEP

Axis = Literal["steps", "updates", "hours"]
Score = Literal["success_rate", "return"]


@dataclass(frozen=True)
class Final:
    """The full evaluation of a finished run.

    Attributes:
        scores: Success rate or mean return of each task, `[T]`.
        episodes: Episodes per task.
    """

    scores: np.ndarray
    episodes: int

    @property
    def solved(self) -> np.ndarray:
        """Solved episodes of each task, int `[T]`; valid only if scores are success rates."""
        return np.rint(self.scores * self.episodes).astype(int)


@dataclass(frozen=True)
class Run:
    """Logs of one run.

    Attributes:
        path: Run folder.
        config: Configuration of the run.
        tasks: T task names.
        steps: Steps of the evaluations [environment steps over all tasks], `[P]`, increasing.
        scores: Success rates or mean returns at these steps, `[P, T]`.
        clock: Steps, updates and hours of the log rows, `[3, L]`.
        final: Full evaluation; None if the run is unfinished.
        score: Which score `scores` holds.
        custom: Name of the benchmark, if its tasks are custom.
    """

    path: Path
    config: TrainConfig
    tasks: tuple[str, ...]
    steps: np.ndarray
    scores: np.ndarray
    clock: np.ndarray
    final: Final | None
    score: Score = "success_rate"
    custom: str | None = None

    @property
    def last_step(self) -> float:
        """Last step in the logs [environment steps over all tasks]."""
        return float(np.fmax(self.steps[-1], self.clock[0, -1]))

    def axis(self, name: Axis) -> np.ndarray:
        """Return the times of the evaluations in steps, updates or hours, `[P]`.

        Updates and hours are interpolated linearly between log rows; NaN outside them.
        """
        if name == "steps":
            return self.steps
        row = self.clock["steps updates hours".split().index(name)]
        return np.interp(self.steps, self.clock[0], row, left=np.nan, right=np.nan)

    def reordered(self, tasks: tuple[str, ...]) -> Run:
        """Return the run with its tasks in another order."""
        order = [self.tasks.index(task) for task in tasks]
        final = self.final and replace(self.final, scores=self.final.scores[order])
        return replace(self, tasks=tasks, scores=self.scores[:, order], final=final)


def read_run(path: Path, score: Score | None = None) -> Run:
    """Read a run folder.

    Args:
        path: Folder with config.yaml, and progress.json or progress.csv.
        score: Score to read: success rates (of the tasks that have one) or returns. Default:
            success rates if every task has one, else returns.

    Raises:
        Unevaluated: If the path is not a run folder, or the run has no evaluation yet.
        UsageError: If the folder is missing, its logs are damaged, or they lack this score.
    """
    config, rows = read_log(path)
    evaluations = [row for row in rows if any(tag.startswith("eval/") for tag in row)]
    if not evaluations:
        raise Unevaluated(
            f"runs: expected a run with an evaluation in its logs, got none in {path}"
        )
    try:
        stored = read_final(path)
        tasks = tasks_of(path, config, stored, evaluations)
        total = config.schedule(len(tasks)).total_timesteps
        if score is None:
            by_success = all(f"eval/success_rate/{task}" in evaluations[-1] for task in tasks)
            score = "success_rate" if by_success else "return"
        tasks = tuple(task for task in tasks if f"eval/{score}/{task}" in evaluations[-1])
        if not tasks:
            raise UsageError(f"score: expected eval/{score}/ in the logs, got none in {path}")
        tags = [f"eval/{score}/{task}" for task in tasks]
        by_step = {
            float(row[STEP]): [float(row[tag]) for tag in tags]
            for row in evaluations
            if all(tag in row for tag in tags)  # a task may report success later than others
        }  # the last row of a step wins
        steps = np.array(sorted(by_step))
        scores = np.array([by_step[step] for step in steps])
        if not (np.isfinite(steps).all() and np.isfinite(scores).all()):
            raise ValueError("non-finite number")
        # An eval.json written before the run was extended is not its final evaluation.
        if stored is not None and stored["total_timesteps"] < total:
            stored = None
        clock = _clock(rows, stored)
        final = None if stored is None else _final(stored, tasks, score)
    except UsageError:
        raise
    except BROKEN as error:
        raise UsageError(f"runs: cannot read the logs in {path}: {error!r}") from None
    return Run(path, config, tasks, steps, scores, clock, final, score, custom_name(path))


def _clock(rows: Sequence[Mapping[str, Any]], stored: Mapping[str, Any] | None) -> np.ndarray:
    """Return steps, updates and hours of the log rows and of the final evaluation, `[3, L]`."""
    times = [
        (row[STEP], row["time/updates"], row["time/elapsed"])
        for row in rows
        if "time/updates" in row
    ]
    if stored is not None:
        times.append((stored["total_timesteps"], stored["updates"], stored["seconds"]))
    clock = [(float(steps), float(updates), float(s) / 3600) for steps, updates, s in times]
    return np.array(clock or [(np.nan,) * 3]).T


def _final(stored: Mapping[str, Any], tasks: Sequence[str], score: Score) -> Final:
    by_task = {row["task"]: row for row in stored["tasks"]}
    rows = [by_task[task] for task in tasks]
    episodes = int(rows[0]["episodes"])
    if score == "return":
        scores = np.array([float(row["return_mean"]) for row in rows])
    else:
        scores = np.array([int(row["successes"]) for row in rows]) / episodes
    if not np.isfinite(scores).all():
        raise ValueError("eval.json: non-finite score")
    return Final(scores, episodes)
