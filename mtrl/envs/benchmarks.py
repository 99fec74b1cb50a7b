"""Task sets: the tasks one policy is trained on, and their order.

The position of a task in `Benchmark.tasks` is its index everywhere: row t of every `[T, …]` tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mtrl.envs.tasks import ACTION_SPACE, MT10, MT25, MT50, OBSERVATION_SPACE
from mtrl.errors import UsageError, import_attribute, unknown, with_line

EnvFactory = Callable[[], gym.Env[Any, Any]]

N_GOALS = 50
"""Goals per task, the same in training and evaluation (Meta-World's MT protocol)."""

MAX_NAME = 200
"""Maximum length of a benchmark's or task's name [characters]; file names hold 255 bytes."""

NAMED = {"mt10": MT10, "mt25": MT25, "mt50": MT50}
"""Meta-World's multi-task benchmarks."""


@dataclass(frozen=True)
class Benchmark:
    """A task set.

    Args:
        name: Name in run folders and tables.
        environments: Maps each task's name to a function that creates its environment, or to None
            for Meta-World's task of this name. Custom environments have observations and actions in
            a `Box` of one dimension, of one shape for all tasks; see `mtrl.envs.custom`.
        success_key: Key of `info` that says at a step whether the task is solved: a bool, 0 or 1.
            If the value is None or the key is missing, the step does not report success. An episode
            counts as solved if any of its steps reports success. A task whose steps never had the
            key is scored by its return; with `success_key=None`, all tasks are.
        tells_success: Tasks that are scored by success from the start, even if no step has had the
            key yet: some environments set it only in the step that solves the task.
        descriptions: A vector for each task, all of one length, that trunks with `task_input:
            description` receive: sentence embeddings, or parameters of the simulator. Default: the
            embeddings of Meta-World's tasks.
        source: The `package.module:attribute` the benchmark was imported from, if any.
        spaces: Observation and action space; None for custom environments until `examined`.

    Raises:
        UsageError: If there is no task, Meta-World's tasks are mixed with custom ones, a factory is
            not callable, or a name is not allowed (see `expect_task_name`).

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
    tells_success: tuple[str, ...] = ()
    descriptions: Mapping[str, Sequence[float] | np.ndarray] | None = field(
        default=None, compare=False, repr=False
    )
    source: str | None = field(default=None, compare=False)
    spaces: tuple[Box, Box] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _expect_name("name", self.name)
        if not isinstance(self.environments, Mapping):
            kind = type(self.environments).__name__
            raise UsageError(f"environments: expected a dict from task to function, got {kind}")
        for task, make in self.environments.items():
            expect_task_name(task)
            if make is not None and not callable(make):
                raise UsageError(
                    f"benchmark: expected a function that creates task {task!r}, got {make!r}"
                )
        if len({make is None for make in self.environments.values()}) != 1:
            problem = "both" if self.environments else "none"
            raise UsageError(
                f"benchmark: expected tasks of Meta-World or custom ones, got {problem}"
            )
        for task in self.tells_success:
            if task not in self.environments:
                raise UsageError(unknown("tells_success", task, self.environments))
        if not self.custom:
            object.__setattr__(self, "spaces", (OBSERVATION_SPACE, ACTION_SPACE))
        elif self.name in NAMED:
            raise UsageError(f"name: expected a name Meta-World does not use, got {self.name!r}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.environments)

    @property
    def custom(self) -> dict[str, EnvFactory]:
        """Functions that create custom environments, by task; empty for Meta-World's tasks."""
        return {task: make for task, make in self.environments.items() if make is not None}

    @property
    def sizes(self) -> tuple[int, int]:
        """Lengths of observations and actions; custom environments must be `examined`."""
        assert self.spaces is not None
        (observation,), (action,) = (space.shape for space in self.spaces)
        return observation, action

    @property
    def by_success(self) -> list[bool]:
        """Whether each task is scored by success even if no step has reported it yet, `[T]`."""
        return [not self.custom or task in self.tells_success for task in self.tasks]


RESERVED = ("mean", "worst")
"""Last parts of log tags that are not tasks, as in `eval/success_rate/mean`."""


def expect_task_name(name: Any) -> None:
    """Check that a name can be used in logs, tables, policy files and flags.

    Raises:
        UsageError: Unless it is a printable string without `|` (which ends a cell of a Markdown
            table), comma or quotation mark (which Stable-Baselines3's CSV logger does not escape),
            and not `mean` or `worst` (which have tags of their own).
    """
    _expect_name("tasks", name)
    if name in RESERVED:
        raise UsageError(
            f"tasks: expected a name other than {' and '.join(RESERVED)}, got {name!r}"
        )


def _expect_name(field: str, name: Any) -> None:
    usable = isinstance(name, str) and name == name.strip() != "" and name.isprintable()
    if not usable or set('|,"') & set(name):
        raise UsageError(
            f'{field}: expected a name of printable characters without | , and ", got {name!r}'
        )
    if len(name) > MAX_NAME:
        raise UsageError(
            f"{field}: expected a name of at most {MAX_NAME} characters, got {len(name)}"
        )


def get_benchmark(name: str, tasks: tuple[str, ...] | None = None) -> Benchmark:
    """Look up a benchmark, or build one from a list of Meta-World tasks.

    Args:
        name: `mt10`, `mt25`, `mt50`, `mt1:<task>`, or `package.module:attribute`, where the
            attribute is a `Benchmark` or a function that returns one.
        tasks: Tasks to select from an imported benchmark; for any other name, Meta-World tasks to
            use instead of it.

    Raises:
        UsageError: If a name is unknown (the message suggests the nearest one) or a task is given
            twice.
    """
    if ":" in name and not name.startswith("mt1:"):
        benchmark = _imported(name)
        return benchmark if tasks is None else select(benchmark, tasks)
    if tasks is not None:
        everything = Benchmark("metaworld", dict.fromkeys(MT50))
        chosen = select(everything, tasks)
        return replace(chosen, name="custom" if len(tasks) > 1 else f"mt1-{tasks[0]}")
    if name.startswith("mt1:"):
        task = name.removeprefix("mt1:")
        if task not in MT50:
            raise UsageError(unknown("benchmark", name, [f"mt1:{t}" for t in MT50]))
        return Benchmark(f"mt1-{task}", {task: None})
    if name not in NAMED:
        choices = [*NAMED, "mt1:<task>", "package.module:attribute"]
        raise UsageError(unknown("benchmark", name, choices))
    return Benchmark(name, dict.fromkeys(NAMED[name]))


def _imported(name: str) -> Benchmark:
    found = import_attribute("benchmark", name)
    try:
        benchmark = found() if not isinstance(found, Benchmark) and callable(found) else found
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"benchmark: {name} failed: {with_line(error)}") from error
    if not isinstance(benchmark, Benchmark):
        kind = type(benchmark).__name__
        raise UsageError(f"benchmark: expected a mtrl.Benchmark at {name}, got {kind}")
    return replace(benchmark, source=name)


def select(benchmark: Benchmark, tasks: tuple[str, ...]) -> Benchmark:
    """Select tasks of a benchmark, in the given order.

    Raises:
        UsageError: If the benchmark has no such task, or a task is given twice.
    """
    among = benchmark.environments
    for task in tasks:
        if task not in among:
            hint = "" if benchmark.custom else "; custom tasks need --benchmark MODULE:NAME"
            raise UsageError(unknown("tasks", task, among) + hint)
    if len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if tasks.count(task) > 1)
        raise UsageError(f"tasks: expected every task once, got {twice!r} more than once")
    by_success = tuple(task for task in benchmark.tells_success if task in tasks)
    chosen = {task: among[task] for task in tasks}
    return replace(benchmark, environments=chosen, tells_success=by_success)
