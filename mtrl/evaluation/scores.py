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
        tells_success: Whether environments say if a task is solved; if not, returns are all there
            is to judge by.
    """

    tasks: tuple[str, ...]
    seed: int
    first_success: np.ndarray
    returns: np.ndarray
    actions: np.ndarray
    tells_success: bool = True

    @property
    def success(self) -> np.ndarray:
        """Whether the success flag was set at any step of the episode, bool `[T, E]`."""
        return self.first_success > 0

    @property
    def success_rates(self) -> np.ndarray:
        """Fraction of successful episodes, `[T]`."""
        return self.success.mean(1)

    @property
    def mean(self) -> float:
        """Mean success rate over the tasks."""
        return float(self.success_rates.mean())

    @property
    def worst(self) -> float:
        """Mean success rate of the worst fifth of the tasks (rounded up)."""
        return float(np.sort(self.success_rates)[: math.ceil(len(self.tasks) / 5)].mean())

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
        if not self.tells_success:
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
        if not self.tells_success:
            return {}
        steps = self.first_success[t][self.success[t]]
        return {"steps_to_success_mean": float(steps.mean()) if len(steps) else None}

    def table(self) -> str:
        """For people."""
        width = max(len(task) for task in (*self.tasks, "worst fifth"))
        if not self.tells_success:
            lines = [f"{'task':<{width}}   return"]
            lines += [f"{row['task']:<{width}}  {row['return_mean']:7.1f}" for row in self.rows()]
            return "\n".join([*lines, f"{'mean':<{width}}  {self.returns.mean():7.1f}"])
        lines = [f"{'task':<{width}}  success  95% interval   return  steps to success"]
        for row in self.rows():
            interval = f"[{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
            steps = row["steps_to_success_mean"]
            lines.append(
                f"{row['task']:<{width}}  {row['success_rate']:7.2f}  {interval:>12}  "
                f"{row['return_mean']:7.0f}  {'–' if steps is None else f'{steps:.0f}':>16}"
            )
        lines.append(f"{'mean':<{width}}  {self.mean:7.3f}")
        lines.append(f"{'worst fifth':<{width}}  {self.worst:7.3f}")
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
        writer = csv.DictWriter(text, list(self.rows()[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()

    def to_json(self, **context: Any) -> str:
        """Everything, with what the caller knows of where it comes from."""
        summary = {"mean_return": float(self.returns.mean())}
        if self.tells_success:
            summary |= {"mean_success_rate": self.mean, "worst_fifth_success_rate": self.worst}
        return json.dumps(context | summary | {"tasks": self.rows()}, indent=2) + "\n"


def _cell(value: Any) -> str:
    """A value of a table in a notebook."""
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else html.escape(str(value))
