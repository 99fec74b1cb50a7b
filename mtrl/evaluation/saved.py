"""Evaluation of saved policies: find the file, its tasks and their environments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtrl.devices import resolve_device
from mtrl.envs.benchmarks import N_GOALS, Benchmark, get_benchmark, select
from mtrl.envs.examine import examined
from mtrl.envs.record import benchmark_of
from mtrl.errors import UsageError
from mtrl.evaluation.protocol import evaluate
from mtrl.evaluation.scores import Evaluation
from mtrl.folder import find_policy, read_benchmark
from mtrl.policy.file import PolicyHeader
from mtrl.policy.policy import Policy
from mtrl.policy.unseen import in_tasks
from mtrl.progress import tell


def evaluate_file(
    policy: Path,
    episodes: int = N_GOALS,
    *,
    tasks: tuple[str, ...] | None = None,
    seed: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    stochastic: bool = False,
    benchmark: str | None = None,
    filmed: bool = False,
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a run folder's final policy (or latest checkpoint), a checkpoint or a policy file.

    Args:
        tasks: Tasks to evaluate; default: all tasks of the policy. A policy that receives
            descriptions and has one head is evaluated on other tasks too.
        seed: Seed of the goals; default: that of the training run.
        benchmark: `package.module:attribute` of custom tasks. Default for a run folder: the
            benchmark it was trained on, imported from the module recorded in its benchmark.json. A
            policy file or a checkpoint only names its tasks: nothing it names is imported.
        filmed: Whether the evaluation will be filmed.

    Returns:
        The evaluation, and its inputs as plain values.

    Raises:
        UsageError: If there is no policy, it was not trained for one of the tasks, or custom tasks
            are to be filmed.
    """
    path = find_policy(policy)
    loaded, header = Policy.load_with_header(path, resolve_device(device))
    found = benchmark_for(policy, header, tasks, benchmark)
    if filmed and found.custom:
        raise UsageError(f"video: expected Meta-World tasks, got {found.name}")
    found = examined(found)
    seed = header.seed if seed is None else seed
    loaded = in_tasks(loaded, found.tasks, found.descriptions)
    trained = header.total_timesteps
    after = "" if trained is None else f" after {trained:,} steps of training"
    tell(f"evaluating {path}{after}, {episodes} episodes per task")
    result = evaluate(
        loaded,
        found,
        seed,
        episodes,
        header.horizon,
        workers=workers,
        stochastic=stochastic,
        progress=True,
    )
    return result, {
        "policy": str(path),
        "seed": seed,
        "horizon": header.horizon,
        "stochastic": stochastic,
        "unseen_tasks": [task for task in found.tasks if task not in header.tasks],
    }


def benchmark_for(
    source: Path, header: PolicyHeader, tasks: tuple[str, ...] | None, named: str | None
) -> Benchmark:
    """Return the tasks to evaluate on: the named benchmark's, or else those on record."""
    wanted = tasks or header.tasks
    if named is not None:
        return get_benchmark(named, wanted)
    if source.is_dir() and (record := read_benchmark(source)) is not None:
        found = benchmark_of(record)
        if found.custom or all(task in found.tasks for task in wanted):
            return select(found, wanted)
    if header.environments == "custom":
        raise UsageError(
            f"benchmark: expected --benchmark MODULE:NAME for the custom tasks of "
            f"{header.benchmark}, because a file only names its tasks, got none"
        )
    return get_benchmark("", wanted)
