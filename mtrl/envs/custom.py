"""Tasks that users bring: any Gymnasium environments with equal spaces."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import RescaleAction

from mtrl.envs.benchmarks import Benchmark, EnvFactory
from mtrl.errors import UsageError


class CustomTask(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """A user's environment with episodes that repeat from a seed, and actions in [-1, 1].

    Episode e is what `reset(seed=…)` gives for a number drawn from (seed, task, e), and for
    evaluation from another stream than for training. So a trajectory depends on (seed, task,
    episode, actions), if the environment is deterministic after a seeded reset.

    Args:
        task: Its name.
        make: Makes the environment.
        success_key: Where `info` says whether the task is solved; missing counts as false.
        horizon: Steps after which the episode is truncated, if the environment has not ended it.
        for_training: Whether episodes are those of training.
        stride: As of `MetaWorldTask`.
    """

    def __init__(
        self,
        task: str,
        make: EnvFactory,
        success_key: str | None = "success",
        horizon: int = 500,
        for_training: bool = True,
        stride: int = 1,
    ) -> None:
        super().__init__(RescaleAction(make(), np.float32(-1.0), np.float32(1.0)))
        self.task, self.success_key, self.horizon = task, success_key, horizon
        self.for_training, self.stride = for_training, stride
        self._seed, self._episode, self._elapsed = 0, -stride, 0

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the next episode; `seed` starts over at episode 0; `options["episode"]` jumps."""
        if seed is not None:
            self._seed, self._episode = seed, -self.stride
        self._episode = (options or {}).get("episode", self._episode + self.stride)
        self._elapsed = 0
        key = [self._seed, zlib.crc32(self.task.encode()), int(self.for_training), self._episode]
        observation, _ = self.env.reset(seed=int(np.random.SeedSequence(key).generate_state(1)[0]))
        return observation, {"episode": self._episode}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """`info["success"]` is this step's flag."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._elapsed += 1
        truncated = truncated or self._elapsed >= self.horizon
        success = self.success_key is not None and bool(info.get(self.success_key, False))
        return observation, float(reward), bool(terminated), bool(truncated), {"success": success}


def spaces_of(benchmark: Benchmark) -> tuple[Box, Box]:
    """The observation space of all tasks and their actions', made once to be looked at.

    Raises:
        UsageError: if a space is not what a learner can use, or tasks differ in theirs.
    """
    first: dict[str, Box] = {}
    for task, make in benchmark.custom.items():
        env = make()
        found = {"observations": env.observation_space, "actions": env.action_space}
        env.close()
        for name, space in found.items():
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise UsageError(
                    f"benchmark: expected {name} of task {task!r} in a Box of one dimension, got "
                    f"{space}"
                )
            if space.shape != first.setdefault(name, space).shape:
                raise UsageError(
                    f"benchmark: expected {name} of equal shape, got {first[name].shape} of task "
                    f"{benchmark.tasks[0]!r} and {space.shape} of task {task!r}"
                )
        actions = found["actions"]
        if isinstance(actions, Box) and not actions.is_bounded():
            raise UsageError(f"benchmark: expected bounded actions of task {task!r}, got {actions}")
    observations, actions = first["observations"], first["actions"]
    return (
        Box(-np.inf, np.inf, observations.shape, np.float32),
        Box(-1.0, 1.0, actions.shape, np.float32),
    )


def checked(benchmark: Benchmark) -> Benchmark:
    """The benchmark, once its own environments were looked at; without a key that none tells.

    Raises:
        UsageError: see `spaces_of`.
    """
    if not benchmark.custom:
        return benchmark
    spaces_of(benchmark)
    if benchmark.success_key is None or tells_success(benchmark):
        return benchmark
    return replace(benchmark, success_key=None)


def tells_success(benchmark: Benchmark) -> bool:
    """Whether some step of an episode of every task has the success key, by random actions."""
    return all(_has_key(make(), benchmark.success_key) for make in benchmark.custom.values())


def _has_key(env: gym.Env[Any, Any], key: str | None, longest: int = 1_000) -> bool:
    env.reset(seed=0)
    env.action_space.seed(0)
    found = False
    for _ in range(longest):
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        found = found or key in info
        if found or terminated or truncated:
            break
    env.close()
    return found
