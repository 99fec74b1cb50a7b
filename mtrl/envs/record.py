"""Benchmarks on disk: what a run writes down of its own, and how it is made again from that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtrl.envs.benchmarks import Benchmark, get_benchmark, select
from mtrl.errors import UsageError
from mtrl.folder import BenchmarkRecord, TaskRecord


def record_of(benchmark: Benchmark, tells_success: Sequence[bool]) -> BenchmarkRecord:
    """What to write down.

    Args:
        tells_success: For each task whether it has said if it is solved, `[T]`.
    """
    return BenchmarkRecord(
        name=benchmark.name,
        environments="custom" if benchmark.custom else "metaworld",
        source=benchmark.source,
        tasks=tuple(
            TaskRecord(name=task, score="success" if told else "return")
            for task, told in zip(benchmark.tasks, tells_success, strict=True)
        ),
    )


def benchmark_of(record: BenchmarkRecord) -> Benchmark:
    """The benchmark again; a custom one is imported from where the record says.

    Raises:
        UsageError: if it cannot be imported, or does not have the tasks any more.
    """
    if record.environments == "metaworld":
        return replace(get_benchmark("", record.names), name=record.name)
    if record.source is None:
        raise UsageError(
            f"benchmark: expected --benchmark MODULE:NAME (in Python: benchmark=...), for "
            f"{record.name!r} was not imported from a module; got none"
        )
    return _with_scores(record, get_benchmark(record.source, record.names))


def expect_tasks_of(record: BenchmarkRecord, benchmark: Benchmark) -> Benchmark:
    """The tasks of a record, out of a benchmark that a user names in place of it.

    Raises:
        UsageError: if it is of the other kind, or does not have them.
    """
    kind = "custom" if benchmark.custom else "metaworld"
    if kind != record.environments:
        raise UsageError(
            f"benchmark: expected {record.environments} tasks as those of {record.name}, got {kind}"
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
    told = tuple(task.name for task in record.tasks if task.score == "success")
    return replace(benchmark, tells_success=told) if benchmark.custom else benchmark


def with_source(benchmark: Benchmark) -> Benchmark:
    """The benchmark with the module and attribute that hold this very object, if one does.

    The script that was started counts under its file's name: whoever imports it by that name has
    to stand in its folder.
    """
    if benchmark.source is not None or not benchmark.custom:
        return benchmark
    # A module stands there after those that it imports, except the script, which is first, and has
    # a second name in its worker processes.
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
