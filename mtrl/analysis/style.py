"""How figures look on paper, and how they get into files.

Sizes are those of a column and of a page's text, so that nothing is scaled and 8 pt stay 8 pt.
Figures are made without pyplot: there is no state to clean up and no display to look for.
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
    "pdf.fonttype": 42,  # TrueType: many venues refuse matplotlib's default, Type 3
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "mtrl",  # parts get the same names every time
}


def styled() -> AbstractContextManager[Any]:
    """A context in which figures are made and saved."""
    context: AbstractContextManager[Any] = matplotlib.rc_context(STYLE)
    return context


def short(task: str, most: int = 26) -> str:
    """A task's name without its version, its middle cut out if it is too long; never mathematics.

    Args:
        most: Characters; Meta-World's longest name fits.
    """
    name = task.removesuffix("-v3")
    if len(name) > most:
        name = name[: (most - 1) // 2] + "…" + name[-(most // 2) :]
    return literal(name)


def fitted(task: str, room: float) -> tuple[str, int]:
    """A task's short name and a letter size, at most 7 pt, that fit into so many points."""
    for most in range(40, 4, -1):
        name = short(task, most)
        for size in (7, 6):
            if TextPath((0, 0), name, size=size).get_extents().width <= room:
                return name, size
    return "…", 6


def literal(text: str) -> str:
    """A text that matplotlib shows as it is, dollar signs included."""
    return text.replace("$", r"\$")


def expect_drawable(label: str) -> str:
    """A label that a user chose, which may hold mathematics between dollar signs.

    Raises:
        UsageError: if matplotlib cannot read it.
    """
    try:
        MathTextParser("path").parse(label)
    except ValueError as error:
        raise UsageError(
            f"labels: cannot read {label!r} as mathematics ({one_line(error)}); a dollar sign is "
            r"written \$"
        ) from None
    return label


def wrapped(text: str, width: float, fontsize: float = 8) -> str:
    """A text in lines of at most so many inches, roughly."""
    letters = max(8, int(width * 72 / (0.53 * fontsize)))
    return textwrap.fill(text, letters, break_on_hyphens=False)


def scale(label: str, largest: float) -> tuple[str, float]:
    """An axis' label, and what numbers as large as this are divided by on it."""
    if largest >= 1e6:
        return f"{label} (millions)", 1e6
    return (f"{label} (thousands)", 1e3) if largest >= 2e3 else (label, 1.0)


def scale_ticks(axes: Axes, factor: float) -> None:
    """Divide the numbers on the x-axis."""
    axes.xaxis.set_major_formatter(lambda value, _: number(value / factor))


def number(value: float) -> str:
    """Three digits at least, and never an exponent: 0.25, 1.5, 6,000."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def between(values: Sequence[float]) -> str:
    """The first and last of some numbers, or the one they are: `0.5–1`."""
    return "–".join(dict.fromkeys((number(values[0]), number(values[-1]))))


def save(
    figures: Mapping[str, Figure], folder: Path, formats: Sequence[Format] = ("png", "svg")
) -> list[Path]:
    """Write every figure in every format; the same figure makes the same bytes."""
    unwanted = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}
    paths = []
    for name, figure in figures.items():
        for kind in formats:
            path = folder / f"{name}.{kind}"
            with styled():
                write_atomically(
                    path, partial(figure.savefig, format=kind, metadata={unwanted[kind]: None})
                )
            figure.set_layout_engine("none")  # it is laid out, which takes most of the time
            paths.append(path)
    return paths
