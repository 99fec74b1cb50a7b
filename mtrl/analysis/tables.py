"""Table of the final evaluations of several methods, as Markdown, HTML and CSV."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtrl.analysis.methods import Method, differences
from mtrl.analysis.statistics import Bootstrap, interquartile_mean, interval, mean
from mtrl.evaluation.intervals import wilson

Cell = tuple[float, float, float]
NOTHING: Cell = (math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Row:
    """One quantity for every method.

    Attributes:
        name: Name of the quantity: a task or a statistic.
        cells: Value and ends of its interval for each method; NaN where there is none.
        interval: Kind of interval.
        digits: Number of decimals.
        remarks: Remark beside each value.
    """

    name: str
    cells: tuple[Cell, ...]
    interval: str = ""
    digits: int = 2
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Table with methods in columns and scores in rows; built by `summarise`."""

    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """Return the table as Markdown, followed by its notes."""
        head, *body = [[_cell(text) for text in line] for line in self._lines()]
        lines = [head, ["---"] * len(head), *body]
        table = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([*table, "", *(f"- {note}" for note in self.notes)]) + "\n"

    def html(self) -> str:
        """Return the table as HTML, for notebooks."""
        head, *body = [[html.escape(text) for text in line] for line in self._lines()]
        lines = ["".join(f"<th>{text}</th>" for text in head)]
        lines += ["".join(f"<td>{text}</td>" for text in line) for line in body]
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table>{rows}</table><ul>{notes}</ul>"

    def _lines(self) -> Iterator[list[str]]:
        yield ["final evaluation", *self.methods]
        for row in self.rows:
            remarks = row.remarks or ("",) * len(row.cells)
            pairs = zip(row.cells, remarks, strict=True)
            yield [row.name, *(_text(cell, row.digits, remark) for cell, remark in pairs)]

    def to_csv(self) -> str:
        """Return the table as CSV with one line per method and quantity."""
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
    """Summarise final scores with 95% intervals, and the steps, updates and time they took.

    Unfinished runs have no final evaluation: they are left out of the scores but listed in the
    notes. The best quick evaluation is what one would report by selecting a policy by its score.
    """
    tasks = methods[0].tasks
    by_success = methods[0].score == "success_rate"
    few, more = (2, 3) if by_success else (_digits(methods),) * 2
    by_task = [[_task(method, t, how) for t in range(len(tasks))] for method in methods]
    rows = [
        Row(task, cells, "Wilson" if by_success else f"bootstrap, {how}", few)
        for task, cells in zip(tasks, zip(*by_task, strict=True), strict=True)
    ]
    for name, statistic in (("mean", mean), ("interquartile mean", interquartile_mean)):
        cells = tuple(_statistic(statistic, how, m.scores) for m in methods)
        rows.append(Row(name, cells, f"bootstrap, {how}", more))
    if by_success:  # returns of different tasks are not on one scale
        rows.append(_worst(methods, by_task))
    unfinished = [len(m.runs) - len(m.finished) for m in methods]
    rows += [
        Row(
            "best quick evaluation during training",
            tuple(
                _range(r.scores[:-1].mean(1).max() for r in m.finished if len(r.steps) > 1)
                for m in methods
            ),
            "range",
            more,
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
        "Scores are of the final policies on all goals. Only the best quick evaluation is of "
        "policies during training, on fewer goals."
    )
    several = any(len(method.finished) > 1 for method in methods)
    what = "runs within each task" if how == "stratified" else "whole runs"
    if methods[0].score == "return":
        yield (
            "Scores are returns: undiscounted sums of raw rewards, averaged over episodes. Tasks "
            "with larger rewards count for more in the means."
        )
        if several:
            yield f"Scores: mean over seeds with the 95% percentile bootstrap of {what}."
    else:
        yield (
            "Tasks: mean over seeds with Wilson's 95% interval at the effective number of "
            "episodes, which is all episodes if seeds agree or there is only one, and fewer the "
            "more seeds differ."
        )
        if several:
            yield f"Mean and interquartile mean: 95% percentile bootstrap of {what}."
    yield "Other brackets: minimum and maximum over seeds."
    for field in differences(methods):
        values = ", ".join(f"{method.setting(field)} ({method.name})" for method in methods)
        yield f"Methods differ in {field}: {values}."
    for method in methods:
        for run in method.runs:
            if run.final is None:
                yield (
                    f"Unfinished, shown in the curves only: {run.path} ({method.name}, seed "
                    f"{run.config.seed}), at {run.last_step:,.0f} steps."
                )


def _task(method: Method, t: int, how: Bootstrap) -> Cell:
    finals = [run.final for run in method.runs if run.final is not None]
    if method.score == "return" or not finals:
        return _statistic(mean, how, method.scores[t : t + 1])
    solved, episodes = np.array([final.solved[t] for final in finals]), finals[0].episodes
    return float(solved.mean()) / episodes, *wilson(solved, episodes)


def _statistic(
    statistic: Callable[[np.ndarray], np.ndarray], how: Bootstrap, scores: np.ndarray
) -> Cell:
    if not scores.shape[1]:
        return NOTHING
    return float(statistic(scores)), *interval(statistic, how, scores)


def _worst(methods: Sequence[Method], by_task: Sequence[Sequence[Cell]]) -> Row:
    worst = [int(np.argmin([cell[0] for cell in own])) for own in by_task]
    pairs = list(zip(methods, worst, strict=True))
    cells = tuple(own[t] for own, t in zip(by_task, worst, strict=True))
    names = tuple(method.tasks[t] if method.finished else "" for method, t in pairs)
    return Row("worst task", cells, "Wilson", remarks=names)


def _digits(methods: Sequence[Method]) -> int:
    """Return the number of decimals with which the largest score shows four digits."""
    largest = max((float(np.abs(m.scores).max()) for m in methods if m.finished), default=0.0)
    return max(0, 3 - math.floor(math.log10(largest))) if largest > 0 else 2


def _range(values: Iterable[float]) -> Cell:
    """Return mean, minimum and maximum."""
    numbers = [float(value) for value in values]
    return (sum(numbers) / len(numbers), min(numbers), max(numbers)) if numbers else NOTHING


def _text(cell: Cell, digits: int, remark: str) -> str:
    value, low, high = (f"{number:,.{digits}f}" for number in cell)
    if math.isnan(cell[0]):
        return "–"
    ends = "" if math.isnan(cell[1]) or low == high else f"[{low}, {high}]"
    return " ".join(filter(None, (value, ends, remark)))


def _cell(text: str) -> str:
    """Escape a cell of a Markdown table: join its lines and escape `|`."""
    return " ".join(text.split()).replace("|", "\\|")
