"""Faulty environments, in a module without torch, because workers import it."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Plain(gym.Env):
    """Ends after ten steps; the observation counts them, and the reward is the action's sum."""

    LENGTH = 10

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or Box(-99, 99, (3,), np.float32)
        self.action_space = action_space or Box(-1, 1, (2,), np.float32)
        self.episodes = self.steps = 0

    def observation(self):
        return np.full(self.observation_space.shape, self.steps, self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        self.episodes += 1
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        reward = float(np.sum(action))
        return self.observation(), reward, False, self.steps == self.LENGTH, self.info()

    def info(self):
        return {}


class BadReset(Plain):
    """The reset with this number, counted per process, returns `value`; later ones do not."""

    def __init__(self, number, value):
        super().__init__(Box(-np.inf, np.inf, (3,), np.float64))
        self.number, self.value = number, value

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        if self.episodes == self.number:
            observation[1] = self.value
        return observation, info


class BadSeed(Plain):
    """Resets with a third of the seeds return NaN or raise, in any process."""

    def __init__(self, raises=False):
        super().__init__(Box(-np.inf, np.inf, (3,), np.float64))
        self.raises = raises

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        if seed % 3 == 0:
            if self.raises:
                raise RuntimeError("no scene for this seed")
            observation[:] = np.nan
        return observation, info


class NeverFinite(Plain):
    """All resets of a process from this number on return NaN."""

    def __init__(self, number):
        super().__init__(Box(-np.inf, np.inf, (3,), np.float64))
        self.number = number

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return observation * (np.nan if self.episodes >= self.number else 1.0), info


class Told(Plain):
    """Reports `values[step]` as success, or nothing if it is missing."""

    def __init__(self, values, key="success"):
        super().__init__()
        self.values, self.key = values, key

    def info(self):
        return {self.key: self.values[self.steps]} if self.steps in self.values else {}


class Long(Plain):
    """Its episodes take a thousand steps, or never end."""

    def __init__(self, length):
        super().__init__()
        self.LENGTH = length


class Wrong(Plain):
    """Breaks Gymnasium's contract in one way."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return {
            "reset alone": observation,
            "reset shape": (observation[:1], info),
            "reset none": (None, info),
            "reset words": (["a", "b", "c"], info),
        }.get(self.how, (observation, info))

    def step(self, action):
        answer = list(super().step(action))
        index, value = {
            "observation shape": (0, np.zeros(1)),
            "observation scalar": (0, 0.0),
            "reward array": (1, np.array([1.0])),
            "reward none": (1, None),
            "reward text": (1, "1.0"),
            "terminated none": (2, None),
            "truncated array": (3, np.array([False])),
            "info none": (4, None),
            "success text": (4, {"success": "False"}),
            "success nan": (4, {"success": np.nan}),
            "success array": (4, {"success": np.array([True])}),
            "success half": (4, {"success": 0.5}),
        }.get(self.how, (4, {}))
        answer[index] = value
        if self.how == "raises":
            raise KeyError("wheel")
        return tuple(answer[:4] if self.how == "four values" else answer)


class LateWrong(Plain):
    """Its fourth episode breaks the contract."""

    def step(self, action):
        observation, *rest = super().step(action)
        return (observation if self.episodes < 4 else observation[:1]), *rest


class Counted(Plain):
    """Writes a file when created and when closed; may fail at its sixth step."""

    def __init__(self, folder, fails=False):
        super().__init__()
        self.folder, self.fails = Path(folder), fails
        self.mark = f"{id(self)}-{time.time_ns()}"
        (self.folder / f"{self.mark}.opened").touch()

    def step(self, action):
        if self.fails and self.steps == 5:
            raise OSError("simulator lost")
        return super().step(action)

    def close(self):
        (self.folder / f"{self.mark}.closed").touch()


class Program(Plain):
    """Starts a program, which close() terminates, like simulators behind a socket."""

    def __init__(self, hangs=False):
        super().__init__()
        self.hangs = hangs
        self.program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def step(self, action):
        if self.hangs and self.steps == 5:
            time.sleep(600)
        observation, *rest = super().step(action)
        observation[:] = self.program.pid % 100_000
        return observation, *rest

    def close(self):
        self.program.terminate()
        self.program.wait()


class Forks(Plain):
    """Steps in a separate process, like some simulators."""

    def __init__(self):
        super().__init__()
        self.pipe, theirs = multiprocessing.Pipe()
        self.child = multiprocessing.get_context("fork").Process(target=_double, args=(theirs,))
        self.child.start()

    def step(self, action):
        self.pipe.send(self.steps)
        observation, *rest = super().step(action)
        return observation * 0 + self.pipe.recv(), *rest

    def close(self):
        self.pipe.send(None)
        self.child.join()


def _double(pipe):
    while (number := pipe.recv()) is not None:
        pipe.send(2 * number)


class Drift(Plain):
    """A random walk in float64 that terminates beyond `limit`; its action range is asymmetric."""

    def __init__(self, observation_space=None, limit=3.0, scale=1.0, length=None):
        low, high = np.array([-1.5, 0.0]), np.array([0.5, 0.25])
        spaces = observation_space or Box(-np.inf, np.inf, (3,), np.float64)
        super().__init__(spaces, Box(low, high, dtype=np.float64))
        self.limit, self.scale, self.LENGTH = limit, scale, length

    def observation(self):
        seen = np.array([self.at * self.scale, self.steps, 1.0])
        return seen.astype(self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        self.at = np.random.default_rng(seed).uniform(-1, 1)
        return super().reset(seed=seed)

    def step(self, action):
        self.at += action[0] + 4 * action[1]
        observation, reward, _, truncated, info = super().step(action)
        return observation, np.float32(reward), np.bool_(abs(self.at) > self.limit), truncated, info


class Unseeded(Drift):
    """Starts anywhere, whatever the seed."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=time.time_ns() % 2**32)
