"""Custom tasks, in a module without torch, because simulator processes import it."""

from functools import partial

import gymnasium as gym

from mtrl.envs.benchmarks import Benchmark


class Touch(gym.Wrapper):
    """Reacher, solved if the finger is within a distance of its target."""

    def __init__(self, env, distance):
        super().__init__(env)
        self.distance = distance

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        solved = -info["reward_dist"] < self.distance
        return observation, reward, terminated, truncated, info | {"solved": solved}


def reacher(gravity: float, distance: float) -> gym.Env:
    env = gym.make("Reacher-v5")
    env.unwrapped.model.opt.gravity[:] = (0, 0, gravity)
    return Touch(env, distance)


REACHERS = Benchmark(
    "reachers",
    {f"gravity{g}": partial(reacher, g, 0.2) for g in (0, -9)},
    success_key="solved",
)
