"""Errors of one line, and how their texts are made."""

from __future__ import annotations

import difflib
import sys
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
    """What `package.module:attribute` stands for; modules in the working directory are found too.

    Raises:
        UsageError: if there is no such module or attribute.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path:  # a console script's path begins elsewhere
        sys.path.insert(0, "")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{field}: cannot import {name!r}: {one_line(error)}") from None


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
