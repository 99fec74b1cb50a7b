"""Tasks of a run: from names to a benchmark, and from a benchmark to names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError

if TYPE_CHECKING:
    from mtrl.envs.benchmarks import Benchmark


def chosen(config: TrainConfig) -> Benchmark:
    """Look up the tasks of a configuration, including all stages of its curriculum.

    Raises:
        UsageError: If a name is unknown.
    """
    from mtrl.envs.benchmarks import get_benchmark  # imports a simulator

    if config.transfer.tasks is None:
        return get_benchmark(config.benchmark, config.tasks)
    if config.tasks is not None:
        raise UsageError("curriculum: expected no tasks with it, got both")
    with _of_curriculum():
        return get_benchmark(config.benchmark, config.transfer.tasks)


def named(benchmark: Benchmark, config: TrainConfig) -> tuple[Benchmark, TrainConfig]:
    """Return the tasks of `benchmark` that `config` selects, and `config` updated to name them.

    The run's config.yaml then says what it was trained on, and `--config` finds it again.

    Raises:
        UsageError: If a name is unknown.
    """
    from mtrl.envs.benchmarks import NAMED, select
    from mtrl.envs.record import with_source

    benchmark = with_source(benchmark)
    if config.tasks is not None:
        benchmark = select(benchmark, config.tasks)
    name, by_stage = benchmark.source or benchmark.name, config.transfer.tasks
    if by_stage is not None:
        with _of_curriculum():
            benchmark = select(benchmark, by_stage)
    whole = benchmark.custom or by_stage or NAMED.get(name) == benchmark.tasks
    tasks = config.tasks if whole else benchmark.tasks
    return benchmark, config.model_copy(update={"benchmark": name, "tasks": tasks})


@contextmanager
def _of_curriculum() -> Iterator[None]:
    """Name the curriculum in errors about its tasks."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"curriculum: {str(error).removeprefix('tasks: ')}") from None
