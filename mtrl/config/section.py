"""Base class of the validated sections of a configuration."""

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
"""Value of a flag that resets a field to its default None, although a preset sets it."""


def flag_of(field: str) -> str:
    """Return the flag of a field: `--batch-size` for batch_size."""
    return "--" + FLAGS.get(field, field).replace("_", "-")


_PLAIN = {
    "tuple_type": "input should be a list of values",
    "model_type": "input should be a mapping from fields to values",
    "dict_type": "input should be a mapping from names to values",
}
"""Replacements in terms of YAML for pydantic's messages about Python types."""


class Section(BaseModel):
    """Base class of every part of the configuration: immutable, without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept `1e6` as an integer, which pydantic does not, and no bool, which it does.

        Accept `default` as None, which a command line cannot write otherwise.
        """
        kinds = leaf_types(cls.model_fields[str(info.field_name)].annotation)
        if type(None) in kinds and Path not in kinds and value in (DEFAULT, [DEFAULT], (DEFAULT,)):
            return None
        if isinstance(value, list | tuple):
            return type(value)(read_number(part, kinds) for part in value)
        return read_number(value, kinds)

    def model_copy(
        self: AnySection, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> AnySection:
        """Return a copy with some fields replaced; unlike pydantic's method, this validates them.

        Args:
            update: New values; fields of nested sections may be given without their section. A
                section given as a dict changes only the fields in it; as an object, all of them.
            deep: See pydantic.

        Raises:
            UsageError: If a name is unknown or a value is invalid.
        """
        if not update:
            return super().model_copy(deep=deep)
        return validate(type(self), merged(self, update))


def leaves(section: Section, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten `changes`: replace each section given as a dict by its fields.

    Raises:
        UsageError: If a field is given twice, on its own and in its section.
    """
    found: dict[str, Any] = {}
    for name, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(getattr(section, name, None), Section)
        for leaf, new in value.items() if inside else [(name, value)]:
            if leaf in found:
                raise UsageError(f"{leaf}: expected one value, got two")
            found[leaf] = new
    return found


def merged(section: Section, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of `section` with `changes`, whose leaves may be given without sections."""
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
    """Return the types in an annotation such as `tuple[int, ...] | None`."""
    if arguments := typing.get_args(annotation):
        return set().union(*map(leaf_types, arguments))
    return {annotation} if isinstance(annotation, type) else set()


def is_tuple(annotation: Any) -> bool:
    """Return whether an annotation is `tuple[X, ...]` or `tuple[X, ...] | None`."""
    parts = (annotation, *typing.get_args(annotation))
    return any(typing.get_origin(part) is tuple for part in parts)


def read_number(value: Any, kinds: set[type]) -> Any:
    """Turn text such as `1e6` into an integer, if `kinds` have one; leave other values alone."""
    if bool in kinds or not kinds & {int, float}:
        return value
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    if int in kinds and isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        number = Decimal(value.strip())
        return int(number) if number == number.to_integral_value() else value
    return value


def validate(model: type[Model], tree: Any, source: str = "") -> Model:
    """Build `model` from plain values, with one-line errors that name the field.

    Raises:
        UsageError: If a key is unknown (the message suggests the nearest one) or a value is
            invalid.
    """
    try:
        return model.model_validate(tree)
    except RecursionError:
        raise UsageError(f"{source}expected plain values, got endlessly nested ones") from None
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if not isinstance(part, int)]
        if first["type"] == "extra_forbidden":
            section: Any = model
            for part in path[:-1]:
                section = section.model_fields[part].annotation
            names = list(section.model_fields)
            for field in section.model_fields.values():  # include nested sections
                names += getattr(field.annotation, "model_fields", ())
            raise UsageError(source + unknown("key", path[-1], names)) from None
        name = ".".join(path) or "the file"
        message = first["msg"][0].lower() + first["msg"][1:]
        message = _PLAIN.get(first["type"], message)
        raise UsageError(f"{source}{name}: {message}, got {_shown(first['input'])}") from None


def _shown(value: Any) -> str:
    """Shorten any value for display: a few aliases in YAML can expand to a billion values."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 200 else text[:199] + "…"


def expect_writable(field: str, path: Path | None, is_folder: bool = False) -> None:
    """Check that a result can be written to a path; None means no result.

    Args:
        field: Name of the option, for the message.
        path: File, which may exist; with `is_folder` a folder, likewise.

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
    except (OSError, ValueError) as error:  # not writable, or not a valid name
        reason = f"expected a {kind} that can be written, got {str(path)!r} ({one_line(error)})"
        raise UsageError(f"{field}: {reason}") from None
