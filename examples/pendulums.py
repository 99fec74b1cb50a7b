"""Benchmark of Gymnasium's pendulum under four conditions, without Meta-World; score: return."""

from functools import partial

import gymnasium as gym

from mtrl import Benchmark


def pendulum(g: float = 10.0, m: float = 1.0) -> gym.Env:
    """Make a pendulum with gravity g [m/s²] and mass m [kg]."""
    env = gym.make("Pendulum-v1", g=g)
    env.unwrapped.m = m
    return env


pendulums = Benchmark(
    "pendulums",
    {
        "moon": partial(pendulum, g=1.6),
        "mars": partial(pendulum, g=3.7),
        "earth": partial(pendulum, g=9.8),
        "heavy": partial(pendulum, g=9.8, m=1.3),
    },
    success_key=None,  # the environment does not report success
)
