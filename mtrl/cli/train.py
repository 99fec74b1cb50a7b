"""`mtrl-train`: train a policy, or go on training one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mtrl.cli.flags import Parser, add_flags, merge, run
from mtrl.config import TrainConfig
from mtrl.validation import UsageError, validate


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run("mtrl-train", _train, arguments)


def _train(arguments: Sequence[str] | None) -> int:
    # --config comes first: it decides the defaults that --help shows and flags override.
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(arguments)
    defaults = TrainConfig() if chosen.config is None else TrainConfig.from_yaml(chosen.config)

    parser = Parser(
        prog="mtrl-train",
        allow_abbrev=False,
        description="Train one policy on many Meta-World tasks. Counts of timesteps are "
        "environment steps over all tasks together.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file whose values become the defaults below."
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="Go on with this run from its newest checkpoint, with its own configuration; only "
        "--total-timesteps and --max-runtime may be changed.",
    )
    add_flags(parser, defaults)
    given = parser.parse(arguments)
    resumed = given.pop("resume", None)
    given.pop("config", None)
    if resumed is not None:
        others = [key for key in given if key not in ("total_timesteps", "max_runtime")]
        if others or chosen.config is not None:
            flag = "--" + (others[0].replace("_", "-") if others else "config")
            raise UsageError(
                "resume: expected no flag but --total-timesteps and --max-runtime beside it, got "
                f"{flag}"
            )
        changes = validate(TrainConfig, given)
    else:
        config = validate(TrainConfig, merge(defaults, given))

    from mtrl.run import resume, train

    if resumed is None:
        outcome = train(config)
    else:
        outcome = resume(Path(resumed), changes.total_timesteps, changes.max_runtime)
    return 0 if outcome.signal is None else 128 + outcome.signal


if __name__ == "__main__":
    sys.exit(main())
