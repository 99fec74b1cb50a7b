"""Options of `mtrl-sweep`, and the settings derived from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from mtrl.cli.flags import Parser, add_flags
from mtrl.config.fields import Processes, UserPath
from mtrl.config.section import Section, flag_of, validate
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, one_line
from mtrl.sweep.folder import SweepFolder
from mtrl.sweep.local import cores
from mtrl.sweep.plan import TAKEN, Plan, words
from mtrl.sweep.rules import Halving, Rules, Threshold

CORES = 2
"""Default cores of a run on a cluster: one for the learner, one for a simulator."""


class SweepConfig(Section):
    """Options of mtrl-sweep, in addition to the fields of a run."""

    out: UserPath = Field(description="Folder of the sweep; an existing sweep is continued.")
    backend: Literal["local", "ray", "slurm"] = Field(
        default="local", description="Where to run: this machine, or a cluster."
    )
    max_parallel: Processes | None = Field(
        default=None,
        description="Maximum number of parallel runs (default: local: one per cpus_per_run cores; "
        "ray, slurm: as many as fit).",
    )
    cpus_per_run: Processes | None = Field(
        default=None,
        description="CPU cores per run, which are also its numbers of threads and simulator "
        "processes (default: local: its share of the machine; slurm: as in the template; else 2).",
    )
    gpus_per_run: float = Field(
        default=0.0,
        ge=0,
        description="ray: GPUs per run; below 1, several runs share a GPU, whose memory is not "
        "divided between them.",
    )
    address: str | None = Field(
        default=None,
        description="ray: address of a running cluster, 'auto' or host:port (default: a temporary "
        "one on this machine).",
    )
    template: UserPath | None = Field(
        default=None, description="slurm: batch script with {command} in place of the run."
    )
    retries: int = Field(
        default=1,
        ge=0,
        description="Number of times a failed run is retried from its latest checkpoint.",
    )
    stop_when: tuple[str, ...] = Field(
        default=(),
        description="Rules that stop a run early: 'eval/success_rate/mean < 0.2 at 500000'. They "
        "bias the table.",
    )
    halve_on: str | None = Field(
        default=None,
        description="Use successive halving on this tag, such as eval/success_rate/mean (needs "
        "Optuna). It biases the table.",
    )
    halve_from: int | None = Field(
        default=None, gt=0, description="First halving [environment steps over all tasks]."
    )
    halve_by: int = Field(
        default=3, gt=1, description="Reduction factor: one in this many runs continues."
    )
    search: int | None = Field(
        default=None,
        gt=0,
        description="Number of points to draw from `search` in the file (needs Optuna), each with "
        "every seed.",
    )
    goal: str = Field(
        default="eval/success_rate/mean",
        description="Tag that a search maximises: the mean over seeds of its last value.",
    )
    dry_run: bool = Field(default=False, description="Print the command lines, and exit.")


@dataclass(frozen=True)
class Sweep:
    """A parsed command line.

    Attributes:
        options: Options of the sweep.
        plan: Runs of the sweep.
        folder: Folder of the sweep.
        rules: Rules that may stop runs early.
        device: `cpu` or `cuda`, unless the plan sets it.
        cores: CPU cores per run.
        at_a_time: Maximum number of parallel runs; None for as many as fit.
        batch: Text of the template.
    """

    options: SweepConfig
    plan: Plan
    folder: SweepFolder
    rules: Rules
    device: str
    cores: int
    at_a_time: int | None
    batch: str


def parse(arguments: Sequence[str] | None) -> Sweep:
    """Read a command line, and the file it names.

    Raises:
        UsageError: If an option is unknown, invalid, or inconsistent with others.
    """
    parser = Parser(
        prog="mtrl-sweep",
        description="Run many trainings: every combination of the values that flags or a YAML file "
        "give to fields of mtrl-train. Running the same command again continues the sweep. "
        "`mtrl-sweep status DIR` shows its progress, `mtrl-sweep report DIR` its results so far.",
    )
    parser.add_argument("grid", metavar="FILE", nargs="?", help="YAML file; flags override it.")
    parser.add_argument(
        "-o",
        "--out",
        metavar="DIR",
        required=True,
        help=SweepConfig.model_fields["out"].description,
    )
    own = SweepConfig(out=Path())
    add_flags(parser, own, leave_out=("out",))
    axes = parser.add_argument_group("fields of mtrl-train", "each with one or several values")
    axes.add_argument(
        "--config", nargs="+", metavar="NAME|FILE", help="Presets or files that runs start from."
    )
    axes.add_argument("--seeds", nargs="+", metavar="N", help="Seeds of every point.")
    add_flags(parser, TrainConfig(), leave_out=tuple(TAKEN), several=True, top=axes)
    given = parser.parse(arguments)
    names = SweepConfig.model_fields.keys()
    options = validate(SweepConfig, {k: v for k, v in given.items() if k in names})
    file = given.pop("grid")
    flags = {
        name: tuple(value) if name in ("config", "seeds") else words(name, value)
        for name, value in given.items()
        if name not in names and value is not None
    }
    plan = Plan.read(None if file is None else Path(file).expanduser(), flags)
    return _settled(options, plan)


def _settled(options: SweepConfig, plan: Plan) -> Sweep:
    """Check that options are consistent, and determine cores and device."""
    for flag, kind in (("address", "ray"), ("gpus_per_run", "ray"), ("template", "slurm")):
        if getattr(options, flag) and options.backend != kind:
            raise UsageError(f"{flag}: expected --backend {kind} with it, got {options.backend}")
    for flag, other in (("halve_by", "halve_on"), ("goal", "search")):
        if flag in options.model_fields_set and getattr(options, other) is None:
            raise UsageError(f"{flag}: expected {flag_of(other)} with it, got none")
    if options.backend == "slurm" and options.template is None:
        raise UsageError("template: expected a batch script for --backend slurm, got none")
    if bool(plan.search) != (options.search is not None):
        one, other = ("--search N", "search in the file")
        got, missing = (other, one) if plan.search else (one, other)
        raise UsageError(f"search: expected {missing} with {got}, got none")
    if plan.search and options.backend == "ray" and options.max_parallel is None:
        raise UsageError("max_parallel: expected a number for a search on ray, got none")
    halving = None
    if (options.halve_on is None) != (options.halve_from is None):
        raise UsageError("halve_on: expected --halve-on and --halve-from together, got one")
    if options.halve_on is not None and options.halve_from is not None:
        halving = Halving(tag=options.halve_on, start=options.halve_from, by=options.halve_by)
    rules = Rules(stop_when=tuple(map(Threshold.parse, options.stop_when)), halving=halving)
    folder = SweepFolder(options.out.absolute())
    batch = "" if options.template is None else _template(options.template)
    device = _device(options, plan, batch)
    cores, at_a_time = _sizes(options, device, batch)
    return Sweep(options, plan, folder, rules, device, cores, at_a_time, batch)


def _template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"template: cannot read {path}: {one_line(error)}") from None
    if text.count("{command}") != 1:
        raise UsageError(
            "template: expected {command} once, in place of the run, got it "
            f"{text.count('{command}')} times in {path}"
        )
    return text


def _asked(batch: str) -> str:
    """Return the #SBATCH lines of a batch script."""
    return "\n".join(line for line in batch.splitlines() if line.startswith("#SBATCH"))


