"""Step counts of a run, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mtrl.config.rates import total
from mtrl.errors import UsageError


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
    """Defaults per task."""

    total_timesteps: int
    learning_starts: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    diagnose_every: int

    @classmethod
    def of(
        cls,
        given: Mapping[str, int | str | None],
        n_tasks: int,
        *,
        envs_per_task: int,
        buffer_size: int,
        batch_size: int,
    ) -> Schedule:
        """Compute the step counts for `n_tasks` tasks; of `given`, None is a default.

        Raises:
            UsageError: If the run could never learn from the transitions it collects.
        """
        schedule = cls(
            **{
                name: n_tasks * default if given[name] is None else total(given[name], n_tasks)
                for name, default in cls.PER_TASK.items()
            }
        )
        if schedule.learning_starts >= schedule.total_timesteps:
            raise UsageError(
                "learning_starts: expected less than total_timesteps "
                f"({schedule.total_timesteps}), got {schedule.learning_starts}"
            )
        capacity = buffer_size // envs_per_task * envs_per_task  # whole vector steps
        if not capacity:
            raise UsageError(
                f"envs_per_task: expected at most buffer_size ({buffer_size}), got {envs_per_task}"
            )
        stored = min(schedule.learning_starts // n_tasks, capacity)
        if batch_size > stored:
            raise UsageError(
                f"batch_size: expected at most the {stored} transitions per task that "
                f"learning_starts ({schedule.learning_starts} steps over {n_tasks} tasks) and "
                f"buffer_size ({buffer_size}) leave in the replay buffer, got {batch_size}"
            )
        return schedule
