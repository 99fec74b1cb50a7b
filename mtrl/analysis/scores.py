"""Figures of final scores and of the probability of improvement."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtrl.analysis.annotate import display_name, label_x, score_axis, score_name
from mtrl.analysis.methods import Method
from mtrl.analysis.statistics import (
    Bootstrap,
    improvement,
    interquartile_mean,
    interval,
    mean,
)
from mtrl.analysis.style import COLORS, COLUMN, TEXT, wrapped

ALL_PAIRS = 4
"""Largest number of methods for which all pairs are compared."""


def draw_scores(methods: Sequence[Method], how: Bootstrap) -> dict[str, Figure]:
    """Draw final scores and probabilities of improvement, by file name, if runs are finished."""
    figures = {}
    if finished := [method for method in methods if method.finished]:
        figures["scores"] = _scores(methods, how)
    if len(finished) > 1:
        figures["improvement"] = _improvements(finished, how)
    return figures


def _scores(methods: Sequence[Method], how: Bootstrap) -> Figure:
    """Draw interquartile mean and mean of the final scores on one scale."""
    rows = [(c, m) for c, m in zip(COLORS, methods, strict=False) if m.finished]
    names = [wrapped(_name(method), 1.5) for _, method in rows]
    figure = Figure(figsize=(COLUMN, 0.6 + _height(names)), layout="constrained")
    both = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, title, statistic in zip(
        both, ("interquartile mean", "mean"), (interquartile_mean, mean), strict=True
    ):
        for y, (color, method) in enumerate(rows):
            ends = interval(statistic, how, method.scores)
            _dot(axes, y, float(statistic(method.scores)), ends, color)
        _rows(axes, names)
        axes.set_title(title)
        score_axis(axes, methods, "x")
    label_x(figure, methods, f"final {score_name(methods)}")
    return figure


def _improvements(methods: Sequence[Method], how: Bootstrap) -> Figure:
    """Draw the probability that a run of one method scores higher than one of another on a task.

    Up to `ALL_PAIRS` methods, all pairs are compared; beyond, each method with the first.
    """
    pairs = [(later, earlier) for earlier, later in combinations(methods, 2)]
    if len(methods) > ALL_PAIRS:
        pairs = [(later, methods[0]) for later in methods[1:]]
    sides = [(display_name(a), display_name(b)) for a, b in pairs]
    names = [f"{a} > {b}" for a, b in sides]
    width = COLUMN
    if max(map(len, names)) > 30:
        width = TEXT
        names = [f"{wrapped(a, TEXT / 2)} >\n{wrapped(b, TEXT / 2)}" for a, b in sides]
    figure = Figure(figsize=(width, 0.5 + _height(names)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.5, color="0.4", lw=0.8, ls=(0, (4, 2)))
    for y, (a, b) in enumerate(pairs):
        ends = interval(improvement, how, a.scores, b.scores)
        _dot(axes, y, float(improvement(a.scores, b.scores)), ends, "black")
    _rows(axes, names)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    label_x(figure, methods, "probability of improvement")
    return figure


def _height(names: Sequence[str]) -> float:
    """Return the height of rows with these names [inches]; all rows are as tall as the tallest."""
    return len(names) * (0.07 + 0.14 * max(name.count("\n") + 1 for name in names))


def _name(method: Method) -> str:
    """Return the name, with the number of finished seeds if some are unfinished."""
    n, of = len(method.finished), len(method.runs)
    return display_name(method) if n == of else f"{display_name(method)} ({n} of {of})"


def _dot(axes: Axes, y: int, value: float, ends: tuple[float, float], color: str) -> None:
    axes.plot(ends, [y, y], color=color, lw=5, alpha=0.35, solid_capstyle="butt")
    axes.plot(value, y, "o", color=color, clip_on=False, zorder=3)  # not cut at the axes' ends


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
