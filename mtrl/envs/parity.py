"""Choice of each task's simulator: EnvPool where it was found to agree with the reference.

The verdicts are in `parity.json`, written by `scripts/parity.py`. They hold only for the versions
and the platform named in that file.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from mtrl.config.environment import EnvironmentConfig
from mtrl.envs.benchmarks import Benchmark
from mtrl.errors import UsageError, unknown

INSTALL = 'pip install "mtrl-surgery[fast]"'


@dataclass(frozen=True)
class Simulators:
    """Simulator of each task, and the reason for the choice.

    Attributes:
        by_task: `"metaworld"`, `"envpool"` or `"own"` for each task, in the tasks' order.
        note: One line for the user.
    """

    by_task: tuple[str, ...]
    note: str


@cache
def verdicts() -> dict[str, Any]:
    """Read the results of `scripts/parity.py`: `versions`, and whether each of `tasks` `passed`."""
    return json.loads((files("mtrl.envs") / "parity.json").read_text(encoding="utf-8"))


def simulator_versions() -> dict[str, str]:
    """Return the versions a verdict depends on; packages that are not installed are left out."""
    found = {"platform": f"{platform.system()} {platform.machine()}"}
    for package in ("envpool", "metaworld", "mujoco"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def choose_simulators(benchmark: Benchmark, config: EnvironmentConfig) -> Simulators:
    """Choose the simulator of each task without starting any; custom tasks are their own.

    `native_tasks` run on EnvPool whatever their verdict. The other tasks depend on `simulator`:
    "metaworld" selects the reference; "envpool" selects EnvPool and rejects tasks that have not
    passed; "auto" selects EnvPool if it is installed and the task has passed, else the reference.

    Raises:
        UsageError: If EnvPool is requested but is not installed, the task has not passed, or the
            task is not one of Meta-World's.
    """
    tasks = benchmark.tasks
    for task in config.native_tasks:
        if task not in tasks:
            raise UsageError(unknown("native_tasks", task, tasks))
    if benchmark.custom:
        if config.simulator == "envpool" or config.native_tasks:
            raise UsageError(f"simulator: expected 'auto' for {benchmark.name}, got 'envpool'")
        note = f"simulators: those of {benchmark.name}"
        if benchmark.success_key is None:
            note += "; tasks are scored by their return, because success_key is None"
        return Simulators(("own",) * len(tasks), note)
    if config.simulator == "metaworld":
        if config.native_tasks:
            raise UsageError(
                "native_tasks: expected none with simulator 'metaworld', got "
                f"{config.native_tasks[0]!r}"
            )
        return _describe(tasks, [], "as requested")
    found, tested = simulator_versions(), verdicts()["versions"]
    if "envpool" not in found:
        if config.simulator == "envpool" or config.native_tasks:
            field = "simulator" if config.simulator == "envpool" else "native_tasks"
            raise UsageError(f"{field}: expected EnvPool to be installed ({INSTALL}), got none")
        return _describe(tasks, [], f"EnvPool is not installed: {INSTALL}")
    if found == tested:
        passed = {task for task, verdict in verdicts()["tasks"].items() if verdict["passed"]}
        why = "EnvPool does not agree with it, see mtrl/envs/parity.json"
    else:
        passed = set()
        other = next(key for key in tested if found.get(key) != tested[key])
        why = f"parity was tested with {other} {tested[other]}, installed is {found[other]}"
    native = [task for task in tasks if task in passed or task in config.native_tasks]
    if config.simulator == "envpool" and len(native) < len(tasks):
        rest = " ".join(task for task in tasks if task not in native)
        raise UsageError(
            f"simulator: expected tasks on which EnvPool agrees with the reference ({why}) or "
            f"tasks in native_tasks, got {rest}"
        )
    return _describe(tasks, native, why)


def expect_same_simulators(tasks: Sequence[str], before: Sequence[str], now: Sequence[str]) -> None:
    """Check that a run resumes on the simulators it started with.

    Raises:
        UsageError: Naming the first task whose simulator would change.
    """
    for task, old, new in zip(tasks, before, now, strict=True):
        if old != new:
            raise UsageError(
                f"simulator: expected {task} to resume on {old}, where it started, got {new}"
            )


def _describe(tasks: Sequence[str], native: list[str], why: str) -> Simulators:
    by_task = tuple("envpool" if task in native else "metaworld" for task in tasks)
    rest = [task for task in tasks if task not in native]
    parts = []
    if native:
        parts.append(f"{len(native)} of {len(tasks)} tasks on EnvPool {version('envpool')}")
    if rest:
        names = "all" if not native else ", ".join(rest)
        parts.append(f"on the reference Meta-World {version('metaworld')}: {names} ({why})")
    return Simulators(by_task, "simulators: " + "; ".join(parts))
