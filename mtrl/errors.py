"""One-line errors and their messages."""

from __future__ import annotations

import difflib
import importlib
import os
import traceback
from collections.abc import Iterable
from numbers import Integral
from typing import Any

_IMPORTING = (__file__, importlib.__file__)
"""Files whose lines are no part of the module that is imported."""


class UsageError(ValueError):
    """Invalid request by the user; one line says what was expected.

    The command line prints it and exits with code 2, before anything has been written.
    """


class RunError(RuntimeError):
    """A run cannot continue; one line says why. Everything saved so far is intact."""


def expect(holds: bool, expected: str, got: Any) -> None:
    """Check a condition on an option of a surgery method.

    Raises:
        UsageError: `surgery: expected …, got …`, if it does not hold.
    """
    if not holds:
        raise UsageError(f"surgery: expected {expected}, got {got!r}")


def expect_kind(field: str, value: Any, kind: type, example: str) -> None:
    """Check the type of an argument.

    Raises:
        UsageError: With an example of what was expected.
    """
    if not isinstance(value, kind):
        raise UsageError(
            f"{field}: expected an mtrl.{kind.__name__}, such as {example}, got {value!r}"
        )


def expect_whole(field: str, value: Any, least: int = 1) -> None:
    """Check that an argument is an integer of at least `least`.

    Raises:
        UsageError: If it is not.
    """
    if not (isinstance(value, Integral) and int(value) >= least):
        raise UsageError(f"{field}: expected an integer of at least {least}, got {value!r}")


def import_attribute(field: str, name: str) -> Any:
    """Import the object `package.module:attribute`, or the module `package.module`.

    Commands also search the working directory; see `mtrl.cli.flags.run`.

    Raises:
        UsageError: If there is no such module or attribute, or importing it fails.
    """
    module, _, attributes = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")) or module.endswith(".py"):
        raise UsageError(
            f"{field}: expected the name of a module as in an import statement, such as "
            f"package.module, got {module!r}"
        )
    try:
        found = importlib.import_module(module)
        for attribute in filter(None, attributes.split(".")):
            found = getattr(found, attribute)
        return found
    except (Exception, SystemExit) as error:  # a module may raise anything on import
        reason, frames = one_line(error), traceback.extract_tb(error.__traceback__)
        inside = [f for f in frames if f.filename not in _IMPORTING and f.filename[0] != "<"]
        if inside:
            reason = with_line(error, inside)
        elif isinstance(error, ModuleNotFoundError):
            reason += f" (working directory: {os.getcwd()})"
    raise UsageError(f"{field}: cannot import {name!r}: {reason}")


def import_extra(field: str, module: str, extra: str) -> Any:
    """Import an optional dependency.

    Raises:
        UsageError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        command = f'pip install "mtrl-surgery[{extra}]"'
        raise UsageError(f"{field}: expected {module.capitalize()}: {command}") from None


def plain(error: Exception) -> str:
    """Return an error's message; TensorBoard names its files as bytes."""
    if isinstance(error, OSError) and isinstance(error.filename, bytes):
        return f"{error.strerror}: {os.fsdecode(error.filename)!r}"
    return str(error)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks and at most 500 characters long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:499] + "…"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python or torch lacks memory: on CUDA, on a CPU, or to map a file."""
    texts = ("not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, RunError)  # which says more, such as the callback's name
        and (type(error).__name__ == "OutOfMemoryError" or any(t in str(error) for t in texts))
    )


def with_line(error: BaseException, frames: list[traceback.FrameSummary] | None = None) -> str:
    """Return an error's type and message, and where it was raised: `KeyError: 'x' (a.py, line 3)`.

    Args:
        frames: Frames of its traceback to consider; default: all.
    """
    frames = traceback.extract_tb(error.__traceback__) if frames is None else frames
    line = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{line}"


def unknown(field: str, value: str, choices: Iterable[str]) -> str:
    """Return the error message for an unknown name, which suggests the nearest known one."""
    names = list(choices)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return f"{field}: unknown {value!r}; {hint}expected one of: {shown}"
