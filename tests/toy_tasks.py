"""Tasks without physics, for tests that start many runs: a step costs microseconds."""

from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mtrl.envs.benchmarks import Benchmark


class Point(gym.Env):
    """A point on a line that must reach a goal within ten steps."""

    observation_space = Box(-10.0, 10.0, (3,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, goal: float) -> None:
        self._goal = goal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._at, self._steps = float(self.np_random.uniform(-1, 1)), 0
        return self._seen(), {}

    def step(self, action):
        self._at += 0.5 * float(action[0])
        self._steps += 1
        distance = abs(self._at - self._goal)
        info = {"success": float(distance < 0.2)}
        return self._seen(), -distance, False, self._steps >= 10, info

    def _seen(self) -> np.ndarray:
        return np.array([self._at, self._goal, self._steps / 10], np.float32)


POINTS = Benchmark("points", {"left": partial(Point, -2.0), "right": partial(Point, 2.0)})


class Broken(Point):
    """Fails at its hundredth step."""

    made = 0

    def step(self, action):
        self.made += 1
        if self.made == 100:
            raise RuntimeError("no such luck")
        return super().step(action)


BROKEN = Benchmark("broken", {"left": partial(Broken, -2.0), "right": partial(Point, 2.0)})
