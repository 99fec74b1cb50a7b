"""The final evaluations of several methods as one table, in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtrl.analysis.methods import Method, differences
from mtrl.analysis.statistics import Bootstrap, interquartile_mean, interval, mean, wilson

Cell = tuple[float, float, float]
NOTHING: Cell = (math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Row:
    """One number of every method.

    Attributes:
        name: Of the number: a task, or a word.
        cells: Value and the ends of its interval for each method; NaN where there is none.
        interval: What the interval is.
        digits: After the point; thousands are separated where there are none.
        remarks: What to say beside each number.
    """

    name: str
    cells: tuple[Cell, ...]
    interval: str = ""
    digits: int = 2
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """See `summarise`."""

    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """For people."""
        lines = [
            "| " + " | ".join(("final evaluation", *self.methods)) + " |",
            "|---" * (1 + len(self.methods)) + "|",
        ]
        for row in self.rows:
            remarks = row.remarks or ("",) * len(row.cells)
            pairs = zip(row.cells, remarks, strict=True)
            texts = (_text(cell, row.digits, remark) for cell, remark in pairs)
            lines.append("| " + " | ".join((row.name, *texts)) + " |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def to_csv(self) -> str:
        """One line per method and number."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("method", "quantity", "value", "low", "high", "interval", "remark"))
        for m, method in enumerate(self.methods):
            for row in self.rows:
                numbers = ("" if math.isnan(number) else number for number in row.cells[m])
                remark = row.remarks[m] if row.remarks else ""
                writer.writerow((method, row.name, *numbers, row.interval, remark))
        return text.getvalue()


def summarise(methods: Sequence[Method], how: Bootstrap) -> Table:
    """Final success rates with 95% intervals, and what they cost.

    Unfinished runs have no final evaluation and take no part, but are named. The best quick
    evaluation is what one would report by choosing a policy by its score.
    """
    tasks = methods[0].tasks
    by_task = [[_task(method, t) for t in range(len(tasks))] for method in methods]
    rows = [
        Row(task, cells, "Wilson")
        for task, cells in zip(tasks, zip(*by_task, strict=True), strict=True)
    ]
    for name, statistic in (("mean", mean), ("interquartile mean", interquartile_mean)):
        cells = tuple(
            (float(statistic(m.scores)), *interval(statistic, how, m.scores))
            if m.finished
            else NOTHING
            for m in methods
        )
        rows.append(Row(name, cells, f"bootstrap, {how}", 3))
    worst = [int(np.argmin([cell[0] for cell in own])) for own in by_task]
    rows.append(
        Row(
            "worst task",
            tuple(own[t] for own, t in zip(by_task, worst, strict=True)),
            "Wilson",
            remarks=tuple(
                tasks[t] if m.finished else "" for m, t in zip(methods, worst, strict=True)
            ),
        )
    )
    unfinished = [len(m.runs) - len(m.finished) for m in methods]
    rows += [
        Row(
            "best quick evaluation on the way",
            tuple(
                _range(r.success[:-1].mean(1).max() for r in m.finished if len(r.steps) > 1)
                for m in methods
            ),
            "range",
            3,
        ),
        Row(
            "seeds",
            tuple((float(len(m.finished)), math.nan, math.nan) for m in methods),
            digits=0,
            remarks=tuple(f"and {n} unfinished" if n else "" for n in unfinished),
        ),
    ]
    for name, row, unit, digits in (
        ("steps per task", 0, len(tasks), 0),
        ("updates", 1, 1, 0),
        ("wall-clock time [h]", 2, 1, 2),
    ):
        cells = tuple(_range(r.clock[row, -1] / unit for r in m.finished) for m in methods)
        rows.append(Row(name, cells, "range", digits))
    return Table(tuple(m.name for m in methods), tuple(rows), tuple(_notes(methods, how)))


def _notes(methods: Sequence[Method], how: Bootstrap) -> Iterator[str]:
    yield (
        "Final policies, each judged on all goals; only the best quick evaluation is of policies "
        "on the way, on fewer goals."
    )
    yield (
        "Tasks: mean over seeds, and Wilson's 95% interval at the effective number of episodes: "
        "all that were played if seeds agree or there is one, fewer the more they differ."
    )
    if any(len(method.finished) > 1 for method in methods):
        what = "runs within each task" if how == "stratified" else "whole runs"
        yield f"Mean and interquartile mean: 95% percentile bootstrap of {what}."
    yield "Other brackets: smallest and largest of the seeds."
    for told in differences(methods):
        yield f"Methods differ in {told}."
    for method in methods:
        for run in method.runs:
            if run.final is None:
                yield (
                    f"Unfinished, in the curves alone: {run.path} ({method.name}, seed "
                    f"{run.config.seed}), at {run.last_step:,.0f} steps."
                )


def _task(method: Method, t: int) -> Cell:
    finals = [run.final for run in method.runs if run.final is not None]
    if not finals:
        return NOTHING
    solved, episodes = np.array([final.solved[t] for final in finals]), finals[0].episodes
    return float(solved.mean()) / episodes, *wilson(solved, episodes)


def _range(values: Iterable[float]) -> Cell:
    """Mean and ends."""
    found = [float(value) for value in values]
    return (sum(found) / len(found), min(found), max(found)) if found else NOTHING


def _text(cell: Cell, digits: int, remark: str) -> str:
    value, low, high = (f"{number:,.{digits}f}" for number in cell)
    if math.isnan(cell[0]):
        return "–"
    ends = "" if math.isnan(cell[1]) or low == high else f"[{low}, {high}]"
    return " ".join(filter(None, (value, ends, remark)))
