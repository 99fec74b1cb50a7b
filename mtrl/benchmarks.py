"""Named task sets: which Meta-World tasks one policy is trained on, in which order.

A task's position in `Benchmark.tasks` is its index everywhere: row t of every `[T, …]` tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT25_V3, MT50_V3

from mtrl.validation import UsageError, unknown

N_GOALS = 50
"""Goals per task, the same ones in training and evaluation (Meta-World's MT protocol)."""

NAMED = {"mt10": tuple(MT10_V3), "mt25": tuple(MT25_V3), "mt50": tuple(MT50_V3)}
"""Meta-World's own multi-task benchmarks, from its own lists."""


@dataclass(frozen=True)
class Benchmark:
    """A task set.

    Attributes:
        name: What run folders and tables call it.
        tasks: Meta-World task names, without repetition.
    """

    name: str
    tasks: tuple[str, ...]


def get_benchmark(name: str, tasks: tuple[str, ...] | None = None) -> Benchmark:
    """Look up `mt10`, `mt25`, `mt50` or `mt1:<task>`, or make a benchmark from a list of tasks.

    Args:
        name: The benchmark; not looked at if `tasks` is given.
        tasks: Meta-World task names, e.g. `("reach-v3", "push-v3")`.

    Raises:
        UsageError: if a name is unknown (the nearest one is given) or a task is named twice.
    """
    if tasks is not None:
        for task in tasks:
            if task not in ALL_V3_ENVIRONMENTS:
                raise UsageError(unknown("tasks", task, ALL_V3_ENVIRONMENTS))
        if len(set(tasks)) < len(tasks):
            twice = next(task for task in tasks if tasks.count(task) > 1)
            raise UsageError(f"tasks: expected every task once, got {twice!r} more than once")
        return Benchmark("custom" if len(tasks) > 1 else f"mt1-{tasks[0]}", tasks)
    if name.startswith("mt1:"):
        task = name.removeprefix("mt1:")
        if task not in ALL_V3_ENVIRONMENTS:
            raise UsageError(unknown("benchmark", name, [f"mt1:{t}" for t in ALL_V3_ENVIRONMENTS]))
        return Benchmark(f"mt1-{task}", (task,))
    if name not in NAMED:
        raise UsageError(unknown("benchmark", name, [*NAMED, "mt1:<task>"]))
    return Benchmark(name, NAMED[name])
