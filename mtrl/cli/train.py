"""`mtrl-train`: train a policy, or go on training one."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mtrl.cli.flags import Parser, add_flags, merge, run
from mtrl.config import presets
from mtrl.config.section import validate
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run("mtrl-train", _train, arguments)


def _train(arguments: Sequence[str] | None) -> int:
    # These come first: they decide the defaults that --help shows and flags override.
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--benchmark", "--device"):
        first.add_argument(flag)
    first.add_argument("--tasks", nargs="+")
    chosen, _ = first.parse_known_args(arguments)
    shown = _start(chosen, "cuda" if chosen.device == "cuda" else "cpu")

    parser = Parser(
        prog="mtrl-train",
        allow_abbrev=False,
        description="Train one policy on many Meta-World tasks. Counts of timesteps are "
        "environment steps over all tasks together. Without --config, all of MT10 or MT50 starts "
        "from the preset for the device at hand, and other tasks from the published protocol. The "
        f"defaults below: {shown.name or 'the published protocol'}.",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help=f"A preset ({', '.join(presets.EXPECTED)}) or a YAML file, whose values become the "
        "defaults below.",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="Go on with this run from its newest checkpoint, with its own configuration; only "
        "--total-timesteps and --max-runtime may be changed, and --benchmark say where its custom "
        "tasks are now.",
    )
    add_flags(parser, shown.config)
    given = parser.parse(arguments)
    resumed = given.pop("resume", None)
    given.pop("config", None)
    if resumed is None:
        config = validate(TrainConfig, merge(shown.config, given))
    else:
        others = given.keys() - {"total_timesteps", "max_runtime", "benchmark"}
        if others or chosen.config is not None:
            flag = "--" + (min(others).replace("_", "-") if others else "config")
            raise UsageError(
                "resume: expected no flag but --total-timesteps, --max-runtime and --benchmark "
                f"beside it, got {flag}"
            )
        config = validate(TrainConfig, given)

    from mtrl.devices import resolve_device
    from mtrl.training.run import resume, train

    if resumed is None:
        found = _start(chosen, resolve_device(config.device).type)
        outcome = train(validate(TrainConfig, merge(found.config, given)), note=str(found))
    else:
        from mtrl.envs.benchmarks import get_benchmark

        # Where custom tasks are to be found now, if it is not where the run had them from.
        benchmark = get_benchmark(config.benchmark) if "benchmark" in given else None
        outcome = resume(
            Path(resumed), config.total_timesteps, config.max_runtime, benchmark=benchmark
        )
    return 0 if outcome.signal is None else 128 + outcome.signal


def _start(chosen: Namespace, device: str) -> presets.Start:
    """The configuration that flags change."""
    if chosen.config is not None:
        return presets.named(chosen.config)
    benchmark = chosen.benchmark or TrainConfig().benchmark
    return presets.best(benchmark if chosen.tasks is None else None, device)


if __name__ == "__main__":
    sys.exit(main())
