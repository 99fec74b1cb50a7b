"""Names of methods of surgery and their options, known without importing PyTorch."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mtrl.config.spec import check_options, parse
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


def check(spec: str) -> None:
    """Refuse what can be refused without PyTorch: a bad form, an unknown name or option.

    Raises:
        UsageError: `surgery: …`, with the nearest name.
    """
    name, options = parse("surgery", spec)
    if name in OPTIONS:
        check_options("surgery", name, options, OPTIONS[name])
    elif ":" in name:
        if not name.startswith("torchjd:"):
            import_attribute("surgery", name)
    elif not (entry_point(name) or "mtrl.surgery" in sys.modules):
        raise UsageError(unknown("surgery", name, choices(OPTIONS)))


def choices(names: Any) -> list[str]:
    """All that may stand in a description."""
    return [*sorted(names), "torchjd:NAME", "MODULE:NAME"]


def entry_point(name: str) -> EntryPoint | None:
    """The entry point of this name that an installed package has, if one has."""
    return next(iter(entry_points(group=GROUP, name=name)), None)
