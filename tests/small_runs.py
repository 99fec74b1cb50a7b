"""Configurations of runs that take seconds."""

from pathlib import Path
from typing import Any

from mtrl import TrainConfig
from mtrl.training.checkpoint import CheckpointWriter

TASKS, HORIZON, TOTAL = ("reach-v3", "drawer-close-v3"), 10, 240


def small_config(run_dir: Path, **leaves: Any) -> TrainConfig:
    """120 vector steps of two tasks, the first 20 of them random; `leaves` override fields."""
    small = {
        "tasks": TASKS,
        "total_timesteps": TOTAL,
        "learning_starts": 40,
        "log_every": 40,
        "checkpoint_every": 60,
        "eval_every": 80,
        "eval_episodes": 1,
        "diagnose_every": 0,
        "run_dir": run_dir,
        "hidden_sizes": (8,),
        "batch_size": 8,
        "horizon": HORIZON,
        "workers": 1,
        "simulator": "metaworld",
    }
    return TrainConfig(**small | leaves)


def point_config(run_dir: Path, **leaves: Any) -> TrainConfig:
    """The same of `toy_tasks.POINTS`, for tests of all but the simulator, which takes seconds."""
    points = {"benchmark": "toy_tasks:POINTS", "tasks": None, "simulator": "auto"}
    return small_config(run_dir, **points | leaves)


def save_checkpoint(run_dir: Path, steps: int, state: dict[str, Any], config: str) -> Path:
    """Write a checkpoint and wait for it; its path."""
    writer = CheckpointWriter(run_dir)
    path = writer.save(steps, state, config)
    writer.wait()
    return path
