"""Configuration section for the simulator. Every field states its unit.

This module imports neither torch nor MuJoCo, so that `--help` is fast.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtrl.config.fields import Workers
from mtrl.config.section import Section

MAX_COPIES = 10_000
"""Upper bound of environments per task; more can only be a typo."""


class EnvironmentConfig(Section):
    """Configuration of the simulator."""

    horizon: int | None = Field(
        default=None,
        gt=0,
        description="Length at which an episode is truncated [environment steps] (default: 500, "
        "Meta-World's limit; none for custom environments).",
    )
    simulator: Literal["auto", "metaworld", "envpool"] = Field(
        default="auto",
        description="Simulator for training: 'metaworld', the reference; 'envpool', a faster port, "
        "for tasks on which it agrees with the reference; 'auto': EnvPool if it is installed and "
        "a task agrees, else the reference. Evaluation always uses the reference.",
    )
    native_tasks: tuple[str, ...] = Field(
        default=(),
        description="Tasks to run on EnvPool whether or not it agrees with the reference.",
    )
    envs_per_task: int = Field(
        default=1,
        gt=0,
        le=MAX_COPIES,
        description="Number of environments per task, stepped in parallel; they share its goals.",
    )
    workers: Workers = None
    max_restarts: int = Field(
        default=10,
        ge=0,
        description="Maximum number of failed simulator processes (crash, hang, NaN) to replace "
        "before the run stops.",
    )
