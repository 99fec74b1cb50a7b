"""`mtrl.plot`: from run folders to figures and a table."""

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
    """What some runs show. A notebook displays its table and figures.

    Attributes:
        table: Final scores with intervals; `print(comparison)` shows it.
        figures: Matplotlib figures at a paper's size: `curves_mean`, `curves_tasks`, and, of
            finished runs, `scores` and `improvement`.
        skipped: Why each run that was left out was.
    """

    table: Table
    figures: dict[str, Figure]
    skipped: tuple[str, ...] = ()

    def save(self, folder: Path | str, formats: Sequence[Format] = ("png", "pdf")) -> list[Path]:
        """Write table.md, table.csv and every figure into a folder, made if missing.

        Returns:
            The figures' paths.
        """
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

    Runs that differ in nothing but the seed are one method. Runs without an evaluation yet are
    skipped.

    Args:
        runs: Run folders, or globs of them.
        x: What curves are drawn over.
        score: What is compared: "success_rate", of the tasks that have one, or "return"; default:
            success rates if every task has one, else returns.
        group_by: Fields of the configuration that make a method, instead of all but the seed and
            what does not change an update.
        labels: Other names for methods, by the name they would have, or by the folder of a run or
            a glob of it.
        bootstrap: What 95% intervals resample; see `mtrl.analysis.statistics`.

    Raises:
        UsageError: if runs cannot be read or compared.

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
    """Learning curves; final scores, where there are any.

    Args:
        methods: At most as many as there are colours.
        x: What curves are drawn over.
        how: What bands and intervals resample; see `mtrl.analysis.statistics`.

    Returns:
        Figures by file name.

    Raises:
        UsageError: if there are too many methods, or the logs do not say when anything was.
    """
    if len(methods) > len(COLORS):
        raise UsageError(
            f"runs: expected at most {len(COLORS)} methods, as many colours as one can tell apart, "
            f"got {len(methods)}"
        )
    with styled():
        return draw_curves(methods, x, how) | draw_scores(methods, how)


def _folders(runs: str | Path | Iterable[str | Path]) -> list[Path]:
    """The folders that are meant, each once; a glob that nothing matches stands for itself."""
    paths: dict[Path, None] = {}
    for each in [runs] if isinstance(runs, str | Path) else runs:
        is_glob = has_magic(str(each)) and not Path(each).exists()
        matches = sorted(map(Path, glob(str(each)))) if is_glob else []
        paths |= dict.fromkeys(matches or [Path(each)])
    if not paths:
        raise UsageError("runs: expected a run folder, got none")
    return list(paths)


def _read(paths: Sequence[Path], score: Score | None) -> tuple[list[Run], list[str]]:
    """Runs, and why others are left out; a single one is not left out in silence."""
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
