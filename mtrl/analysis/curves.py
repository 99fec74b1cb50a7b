"""Figures that compare methods: learning curves, final scores, who beats whom."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtrl.analysis.methods import Method
from mtrl.analysis.runs import Axis
from mtrl.analysis.statistics import (
    Bootstrap,
    Stretch,
    curve,
    improvement,
    interquartile_mean,
    interval,
    mean,
)
from mtrl.analysis.style import COLORS, COLUMN, TEXT, scale, scale_ticks, short, styled
from mtrl.errors import UsageError

X_LABELS = {
    "steps": "environment steps over all tasks",
    "updates": "updates",
    "hours": "wall-clock time [h]",
}
PANELS = 5
"""Tasks in a row."""


def draw_comparison(methods: Sequence[Method], x: Axis, how: Bootstrap) -> dict[str, Figure]:
    """Learning curves of the mean and of each task; final scores, where there are any.

    Args:
        methods: At most as many as there are colours.
        x: What curves are drawn over.
        how: What bands and intervals resample; see `mtrl.analysis.statistics`.

    Returns:
        Figures by file name.

    Raises:
        UsageError: if there are too many methods, or the logs do not say when anything was.
    """
    if len(methods) > len(COLORS):
        raise UsageError(
            f"runs: expected at most {len(COLORS)} methods, as many colours as one can tell apart, "
            f"got {len(methods)}"
        )
    curves = [curve(method, x, how) for method in methods]
    for method, stretches in zip(methods, curves, strict=True):
        if not stretches:
            raise UsageError(
                f"x: expected logs that tell the {x} of an evaluation, got none of {method.name}"
            )
    with styled():
        figures = {
            "curves_mean": _mean_curve(methods, curves, x),
            "curves_tasks": _task_curves(methods, curves, x),
        }
        if finished := [method for method in methods if method.finished]:
            figures["scores"] = _scores(methods, how)
        if len(finished) > 1:
            figures["improvement"] = _improvements(finished, how)
    return figures


def _mean_curve(methods: Sequence[Method], curves: Sequence[Sequence[Stretch]], x: Axis) -> Figure:
    """The mean over tasks; below it how many seeds contribute, if that changes."""
    changes = any(
        stretch.n_runs < len(method.runs)
        for method, stretches in zip(methods, curves, strict=True)
        for stretch in stretches
    )
    figure = Figure(figsize=(COLUMN, 2.3 + 0.5 * changes), layout="constrained")
    rows = figure.subplots(
        1 + changes, sharex=True, squeeze=False, height_ratios=(4, 1)[: 1 + changes]
    )[:, 0]
    _draw(rows[0], methods, curves, row=-1)
    rows[0].set_ylabel(f"mean success rate{_seeds(methods)}")
    if changes:
        most = max(len(method.runs) for method in methods)
        for m, (color, stretches) in enumerate(zip(COLORS, curves, strict=False)):
            aside = 0.04 * most * (m - (len(methods) - 1) / 2)  # or equal ones would hide
            for s in stretches:
                rows[1].plot(s.x[[0, -1]], [s.n_runs + aside] * 2, color=color)
        rows[1].set(ylabel="seeds", ylim=(0, 1.2 * most), yticks=(0, most))
    _label_x(figure, rows[-1], curves, x)
    _legend(figure, methods)
    return figure


def _task_curves(methods: Sequence[Method], curves: Sequence[Sequence[Stretch]], x: Axis) -> Figure:
    """A panel for each task."""
    tasks = methods[0].tasks
    columns = min(PANELS, len(tasks))
    rows = -(-len(tasks) // columns)
    height = min(1.1, 8.2 / rows)  # a page's, at most
    figure = Figure(
        figsize=(max(COLUMN, TEXT * columns / PANELS), 0.55 + rows * height), layout="constrained"
    )
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    for t, task in enumerate(tasks):
        axes = panels.flat[t]
        _draw(axes, methods, curves, row=t)
        axes.set_title(short(task), fontsize=7)
        # Where the panel below is empty, the numbers are here.
        axes.tick_params(labelbottom=t + columns >= len(tasks))
    _label_x(figure, panels[0, 0], curves, x)
    figure.supylabel(f"success rate{_seeds(methods)}")
    _legend(figure, methods)
    return figure


def _draw(
    axes: Axes, methods: Sequence[Method], curves: Sequence[Sequence[Stretch]], row: int
) -> None:
    """One curve of each method with its band; dashed where not all of its runs contribute."""
    for color, method, stretches in zip(COLORS, methods, curves, strict=False):
        for s in stretches:
            axes.fill_between(s.x, s.low[row], s.high[row], color=color, alpha=0.2, lw=0)
            axes.plot(
                s.x,
                s.values[row],
                color=color,
                ls="-" if s.n_runs == len(method.runs) else (0, (2, 1)),
                marker="o" if len(s.x) == 1 else None,
            )
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    axes.grid(True)


def _label_x(figure: Figure, axes: Axes, curves: Sequence[Sequence[Stretch]], x: Axis) -> None:
    largest = max(stretch.x[-1] for stretches in curves for stretch in stretches)
    label, factor = scale(X_LABELS[x], largest)
    axes.set_xlim(0, 1.02 * largest)
    axes.locator_params(axis="x", nbins=4)
    scale_ticks(axes, factor)
    figure.supxlabel(label)


def _legend(figure: Figure, methods: Sequence[Method]) -> None:
    """Above everything, in as many columns as there is room for."""
    entries = []
    for color, method in zip(COLORS, methods, strict=False):
        own = "" if _seeds(methods) else _seeds([method])
        entries.append(Line2D([], [], color=color, label=method.name + own))
    widest = max(len(str(entry.get_label())) for entry in entries)
    room = int(figure.get_figwidth() * 72 // (4.2 * widest + 26))  # points a letter, and beside
    columns = max(1, min(room, len(entries)))
    figure.legend(handles=entries, loc="outside upper center", ncols=columns)


def _scores(methods: Sequence[Method], how: Bootstrap) -> Figure:
    """Interquartile mean and mean of the final scores."""
    rows = [(c, m) for c, m in zip(COLORS, methods, strict=False) if m.finished]
    figure = Figure(figsize=(COLUMN, 0.6 + 0.22 * len(rows)), layout="constrained")
    for axes, (title, statistic) in zip(
        figure.subplots(1, 2, sharey=True),
        (("interquartile mean", interquartile_mean), ("mean", mean)),
        strict=True,
    ):
        for y, (color, method) in enumerate(rows):
            ends = interval(statistic, how, method.scores)
            _dot(axes, y, float(statistic(method.scores)), ends, color)
        _rows(axes, [_name(method) for _, method in rows])
        axes.set_title(title)
    figure.supxlabel("final success rate")
    return figure


def _improvements(methods: Sequence[Method], how: Bootstrap) -> Figure:
    """Probability that a run of one method beats a run of another on a task."""
    pairs = [(later, earlier) for earlier, later in combinations(methods, 2)]
    figure = Figure(figsize=(COLUMN, 0.5 + 0.2 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.5, color="0.4", lw=0.8, ls=(0, (4, 2)))
    for y, (a, b) in enumerate(pairs):
        ends = interval(improvement, how, a.scores, b.scores)
        _dot(axes, y, float(improvement(a.scores, b.scores)), ends, "black")
    _rows(axes, [f"{a.name} > {b.name}" for a, b in pairs])
    axes.set(xlim=(0, 1), xlabel="probability of improvement")
    return figure


def _seeds(methods: Sequence[Method]) -> str:
    """How many each has, if all have as many."""
    counts = {len(method.runs) for method in methods}
    if len(counts) > 1:
        return ""
    (n,) = counts
    return f" ({n} seed{'s' * (n > 1)})"


def _name(method: Method) -> str:
    """With how many seeds there is a final score of, if not of all."""
    n, of = len(method.finished), len(method.runs)
    return method.name if n == of else f"{method.name} ({n} of {of})"


def _dot(axes: Axes, y: int, value: float, ends: tuple[float, float], color: str) -> None:
    axes.plot(ends, [y, y], color=color, lw=5, alpha=0.35, solid_capstyle="butt")
    axes.plot(value, y, "o", color=color)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
