"""Task sets: which tasks one policy is trained on, in which order.

A task's position in `Benchmark.tasks` is its index everywhere: row t of every `[T, …]` tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT25_V3, MT50_V3

from mtrl.errors import UsageError, import_attribute, unknown

EnvFactory = Callable[[], gym.Env[Any, Any]]

N_GOALS = 50
"""Goals per task, the same ones in training and evaluation (Meta-World's MT protocol)."""

NAMED = {"mt10": tuple(MT10_V3), "mt25": tuple(MT25_V3), "mt50": tuple(MT50_V3)}
"""Meta-World's own multi-task benchmarks, from its own lists."""


@dataclass(frozen=True)
class Benchmark:
    """A task set.

    Args:
        name: What run folders and tables call it.
        environments: For each task's name what makes its environment, or None for Meta-World's
            task of this name. Environments of one's own have observations and actions in a `Box`
            of one dimension, of one shape for all tasks.
        success_key: Where an environment's `info` says at some step whether the task is solved;
            None, or a key that is not there: tasks are judged by their return.

    Raises:
        UsageError: if there is no task, or some of Meta-World's are among others.

    Example:
        >>> from functools import partial
        >>> import gymnasium as gym
        >>> makers = {f"gravity-{g}": partial(gym.make, "Reacher-v5") for g in (5, 10)}
        >>> Benchmark("reachers", makers, success_key=None).tasks
        ('gravity-5', 'gravity-10')
    """

    name: str
    environments: Mapping[str, EnvFactory | None]
    success_key: str | None = "success"

    def __post_init__(self) -> None:
        kinds = {make is None for make in self.environments.values()}
        if len(kinds) != 1:
            problem = "of both" if kinds else "none"
            raise UsageError(
                f"benchmark: expected tasks of Meta-World or of one's own, got {problem}"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(self.environments)

    @property
    def own(self) -> dict[str, EnvFactory]:
        """What makes the environments that are not Meta-World's."""
        return {task: make for task, make in self.environments.items() if make is not None}


def get_benchmark(name: str, tasks: tuple[str, ...] | None = None) -> Benchmark:
    """Look up a benchmark, or make one from a list of Meta-World's tasks.

    Args:
        name: `mt10`, `mt25`, `mt50`, `mt1:<task>`, or `package.module:attribute`, a `Benchmark` or
            a function that returns one.
        tasks: Some tasks of that last benchmark, or else any of Meta-World's, instead.

    Raises:
        UsageError: if a name is unknown (the nearest one is given) or a task is named twice.
    """
    if ":" in name and not name.startswith("mt1:"):
        benchmark = _imported(name)
        return benchmark if tasks is None else _some(benchmark, tasks)
    if tasks is not None:
        everything = Benchmark("metaworld", dict.fromkeys(ALL_V3_ENVIRONMENTS))
        chosen = _some(everything, tasks)
        return replace(chosen, name="custom" if len(tasks) > 1 else f"mt1-{tasks[0]}")
    if name.startswith("mt1:"):
        task = name.removeprefix("mt1:")
        if task not in ALL_V3_ENVIRONMENTS:
            raise UsageError(unknown("benchmark", name, [f"mt1:{t}" for t in ALL_V3_ENVIRONMENTS]))
        return Benchmark(f"mt1-{task}", {task: None})
    if name not in NAMED:
        choices = [*NAMED, "mt1:<task>", "package.module:attribute"]
        raise UsageError(unknown("benchmark", name, choices))
    return Benchmark(name, dict.fromkeys(NAMED[name]))


def _imported(name: str) -> Benchmark:
    found = import_attribute("benchmark", name)
    benchmark = found() if not isinstance(found, Benchmark) and callable(found) else found
    if not isinstance(benchmark, Benchmark):
        kind = type(benchmark).__name__
        raise UsageError(f"benchmark: expected a mtrl.Benchmark at {name}, got {kind}")
    return benchmark


def _some(benchmark: Benchmark, tasks: tuple[str, ...]) -> Benchmark:
    """These of its tasks, in this order."""
    among = benchmark.environments
    for task in tasks:
        if task not in among:
            hint = "" if benchmark.own else "; tasks of one's own need --benchmark MODULE:NAME"
            raise UsageError(unknown("tasks", task, among) + hint)
    if len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if tasks.count(task) > 1)
        raise UsageError(f"tasks: expected every task once, got {twice!r} more than once")
    return replace(benchmark, environments={task: among[task] for task in tasks})
