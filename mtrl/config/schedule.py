"""Step counts of a run, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mtrl.config.rates import total
from mtrl.errors import UsageError

if TYPE_CHECKING:
    from mtrl.config.train import TrainConfig


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
    def of(cls, config: TrainConfig, n_tasks: int) -> Schedule:
        """Compute the step counts of a configuration for `n_tasks` tasks.

        Raises:
            UsageError: If the run could never learn from the transitions it collects.
        """
        given = {name: getattr(config, name) for name in cls.PER_TASK}
        schedule = cls(
            **{
                name: n_tasks * cls.PER_TASK[name] if steps is None else total(steps, n_tasks)
                for name, steps in given.items()
            }
        )
        if schedule.learning_starts >= schedule.total_timesteps:
            raise UsageError(
                "learning_starts: expected less than total_timesteps "
                f"({schedule.total_timesteps}), got {schedule.learning_starts}"
            )
        copies, size = config.environment.envs_per_task, config.learner.buffer_size
        capacity = size // copies * copies  # whole vector steps
        if not capacity:
            raise UsageError(f"envs_per_task: expected at most buffer_size ({size}), got {copies}")
        stored = min(schedule.learning_starts // n_tasks, capacity)
        if config.learner.batch_size > stored:
            raise UsageError(
                f"batch_size: expected at most the {stored} transitions per task that "
                f"learning_starts ({schedule.learning_starts} steps over {n_tasks} tasks) and "
                f"buffer_size ({size}) leave in the replay buffer, got {config.learner.batch_size}"
            )
        return schedule
