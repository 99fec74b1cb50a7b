"""How figures look on paper, and how they get into files.

Sizes are those of a column and of a page's text, so that nothing is scaled and 8 pt stay 8 pt.
Figures are made without pyplot: there is no state to clean up and no display to look for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtrl.folder import write_atomically

COLUMN, TEXT = 3.25, 6.75
"""Widths of a column and of a page's text [inches]."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's, which all eyes tell apart; yellow, weak on white, comes last."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.titlepad": 3,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0.1,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "savefig.dpi": 300,
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "mtrl",  # parts get the same names every time
}


def styled() -> AbstractContextManager[Any]:
    """A context in which figures are made and saved."""
    context: AbstractContextManager[Any] = matplotlib.rc_context(STYLE)
    return context


def short(task: str) -> str:
    """A task's name without its version."""
    return task.removesuffix("-v3")


def scale(label: str, largest: float) -> tuple[str, float]:
    """An axis' label, and what numbers as large as this are divided by on it."""
    if largest >= 1e6:
        return f"{label} (millions)", 1e6
    return (f"{label} (thousands)", 1e3) if largest >= 1e4 else (label, 1.0)


def scale_ticks(axes: Axes, factor: float) -> None:
    """Divide the numbers on the x-axis."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / factor:g}")


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG; the same figure makes the same bytes."""
    paths = []
    for name, figure in figures.items():
        for kind, unwanted in (("png", "Software"), ("svg", "Date")):
            path = folder / f"{name}.{kind}"
            with styled():
                write_atomically(
                    path, partial(figure.savefig, format=kind, metadata={unwanted: None})
                )
            paths.append(path)
    return paths
