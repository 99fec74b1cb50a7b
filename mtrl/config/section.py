"""Validated sections, of which a configuration is made.

Imports neither torch nor MuJoCo, so that `--help` answers at once.
"""

from __future__ import annotations

import reprlib
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mtrl.errors import UsageError, one_line, unknown

Model = TypeVar("Model", bound=BaseModel)


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
