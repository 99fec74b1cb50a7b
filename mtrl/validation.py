"""Errors of one line, and the validated sections that a configuration is made of.

Imports neither torch nor mujoco, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class UsageError(ValueError):
    """The user asked for something that cannot be done: one line says what was expected.

    The command line prints it and exits with code 2; nothing has been written by then.
    """


class RunError(RuntimeError):
    """A run cannot go on: one line says why. What it had saved by then is whole."""


class Section(BaseModel):
    """Common behaviour of every part of the tree: immutable, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def validate(model: type[Model], tree: Any, source: str = "") -> Model:
    """Build `model` from plain values, turning the first error into one line that names the field.

    Raises:
        UsageError: if a key is unknown (the nearest one is named) or a value does not fit.
    """
    try:
        return model.model_validate(tree)
    except RecursionError:
        raise UsageError(f"{source}expected values, got values within values without end") from None
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if not isinstance(part, int)]
        if first["type"] == "extra_forbidden":
            section: Any = model
            for part in path[:-1]:
                section = section.model_fields[part].annotation
            names = list(section.model_fields)
            for field in section.model_fields.values():  # of the sections within, too
                names += getattr(field.annotation, "model_fields", ())
            raise UsageError(source + unknown("key", path[-1], names)) from None
        name = ".".join(path) or "the file"
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{source}{name}: {message}, got {_shown(first['input'])}") from None


def _shown(value: Any) -> str:
    """Short, whatever is in it: a few aliases in YAML can stand for a billion values."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 200 else text[:199] + "…"


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


def expect_writable(field: str, path: Path | None, is_folder: bool = False) -> None:
    """Refuse a place for a result that could not be written to; None is no result.

    Args:
        field: What asked for it.
        path: A file, which may exist; with `is_folder` a folder, likewise.

    Raises:
        UsageError: `<field>: expected …, got …`.
    """
    if path is None:
        return
    kind, other = ("folder", "file") if is_folder else ("file", "folder")
    try:
        into = path if is_folder and path.is_dir() else path.absolute().parent
        if not into.is_dir():
            raise UsageError(f"{field}: expected a {kind} in a folder that exists, got {path}")
        if path.exists() and path.is_dir() != is_folder:
            raise UsageError(f"{field}: expected a {kind}, got the {other} {path}")
        tempfile.TemporaryFile(dir=into).close()
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # no such disk, or no name that a file could have
        reason = f"expected a {kind} that can be written, got {str(path)!r} ({one_line(error)})"
        raise UsageError(f"{field}: {reason}") from None


def one_line(error: Exception) -> str:
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
