"""`mtrl-train`: train a policy, or resume a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrl.cli.flags import Parser, add_flags, run
from mtrl.config import presets
from mtrl.config.section import flag_of, validate
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.folder import find_policy
from mtrl.training.check import check_names, check_plan
from mtrl.training.place import MAY_CHANGE, expect_new

if TYPE_CHECKING:
    from mtrl.envs.benchmarks import Benchmark
    from mtrl.training.report import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run("mtrl-train", _train, arguments)


def _train(arguments: Sequence[str] | None) -> int:
    # Parse these first: they select the configuration that --help shows and flags change.
    first = Parser(add_help=False)
    for flag in ("--config", "--benchmark", "--device"):
        first.add_argument(flag)
    first.add_argument("--tasks", nargs="+")
    chosen, _ = first.parse_known_args(arguments)
    shown = _start(chosen, "cuda" if chosen.device == "cuda" else "cpu")
    given = _parser(shown).parse(arguments)
    if (resumed := given.pop("resume", None)) is not None:
        return _exit_code(_resume(Path(resumed), given))
    may_exist = given.pop("resume_if_exists", False)
    given.pop("config", None)
    config, _ = presets.override(shown.config, given)
    if not may_exist:
        with suppress(OSError):  # not a valid name; creating the folder reports it
            expect_new(config.run_dir)
    benchmark = check_names(config)
    if config.transfer.init_from is not None:
        find_policy(config.transfer.init_from, "init_from")
    # The preset may depend on the device, which PyTorch finds, and its import takes a second.
    depends = chosen.config is None and config.device == "auto"
    devices = ("cpu", "cuda") if depends else (config.device,)
    _check_plans([presets.override(_start(chosen, d).config, given)[0] for d in devices], benchmark)

    from mtrl.devices import resolve_device
    from mtrl.training.run import train

    found = _start(chosen, resolve_device(config.device).type)
    config, lines = presets.override(found.config, given)
    if config.transfer.init_from is not None:
        from mtrl.sac.transfer import adopted

        config, _, replaced = adopted(config, insisted=given)
        lines += replaced
    note = "\n".join([found.line(config), *lines])
    return _exit_code(train(config, note=note, resume_if_exists=may_exist))


def _parser(shown: presets.Start) -> Parser:
    """Return the parser whose --help shows the defaults of a configuration."""
    parser = Parser(
        prog="mtrl-train",
        description="Train one policy on many Meta-World tasks. Timesteps are environment steps "
        "summed over all tasks. Without --config, MT10 and MT50 use the best preset for the "
        "device, and other tasks use the recipe. The defaults below are those of "
        f"{shown.name}.",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        default=argparse.SUPPRESS,
        help=f"Preset ({', '.join(presets.EXPECTED)}) or YAML file; flags override its values.",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="Resume this run from its latest checkpoint with its own configuration. Only "
        "--total-timesteps, --max-runtime and --max-restarts may be changed; --benchmark gives "
        "the new location of custom tasks that have moved.",
    )
    parser.add_argument(
        "--resume-if-exists",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Resume the run in --run-dir if it exists, else start it: a single command for jobs "
        "that a scheduler requeues.",
    )
    add_flags(parser, shown.config)
    return parser


def _check_plans(configs: Sequence[TrainConfig], benchmark: Benchmark) -> None:
    """Raise the error of the configuration that will be used, if all have the same."""
    errors = []
    for config in configs:
        try:
            check_plan(config, benchmark)
        except UsageError as error:
            errors.append(error)
    if len(errors) == len(configs) and len(set(map(str, errors))) == 1:
        raise errors[0]


def _resume(run_dir: Path, given: dict[str, Any]) -> Outcome:
    if others := sorted(given.keys() - {*MAY_CHANGE, "benchmark"}):
        raise UsageError(
            "resume: expected only --total-timesteps, --max-runtime, --max-restarts and "
            f"--benchmark with it, got {flag_of(others[0])}"
        )
    config = validate(TrainConfig, given)
    from mtrl.training.run import resume

    # The new location of custom tasks, if they have moved since the run started.
    benchmark = check_names(config) if "benchmark" in given else None
    changes = {name: config.flat()[name] for name in MAY_CHANGE if name in given}
    return resume(run_dir, **changes, benchmark=benchmark)


def _exit_code(outcome: Outcome) -> int:
    return 0 if outcome.signal is None else 128 + outcome.signal


def _start(chosen: argparse.Namespace, device: str) -> presets.Start:
    """Return the configuration that the flags change."""
    return presets.start(chosen.config, chosen.benchmark, chosen.tasks, device)


if __name__ == "__main__":
    sys.exit(main())
