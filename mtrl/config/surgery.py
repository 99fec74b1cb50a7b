"""Descriptions of methods of surgery, such as `cagrad(c=0.4)`, read without importing PyTorch."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mtrl.errors import UsageError, import_attribute, unknown

GROUP = "mtrl.surgery"
"""Entry points under which installed packages offer methods."""

_ROTOGRAD = ("rotation_lr", "rotation_decay", "rotation_size", "rotation_step", "reset_every")
OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "pcgrad": (),
    "rotograd": _ROTOGRAD,
    "rotograd-scale": _ROTOGRAD,
    "rotograd-rotate": _ROTOGRAD,
    "cagrad": ("c",),
    "mgda": (),
    "imtl-g": (),
    "aligned-mtl": (),
    "fairgrad": ("alpha",),
    "gradnorm": ("alpha", "lr"),
    "famo": ("gamma", "lr"),
}
"""The built-in methods and their options; a test compares them with the registry's."""


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split `name(key=value, …)`; values are Python literals.

    Raises:
        UsageError: if it has another form.
    """
    name, bracket, _ = spec.partition("(")
    try:
        call = ast.parse(f"f{spec[len(name) :] if bracket else '()'}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise UsageError(f"surgery: expected NAME or NAME(option=value, …), got {spec!r}") from None
    return name.strip(), options


def check(spec: str) -> None:
    """Refuse what can be refused without PyTorch: a bad form, an unknown name or option.

    Raises:
        UsageError: `surgery: …`, with the nearest name.
    """
    name, options = parse(spec)
    if name in OPTIONS:
        check_options(name, options, OPTIONS[name])
    elif ":" in name:
        if not name.startswith("torchjd:"):
            import_attribute("surgery", name)
    elif not (entry_point(name) or "mtrl.surgery" in sys.modules):
        raise UsageError(unknown("surgery", name, choices(OPTIONS)))


def check_options(name: str, options: dict[str, Any], accepted: tuple[str, ...]) -> None:
    """Refuse an option that the method does not have.

    Raises:
        UsageError: with the nearest option.
    """
    for option in options:
        if not accepted:
            raise UsageError(f"surgery: expected no options for {name}, got {option!r}")
        if option not in accepted:
            raise UsageError(unknown(f"surgery: option of {name}", option, accepted))


def choices(names: Any) -> list[str]:
    """All that may stand in a description."""
    return [*sorted(names), "torchjd:NAME", "MODULE:NAME"]


def entry_point(name: str) -> EntryPoint | None:
    """The entry point of this name that an installed package has, if one has."""
    return next(iter(entry_points(group=GROUP, name=name)), None)
