"""Descriptions such as `cagrad(c=0.4)` or `moore(experts=4)`, read without importing PyTorch."""

from __future__ import annotations

import ast
import reprlib
from collections.abc import Sequence
from typing import Any

from mtrl.errors import UsageError, unknown


def parse(field: str, spec: str) -> tuple[str, dict[str, Any]]:
    """Split `name(key=value, …)`; values are Python literals.

    Raises:
        UsageError: if it has another form; the text begins with the field's name.
    """
    name, bracket, _ = spec.partition("(")
    try:
        call = ast.parse(f"f{spec[len(name) :] if bracket else '()'}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        shown = reprlib.repr(spec) if len(spec) > 200 else repr(spec)
        raise UsageError(f"{field}: expected NAME or NAME(option=value, …), got {shown}") from None
    return name.strip(), options


def check_options(field: str, name: str, options: dict[str, Any], accepted: Sequence[str]) -> None:
    """Refuse an option that `name` does not have.

    Raises:
        UsageError: with the nearest option.
    """
    for option in options:
        if not accepted:
            raise UsageError(f"{field}: expected no options for {name}, got {option!r}")
        if option not in accepted:
            raise UsageError(unknown(f"{field}: option of {name}", option, accepted))
