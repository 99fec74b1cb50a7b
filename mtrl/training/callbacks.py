"""Base class of callbacks. This module does not import PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrl.config.registry import parse
from mtrl.errors import UsageError, import_attribute

if TYPE_CHECKING:
    from torch import Tensor

    from mtrl.config.train import TrainConfig
    from mtrl.envs.benchmarks import Benchmark
    from mtrl.envs.vector import TaskVectorEnv
    from mtrl.evaluation.scores import Evaluation
    from mtrl.sac.agent import MTSAC
    from mtrl.sac.learner import Learner
    from mtrl.sac.replay import ReplayBuffer
    from mtrl.training.episodes import Episode
    from mtrl.training.logger import RunLogger
    from mtrl.training.report import Outcome
    from mtrl.training.trainer import Trainer


class Callback:
    """Base class of callbacks; override the hooks you need.

    Hooks and attributes have the names of Stable-Baselines3's `BaseCallback` where they mean the
    same. Hooks are called between two vector steps, in the thread of the training loop. If a hook
    returns False, the run stops as after an interrupt: it writes a checkpoint and can be resumed.
    After None and True the run continues. If a hook raises an error, the run stops in the same
    way, and `train` raises a `RunError` that names the hook.

    Example:
        >>> class Patience(Callback):
        ...     def on_eval(self, evaluation):
        ...         self.logger.record("my/worst", evaluation.worst)
        ...         return evaluation.mean < 0.9
    """

    _trainer: Trainer | None = None

    def on_training_start(self) -> None:
        """Called before the first step of a run or of a resumed run."""

    def on_step(self) -> bool | None:
        """Called after each vector step and its updates."""

    def on_rollout_end(self, episodes: Sequence[Episode]) -> bool | None:
        """Called after `on_step` with the training episodes that ended in the step, if any."""

    def on_log(self, values: Mapping[str, float]) -> bool | None:
        """Called after a row of the logs was written, with its tags and numbers."""

    def on_eval(self, evaluation: Evaluation) -> bool | None:
        """Called after each evaluation, including the final one on all 50 goals."""

    def on_checkpoint(self, path: Path) -> bool | None:
        """Called after a checkpoint was written completely.

        The checkpoint holds what `state_dict` returned before. If any callback has this hook, the
        loop waits until the file is written.
        """

    def on_training_end(self, outcome: Outcome) -> None:
        """Called when the run is complete or has stopped without an error; returns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints: tensors, arrays, plain values, or dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, with tensors for arrays, before `on_training_start`."""

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; must differ between two objects of one class."""
        return type(self).__qualname__

    @property
    def model(self) -> MTSAC:
        """Agent, with `predict`, `save`, networks and temperatures."""
        return self._of_run.state.agent

    @property
    def learner(self) -> Learner:
        """Optimisers and surgery."""
        return self._of_run.state.learner

    @property
    def replay_buffer(self) -> ReplayBuffer:
        """Replay buffer."""
        return self._of_run.state.replay

    @property
    def training_env(self) -> TaskVectorEnv:
        """Vector environment of training. Stepping or resetting it changes the run."""
        return self._of_run.state.envs

    @property
    def last_step(self) -> tuple[Any, ...]:
        """Last result of `training_env.step`: observations, rewards, … `[T·E, …]`, and infos."""
        return self._of_run.last_step

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Results of the last update, `[T]` on the device, by name as in the `train/` tags."""
        return self._of_run.state.metrics

    @property
    def logger(self) -> RunLogger:
        """Logger; `record(name, value)` adds a number to the next row of the logs."""
        return self._of_run.logger

    @property
    def num_timesteps(self) -> int:
        """Environment steps so far, over all tasks."""
        return self._of_run.state.steps

    @property
    def n_calls(self) -> int:
        """Vector steps so far, those before a resume included."""
        return self._of_run.hooks.n_calls

    @property
    def config(self) -> TrainConfig:
        """Resolved configuration."""
        return self._of_run.config

    @property
    def benchmark(self) -> Benchmark:
        """The tasks."""
        return self._of_run.benchmark

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self._of_run.run_dir

    @property
    def _of_run(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__}: expected to be part of a run, got none yet")
        return self._trainer


def check(spec: str) -> Any:
    """Import the class or function named `package.module:Name` or `package.module:Name(x=1)`.

    Raises:
        UsageError: If it cannot be imported or called.
    """
    name, _ = parse("callbacks", spec)
    if ":" not in name:
        raise UsageError(f"callbacks: expected package.module:Name, got {name!r}")
    found = import_attribute("callbacks", name)
    if not callable(found):
        raise UsageError(f"callbacks: expected an mtrl.Callback class at {name}, got {found!r}")
    return found
