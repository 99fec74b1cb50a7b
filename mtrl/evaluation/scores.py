"""What an evaluation found, for people and for files."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from mtrl.policy.file import short_number


@dataclass(frozen=True)
class Evaluation:
    """What E episodes of every task showed.

    Attributes:
        tasks: Task names, T of them.
        seed: Of the goals; episode e is on goal e.
        first_success: The step that first set the success flag, counted from 1; 0 if none did.
            int `[T, E]`.
        returns: Undiscounted sums of raw rewards over the whole episode, `[T, E]`.
        actions: What was done in H steps, float32 `[T, E, H, A]`; enough to play it again. NaN
            after the end of a shorter episode.
        tells_success: Whether a step of the task has ever said if it is solved, bool `[T]`; one
            bool stands for all. The other tasks are judged by their return.
    """

    tasks: tuple[str, ...]
    seed: int
    first_success: np.ndarray
    returns: np.ndarray
    actions: np.ndarray
    tells_success: np.ndarray | bool = True

    def __post_init__(self) -> None:
        told = np.broadcast_to(np.asarray(self.tells_success, bool), len(self.tasks))
        object.__setattr__(self, "tells_success", told)

    @property
    def told(self) -> np.ndarray:
        """Which tasks have a success rate, indices `[S]`."""
        return np.flatnonzero(self.tells_success)

    @property
    def success(self) -> np.ndarray:
        """Whether the success flag was set at any step of the episode, bool `[T, E]`."""
        return self.first_success > 0

    @property
    def success_rates(self) -> np.ndarray:
        """Fraction of successful episodes, `[T]`; NaN for a task that is judged by its return."""
        return np.where(self.tells_success, self.success.mean(1), np.nan)

    @property
    def mean(self) -> float:
        """Mean success rate of the tasks that have one; NaN if none has."""
        rates = self.success_rates[self.told]
        return float(rates.mean()) if len(rates) else math.nan

    @property
    def worst(self) -> float:
        """Mean success rate of the worst fifth of the tasks that have one, rounded up; or NaN."""
        rates = np.sort(self.success_rates[self.told])[: math.ceil(len(self.told) / 5)]
        return float(rates.mean()) if len(rates) else math.nan

    @property
    def summary(self) -> str:
        """The mean scores in a few words: `success 0.87`, `return 12.3`, or both."""
        parts = [f"success {self.mean:.2f}"] if len(self.told) else []
        rest = self.returns[~np.asarray(self.tells_success)]
        if len(rest):
            parts.append(f"return {short_number(rest.mean())}")
        if len(parts) == 1:
            return parts[0]
        counts = (len(self.told), len(rest))
        tasks = [f"{part} ({n} task{'s' * (n > 1)})" for part, n in zip(parts, counts, strict=True)]
        return ", ".join(tasks)

    def intervals(self) -> list[tuple[float, float]]:
        """Wilson's 95% interval of each task's success rate."""
        tests = [binomtest(int(row.sum()), len(row)) for row in self.success]
        proportions = [test.proportion_ci(0.95, method="wilson") for test in tests]
        return [(float(p.low), float(p.high)) for p in proportions]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dictionary per task."""
        return [
            {
                "task": task,
                "episodes": self.returns.shape[1],
                **self._successes(t),
                "return_mean": float(self.returns[t].mean()),
                **self._steps_to_success(t),
            }
            for t, task in enumerate(self.tasks)
        ]

    def _successes(self, t: int) -> dict[str, Any]:
        if t not in self.told:
            return {}
        low, high = self.intervals()[t]
        return {
            "successes": int(self.success[t].sum()),
            "success_rate": float(self.success_rates[t]),
            "wilson_low": low,
            "wilson_high": high,
        }

    def _steps_to_success(self, t: int) -> dict[str, float | None]:
        """Mean over the successful episodes, None if there are none."""
        if t not in self.told:
            return {}
        steps = self.first_success[t][self.success[t]]
        return {"steps_to_success_mean": float(steps.mean()) if len(steps) else None}

    def table(self) -> str:
        """For people."""
        width = max(len(task) for task in (*self.tasks, "worst fifth"))
        if not len(self.told):
            lines = [f"{'task':<{width}}    return"]
            lines += [
                f"{row['task']:<{width}}  {short_number(row['return_mean']):>8}"
                for row in self.rows()
            ]
            return "\n".join([*lines, f"{'mean':<{width}}  {short_number(self.returns.mean()):>8}"])
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
        if len(self.told) < len(self.tasks):
            lines.append("–: no step said whether the task is solved; its score is the return")
        return "\n".join(lines)

    def __str__(self) -> str:
        """`table`, for `print`."""
        return self.table()

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        rows = self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = ["".join(f"<th>{html.escape(column)}</th>" for column in columns)]
        lines += ["".join(f"<td>{_cell(row.get(key))}</td>" for key in columns) for row in rows]
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

    def to_csv(self) -> str:
        """One line per task."""
        text = io.StringIO()
        rows = self.rows()
        columns = max(rows, key=len)  # with those of success, if any has them
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_json(self, **context: Any) -> str:
        """Everything, with what the caller knows of where it comes from."""
        summary = {"mean_return": float(self.returns.mean())}
        if len(self.told):
            summary |= {"mean_success_rate": self.mean, "worst_fifth_success_rate": self.worst}
        return json.dumps(context | summary | {"tasks": self.rows()}, indent=2) + "\n"


def _cell(value: Any) -> str:
    """A value of a table in a notebook."""
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else html.escape(str(value))
