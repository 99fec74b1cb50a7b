"""`mtrl-collect`: collect episodes of a policy or of Meta-World's experts in a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mtrl.cli.flags import Parser, add_flags, run
from mtrl.config.fields import PolicyDevice, Seed, TrunkImports, Workers
from mtrl.config.section import Section, expect_writable, validate
from mtrl.errors import UsageError
from mtrl.folder import find_policy

if TYPE_CHECKING:
    from mtrl.demonstrations.data import Demonstrations


class CollectConfig(Section):
    """Options of mtrl-collect."""

    source: str = Field(
        description="'expert' for Meta-World's scripted policies, or a run folder, checkpoint or "
        "policy file."
    )
    output: Path = Field(description="File to write, NAME.npz.")
    episodes: int = Field(
        default=10, gt=0, le=10_000, description="Number of episodes [episodes per task]."
    )
    tasks: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Tasks (default: all tasks of the policy)."
    )
    benchmark: str | None = Field(
        default=None,
        description="Task set for the expert, or custom tasks as package.module:attribute "
        "(default: as recorded in the run folder).",
    )
    imports: TrunkImports = ()
    seed: Seed | None = Field(
        default=None,
        description="Random seed of goals and sampled actions (default: the seed of the training "
        "run, which gives its goals; 0 for the expert).",
    )
    horizon: int | None = Field(
        default=None,
        gt=0,
        description="Episode length at which an episode is truncated [environment steps] "
        "(default: the training run's; 500 for the expert).",
    )
    workers: Workers = None
    device: PolicyDevice = "auto"
    stochastic: bool = Field(
        default=False,
        description="Sample actions from the policy instead of taking its mode.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run("mtrl-collect", _collect, arguments)


def _collect(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="mtrl-collect",
        description="Collect episodes on the reference simulator, and write their transitions to a "
        "file for mtrl-train --demonstrations.",
    )
    fields = CollectConfig.model_fields
    parser.add_argument("source", metavar="expert|RUN_OR_POLICY", help=fields["source"].description)
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help=fields["output"].description
    )
    defaults = CollectConfig(source="", output=Path())
    add_flags(parser, defaults, leave_out=("source", "output"))
    config = validate(CollectConfig, parser.parse(arguments))
    expect_writable("output", config.output)
    found = _expert(config) if config.source == "expert" else _policy(config)
    found.save(config.output)
    print(f"{found}\n{config.output}: {len(found):,} transitions")
    return 0


def _expert(config: CollectConfig) -> Demonstrations:
    from mtrl.envs.benchmarks import get_benchmark  # imports a simulator

    if config.tasks is None and config.benchmark is None:
        raise UsageError("tasks: expected --tasks or --benchmark with the expert, got neither")
    benchmark = get_benchmark(config.benchmark or "", config.tasks)
    if benchmark.custom:
        raise UsageError(
            f"benchmark: expected Meta-World tasks, because only these have experts, got "
            f"{benchmark.name}"
        )
    for name in ("stochastic", "imports"):
        if getattr(config, name):
            raise UsageError(f"{name}: expected a policy with it, got the expert")
    from mtrl.demonstrations.collect import collect, experts

    return collect(
        experts(benchmark.tasks),
        benchmark,
        config.episodes,
        config.seed or 0,
        config.horizon,
        workers=config.workers,
        progress=True,
    )


def _policy(config: CollectConfig) -> Demonstrations:
    source = Path(config.source)
    path = find_policy(source)  # raises before the import of PyTorch
    from mtrl.demonstrations.collect import collect
    from mtrl.devices import resolve_device
    from mtrl.evaluation.saved import benchmark_for
    from mtrl.nets.trunks import import_trunks
    from mtrl.policy.policy import Policy

    import_trunks(config.imports)
    policy, header = Policy.load_with_header(path, resolve_device(config.device))
    return collect(
        policy,
        benchmark_for(source, header, config.tasks, config.benchmark),
        config.episodes,
        header.seed if config.seed is None else config.seed,
        header.horizon if config.horizon is None else config.horizon,
        workers=config.workers,
        stochastic=config.stochastic,
        progress=True,
    )


if __name__ == "__main__":
    sys.exit(main())
