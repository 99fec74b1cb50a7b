"""Command lines generated from configurations: one flag per field, spelled with dashes.

argparse splits the command line, and pydantic validates the values, as for YAML.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import threading
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mtrl.config.section import flag_of, is_tuple
from mtrl.errors import RunError, UsageError, plain, unknown
from mtrl.training.interrupt import SIGNALS

Command = Callable[[Sequence[str] | None], int]

_format_warning = warnings.formatwarning


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        import mtrl

        print(parser.prog, mtrl.__version__)
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors; that of an unknown flag suggests the nearest flag.

    Flags must be written in full.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        # argparse's own pattern treats `-1e-3` as a flag.
        self._negative_number_matcher = re.compile(r"-(\.?\d|\.?inf|\.?nan)", re.IGNORECASE)
        if self.add_help:
            self.add_argument(
                "--version",
                action=_Version,
                nargs=0,
                dest=argparse.SUPPRESS,
                default=argparse.SUPPRESS,
                help="Print the version and exit.",
            )

    def error(self, message: str) -> NoReturn:
        """Raise a one-line error without the usage."""
        raise UsageError(message)

    def parse(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """Return the values of the given flags, by field."""
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


def run(program: str, command: Command, arguments: Sequence[str] | None) -> int:
    """Run a command, and print errors as one line; return the exit code."""
    with _surroundings():
        code = _run(program, command, arguments)
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):
            _discard_output()
    return code


def _run(program: str, command: Command, arguments: Sequence[str] | None) -> int:
    try:
        return command(arguments)
    except BrokenPipeError:  # the reader of the output has closed it
        return 128 + signal.SIGPIPE
    except UsageError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:  # from the disk, a simulator process, or NaN
        print(f"{program}: error: {plain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:  # before a run could handle it, or the second one
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        print(f"{program}: interrupted by {number.name}", file=sys.stderr)
        return 128 + number


@contextmanager
def _surroundings() -> Iterator[None]:
    """Set up the process for a command, and restore it for callers in Python.

    - Modules in the working directory can be imported, as with `python -m`.
    - Characters that the terminal's encoding lacks are replaced by question marks.
    - SIGTERM, SIGUSR1 and a closed terminal interrupt like SIGINT, so that a run can stop cleanly.
    - Closed standard streams become the null device. Otherwise the next opened file would take
      their descriptor, and child processes would write into it.
    - Warnings from mtrl are one line without source code.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # open() returns the lowest free descriptor, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # NumPy 2.0 accesses it on import
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    warnings.formatwarning = _formatted
    unhandled, threading.excepthook = threading.excepthook, _unhandled
    path, sys.path = sys.path, [os.getcwd(), *sys.path]
    encodings = {}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encodings[stream] = stream.errors
            stream.reconfigure(errors="replace")
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                handlers[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        threading.excepthook, sys.path = unhandled, path
        warnings.formatwarning = _format_warning
        for stream, errors in encodings.items():
            if not stream.closed:
                stream.reconfigure(errors=errors)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _discard_output() -> None:
    """Keep the interpreter from flushing to a closed output at exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unhandled(error: threading.ExceptHookArgs) -> None:
    """Do not print OSErrors of threads: TensorBoard's raises them again at the next write."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def add_flags(
    parser: argparse.ArgumentParser,
    defaults: BaseModel,
    leave_out: Sequence[str] = (),
    *,
    several: bool = False,
    top: argparse._ArgumentGroup | None = None,
) -> None:
    """Add one flag per leaf of the tree, except `leave_out`; values stay strings for pydantic.

    Args:
        defaults: Values shown in --help.
        several: Whether every flag takes several values.
        top: Group of the fields outside sections.
    """
    for group, name, field, default in _leaves(defaults):
        if name in leave_out:
            continue
        target = (top or parser) if group is None else _group(parser, group)
        is_switch = field.annotation is bool  # `--flag` without a value means true
        is_list = several or is_tuple(field.annotation)
        one, many = ("?", "*") if is_switch else (None, "+")
        target.add_argument(
            flag_of(name),
            dest=name,
            metavar=_metavar(field.annotation),
            nargs=many if is_list else one,
            const="true" if is_switch and not is_list else None,
            default=argparse.SUPPRESS,
            help=_help(field.description or "", default).replace("%", "%%"),
        )


def _help(description: str, default: Any) -> str:
    """Return the help text; a default that is set replaces the one in the description."""
    if default is None or default == ():
        return description
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    return f"{re.sub(r' ?[(]default: [^()]*[)]', '', description)} (default: {shown})"


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
    """Return the placeholder of a value in --help: a word for its type, or the choices."""
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(typing.get_args(annotation))
    if inner := typing.get_args(annotation):  # X | None, tuple[X, ...], Annotated[X, ...]
        return "FILE" if typing.get_origin(annotation) is dict else _metavar(inner[0])
    return {int: "N", float: "X", str: "NAME", Path: "PATH", bool: "true|false"}[annotation]
