"""`mtrl-plot`: plot and compare training runs."""

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
    """Options of mtrl-plot."""

    runs: tuple[Path, ...] = Field(
        description="Run folders. Runs that differ only in the seed count as one method; runs "
        "without an evaluation are skipped."
    )
    out: Path = Field(description="Folder for the figures and the table, created if missing.")
    formats: tuple[typing.Literal["png", "pdf", "svg"], ...] = Field(
        default=("png", "pdf"), min_length=1, description="File formats of the figures."
    )
    score: typing.Literal["success_rate", "return"] | None = Field(
        default=None,
        description="Score to compare (default: success rate if every task has one, else return). "
        "'success_rate' leaves out tasks that have none.",
    )
    x: typing.Literal["steps", "updates", "hours"] = Field(
        default="steps", description="X-axis of the learning curves."
    )
    group_by: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Configuration fields that distinguish methods (default: all fields that "
        "affect an update, except the seed).",
    )
    labels: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="New labels of methods, as OLD=NEW: pcgrad=PCGrad. OLD is the default label, "
        "the folder of a run, or a glob that matches run folders: 'runs/mt10_cpu_*=CPU'.",
    )
    bootstrap: typing.Literal["stratified", "runs"] = Field(
        default="stratified",
        description="Bootstrap of the 95% intervals: 'stratified' resamples runs within each task "
        "(Agarwal et al. 2021); 'runs' resamples whole runs, because their tasks share a policy.",
    )
    cosine: Path | None = Field(
        default=None,
        description="Run folder whose gradient conflicts to plot: cosines between task gradients "
        "over training.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run("mtrl-plot", _plot, arguments)


def _plot(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="mtrl-plot",
        description="Compare training runs: learning curves with bootstrap bands over seeds, "
        "final scores with intervals, and a table.",
    )
    fields = PlotConfig.model_fields
    parser.add_argument("runs", metavar="RUN", nargs="*", help=fields["runs"].description)
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help=fields["out"].description)
    add_flags(parser, PlotConfig(runs=(), out=Path()), leave_out=("runs", "out"))
    config = validate(PlotConfig, parser.parse(arguments))
    if not config.runs and config.cosine is None:
        raise UsageError("runs: expected a run folder, or --cosine with a run folder, got none")
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
    if comparison is not None:  # print last, because the reader may close the pipe
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
