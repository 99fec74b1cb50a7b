"""Comparison of runs, `mtrl.plot`: figures and a table from run folders."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from matplotlib.figure import Figure

from mtrl.analysis.curves import draw_curves
from mtrl.analysis.logs import Unevaluated
from mtrl.analysis.methods import Method, group
from mtrl.analysis.runs import Axis, Run, Score, read_run
from mtrl.analysis.scores import draw_scores
from mtrl.analysis.statistics import Bootstrap
from mtrl.analysis.style import COLORS, Format, expect_drawable, save, styled
from mtrl.analysis.tables import Table, summarise
from mtrl.errors import UsageError, one_line
from mtrl.folder import write_text


@dataclass(frozen=True)
class Comparison:
    """Comparison of several runs. A notebook displays its table and figures.

    Attributes:
        table: Final scores with intervals; `print(comparison)` shows it.
        figures: Matplotlib figures sized for a paper: `curves_mean`, `curves_tasks`, and, if runs
            are finished, `scores` and `improvement`.
        skipped: The reason for each run that was skipped.
    """

    table: Table
    figures: dict[str, Figure]
    skipped: tuple[str, ...] = ()

    def save(self, folder: Path | str, formats: Sequence[Format] = ("png", "pdf")) -> list[Path]:
        """Write table.md, table.csv and every figure into a folder; return the figures' paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.md", self.table.markdown())
        write_text(folder / "table.csv", self.table.to_csv())
        return save(self.figures, folder, formats)

    def __str__(self) -> str:
        return "\n".join([*self.skipped, self.table.markdown()])

    def _repr_html_(self) -> str:
        pictures = []
        for name, figure in self.figures.items():
            png = io.BytesIO()
            with styled():
                figure.savefig(png, format="png", dpi=200)
            data = base64.b64encode(png.getvalue()).decode()
            width = round(96 * figure.get_figwidth())  # CSS pixels
            pictures.append(
                f'<img alt="{name}" width="{width}" src="data:image/png;base64,{data}">'
            )
        return self.table.html() + "".join(pictures)


def plot(
    runs: str | Path | Iterable[str | Path],
    *,
    x: Axis = "steps",
    score: Score | None = None,
    group_by: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    bootstrap: Bootstrap = "stratified",
) -> Comparison:
    """Compare training runs: learning curves, final scores and a table.

    Runs that differ only in the seed form one method. Runs without an evaluation are skipped.

    Args:
        runs: Run folders, or globs that match them.
        x: Quantity on the x-axis of learning curves.
        score: Score to compare: "success_rate" (of the tasks that have one) or "return". Default:
            success rates if every task has one, else returns.
        group_by: Configuration fields that define a method. Default: all fields except the seed
            and those that do not change an update.
        labels: New names for methods, keyed by the default name, or by the folder of a run or a
            glob that matches it.
        bootstrap: What to resample for 95% intervals; see `mtrl.analysis.statistics`.

    Raises:
        UsageError: If runs cannot be read or compared.

    Example:
        >>> import mtrl
        >>> found = mtrl.plot("results/quickstart_seed*")
        >>> list(found.figures)
        ['curves_mean', 'curves_tasks', 'scores']
        >>> found.table.methods
        ('none',)
    """
    labels = {old: expect_drawable(new) for old, new in (labels or {}).items()}
    found, skipped = _read(_folders(runs), score)
    methods = group(found, group_by, labels)
    figures = draw_comparison(methods, x, bootstrap)
    return Comparison(summarise(methods, bootstrap), figures, tuple(skipped))


def draw_comparison(methods: Sequence[Method], x: Axis, how: Bootstrap) -> dict[str, Figure]:
    """Draw learning curves, and final scores if there are any, by file name.

    Args:
        methods: At most as many methods as there are colours.
        x: Quantity on the x-axis of learning curves.
        how: What to resample for bands and intervals; see `mtrl.analysis.statistics`.

    Raises:
        UsageError: If there are too many methods, or the logs lack the times of evaluations.
    """
    if len(methods) > len(COLORS):
        raise UsageError(
            f"runs: expected at most {len(COLORS)} methods, one per distinguishable colour, got "
            f"{len(methods)}"
        )
    with styled():
        return draw_curves(methods, x, how) | draw_scores(methods, how)


def _folders(runs: str | Path | Iterable[str | Path]) -> list[Path]:
    """Expand globs to unique folders; a glob without a match is kept as it is."""
    paths: dict[Path, None] = {}
    for each in [runs] if isinstance(runs, str | Path) else runs:
        is_glob = has_magic(str(each)) and not Path(each).exists()
        matches = sorted(map(Path, glob(str(each)))) if is_glob else []
        paths |= dict.fromkeys(matches or [Path(each)])
    if not paths:
        raise UsageError("runs: expected a run folder, got none")
    return list(paths)


def _read(paths: Sequence[Path], score: Score | None) -> tuple[list[Run], list[str]]:
    """Read runs, and say why others are skipped; a single run raises instead of being skipped."""
    found, skipped = [], []
    for path in paths:
        try:
            found.append(read_run(path, score))
        except Unevaluated as error:
            if len(paths) == 1:
                raise
            skipped.append(f"skipped {path}: {one_line(error).removeprefix('runs: ')}")
    if not found:
        raise UsageError(f"runs: none of {len(paths)} has an evaluation yet: {skipped[0]}")
    return found, skipped
