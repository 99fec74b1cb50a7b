"""The step counts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

MAX_COUNT = 10**12
"""Bound of step counts: a checkpoint's name has twelve digits."""


@dataclass(frozen=True)
class Schedule:
    """Step counts of a run [environment steps over all tasks]; see `TrainConfig`'s fields."""

    PER_TASK: ClassVar = {
        "total_timesteps": 2_000_000,
        "learning_starts": 4_000,
        "eval_every": 50_000,
        "checkpoint_every": 50_000,
        "log_every": 2_000,
        "diagnose_every": 20_000,
    }
    """The defaults, per task."""

    total_timesteps: int
    learning_starts: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    diagnose_every: int
