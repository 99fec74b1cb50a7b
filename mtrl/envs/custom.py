"""Custom tasks: Gymnasium environments whose observations and actions are vectors of one shape."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mtrl.envs.benchmarks import EnvFactory
from mtrl.errors import UsageError

ENDLESS = 10_000
"""Steps after which an episode without any other limit is truncated, so that evaluations end."""


class CustomTask(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Wrapper of a user's environment: reproducible episodes, and actions in [-1, 1].

    Episode e starts with `reset(seed=…)`, whose seed is derived from (seed, task, e); evaluation
    and training use different streams. A trajectory therefore depends on (seed, task, episode,
    actions), provided that the environment is deterministic after a seeded reset.

    Actions in [-1, 1] are scaled to the range [low, high] of the action space. Every return value
    of the environment is checked against Gymnasium's contract, because NumPy would silently
    broadcast most violations.

    Args:
        task: Name of the task.
        make: Function that creates the environment.
        success_key: Key of `info` that says whether the task is solved.
        horizon: Steps after which the episode is truncated if the environment has not ended it;
            None: `ENDLESS`.
        for_training: Whether episodes are those of training.
        stride: See `MetaWorldTask`.

    Attributes:
        spaces: Observation space and action space.
        told: The last step's `info`, as the environment returned it.

    Raises:
        UsageError: Also from `reset` and `step`, if the environment breaks the contract. The
            message says what was expected.
    """

    def __init__(
        self,
        task: str,
        make: EnvFactory,
        success_key: str | None = "success",
        horizon: int | None = None,
        *,
        for_training: bool = True,
        stride: int = 1,
    ) -> None:
        env = make()
        if not isinstance(env, gym.Env):
            kind = f"{type(env).__module__}.{type(env).__qualname__}"
            raise UsageError(f"expected a gymnasium.Env, got {kind}")
        super().__init__(env)
        try:
            self._observations = _vector("observations", env.observation_space)
            self._actions = _vector("actions", env.action_space)
            self._center, self._half = _range(self._actions)
        except UsageError:
            env.close()
            raise
        self.spaces = (
            Box(-np.inf, np.inf, self._observations.shape, np.float32),
            Box(-1.0, 1.0, self._actions.shape, np.float32),
        )
        self.observation_space, self.action_space = self.spaces
        self.task, self.success_key, self.horizon = task, success_key, horizon or ENDLESS
        self.for_training, self.stride = for_training, stride
        self._seed, self._episode, self._elapsed = 0, -stride, 0
        self.told: Mapping[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the next episode; observations are float32.

        Args:
            seed: New seed; starts over at episode 0.
            options: `episode` selects an episode. A `generation` above 0 selects a replacement for
                an episode in which the environment failed.
        """
        if seed is not None:
            self._seed, self._episode = seed, -self.stride
        options = options or {}
        self._episode = options.get("episode", self._episode + self.stride)
        self._elapsed = 0
        key = [self._seed, zlib.crc32(self.task.encode()), int(self.for_training), self._episode]
        if generation := options.get("generation", 0):
            key.append(generation)
        answer = self.env.reset(seed=int(np.random.SeedSequence(key).generate_state(1)[0]))
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise UsageError(f"expected reset to return (observation, info), got {_kind(answer)}")
        return self._observation("reset", answer[0]), {"episode": self._episode}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Step once; `info["success"]` is missing if the environment does not report it."""
        given = np.clip(
            self._center + action * self._half, self._actions.low, self._actions.high
        ).astype(self._actions.dtype)
        answer = self.env.step(given)
        if not (isinstance(answer, tuple) and len(answer) == 5):
            raise UsageError(
                "expected step to return (observation, reward, terminated, truncated, info), got "
                f"{_kind(answer)}"
            )
        observation, reward, terminated, truncated, info = answer
        self.told, self._elapsed = info, self._elapsed + 1
        ended = _flag("terminated", terminated)
        cut = _flag("truncated", truncated) or self._elapsed >= self.horizon
        return (
            self._observation("step", observation),
            _number("reward", reward),
            ended,
            cut,
            self._success(info),
        )

    def _observation(self, call: str, observation: Any) -> np.ndarray:
        try:
            with np.errstate(over="ignore"):
                row = np.array(observation, np.float32)
        except (TypeError, ValueError):
            row = None
        if row is None or row.shape != self._observations.shape:
            raise UsageError(
                f"expected {call} to return an observation of shape {self._observations.shape}, as "
                f"in the observation space, got {_kind(observation)}"
            )
        return row

    def _success(self, info: Any) -> dict[str, Any]:
        if not isinstance(info, Mapping):
            raise UsageError(f"expected step to return info as a dict, got {_kind(info)}")
        flag = None if self.success_key is None else info.get(self.success_key)
        return {} if flag is None else {"success": _flag(f"info[{self.success_key!r}]", flag)}


def _vector(name: str, space: Any) -> Box:
    if not isinstance(space, Box) or len(space.shape) != 1 or space.shape == (0,):
        hint = ""
        if name == "observations" and getattr(space, "is_np_flattenable", False):
            hint = " (use gymnasium.wrappers.FlattenObservation)"
        raise UsageError(f"expected {name} in a Box of one dimension, got {space}{hint}")
    return space


def _range(actions: Box) -> tuple[np.ndarray, np.ndarray]:
    """Return the centre and half width of each action's range, in float64."""
    if actions.dtype.kind != "f":
        raise UsageError(f"expected floating-point actions, got {actions}")
    low, high = actions.low.astype(np.float64), actions.high.astype(np.float64)
    if not (actions.is_bounded() and np.isfinite([low, high]).all()):
        hint = "gymnasium.wrappers.TransformAction gives them bounds"
        raise UsageError(f"expected bounded actions, got {actions} ({hint})")
    return low / 2 + high / 2, high / 2 - low / 2


def _flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "biuf" or array.item() not in (0, 1):
        raise UsageError(f"expected {name} to be True, False, 0 or 1, got {_kind(value)}")
    return bool(array)


def _number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "biuf":
        raise UsageError(f"expected {name} to be a number, got {_kind(value)}")
    return float(array)


def _kind(value: Any) -> str:
    """Describe a value briefly."""
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, np.ndarray) or hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 80 else text[:79] + '…'}"
