"""Construction of a vector environment from a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import cloudpickle
import gymnasium as gym
from gymnasium.vector.utils import CloudpickleWrapper

from mtrl.envs import worker
from mtrl.envs.benchmarks import Benchmark, EnvFactory
from mtrl.envs.custom import ENDLESS, CustomTask
from mtrl.envs.examine import examined
from mtrl.envs.native import NativePools
from mtrl.envs.processes import START_TIMEOUT, WorkerProcesses
from mtrl.envs.tasks import MAX_STEPS
from mtrl.envs.vector import TaskVectorEnv
from mtrl.errors import UsageError, expect_kind, expect_whole


def make_vector_env(
    benchmark: Benchmark,
    horizon: int | None = None,
    *,
    workers: int | None = None,
    shuffle_goals: bool = True,
    envs_per_task: int = 1,
    simulators: Sequence[str] | None = None,
    max_restarts: int = 0,
) -> TaskVectorEnv:
    """Create the vector environment of a benchmark's tasks, ready to be reset.

    Args:
        benchmark: The tasks.
        horizon: See `steps_of_an_episode`.
        workers: Number of processes for the tasks on the reference simulator; default: one per
            core.
        shuffle_goals: Whether the 50 goals of the reference simulator come in random order, as in
            training. For custom environments: whether episodes are those of training.
        envs_per_task: Number of copies of each task.
        simulators: `"metaworld"` (the reference) or `"envpool"` for each Meta-World task, as
            returned by `choose_simulators`; default: the reference for all.
        max_restarts: Maximum number of lost simulator processes to replace.

    Raises:
        UsageError: If an argument is invalid; see also `examined` and `steps_of_an_episode`.
    """
    expect_kind("benchmark", benchmark, Benchmark, "get_benchmark('mt10')")
    if workers is not None:
        expect_whole("workers", workers)
    expect_whole("envs_per_task", envs_per_task)
    expect_whole("max_restarts", max_restarts, least=0)
    horizon = steps_of_an_episode(benchmark, horizon)
    benchmark = examined(benchmark)
    assert benchmark.spaces is not None
    if benchmark.custom or simulators is None:
        simulators = ("own" if benchmark.custom else "metaworld",) * len(benchmark.tasks)
    chosen = zip(benchmark.tasks, simulators, strict=True)
    native = [task for task, simulator in chosen if simulator == "envpool"]
    names = [task for task in benchmark.tasks for _ in range(envs_per_task)]
    rows = [row for row, task in enumerate(names) if task not in native]
    parts: list[WorkerProcesses | NativePools] = []
    if rows:
        known = _registered() if benchmark.custom else {}
        settings = benchmark, horizon, shuffle_goals, envs_per_task
        of_rows = [names[row] for row in rows]
        factories = [_factory(*settings, task, registered=known) for task in of_rows]
        # Custom environments may be slow, in particular when they reset within a step.
        patience = START_TIMEOUT if benchmark.custom else None
        parts.append(WorkerProcesses(rows, factories, of_rows, workers, patience))
    if native:
        first = [names.index(task) for task in native]
        parts.append(NativePools(native, first, envs_per_task, horizon or MAX_STEPS))
    return TaskVectorEnv(
        benchmark.tasks,
        simulators,
        parts,
        *benchmark.spaces,
        envs_per_task=envs_per_task,
        max_restarts=max_restarts,
        tells_success=benchmark.by_success,
        endless=ENDLESS if horizon is None else None,
    )


def steps_of_an_episode(benchmark: Benchmark, horizon: int | None) -> int | None:
    """Return the number of steps after which an episode is truncated, None for no limit.

    Args:
        horizon: Requested limit. Default: 500 for Meta-World, no limit for custom environments.

    Raises:
        UsageError: If the limit is no positive integer or exceeds what Meta-World's environments
            allow.
    """
    if horizon is not None:
        expect_whole("horizon", horizon)
    if benchmark.custom:
        return horizon
    if horizon is not None and horizon > MAX_STEPS:
        raise UsageError(
            f"horizon: expected at most Meta-World's {MAX_STEPS} steps for {benchmark.name}, got "
            f"{horizon}"
        )
    return horizon or MAX_STEPS


def _registered() -> dict[str, bytes]:
    """Return what was registered with Gymnasium in this process, pickled, by the environment's id.

    A worker lacks it if a notebook registered it, or a module that nothing there imports.
    """
    found = {}
    for name, spec in gym.registry.items():
        if str(spec.entry_point).partition(".")[0] not in ("gymnasium", "metaworld"):
            with suppress(Exception):  # `gym.make` then fails there, and says so
                found[name] = cloudpickle.dumps(spec)
    return found


def _factory(
    benchmark: Benchmark,
    horizon: int | None,
    shuffle_goals: bool,
    stride: int,
    task: str,
    *,
    registered: Mapping[str, bytes],
) -> worker.EnvFactory:
    """Return a picklable callable that creates the task's environment."""
    if task not in benchmark.custom:
        from mtrl.envs.metaworld import MetaWorldTask  # brings the simulator

        return partial(MetaWorldTask, task, horizon or MAX_STEPS, shuffle_goals, stride)
    make = partial(_made, registered, CloudpickleWrapper(benchmark.custom[task]))
    key = benchmark.success_key
    return partial(CustomTask, task, make, key, horizon, for_training=shuffle_goals, stride=stride)


def _made(registered: Mapping[str, bytes], make: EnvFactory) -> gym.Env[Any, Any]:
    """Create an environment where others may have to be registered first."""
    for name in registered.keys() - gym.registry.keys():
        gym.registry[name] = cloudpickle.loads(registered[name])
    return make()
