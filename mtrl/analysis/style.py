"""Style of figures for papers, and saving them to files.

Figures have the width of a column or of the text block, so that they are not scaled and 8 pt stay
8 pt. They do not use pyplot, so there is no global state and no display is needed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.textpath import TextPath

from mtrl.errors import UsageError, one_line
from mtrl.folder import write_atomically

Format = Literal["png", "pdf", "svg"]

COLUMN, TEXT = 3.25, 6.75
"""Width of a column and of the text block [inches]."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's colour-blind safe palette; yellow comes last, as it is faint on white."""

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
    "pdf.fonttype": 42,  # TrueType; many venues reject matplotlib's default, Type 3
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "mtrl",  # element ids are the same every time
}


def styled() -> AbstractContextManager[Any]:
    """Return a context in which figures are drawn and saved."""
    context: AbstractContextManager[Any] = matplotlib.rc_context(STYLE)
    return context


def short(task: str, max_length: int = 26) -> str:
    """Shorten a task's name: drop its version and elide the middle; `$` is escaped.

    Args:
        max_length: Number of characters; the default fits Meta-World's longest name.
    """
    name = task.removesuffix("-v3")
    if len(name) > max_length:
        name = name[: (max_length - 1) // 2] + "…" + name[-(max_length // 2) :]
    return literal(name)


def fitted(task: str, room: float) -> tuple[str, int]:
    """Return a short name and a font size of at most 7 pt that fit into `room` points."""
    for max_length in range(40, 4, -1):
        name = short(task, max_length)
        for size in (7, 6):
            if TextPath((0, 0), name, size=size).get_extents().width <= room:
                return name, size
    return "…", 6


def literal(text: str) -> str:
    """Escape a text so that matplotlib draws it as it is, dollar signs included."""
    return text.replace("$", r"\$")


def expect_drawable(label: str) -> str:
    """Check a user's label, which may hold math between dollar signs.

    Raises:
        UsageError: If matplotlib cannot parse it.
    """
    try:
        MathTextParser("path").parse(label)
    except ValueError as error:
        raise UsageError(
            f"labels: cannot parse the math in {label!r} ({one_line(error)}); write a dollar sign "
            r"as \$"
        ) from None
    return label


def wrapped(text: str, width: float, fontsize: float = 8) -> str:
    """Wrap a text into lines of roughly `width` inches at most."""
    letters = max(8, int(width * 72 / (0.53 * fontsize)))
    return textwrap.fill(text, letters, break_on_hyphens=False)


def scale(label: str, largest: float) -> tuple[str, float]:
    """Return an axis label with a unit for numbers up to `largest`, and the unit's factor."""
    if largest >= 1e6:
        return f"{label} (millions)", 1e6
    return (f"{label} (thousands)", 1e3) if largest >= 2e3 else (label, 1.0)


def scale_ticks(axes: Axes, factor: float) -> None:
    """Divide the tick labels of the x-axis by a factor."""
    axes.xaxis.set_major_formatter(lambda value, _: number(value / factor))


def number(value: float) -> str:
    """Format a number with three digits or more and without an exponent: 0.25, 1.5, 6,000."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def between(values: Sequence[float]) -> str:
    """Format a range by its first and last number, or by one if they are equal: `0.5–1`."""
    return "–".join(dict.fromkeys((number(values[0]), number(values[-1]))))


def save(
    figures: Mapping[str, Figure], folder: Path, formats: Sequence[Format] = ("png", "svg")
) -> list[Path]:
    """Write every figure in every format; equal figures give equal bytes."""
    unwanted = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}
    paths = []
    for name, figure in figures.items():
        for kind in formats:
            path = folder / f"{name}.{kind}"
            with styled():
                write_atomically(
                    path, partial(figure.savefig, format=kind, metadata={unwanted[kind]: None})
                )
            figure.set_layout_engine("none")  # already laid out; layout takes most of the time
            paths.append(path)
    return paths
