"""What figures that compare methods say beside the data: legends, footnotes, axes of scores."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mtrl.analysis.methods import Method, differences
from mtrl.analysis.style import COLORS, literal, number, wrapped

FOOTNOTE = 6
"""Size of a footnote's letters [pt]."""


def legend(figure: Figure, methods: Sequence[Method]) -> None:
    """Above everything, in as many columns as there is room for; the figure grows by its rows."""
    width = figure.get_figwidth()
    entries = []
    for color, method in zip(COLORS, methods, strict=False):
        own = "" if seeds(methods) else seeds([method])
        label = wrapped(shown(method) + own, width - 0.4)
        entries.append(Line2D([], [], color=color, label=label))
    widest = max(len(line) for entry in entries for line in str(entry.get_label()).split("\n"))
    room = int(width * 72 // (4.2 * widest + 26))  # points a letter, and beside
    columns = max(1, min(room, len(entries)))
    figure.legend(handles=entries, loc="outside upper center", ncols=columns)
    lines = [str(entry.get_label()).count("\n") + 1 for entry in entries]
    rows = max(sum(lines[c::columns]) for c in range(columns))
    figure.set_figheight(figure.get_figheight() + 0.16 * (rows - 1))


def label_x(figure: Figure, methods: Sequence[Method], label: str) -> None:
    """Below everything: what is on the x-axis, and a footnote, for which the figure grows."""
    note = _footnote(methods, figure.get_figwidth())
    if not note:
        figure.supxlabel(label)
        return
    room = 1.25 * FOOTNOTE * (note.count("\n") + 1) / 72 + 0.08  # inches
    height = figure.get_figheight() + room
    figure.set_figheight(height)
    figure.supxlabel(label, y=(room + 0.04) / height)
    # A legend, because the layout keeps axes away from it: from one more line, for the label.
    figure.legend(
        handles=[],
        title="\n" + note,
        loc="outside lower left",
        title_fontsize=FOOTNOTE,
        borderaxespad=0,
        borderpad=0.4,
    )


def _footnote(methods: Sequence[Method], width: float) -> str:
    """In which settings methods differ beyond their names; none where the user chose the names."""
    fields = differences(methods)
    if not fields or all(method.named_by is None for method in methods):
        return ""
    for n in range(len(fields), -1, -1):
        told = ", ".join(fields[:n])
        if n < len(fields):
            more = f"{len(fields) - n} more settings" if n else f"{len(fields)} settings"
            told += " and " * (n > 0) + f"{more}: see the table"
        text = wrapped(f"They also differ in {told}.", width, FOOTNOTE)
        if text.count("\n") < 2:
            break
    return text


def shown(method: Method) -> str:
    """Its name as matplotlib should draw it: mathematics only where the user chose the name."""
    return method.name if method.named_by is None else literal(method.name)


def seeds(methods: Sequence[Method]) -> str:
    """How many each has, if all have as many."""
    counts = {len(method.runs) for method in methods}
    if len(counts) > 1:
        return ""
    (n,) = counts
    return f" ({n} seed{'s' * (n > 1)})"


def score_name(methods: Sequence[Method]) -> str:
    """For an axis."""
    return methods[0].score.replace("_", " ")


def score_axis(axis_of: Axes, methods: Sequence[Method], which: str) -> None:
    """Success rates always from 0 to 1, so that no figure enlarges what is nothing."""
    axis = axis_of.xaxis if which == "x" else axis_of.yaxis
    if methods[0].score == "success_rate":
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis_of.set(**{f"{which}lim": (-0.04, 1.04)})
    else:
        if which == "x":  # a dot's distance from 0, not from another dot
            low, high = axis_of.get_xlim()
            axis_of.set_xlim(min(low, 0), max(high, 0))
        axis.set_major_locator(MaxNLocator(3))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
