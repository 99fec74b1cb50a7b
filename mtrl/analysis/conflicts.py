"""Figures of conflicts between task gradients, for TensorBoard and for papers.

Import this module only where a figure is drawn: it imports matplotlib.
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
"""Largest number of tasks for which cells show numbers and rows of small maps show names."""

PARTS = 4
"""Number of parts a run is divided into; each part has its own map."""

BAR_TICKS = (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)


def cosine_figure(cosines: np.ndarray, tasks: Sequence[str], title: str) -> Figure:
    """Draw a heat map of the cosines between task gradients: red where two tasks conflict.

    The figure does not use pyplot, so there is no global state and no display is needed.

    Args:
        cosines: `[T, T]`.
        tasks: Task names; the suffix `-v3` is left out.
        title: Title above the map.
    """
    n_tasks = len(tasks)
    names = [short(task) for task in tasks]
    has_numbers = n_tasks <= NUMBERS_UP_TO
    font_size = 8 + n_tasks / 25  # TensorBoard scales large images down
    side = max(1.8, n_tasks * (0.45 if has_numbers else 0.22))  # inches, without names and bar
    figure = Figure(figsize=(side + 2.7, side + 2.2), layout="compressed")
    FigureCanvasAgg(figure)  # attaches itself to the figure
    axes = figure.add_subplot()
    image = axes.imshow(cosines, cmap=_colors(), norm=_norm())
    axes.set_xticks(range(n_tasks), names, rotation=90, fontsize=font_size)
    axes.set_yticks(range(n_tasks), names, fontsize=font_size)
    if has_numbers:
        for i, row in enumerate(cosines.tolist()):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.5 else "black"
                text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0 avoids "-0.00"
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
    """Draw how task gradients conflict over one run, by file name, sized for a paper.

    A diagnosis uses a single batch. Maps therefore show the mean over the diagnoses of a part of
    the run.

    Args:
        steps: Steps of the diagnoses [environment steps over all tasks], `[D]`.
        cosines: `[D, T, T]` for each network.
        tasks: T task names.
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
    """Return the fraction of task pairs with a negative cosine, `[…, T, T]` to `[…]`."""
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
    """Draw a grid of maps: a row per network, a column per part of the run."""
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
    """Draw the map of the last part of the run with all task names."""
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
    """Estimate the width of the longest name [inches]."""
    return max(len(short(task)) for task in tasks) * 0.58 * fontsize / 72


def _mean(values: np.ndarray) -> np.ndarray:
    """Average over the finite values, `[D, T, T]` to `[T, T]`; NaN where there are none."""
    mean: np.ndarray = np.ma.masked_invalid(values).mean(0).filled(np.nan)
    return mean


def _map(axes: Axes, values: np.ndarray) -> AxesImage:
    """Draw a map: red where two tasks conflict, grey on the diagonal and where undefined."""
    others = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=1)
    return axes.imshow(others, cmap=_colors(), norm=_norm(), interpolation="nearest")


def _colors() -> Colormap:
    """Return a red-to-blue colour map, which is safe for colour-blind readers."""
    return matplotlib.colormaps["RdBu"].with_extremes(bad="0.75")


def _norm() -> FuncNorm:
    """Return the colour scale, which is the same in every figure so that figures are comparable.

    Most cosines are small and would all look white on a linear scale from -1 to 1. Colours are
    therefore linear in the signed square root of the cosine.
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
