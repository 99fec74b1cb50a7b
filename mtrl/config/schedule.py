"""The step counts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mtrl.errors import UsageError

if TYPE_CHECKING:
    from mtrl.config.train import TrainConfig

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

    @classmethod
    def of(cls, config: TrainConfig, n_tasks: int) -> Schedule:
        """Those of a configuration for `n_tasks` tasks, checked against each other.

        Raises:
            UsageError: if the run could never learn from what it collects.
        """
        schedule = cls(
            **{
                name: n_tasks * per_task if getattr(config, name) is None else getattr(config, name)
                for name, per_task in cls.PER_TASK.items()
            }
        )
        if schedule.learning_starts >= schedule.total_timesteps:
            raise UsageError(
                "learning_starts: expected less than total_timesteps "
                f"({schedule.total_timesteps}), got {schedule.learning_starts}"
            )
        learner, copies = config.learner, config.environment.envs_per_task
        capacity = learner.buffer_size // copies * copies  # whole vector steps
        if not capacity:
            raise UsageError(
                f"envs_per_task: expected at most buffer_size ({learner.buffer_size}), got {copies}"
            )
        stored = min(schedule.learning_starts // n_tasks, capacity)
        if learner.batch_size > stored:
            raise UsageError(
                f"batch_size: expected at most the {stored} transitions per task that "
                f"learning_starts ({schedule.learning_starts} steps over {n_tasks} tasks) and "
                f"buffer_size ({learner.buffer_size}) leave in the replay, got "
                f"{learner.batch_size}"
            )
        return schedule
