"""Names of trunks and their options, known without importing PyTorch."""

from __future__ import annotations

import sys

from mtrl.config.spec import check_options, parse
from mtrl.errors import UsageError, unknown

_COMMON = ("widths", "layer_norm")
OPTIONS: dict[str, tuple[str, ...]] = {
    "mlp": (*_COMMON, "embedding"),
    "residual": (*_COMMON, "embedding"),
    "film": (*_COMMON, "embedding"),
    "soft-modules": (*_COMMON, "layers", "modules", "width", "size"),
    "moore": (*_COMMON, "experts"),
    "care": (*_COMMON, "encoders", "size", "embedding"),
    "paco": (*_COMMON, "sets"),
}
"""The built-in trunks and their options; a test compares them with the registry's."""


def check(spec: str) -> None:
    """Refuse what can be refused without PyTorch: a bad form, an unknown name or option.

    Raises:
        UsageError: `trunk: …`, with the nearest name.
    """
    name, options = parse("trunk", spec)
    if name in OPTIONS:
        check_options("trunk", name, options, OPTIONS[name])
    elif (
        ":" not in name and "mtrl.nets.trunks" not in sys.modules
    ):  # no module that was imported has registered it
        raise UsageError(unknown("trunk", name, [*sorted(OPTIONS), "MODULE:NAME"]))
