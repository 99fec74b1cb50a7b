"""The section of a configuration about the simulator. Every field states its unit.

Imports neither torch nor MuJoCo, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtrl.config.section import Section

MAX_COPIES = 10_000
"""Bound of environments per task; more can only be a slip."""

MAX_PROCESSES = 1_024
"""Bound of processes or threads, beyond the cores of any machine."""


class EnvironmentConfig(Section):
    """The simulator."""

    horizon: int | None = Field(
        default=None,
        gt=0,
        description="Episode length at which an episode is truncated [environment steps] "
        "(default: 500, Meta-World's limit; custom environments end their episodes themselves).",
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
        description="Environments of each task, stepped in parallel; they share the task's goals.",
    )
    workers: int | None = Field(
        default=None,
        gt=0,
        le=MAX_PROCESSES,
        description="Simulator processes (default: one per processor core, at most one per "
        "environment). Results do not depend on their number.",
    )
    max_restarts: int = Field(
        default=10,
        ge=0,
        description="Failures of simulator processes (crash, hang, NaN) to recover from before the "
        "run stops.",
    )
