"""Numbers per task or per action dimension, such as `280_000/task` and `-0.5/action`.

A configuration for any set of tasks can state its budgets this way; the resolved configuration of a
run contains plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from mtrl.config.section import read_number

MAX_COUNT = 10**12
"""Upper bound of step counts: the name of a checkpoint has twelve digits."""


def _per(unit: str, kind: type) -> WrapValidator:
    """Return a validator that also accepts `NUMBER/unit`, with the same bounds."""

    def read(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, str) or "/" not in value:
            return number(value)
        text, _, given = value.partition("/")
        if given.strip() != unit:
            raise PydanticCustomError("rate", f"input should be a number, or NUMBER/{unit}")
        return f"{number(read_number(text.strip(), {kind}))}/{unit}"

    return WrapValidator(read)


_Either = PlainSerializer(lambda value: value, return_type=Any)

Steps = Annotated[int, Field(gt=0, lt=MAX_COUNT), _per("task", int), _Either]
"""Environment steps over all tasks, or `N/task`."""

StepsOrNever = Annotated[int, Field(ge=0, lt=MAX_COUNT), _per("task", int), _Either]
"""Environment steps over all tasks, or `N/task`; 0 means never."""

Nats = Annotated[float, _per("action", float), _Either]
"""Nats, or `X/action` per action dimension."""


def total(value: Any, count: int, number: Callable[[str], Any] = int) -> Any:
    """Multiply a number per task or action by their count; return other numbers unchanged."""
    if not isinstance(value, str):
        return value
    return number(value.partition("/")[0]) * count
