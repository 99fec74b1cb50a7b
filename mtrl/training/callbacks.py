"""What users have a run do beside training. Importing this brings no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrl.config.spec import parse
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
    from mtrl.training.logger import RunLogger
    from mtrl.training.outcome import Outcome
    from mtrl.training.rollout import Episode
    from mtrl.training.trainer import Trainer


class Callback:
    """Base of a user's own; override the hooks that are needed.

    Hooks and attributes have the names of Stable-Baselines3's `BaseCallback` where they mean the
    same. Hooks are called in the loop's thread, between two vector steps, callback by callback in
    their order. All but `on_training_start` and `on_training_end` may return False: the run then
    stops as at an interrupt, with a checkpoint, and can be resumed. None and True go on.

    A hook that raises stops the run in the same way, and `train` raises a `RunError` that names it.

    Example:
        >>> class Patience(Callback):
        ...     def on_eval(self, evaluation):
        ...         self.logger.record("my/worst", evaluation.worst)
        ...         return evaluation.mean < 0.9
    """

    _trainer: Trainer | None = None

    def on_training_start(self) -> None:
        """The run is about to begin, or to go on: everything is there."""

    def on_step(self) -> bool | None:
        """A vector step was made and stored, and the updates beside it."""

    def on_rollout_end(self, episodes: Sequence[Episode]) -> bool | None:
        """These episodes of training have ended, in the vector step of the last `on_step`."""

    def on_log(self, values: Mapping[str, float]) -> bool | None:
        """A row was logged: tags and numbers, with those that were `record`ed."""

    def on_eval(self, evaluation: Evaluation) -> bool | None:
        """The policy was evaluated; the last time after the last step, on all 50 goals."""

    def on_checkpoint(self, path: Path) -> bool | None:
        """A checkpoint is whole and on the disk.

        It holds what `state_dict` gave before. The loop waits until it is written, which it
        otherwise does not.
        """

    def on_training_end(self, outcome: Outcome) -> None:
        """The run is complete, or has stopped in good order."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run is to know again: tensors, arrays, plain values, dicts of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; arrays come as tensors, before `on_training_start`."""

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps the state; another for a second object of one class."""
        return type(self).__qualname__

    @property
    def model(self) -> MTSAC:
        """The agent: `predict`, `save`, networks and temperatures."""
        return self._of_run.state.agent

    @property
    def learner(self) -> Learner:
        """Optimisers and surgery."""
        return self._of_run.state.learner

    @property
    def replay_buffer(self) -> ReplayBuffer:
        """What it learns from."""
        return self._of_run.state.replay

    @property
    def training_env(self) -> TaskVectorEnv:
        """E copies of each of T tasks. Whoever steps or resets it changes the run."""
        return self._of_run.state.envs

    @property
    def last_step(self) -> tuple[Any, ...]:
        """What `training_env.step` returned: observations, rewards, … `[T·E, …]`, and infos."""
        return self._of_run.last_step

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Of the last update, `[T]` by name as in the `train/` tags; on the device."""
        return self._of_run.metrics

    @property
    def logger(self) -> RunLogger:
        """`record(name, value)` adds a number to the next row of the logs."""
        return self._of_run.logger

    @property
    def num_timesteps(self) -> int:
        """Environment steps so far, over all tasks."""
        return self._of_run.state.steps

    @property
    def n_calls(self) -> int:
        """Vector steps so far, those before a resume included."""
        return self.num_timesteps // self.training_env.num_envs

    @property
    def config(self) -> TrainConfig:
        """All of it resolved."""
        return self._of_run.config

    @property
    def benchmark(self) -> Benchmark:
        """The tasks."""
        return self._of_run.benchmark

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self._of_run.run_dir

    @property
    def _of_run(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__}: expected a run around it, got none yet")
        return self._trainer


def check(spec: str) -> Any:
    """The class or function that `package.module:Name` or `package.module:Name(x=1)` names.

    Raises:
        UsageError: if it cannot be imported or called.
    """
    name, _ = parse("callbacks", spec)
    if ":" not in name:
        raise UsageError(f"callbacks: expected package.module:Name, got {name!r}")
    found = import_attribute("callbacks", name)
    if not callable(found):
        raise UsageError(f"callbacks: expected a class of mtrl.Callback's at {name}, got {found!r}")
    return found