def _device(options: SweepConfig, plan: Plan, batch: str) -> str:
    if given := plan.grid.get("device"):
        return str(given[0])
    if options.backend == "ray":
        return "cuda" if options.gpus_per_run else "cpu"
    if options.backend == "slurm":
        return "cuda" if re.search(r"--gres=\S*gpu|--gpus|-G ?\d", _asked(batch)) else "cpu"
    from mtrl.devices import resolve_device  # imports PyTorch

    return resolve_device("auto").type


def _sizes(options: SweepConfig, device: str, batch: str) -> tuple[int, int | None]:
    """Return the cores per run, and the number of parallel runs."""
    each, at_a_time = options.cpus_per_run, options.max_parallel
    if options.backend != "local":
        found = re.search(r"(?:--cpus-per-task[= ]|-c ?)(\d+)", _asked(batch))
        return each or (int(found[1]) if found else CORES), at_a_time
    here = len(cores())
    if at_a_time is None:
        at_a_time = 1 if device == "cuda" else max(1, here // (each or CORES))
    if at_a_time > here:
        raise UsageError(
            f"max_parallel: expected at most the {here} cores of this machine, got {at_a_time}"
        )
    fits = here // at_a_time
    if each is not None and each > fits:
        raise UsageError(
            f"cpus_per_run: expected at most {fits}, so that {at_a_time} runs fit on {here} cores, "
            f"got {each}"
        )
    return each or fits, at_a_time
