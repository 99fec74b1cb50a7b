"""Validated sections, of which a configuration is made.

Imports neither torch nor MuJoCo, so that `--help` answers at once.
"""

from __future__ import annotations

import re
import reprlib
import tempfile
import typing
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from mtrl.errors import UsageError, one_line, unknown

Model = TypeVar("Model", bound=BaseModel)
AnySection = TypeVar("AnySection", bound="Section")

_SCIENTIFIC = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}\s*")


FLAGS = {"imports": "import", "json_file": "json", "csv_file": "csv"}
"""Flags whose word Python or pydantic keeps from being a field's name."""

DEFAULT = "default"
"""What a flag takes for a field that a preset sets and that is to have its default, none, again."""


def flag_of(field: str) -> str:
    """The flag of a field: `--batch-size` of batch_size."""
    return "--" + FLAGS.get(field, field).replace("_", "-")


_PLAIN = {
    "tuple_type": "input should be a list of values",
    "model_type": "input should be a mapping from fields to values",
}
"""Pydantic's errors that speak of Python's types, in the words of YAML."""


class Section(BaseModel):
    """Common behaviour of every part of the tree: immutable, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Take `1e6` for an integer, which pydantic does not, and no truth value, which it does.

        And `default`, which a command line has no other word for, for no value.
        """
        kinds = leaf_types(cls.model_fields[str(info.field_name)].annotation)
        if type(None) in kinds and Path not in kinds and value in (DEFAULT, [DEFAULT], (DEFAULT,)):
            return None
        if isinstance(value, list | tuple):
            return type(value)(_read_number(part, kinds) for part in value)
        return _read_number(value, kinds)

    def model_copy(
        self: AnySection, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> AnySection:
        """A copy with some fields replaced, by pydantic's name but validated.

        Args:
            update: New values; a field of a section within may be named without it. A section as
                a dict changes the fields in it, as an object all of them.
            deep: As pydantic's.

        Raises:
            UsageError: if a name is unknown or a value does not fit.
        """
        if not update:
            return super().model_copy(deep=deep)
        return validate(type(self), merged(self, update))


def leaves(section: Section, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` with the fields of each section that is given as a dict in its place.

    Raises:
        UsageError: if a field is given twice, alone and in its section.
    """
    found: dict[str, Any] = {}
    for name, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(getattr(section, name, None), Section)
        for leaf, new in value.items() if inside else [(name, value)]:
            if leaf in found:
                raise UsageError(f"{leaf}: expected one value, got it twice")
            found[leaf] = new
    return found


def merged(section: Section, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `section` with `changes`, whose leaves may be named without their sections."""
    tree, changes = section.model_dump(), leaves(section, changes)
    homes = {leaf: name for name in tree if isinstance(tree[name], dict) for leaf in tree[name]}
    for name, value in changes.items():
        if name not in homes:
            tree[name] = value.model_dump() if isinstance(value, Section) else value
    for name, value in changes.items():
        if name in homes:
            tree[homes[name]][name] = value
    return tree


def leaf_types(annotation: Any) -> set[type]:
    """The types in an annotation such as `tuple[int, ...] | None`."""
    if arguments := typing.get_args(annotation):
        return set().union(*map(leaf_types, arguments))
    return {annotation} if isinstance(annotation, type) else set()


def _read_number(value: Any, kinds: set[type]) -> Any:
    if bool in kinds or not kinds & {int, float}:
        return value
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    if int in kinds and isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        number = Decimal(value.strip())
        return int(number) if number == number.to_integral_value() else value
    return value


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
        message = _PLAIN.get(first["type"], message)
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
