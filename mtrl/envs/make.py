"""A benchmark's tasks as a vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gymnasium.spaces import Box
from gymnasium.vector.utils import CloudpickleWrapper

from mtrl.envs import worker
from mtrl.envs.benchmarks import Benchmark
from mtrl.envs.custom import CustomTask, spaces_of
from mtrl.envs.metaworld import ACTION_SPACE, OBSERVATION_SPACE, MetaWorldTask
from mtrl.envs.native import NativePools
from mtrl.envs.processes import WorkerProcesses
from mtrl.envs.vector import TaskVectorEnv


def make_vector_env(
    benchmark: Benchmark,
    horizon: int = 500,
    workers: int | None = None,
    shuffle_goals: bool = True,
    envs_per_task: int = 1,
    simulators: Sequence[str] | None = None,
    max_restarts: int = 0,
) -> TaskVectorEnv:
    """The benchmark's tasks, ready to be reset.

    Args:
        benchmark: The tasks.
        horizon: Steps after which an episode is truncated, at most 500.
        workers: Processes for the tasks on the reference simulator; default: one per core.
        shuffle_goals: Whether the 50 goals of the reference simulator come in random order, as in
            training; of one's own environments, whether episodes are those of training.
        envs_per_task: Copies of each task.
        simulators: For each of Meta-World's tasks `"metaworld"` (the reference) or `"envpool"`, as
            `choose_simulators` has it; default: all on the reference.
        max_restarts: Simulator processes that may be lost and replaced.

    Raises:
        UsageError: if spaces of the benchmark's own environments do not fit.
    """
    if benchmark.own:
        simulators = ("own",) * len(benchmark.tasks)
    simulators = simulators or ("metaworld",) * len(benchmark.tasks)
    first_rows = {task: t * envs_per_task for t, task in enumerate(benchmark.tasks)}
    chosen = dict(zip(benchmark.tasks, simulators, strict=True))
    native = [task for task in benchmark.tasks if chosen[task] == "envpool"]
    parts: list[WorkerProcesses | NativePools] = []
    if len(native) < len(benchmark.tasks):
        tasks = [task for task in benchmark.tasks if task not in native]
        rows = [first_rows[task] + copy for task in tasks for copy in range(envs_per_task)]
        factory = partial(_factory, benchmark, horizon, shuffle_goals, envs_per_task)
        of_rows = [task for task in tasks for _ in range(envs_per_task)]
        parts.append(WorkerProcesses(rows, list(map(factory, of_rows)), of_rows, workers))
    if native:
        first = [first_rows[task] for task in native]
        parts.append(NativePools(native, first, envs_per_task, horizon))
    return TaskVectorEnv(
        benchmark.tasks,
        simulators,
        parts,
        *spaces(benchmark),
        envs_per_task,
        max_restarts,
        tells_success=benchmark.success_key is not None,
    )


def spaces(benchmark: Benchmark) -> tuple[Box, Box]:
    """The tasks' observation and action space.

    Raises:
        UsageError: if spaces of the benchmark's own environments do not fit.
    """
    return spaces_of(benchmark) if benchmark.own else (OBSERVATION_SPACE, ACTION_SPACE)


def _factory(
    benchmark: Benchmark, horizon: int, shuffle_goals: bool, stride: int, task: str
) -> worker.EnvFactory:
    """A picklable callable that makes the task's environment."""
    if task not in benchmark.own:
        return partial(MetaWorldTask, task, horizon, shuffle_goals, stride)
    make, key = CloudpickleWrapper(benchmark.own[task]), benchmark.success_key
    return partial(CustomTask, task, make, key, horizon, shuffle_goals, stride)
