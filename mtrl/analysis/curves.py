"""Figures of learning curves: of the mean over tasks, and of each task."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtrl.analysis.annotate import label_x, legend, score_axis, score_name, seeds
from mtrl.analysis.methods import Method
from mtrl.analysis.runs import Axis
from mtrl.analysis.statistics import Bootstrap, Stretch, curve
from mtrl.analysis.style import COLORS, COLUMN, TEXT, fitted, scale, scale_ticks
from mtrl.errors import UsageError

X_LABELS = {
    "steps": "environment steps over all tasks",
    "updates": "updates",
    "hours": "wall-clock time [h]",
}
PANELS = 5
"""Panels per row."""

VISIBLE = 0.05
"""Shortest stretch of a curve on which dashes are visible, as a fraction of the curve."""

Curves = Sequence[Sequence[Stretch]]


def draw_curves(methods: Sequence[Method], x: Axis, how: Bootstrap) -> dict[str, Figure]:
    """Draw learning curves of the mean and of each task, by file name.

    Raises:
        UsageError: If the logs lack the times of evaluations.
    """
    curves = [_visible(curve(method, x, how), method) for method in methods]
    for method, stretches in zip(methods, curves, strict=True):
        if not stretches:
            raise UsageError(
                f"x: expected logs with the {x} of each evaluation, got none for {method.name}"
            )
    return {
        "curves_mean": _mean_curve(methods, curves, x),
        "curves_tasks": _task_curves(methods, curves, x),
    }


def _visible(stretches: Sequence[Stretch], method: Method) -> list[Stretch]:
    """Drop slivers where seeds start or end slightly apart, as they do over hours."""
    if not stretches:
        return []
    min_width = VISIBLE * (stretches[-1].x[-1] - stretches[0].x[0])
    n_runs = max(stretch.n_runs for stretch in stretches)
    return [
        s for s in stretches if s.n_runs == n_runs or len(s.x) == 1 or s.x[-1] - s.x[0] >= min_width
    ]


def _mean_curve(methods: Sequence[Method], curves: Curves, x: Axis) -> Figure:
    """Draw the mean over tasks, and below it the number of seeds if that changes."""
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
    rows[0].set_ylabel(f"mean {score_name(methods)}{seeds(methods)}")
    if changes:
        n_runs = max(len(method.runs) for method in methods)
        for m, (color, stretches) in enumerate(zip(COLORS, curves, strict=False)):
            offset = 0.04 * n_runs * (m - (len(methods) - 1) / 2)  # equal counts stay visible
            for s in stretches:
                rows[1].plot(s.x[[0, -1]], [s.n_runs + offset] * 2, color=color)
        rows[1].set(ylabel="seeds", ylim=(0, 1.2 * n_runs), yticks=(0, n_runs))
    _x_axis(figure, rows[-1], methods, curves, x)
    legend(figure, methods)
    return figure


def _task_curves(methods: Sequence[Method], curves: Curves, x: Axis) -> Figure:
    """Draw a panel per task; success rates share one scale, returns have a scale per task."""
    tasks = methods[0].tasks
    one_scale = methods[0].score == "success_rate"
    columns = min(PANELS, len(tasks))
    rows = -(-len(tasks) // columns)
    height = min(1.1, 8.2 / rows)  # at most one page
    figure = Figure(
        figsize=(max(COLUMN, TEXT * columns / PANELS), 0.55 + rows * height), layout="constrained"
    )
    panels = figure.subplots(rows, columns, sharex=True, sharey=one_scale, squeeze=False)
    labels = 0 if one_scale else 0.35  # inches beside each panel
    room = 72 * ((figure.get_figwidth() - 0.65) / columns - labels)
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    for t, task in enumerate(tasks):
        axes = panels.flat[t]
        _draw(axes, methods, curves, row=t)
        name, size = fitted(task, room)
        axes.set_title(name, fontsize=size)
        # If the panel below is empty, the tick labels belong here.
        axes.tick_params(labelbottom=t + columns >= len(tasks))
    _x_axis(figure, panels[0, 0], methods, curves, x)
    figure.supylabel(f"{score_name(methods)}{seeds(methods)}")
    legend(figure, methods)
    return figure


def _draw(axes: Axes, methods: Sequence[Method], curves: Curves, row: int) -> None:
    """Draw one curve with its band for each method, dashed where some runs do not contribute."""
    for color, method, stretches in zip(COLORS, methods, curves, strict=False):
        for s in stretches:
            axes.fill_between(s.x, s.low[row], s.high[row], color=color, alpha=0.2, lw=0)
            axes.plot(
                s.x,
                s.values[row],
                color=color,
                ls="-" if s.n_runs == len(method.runs) else (0, (2, 1)),
                marker="o" if len(s.x) == 1 else None,
                clip_on=len(s.x) > 1,  # do not cut a dot at the end of the axis
            )
    score_axis(axes, methods, "y")
    axes.grid(True)


def _x_axis(figure: Figure, axes: Axes, methods: Sequence[Method], curves: Curves, x: Axis) -> None:
    largest = max(stretch.x[-1] for stretches in curves for stretch in stretches)
    label, factor = scale(X_LABELS[x], largest)
    axes.set_xlim(0, 1.02 * largest if largest else 1)
    axes.locator_params(axis="x", nbins=4)
    scale_ticks(axes, factor)
    label_x(figure, methods, label)
