"""Pictures for TensorBoard. Import this module where one is drawn: it brings matplotlib along."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

NUMBERS_UP_TO = 12
"""Tasks up to which a cell has room for its number."""


def cosine_figure(cosines: Tensor, tasks: Sequence[str], title: str) -> Figure:
    """Heat map of the cosines between the tasks' gradients: red where two tasks conflict.

    Made without pyplot, so there is no state to clean up and no display to look for.

    Args:
        cosines: `[T, T]`.
        tasks: Names; `-v3` is left out.
        title: Above the map.
    """
    n_tasks = len(tasks)
    names = [task.removesuffix("-v3") for task in tasks]
    has_numbers = n_tasks <= NUMBERS_UP_TO
    font_size = 8 + n_tasks / 25  # a large picture is shown smaller
    side = max(1.8, n_tasks * (0.45 if has_numbers else 0.22))  # inches; beside it, names and bar
    figure = Figure(figsize=(side + 2.7, side + 2.2), layout="compressed")
    FigureCanvasAgg(figure)  # attaches itself
    axes = figure.add_subplot()
    # All eyes tell red from blue. The ends are fixed: a colour means the same in every picture.
    image = axes.imshow(cosines.cpu().numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(n_tasks), names, rotation=90, fontsize=font_size)
    axes.set_yticks(range(n_tasks), names, fontsize=font_size)
    if has_numbers:
        for i, row in enumerate(cosines.tolist()):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.7 else "black"
                text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=font_size)
    bar = figure.colorbar(image, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("cosine", fontsize=font_size)
    bar.ax.tick_params(labelsize=font_size)
    figure.suptitle(title, fontsize=font_size + 2)
    return figure
