"""The tasks of a run: from names to a benchmark, and from a benchmark to names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError

if TYPE_CHECKING:
    from mtrl.envs.benchmarks import Benchmark


def chosen(config: TrainConfig) -> Benchmark:
    """Look up the tasks of a configuration, of all stages of its curriculum.

    Raises:
        UsageError: If a name is unknown.
    """
    from mtrl.envs.benchmarks import get_benchmark  # brings a simulator

    if config.transfer.tasks is None:
        return get_benchmark(config.benchmark, config.tasks)
    if config.tasks is not None:
        raise UsageError("curriculum: expected no tasks beside it, got both")
    with _of_curriculum():
        return get_benchmark(config.benchmark, config.transfer.tasks)


def named(benchmark: Benchmark, config: TrainConfig) -> tuple[Benchmark, TrainConfig]:
    """Select the tasks of `benchmark` that `config` chooses; return `config` such that it names it.

    So the run's own file says what it was trained on, and `--config` finds it again.

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


def expect_stages(config: TrainConfig, total_timesteps: int) -> None:
    """Refuse a curriculum that does not fit the rest of a configuration.

    Raises:
        UsageError: If a stage would never begin, or there are demonstrations.
    """
    if config.transfer.curriculum is None:
        return
    if (last := max(config.transfer.curriculum)) >= total_timesteps:
        raise UsageError(
            f"curriculum: expected stages that begin before total_timesteps ({total_timesteps}), "
            f"got one from {last} on"
        )
    if config.demonstrations:
        raise UsageError("curriculum: expected no demonstrations beside it, got both")


@contextmanager
def _of_curriculum() -> Iterator[None]:
    """Make errors about tasks name the field that they come from."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"curriculum: {str(error).removeprefix('tasks: ')}") from None
