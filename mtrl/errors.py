"""Errors of one line, and their texts."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from importlib import import_module
from typing import Any


class UsageError(ValueError):
    """The user asked for something that cannot be done: one line says what was expected.

    The command line prints it and exits with code 2; nothing has been written by then.
    """


class RunError(RuntimeError):
    """A run cannot go on: one line says why. What it had saved by then is whole."""


def expect(holds: bool, expected: str, got: Any) -> None:
    """Refuse an option of a method of surgery that does not hold.

    Raises:
        UsageError: `surgery: expected …, got …`.
    """
    if not holds:
        raise UsageError(f"surgery: expected {expected}, got {got!r}")


def import_attribute(field: str, name: str) -> Any:
    """The object that `package.module:attribute` names, or the module that `package.module` names.

    Commands also look in the working directory; see `mtrl.cli.flags.run`.

    Raises:
        UsageError: if there is no such module or attribute, or importing it fails.
    """
    module, _, attributes = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")) or module.endswith(".py"):
        raise UsageError(
            f"{field}: expected the name of a module as an import statement has it, such as "
            f"package.module, got {module!r}"
        )
    try:
        found = import_module(module)
        for attribute in filter(None, attributes.split(".")):
            found = getattr(found, attribute)
        return found
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        reason = one_line(error)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {one_line(error)} ({last.filename}, line {last.lineno})"
    raise UsageError(f"{field}: cannot import {name!r}: {reason}")


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks, and no longer than can be read."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:499] + "…"


def unknown(field: str, value: str, choices: Iterable[str]) -> str:
    """The error text for a name that does not exist, with the nearest one that does."""
    names = list(choices)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return f"{field}: unknown {value!r}; {hint}expected one of: {shown}"
