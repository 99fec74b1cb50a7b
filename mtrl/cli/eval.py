"""`mtrl-eval`: judge a saved policy."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mtrl.cli.flags import Parser, add_flags, run
from mtrl.validation import Section, UsageError, validate


class EvalConfig(Section):
    """What mtrl-eval is asked for."""

    policy: Path = Field(description="Run folder, checkpoint, or policy file.")
    episodes: int = Field(
        default=50, gt=0, le=50, description="Episodes per task, each on another goal [episodes]."
    )
    tasks: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Evaluate these of the policy's tasks; default: all.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**32,
        description="Seed that chooses the 50 goals; default: the training run's, whose goals the "
        "policy has practised. Another one gives goals it has not.",
    )
    workers: int | None = Field(
        default=None,
        gt=0,
        description="Simulator processes; default: one per core. Results are the same.",
    )
    device: typing.Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the policy is computed."
    )
    json_file: Path | None = Field(
        default=None, description="Also write the result to this JSON file."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run("mtrl-eval", _eval, arguments)


def _eval(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="mtrl-eval",
        allow_abbrev=False,
        description="Judge a saved policy: deterministic actions, each goal once, an episode "
        "counts as solved if the success flag was set at any step.",
    )
    parser.add_argument(
        "policy", metavar="RUN_OR_POLICY", help=EvalConfig.model_fields["policy"].description
    )
    add_flags(parser, EvalConfig(policy=Path()), leave_out=("policy",))
    config = validate(EvalConfig, parser.parse(arguments))
    if config.json_file is not None and not config.json_file.absolute().parent.is_dir():
        raise UsageError(f"json: expected a file in a folder that exists, got {config.json_file}")
    if config.json_file is not None and config.json_file.is_dir():
        raise UsageError(f"json: expected a file, got the folder {config.json_file}")

    from mtrl.evaluation import evaluate_file

    result, context = evaluate_file(**config.model_dump(exclude={"json_file"}))
    print(result.table())
    if config.json_file is not None:
        from mtrl.checkpoint import write_text

        write_text(config.json_file, result.to_json(**context))
    return 0
