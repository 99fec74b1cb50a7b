"""A look at custom environments, before anything heavy starts."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import NoReturn

import cloudpickle
import numpy as np
from gymnasium.spaces import Box

from mtrl.envs.benchmarks import Benchmark, EnvFactory
from mtrl.envs.custom import CustomTask
from mtrl.envs.worker import NotFinite, expect_finite
from mtrl.errors import UsageError, one_line

EPISODES, STEPS, RESETS = 2, 3, 10
"""What is played of each task, and how many resets may be made for that."""


def examined(benchmark: Benchmark) -> Benchmark:
    """The benchmark with its `spaces`, once every custom environment was made and played.

    Each is made once, here in this process, reset, stepped with random actions and closed.

    Raises:
        UsageError: naming the task, if an environment fails, breaks Gymnasium's contract, returns
            NaN at every reset, cannot be sent to another process, or its shapes differ from the
            first task's.
    """
    if benchmark.spaces is not None or not benchmark.custom:
        return benchmark
    first: tuple[Box, Box] | None = None
    for task, make in benchmark.custom.items():
        found = _play(task, make, benchmark.success_key)
        first = first or found
        for name, space, expected in zip(("observations", "actions"), found, first, strict=True):
            if space.shape != expected.shape:
                raise UsageError(
                    f"benchmark: expected {name} of equal shape, got {expected.shape} of task "
                    f"{benchmark.tasks[0]!r} and {space.shape} of task {task!r}"
                )
    return replace(benchmark, spaces=first)


def _play(task: str, make: EnvFactory, success_key: str | None) -> tuple[Box, Box]:
    doing = "making it"
    env = None
    try:
        env = CustomTask(task, make, success_key)
        actions, size = np.random.default_rng(0), env.spaces[1].shape
        played, problem = 0, ""
        for episode in range(RESETS):
            doing = "reset"
            observation, _ = env.reset(seed=0, options={"episode": episode})
            try:
                expect_finite("a reset's observation", observation)
            except NotFinite as error:  # now and then it may happen: the row begins anew
                problem = str(error)
                continue
            doing, played = "step", played + 1
            for _ in range(STEPS):
                _, _, terminated, truncated, _ = env.step(actions.uniform(-1, 1, size))
                if terminated or truncated:
                    break
            if played == EPISODES:
                break
        if not played:
            raise UsageError(f"expected finite observations, but {problem} at each of {RESETS}")
        doing = "close"
        env.close()
        doing = "sending it to another process (cloudpickle)"
        cloudpickle.dumps(make)
        return env.spaces
    except Exception as error:
        _refuse(task, doing, error)
    finally:
        if env is not None and doing in ("reset", "step"):
            env.close()


def _refuse(task: str, doing: str, error: Exception) -> NoReturn:
    if isinstance(error, UsageError):
        raise UsageError(f"benchmark: task {task!r}: {error}") from None
    last = traceback.extract_tb(error.__traceback__)[-1]
    raise UsageError(
        f"benchmark: task {task!r} failed at {doing}: {type(error).__name__}: {one_line(error)} "
        f"({last.filename}, line {last.lineno})"
    ) from error
