"""mtrl-train and mtrl-eval.

A flag is a field of the configuration, spelled with dashes. argparse splits the command line;
pydantic reads the values, so YAML and flags are validated in one place. torch and mujoco are
imported after that.
"""

from __future__ import annotations

import argparse
import signal
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from mtrl.config import TrainConfig
from mtrl.validation import Section, UsageError, unknown, validate


class _Parser(argparse.ArgumentParser):
    """Errors are one line, and an unknown flag is told the nearest one."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        known, rest = self.parse_known_args(arguments)
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings]
            flags = [flag for flag in flags if flag.startswith("--")]
            raise UsageError(
                unknown("flag", rest[0], flags)
                if rest[0].startswith("-")
                else f"unexpected argument {rest[0]!r}"
            )
        return vars(known)


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


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`mtrl-train`: train a policy, or go on training one. Returns the exit code."""
    return _run("mtrl-train", _train, arguments)


def eval_main(arguments: Sequence[str] | None = None) -> int:
    """`mtrl-eval`: judge a saved policy. Returns the exit code."""
    return _run("mtrl-eval", _eval, arguments)


def _run(program: str, command: Any, arguments: Sequence[str] | None) -> int:
    try:
        return command(arguments)
    except UsageError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk's, or a simulator process's
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before a run could handle it, or a second time
        return 128 + signal.SIGINT


def _train(arguments: Sequence[str] | None) -> int:
    # --config comes first: it decides the defaults that --help shows and flags override.
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    chosen, _ = first.parse_known_args(arguments)
    defaults = TrainConfig() if chosen.config is None else TrainConfig.from_yaml(chosen.config)

    parser = _Parser(
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
        "--total-timesteps may be changed.",
    )
    _add_flags(parser, defaults)
    given = parser.parse(arguments)
    resumed = given.pop("resume", None)
    given.pop("config", None)
    if resumed is not None:
        others = [key for key in given if key != "total_timesteps"]
        if others or chosen.config is not None:
            flag = "--" + (others[0].replace("_", "-") if others else "config")
            raise UsageError(
                f"resume: expected no flag but --total-timesteps beside it, got {flag}"
            )
        total = validate(TrainConfig, given).total_timesteps
    else:
        config = validate(TrainConfig, _merge(defaults, given))

    from mtrl.run import resume, train

    outcome = train(config) if resumed is None else resume(Path(resumed), total)
    return 0 if outcome.signal is None else 128 + outcome.signal


def _eval(arguments: Sequence[str] | None) -> int:
    parser = _Parser(
        prog="mtrl-eval",
        allow_abbrev=False,
        description="Judge a saved policy: deterministic actions, each goal once, an episode "
        "counts as solved if the success flag was set at any step.",
    )
    parser.add_argument(
        "policy", metavar="RUN_OR_POLICY", help=EvalConfig.model_fields["policy"].description
    )
    _add_flags(parser, EvalConfig(policy=Path()), leave_out=("policy",))
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


def _add_flags(
    parser: argparse.ArgumentParser, defaults: BaseModel, leave_out: Sequence[str] = ()
) -> None:
    """One flag per leaf of the tree; values stay strings, for pydantic to read."""
    for group, name, field, default in _leaves(defaults):
        if name in leave_out:
            continue
        target = parser if group is None else _group(parser, group)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = (field.description or "").replace("%", "%%")
        target.add_argument(
            "--json" if name == "json_file" else "--" + name.replace("_", "-"),
            dest=name,
            metavar=_metavar(field.annotation),
            nargs="+" if _is_tuple(field.annotation) else None,
            default=argparse.SUPPRESS,
            help=text if default is None else f"{text} (default: {shown})",
        )


def _leaves(model: BaseModel) -> Iterator[tuple[str | None, str, FieldInfo, Any]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            for _, leaf, leaf_field, leaf_value in _leaves(value):
                yield name, leaf, leaf_field, leaf_value
        else:
            yield None, name, field, value


def _group(parser: argparse.ArgumentParser, title: str) -> Any:
    groups = {group.title: group for group in parser._action_groups}
    return groups.get(title) or parser.add_argument_group(title)


def _metavar(annotation: Any) -> str:
    """What stands for a value in --help: the type's word, or the choices."""
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(typing.get_args(annotation))
    if inner := typing.get_args(annotation):  # X | None, tuple[X, ...], Annotated[X, ...]
        return _metavar(inner[0])
    return {int: "N", float: "X", str: "NAME", Path: "PATH", bool: "true|false"}[annotation]


def _is_tuple(annotation: Any) -> bool:
    parts = (annotation, *typing.get_args(annotation))
    return any(typing.get_origin(part) is tuple for part in parts)


def _merge(defaults: BaseModel, given: dict[str, Any]) -> dict[str, Any]:
    """The tree of `defaults` with the given leaves in their places."""
    tree = defaults.model_dump()
    for group, name, _, _ in _leaves(defaults):
        if name in given:
            (tree if group is None else tree[group])[name] = given[name]
    return tree


if __name__ == "__main__":
    sys.exit(train_main())
