"""Annotations of figures that compare methods: legends, footnotes and score axes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mtrl.analysis.methods import Method, differences
from mtrl.analysis.style import COLORS, literal, number, wrapped

FOOTNOTE = 6
"""Font size of footnotes [pt]."""


def legend(figure: Figure, methods: Sequence[Method]) -> None:
    """Add a legend above the axes, in as many columns as fit; the figure grows by its rows."""
    width = figure.get_figwidth()
    entries = []
    for color, method in zip(COLORS, methods, strict=False):
        own = "" if seeds(methods) else seeds([method])
        label = wrapped(display_name(method) + own, width - 0.4)
        entries.append(Line2D([], [], color=color, label=label))
    widest = max(len(line) for entry in entries for line in str(entry.get_label()).split("\n"))
    room = int(width * 72 // (4.2 * widest + 26))  # points per letter, plus the handle
    columns = max(1, min(room, len(entries)))
    figure.legend(handles=entries, loc="outside upper center", ncols=columns)
    lines = [str(entry.get_label()).count("\n") + 1 for entry in entries]
    rows = max(sum(lines[c::columns]) for c in range(columns))
    figure.set_figheight(figure.get_figheight() + 0.16 * (rows - 1))


def label_x(figure: Figure, methods: Sequence[Method], label: str) -> None:
    """Label the x-axis below all axes, and add a footnote if needed; the figure grows by it."""
    note = _footnote(methods, figure.get_figwidth())
    if not note:
        figure.supxlabel(label)
        return
    room = 1.25 * FOOTNOTE * (note.count("\n") + 1) / 72 + 0.08  # inches
    height = figure.get_figheight() + room
    figure.set_figheight(height)
    figure.supxlabel(label, y=(room + 0.04) / height)
    # The footnote is a legend because the layout keeps axes clear of legends. Its blank first line
    # leaves room for the label.
    figure.legend(
        handles=[],
        title="\n" + note,
        loc="outside lower left",
        title_fontsize=FOOTNOTE,
        borderaxespad=0,
        borderpad=0.4,
    )


def _footnote(methods: Sequence[Method], width: float) -> str:
    """List the settings in which methods differ beyond their names; "" if the user named them."""
    fields = differences(methods)
    if not fields or all(method.named_by is None for method in methods):
        return ""
    for n in range(len(fields), -1, -1):
        listed = ", ".join(fields[:n])
        if n < len(fields):
            more = f"{len(fields) - n} more settings" if n else f"{len(fields)} settings"
            listed += " and " * (n > 0) + f"{more}: see the table"
        text = wrapped(f"They also differ in {listed}.", width, FOOTNOTE)
        if text.count("\n") < 2:
            break
    return text


def display_name(method: Method) -> str:
    """Return the name for matplotlib to draw; only names chosen by the user may hold math."""
    return method.name if method.named_by is None else literal(method.name)


def seeds(methods: Sequence[Method]) -> str:
    """Return the number of seeds as a suffix, or "" if methods differ in it."""
    counts = {len(method.runs) for method in methods}
    if len(counts) > 1:
        return ""
    (n,) = counts
    return f" ({n} seed{'s' * (n > 1)})"


def score_name(methods: Sequence[Method]) -> str:
    """Return the name of the score, for an axis label."""
    return methods[0].score.replace("_", " ")


def score_axis(axis_of: Axes, methods: Sequence[Method], which: str) -> None:
    """Scale a score axis. Success rates always span 0 to 1, so that no noise is magnified."""
    axis = axis_of.xaxis if which == "x" else axis_of.yaxis
    if methods[0].score == "success_rate":
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis_of.set(**{f"{which}lim": (-0.04, 1.04)})
    else:
        if which == "x":  # include 0: a dot's distance from 0 is what it shows
            low, high = axis_of.get_xlim()
            axis_of.set_xlim(min(low, 0), max(high, 0))
        axis.set_major_locator(MaxNLocator(3))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
