"""`mtrl-plot`: look at runs, and compare them."""

from __future__ import annotations

import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mtrl.cli.flags import Parser, add_flags, run
from mtrl.config.section import Section, validate
from mtrl.errors import UsageError


class PlotConfig(Section):
    """What mtrl-plot is asked for."""

    runs: tuple[Path, ...] = Field(
        description="Run folders; those that differ in nothing but the seed are one method."
    )
    out: Path = Field(description="Folder for figures (PNG and SVG) and table; made if missing.")
    x: typing.Literal["steps", "updates", "hours"] = Field(
        default="steps", description="What curves are drawn over."
    )
    group_by: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Fields of the configuration that make a method, instead of all but the seed "
        "and what does not change an update.",
    )
    labels: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Other names for methods, each as OLD=NEW: pcgrad=PCGrad.",
    )
    bootstrap: typing.Literal["stratified", "runs"] = Field(
        default="stratified",
        description="What 95% intervals resample: 'stratified', runs within each task, as Agarwal "
        "et al. 2021 do; 'runs', whole runs, whose tasks one policy learned together.",
    )
    cosine: Path | None = Field(
        default=None,
        description="Draw how the tasks' gradients conflict over this run.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run("mtrl-plot", _plot, arguments)


def _plot(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="mtrl-plot",
        allow_abbrev=False,
        description="Compare training runs: learning curves with bootstrap bands over seeds, "
        "final scores with intervals, and a table.",
    )
    fields = PlotConfig.model_fields
    parser.add_argument("runs", metavar="RUN", nargs="*", help=fields["runs"].description)
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help=fields["out"].description)
    add_flags(parser, PlotConfig(runs=(), out=Path()), leave_out=("runs", "out"))
    config = validate(PlotConfig, parser.parse(arguments))
    if not config.runs and config.cosine is None:
        raise UsageError("runs: expected a run folder, or --cosine with one, got none")
    if config.out.exists() and not config.out.is_dir():
        raise UsageError(f"out: expected a folder, got the file {config.out}")
    labels = dict(_label(text) for text in config.labels or ())

    from mtrl.analysis.conflicts import draw_conflicts
    from mtrl.analysis.curves import draw_comparison
    from mtrl.analysis.methods import group
    from mtrl.analysis.runs import read_cosines, read_run
    from mtrl.analysis.style import save
    from mtrl.analysis.tables import summarise
    from mtrl.folder import write_text

    figures: dict[str, typing.Any] = {}
    table = None
    if config.runs:
        runs = [read_run(path) for path in config.runs]
        methods = group(runs, config.group_by or (), labels)
        table = summarise(methods, config.bootstrap)
        figures |= draw_comparison(methods, config.x, config.bootstrap)
    if config.cosine is not None:
        figures |= draw_conflicts(*read_cosines(config.cosine))
    config.out.mkdir(parents=True, exist_ok=True)
    if table is not None:
        write_text(config.out / "table.md", table.markdown())
        write_text(config.out / "table.csv", table.to_csv())
        print(table.markdown())
    for path in save(figures, config.out):
        print(path)
    return 0


def _label(text: str) -> tuple[str, str]:
    old, equals, new = text.rpartition("=")
    if not (old and equals and new):
        raise UsageError(f"labels: expected OLD=NEW, got {text!r}")
    return old, new


if __name__ == "__main__":
    sys.exit(main())
