"""Figures of how the tasks' gradients conflict, for TensorBoard and for paper.

Import this module only where one is drawn: it imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, FuncNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from mtrl.analysis.style import COLORS, COLUMN, TEXT, between, scale, scale_ticks, short, styled

NUMBERS_UP_TO = 12
"""Tasks up to which a cell has room for its number, or a small map's row for its name."""

PARTS = 4
"""Parts of a run, each with a map of its own."""

BAR_TICKS = (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)


def cosine_figure(cosines: np.ndarray, tasks: Sequence[str], title: str) -> Figure:
    """Heat map of the cosines between the tasks' gradients: red where two tasks conflict.

    Made without pyplot, so there is no state to clean up and no display to look for.

    Args:
        cosines: `[T, T]`.
        tasks: Names; `-v3` is left out.
        title: Above the map.
    """
    n_tasks = len(tasks)
    names = [short(task) for task in tasks]
    has_numbers = n_tasks <= NUMBERS_UP_TO
    font_size = 8 + n_tasks / 25  # a large picture is shown smaller
    side = max(1.8, n_tasks * (0.45 if has_numbers else 0.22))  # inches; beside it, names and bar
    figure = Figure(figsize=(side + 2.7, side + 2.2), layout="compressed")
    FigureCanvasAgg(figure)  # attaches itself
    axes = figure.add_subplot()
    image = axes.imshow(cosines, cmap=_colors(), norm=_norm())
    axes.set_xticks(range(n_tasks), names, rotation=90, fontsize=font_size)
    axes.set_yticks(range(n_tasks), names, fontsize=font_size)
    if has_numbers:
        for i, row in enumerate(cosines.tolist()):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.5 else "black"
                text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=font_size)
    bar = figure.colorbar(image, ticks=BAR_TICKS, format="%g")
    bar.minorticks_off()
    bar.set_label("cosine", fontsize=font_size)
    bar.ax.tick_params(labelsize=font_size)
    figure.suptitle(title, fontsize=font_size + 2)
    return figure


def draw_conflicts(
    steps: np.ndarray, cosines: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> dict[str, Figure]:
    """How the tasks' gradients conflict over one run, at a paper's size.

    One diagnosis is of one batch. So maps show the mean over the diagnoses of a part of the run.

    Args:
        steps: When they were made [environment steps over all tasks], `[D]`.
        cosines: `[D, T, T]` for each network.
        tasks: T names.

    Returns:
        Figures by file name.
    """
    parts = np.array_split(np.arange(len(steps)), min(PARTS, len(steps)))
    maps = {name: [_mean(values[part]) for part in parts] for name, values in cosines.items()}
    with styled():
        figures = {
            "conflict_fraction": _conflict_fraction(steps, cosines),
            "cosines": _over_time(steps, parts, maps, tasks),
        }
        _, factor = scale("", steps[-1])
        unit = {1e6: " million", 1e3: " thousand"}.get(factor, "")
        for network, (*_, values) in maps.items():
            title = f"{network}, {between((steps[parts[-1]] / factor).tolist())}{unit} steps"
            figures[f"cosines_{network}"] = _last_map(title, values, tasks)
    return figures


def conflict_fraction(cosines: np.ndarray) -> np.ndarray:
    """Fraction of the pairs of tasks with a negative cosine, `[…, T, T]` to `[…]`; 0 of none."""
    first, second = np.triu_indices(cosines.shape[-1], 1)
    return (cosines[..., first, second] < 0).mean(-1)


def _conflict_fraction(steps: np.ndarray, cosines: Mapping[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(COLUMN, 2.1), layout="constrained")
    axes = figure.subplots()
    styles = ("-", (0, (4, 1)), (0, (1, 1)))
    for color, style, (network, values) in zip(COLORS, styles, cosines.items(), strict=False):
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps, conflict_fraction(values), color=color, ls=style, marker=marker, label=network
        )
    label, factor = scale("environment steps over all tasks", steps[-1])
    axes.set(xlim=(0, None), ylim=(0, 1), xlabel=label, ylabel="conflicting pairs of tasks")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_yticks([0, 0.5, 1])
    axes.grid(True)
    axes.locator_params(axis="x", nbins=4)
    scale_ticks(axes, factor)
    figure.legend(loc="outside upper center", ncols=len(cosines))
    return figure


def _over_time(
    steps: np.ndarray,
    parts: Sequence[np.ndarray],
    maps: Mapping[str, Sequence[np.ndarray]],
    tasks: Sequence[str],
) -> Figure:
    """A row for each network, a column for each part of the run."""
    label, factor = scale("environment steps over all tasks", steps[-1])
    named = len(tasks) <= NUMBERS_UP_TO
    side = (TEXT - 1 - named * _name_length(tasks, 6)) / len(parts)
    size = (TEXT, 0.45 + (side + 0.06) * len(maps))
    figure = Figure(figsize=size, layout="compressed")
    panels = figure.subplots(len(maps), len(parts), squeeze=False)
    for row, (network, values) in zip(panels, maps.items(), strict=True):
        for axes, map_ in zip(row, values, strict=True):
            image = _map(axes, map_)
            axes.set(xticks=[], yticks=[])
        if named:
            row[0].set_yticks(range(len(tasks)), map(short, tasks), fontsize=6)
        row[0].set_ylabel(network)
    for axes, part in zip(panels[0], parts, strict=True):
        axes.set_title(between((steps[part] / factor).tolist()))
    figure.suptitle(label, fontsize=8)
    _bar(figure, image, panels, "cosine, mean over diagnoses")
    return figure


def _last_map(title: str, values: np.ndarray, tasks: Sequence[str]) -> Figure:
    """The last part of the run with all names."""
    width, fontsize = (COLUMN, 7) if len(tasks) <= NUMBERS_UP_TO else (TEXT, 6)
    figure = Figure(figsize=(width, width - 0.4), layout="compressed")
    axes = figure.subplots()
    image = _map(axes, values)
    axes.set_xticks(range(len(tasks)), map(short, tasks), rotation=90, fontsize=fontsize)
    axes.set_yticks(range(len(tasks)), map(short, tasks), fontsize=fontsize)
    axes.set_title(title)
    _bar(figure, image, axes, "cosine")
    return figure


def _name_length(tasks: Sequence[str], fontsize: float) -> float:
    """Of the longest name, roughly [inches]."""
    return max(len(short(task)) for task in tasks) * 0.58 * fontsize / 72


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the diagnoses that found one, `[D, T, T]` to `[T, T]`; NaN where none did."""
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0).sum(0), known.sum(0)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _map(axes: Axes, values: np.ndarray) -> AxesImage:
    """Red where two tasks conflict; grey on the diagonal, which says nothing, and where unknown."""
    others = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=1)
    return axes.imshow(others, cmap=_colors(), norm=_norm(), interpolation="nearest")


def _colors() -> Colormap:
    """Red to blue, which all eyes tell apart."""
    return matplotlib.colormaps["RdBu"].with_extremes(bad="0.75")


def _norm() -> FuncNorm:
    """The same in every figure, so that figures can be compared.

    Most cosines are small: on a linear scale from -1 to 1 they would all be white. So colours are
    linear in the cosine's signed square root.
    """
    return FuncNorm(
        (lambda c: np.sign(c) * np.sqrt(np.abs(c)), lambda r: np.sign(r) * r**2), vmin=-1, vmax=1
    )


def _bar(figure: Figure, image: AxesImage, axes: Any, label: str) -> None:
    bar = figure.colorbar(
        image, ax=axes, shrink=0.8, aspect=30, pad=0.02, ticks=BAR_TICKS, format="%g"
    )
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(label)
