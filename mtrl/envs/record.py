"""Benchmark records: what a run stores about its benchmark, and how it is rebuilt from that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtrl.envs.benchmarks import Benchmark, get_benchmark, select
from mtrl.errors import UsageError, expect_kind
from mtrl.folder import BenchmarkRecord, TaskRecord


def record_of(benchmark: Benchmark, tells_success: Sequence[bool]) -> BenchmarkRecord:
    """Build the record of a benchmark.

    Args:
        tells_success: Whether each task has ever reported success or failure, `[T]`.
    """
    return BenchmarkRecord(
        name=benchmark.name,
        environments="custom" if benchmark.custom else "metaworld",
        source=benchmark.source,
        tasks=tuple(
            TaskRecord(name=task, score="success" if by_success else "return")
            for task, by_success in zip(benchmark.tasks, tells_success, strict=True)
        ),
    )


def benchmark_of(record: BenchmarkRecord) -> Benchmark:
    """Rebuild the benchmark of a record; a custom one is imported from the recorded module.

    Raises:
        UsageError: If it cannot be imported, or no longer has these tasks.
    """
    if record.environments == "metaworld":
        return replace(get_benchmark("", record.names), name=record.name)
    if record.source is None:
        raise UsageError(
            f"benchmark: expected --benchmark MODULE:NAME (in Python: benchmark=...), because "
            f"{record.name!r} was not imported from a module, got none"
        )
    return _with_scores(record, get_benchmark(record.source, record.names))


def expect_tasks_of(record: BenchmarkRecord, benchmark: Benchmark) -> Benchmark:
    """Select the tasks of a record from a benchmark that the user gives in its place.

    Raises:
        UsageError: If the benchmark is of the other kind, or lacks one of the tasks.
    """
    kind = "custom" if benchmark.custom else "metaworld"
    if kind != record.environments:
        raise UsageError(
            f"benchmark: expected {record.environments} tasks like those of {record.name}, got "
            f"{kind}"
        )
    missing = [task for task in record.names if task not in benchmark.tasks]
    if missing:
        raise UsageError(
            f"benchmark: expected the tasks of {record.name}, got {benchmark.name} without "
            f"{missing[0]!r}"
        )
    chosen = replace(select(benchmark, record.names), name=record.name)
    return _with_scores(record, chosen)


def _with_scores(record: BenchmarkRecord, benchmark: Benchmark) -> Benchmark:
    by_success = tuple(task.name for task in record.tasks if task.score == "success")
    return replace(benchmark, tells_success=by_success) if benchmark.custom else benchmark


def with_source(benchmark: Benchmark) -> Benchmark:
    """Set `source` to the module and attribute that hold this very object, if there is one.

    The main script is recorded under its file's name. Importing it by that name works only from
    its folder.
    """
    expect_kind("benchmark", benchmark, Benchmark, "get_benchmark('mt10')")
    if benchmark.source is not None or not benchmark.custom:
        return benchmark
    # `sys.modules` lists a module after its imports, except the main script, which comes first and
    # has a second name in worker processes.
    modules = sorted(sys.modules.items(), key=lambda item: item[0] == "__main__")
    for name, module in modules:
        if name == "__mp_main__":
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is benchmark and (found := _importable(name)):
                return replace(benchmark, source=f"{found}:{attribute}")
    return benchmark


def _importable(module: str) -> str | None:
    if module != "__main__":
        return module
    main = sys.modules[module]
    if spec := getattr(main, "__spec__", None):
        return str(spec.name)
    stem = Path(getattr(main, "__file__", None) or "").stem
    return stem if stem.isidentifier() else None
