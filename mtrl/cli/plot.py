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
        description="Run folders; those that differ in nothing but the seed are one method. Those "
        "without an evaluation yet are skipped."
    )
    out: Path = Field(description="Folder for figures and table; made if missing.")
    formats: tuple[typing.Literal["png", "pdf", "svg"], ...] = Field(
        default=("png", "pdf"), min_length=1, description="File formats of the figures."
    )
    score: typing.Literal["success_rate", "return"] | None = Field(
        default=None,
        description="What is compared; default: success rates if every task has one, else returns. "
        "'success_rate' takes only the tasks that have one.",
    )
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
        description="Other names for methods, each as OLD=NEW: pcgrad=PCGrad. OLD is the name a "
        "method would have, or the folder of one of its runs, or a glob: 'runs/mt10_cpu_*=CPU'.",
    )
    bootstrap: typing.Literal["stratified", "runs"] = Field(
        default="stratified",
        description="What 95% intervals resample: 'stratified', runs within each task (Agarwal et "
        "al. 2021); 'runs', whole runs, because one policy learned all tasks of a run.",
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

    from mtrl.analysis.comparison import plot
    from mtrl.analysis.conflicts import draw_conflicts
    from mtrl.analysis.cosines import read_cosines
    from mtrl.analysis.style import save

    comparison = conflicts = None
    if config.runs:
        comparison = plot(
            config.runs,
            x=config.x,
            score=config.score,
            group_by=config.group_by or (),
            labels=labels,
            bootstrap=config.bootstrap,
        )
    if config.cosine is not None:
        conflicts = draw_conflicts(*read_cosines(config.cosine))
    config.out.mkdir(parents=True, exist_ok=True)
    paths = []
    if comparison is not None:
        paths += comparison.save(config.out, config.formats)
    if conflicts is not None:
        paths += save(conflicts, config.out, config.formats)
    if comparison is not None:  # last: who reads what is printed may stop reading
        for line in comparison.skipped:
            print(line, file=sys.stderr)
        print(comparison.table.markdown())
    for path in paths:
        print(path)
    return 0


def _label(text: str) -> tuple[str, str]:
    old, equals, new = text.rpartition("=")
    if not (old and equals and new):
        raise UsageError(f"labels: expected OLD=NEW, got {text!r}")
    return old, new


if __name__ == "__main__":
    sys.exit(main())
