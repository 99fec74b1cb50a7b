"""Results of an evaluation, as tables, CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtrl.evaluation.intervals import wilson
from mtrl.policy.file import short_number


@dataclass(frozen=True)
class Evaluation:
    """Results of E episodes of every task.

    Attributes:
        tasks: T task names.
        seed: Seed of the goals; episode e uses goal e.
        first_success: First step with the success flag set, counted from 1; 0 if there is none.
            int `[T, E]`.
        returns: Undiscounted sums of raw rewards over the whole episode, `[T, E]`.
        actions: Actions of H steps, float32 `[T, E, H, A]`, which suffice to replay the episodes.
            NaN after the end of shorter episodes.
        tells_success: Whether a step of each task has ever reported success or failure, bool
            `[T]`; a single bool applies to all. The other tasks are scored by their return.
    """

    tasks: tuple[str, ...]
    seed: int
    first_success: np.ndarray
    returns: np.ndarray
    actions: np.ndarray
    tells_success: np.ndarray | bool = True

    def __post_init__(self) -> None:
        by_task = np.broadcast_to(np.asarray(self.tells_success, bool), len(self.tasks))
        object.__setattr__(self, "tells_success", by_task)

    @property
    def with_success(self) -> np.ndarray:
        """Indices of the tasks that have a success rate, `[S]`."""
        return np.flatnonzero(self.tells_success)

    @property
    def success(self) -> np.ndarray:
        """Whether the success flag was set at any step of the episode, bool `[T, E]`."""
        return self.first_success > 0

    @property
    def success_rates(self) -> np.ndarray:
        """Fraction of successful episodes, `[T]`; NaN for tasks scored by their return."""
        return np.where(self.tells_success, self.success.mean(1), np.nan)

    @property
    def mean(self) -> float:
        """Mean success rate of the tasks that have one; NaN if none has."""
        rates = self.success_rates[self.with_success]
        return float(rates.mean()) if len(rates) else math.nan

    @property
    def worst(self) -> float:
        """Mean success rate of the worst fifth (rounded up) of the tasks that have one, or NaN."""
        rates = np.sort(self.success_rates[self.with_success])
        worst = rates[: math.ceil(len(rates) / 5)]
        return float(worst.mean()) if len(worst) else math.nan

    @property
    def summary(self) -> str:
        """Short text with the mean scores: `success 0.87`, `return 12.3`, or both."""
        parts = [f"success {self.mean:.2f}"] if len(self.with_success) else []
        rest = self.returns[~np.asarray(self.tells_success)]
        if len(rest):
            parts.append(f"return {short_number(rest.mean())}")
        if len(parts) == 1:
            return parts[0]
        counts = (len(self.with_success), len(rest))
        tasks = [f"{part} ({n} task{'s' * (n > 1)})" for part, n in zip(parts, counts, strict=True)]
        return ", ".join(tasks)

    def intervals(self) -> list[tuple[float, float]]:
        """Return Wilson's 95% interval of each task's success rate."""
        return [wilson(row.sum(keepdims=True), len(row)) for row in self.success]

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain dictionary per task; tasks scored by their return have fewer keys."""
        rows, intervals = [], self.intervals()
        for t, task in enumerate(self.tasks):
            row: dict[str, Any] = {"task": task, "episodes": self.returns.shape[1]}
            if t in self.with_success:
                low, high = intervals[t]
                row["successes"] = int(self.success[t].sum())
                row["success_rate"] = float(self.success_rates[t])
                row |= {"wilson_low": low, "wilson_high": high}
            row["return_mean"] = float(self.returns[t].mean())
            if t in self.with_success:
                steps = self.first_success[t][self.success[t]]
                row["steps_to_success_mean"] = float(steps.mean()) if len(steps) else None
            rows.append(row)
        return rows

    def table(self) -> str:
        """Return a plain-text table for the terminal."""
        width = max(len(task) for task in (*self.tasks, "worst fifth"))
        if not len(self.with_success):
            rows = [(row["task"], row["return_mean"]) for row in self.rows()]
            rows.append(("mean", self.returns.mean()))
            lines = [f"{name:<{width}}  {short_number(value):>8}" for name, value in rows]
            return "\n".join([f"{'task':<{width}}    return", *lines])
        lines = [f"{'task':<{width}}  success  95% interval    return  steps to success"]
        for row in self.rows():
            rate, interval = "–", "–"
            if "success_rate" in row:
                rate = f"{row['success_rate']:.2f}"
                interval = f"[{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
            steps = row.get("steps_to_success_mean")
            seen = "–" if steps is None else f"{steps:.0f}"
            lines.append(
                f"{row['task']:<{width}}  {rate:>7}  {interval:>12}  "
                f"{short_number(row['return_mean']):>8}  {seen:>16}"
            )
        lines.append(f"{'mean':<{width}}  {self.mean:7.3f}")
        lines.append(f"{'worst fifth':<{width}}  {self.worst:7.3f}")
        if len(self.with_success) < len(self.tasks):
            lines.append("–: the task does not report success; its score is the return")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return `table`, for `print`."""
        return self.table()

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        rows = self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = ["".join(f"<th>{html.escape(column)}</th>" for column in columns)]
        lines += ["".join(f"<td>{_cell(row.get(key))}</td>" for key in columns) for row in rows]
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

    def to_csv(self) -> str:
        """Return the rows as CSV, one line per task."""
        text = io.StringIO()
        rows = self.rows()
        columns = max(rows, key=len)  # includes the columns of success, if any task has them
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_json(self, **context: Any) -> str:
        """Return all results as JSON, with `context` of the caller such as the policy's path."""
        summary = {"mean_return": float(self.returns.mean())}
        if len(self.with_success):
            summary |= {"mean_success_rate": self.mean, "worst_fifth_success_rate": self.worst}
        return json.dumps(context | summary | {"tasks": self.rows()}, indent=2) + "\n"


def _cell(value: Any) -> str:
    """Format a value as HTML."""
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else html.escape(str(value))
