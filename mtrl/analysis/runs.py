"""Run folders as plain arrays."""

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
    config, rows = read_log(path)
    found = [row for row in rows if any(tag.startswith("eval/") for tag in row)]
    if not found:
        raise Unevaluated(
            f"runs: expected a run with an evaluation in its logs, got none in {path}"
        )
    try:
        stored = read_final(path)
        tasks = tasks_of(path, config, stored, found)
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
        if stored is not None and stored["total_timesteps"] >= total:
            final = _final(stored, tasks, score)
            end = float(stored["total_timesteps"]), float(stored["updates"])
            clock.append((*end, stored["seconds"] / 3600))
    except UsageError:
        raise
    except BROKEN as error:
        raise UsageError(f"runs: cannot read the logs in {path}: {error!r}") from None
    times = np.array(clock or [(np.nan,) * 3]).T
    return Run(path, config, tasks, steps, scores, times, final, score, custom_name(path))


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
