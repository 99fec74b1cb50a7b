"""Fields that several sections and commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

MAX_PROCESSES = 1_024
"""Upper bound of processes or threads, more than the cores of any machine."""

Processes = Annotated[int, Field(gt=0, le=MAX_PROCESSES)]
"""Number of processes or threads."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Random seed."""

Device = Literal["auto", "cpu", "cuda"]
"""Name of a device; 'auto' is CUDA if available, else the CPU."""

Camera = Literal[
    "corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV"
]
"""Names of Meta-World's cameras."""

UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
"""Path in which `~` is the user's home folder."""

TrunkImports = Annotated[
    tuple[str, ...],
    Field(
        description="Modules to import first, because they register trunks, or "
        "'package.module:name' of a trunk; a policy file itself imports nothing."
    ),
]
"""What to import before a policy is read."""

PolicyDevice = Annotated[
    Device, Field(description="Device of the policy; 'auto': CUDA if available, else the CPU.")
]
"""Device on which a policy acts."""

Workers = Annotated[
    Processes | None,
    Field(
        description="Number of simulator processes (default: one per CPU core, at most one per "
        "environment). It does not affect results."
    ),
]
"""Processes of the simulator; None is one per CPU core."""
