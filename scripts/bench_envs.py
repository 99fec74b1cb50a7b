"""Time random steps of mtrl's vector environments and Gymnasium's.

    python scripts/bench_envs.py [--quick] [--json FILE]

All step the same tasks of MT10 and MT50, and a single task. They alternate in blocks; the results
are ratios of median blocks. *ours* is the reference simulator in worker processes; *native* runs
all tasks on EnvPool; *auto*, as in training, runs those on EnvPool that agree with the reference.
*async* and *sync* are Gymnasium's `AsyncVectorEnv` (one process per task) and `SyncVectorEnv` on
the reference. The time from start to the first observation is measured once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import gymnasium as gym
import metaworld  # noqa: F401, registers its environments
import numpy as np

from mtrl.config.environment import EnvironmentConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.parity import choose_simulators

BLOCK = 50
"""Vector steps in one block."""

GYMNASIUM = {"mt1": "Meta-World/MT1", "mt10": "Meta-World/MT10", "mt50": "Meta-World/MT50"}


def main() -> None:
    """Print a table, and write it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without MT50, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    ms: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for name in ("mt1", "mt10") if arguments.quick else GYMNASIUM:
        ms |= measure(name, blocks=8 if arguments.quick else 20)
        # Speed-up: theirs over ours.
        for ours in ("ours", "native", "auto"):
            for theirs in ("async", "sync"):
                ratios[f"{name}/{ours}/{theirs}"] = ms[f"{name}/{theirs}"] / ms[f"{name}/{ours}"]
        ratios[f"{name}/start/async"] = ms[f"{name}/async/start"] / ms[f"{name}/ours/start"]
    for key, value in ms.items():
        print(f"{key:24} {value:9.2f} ms")
    for key, value in ratios.items():
        print(f"{key:24} {value:9.2f} times as fast")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ms": ms, "ratios": ratios}, indent=2) + "\n")


def measure(name: str, blocks: int) -> dict[str, float]:
    """Measure median milliseconds of a vector step and of the start, for all on one benchmark."""
    benchmark = get_benchmark("mt1:reach-v3" if name == "mt1" else name)
    theirs: dict[str, Any] = {"env_name": "reach-v3"} if name == "mt1" else {}
    native = ("envpool",) * len(benchmark.tasks)
    chosen = choose_simulators(benchmark, EnvironmentConfig()).by_task
    make: dict[str, Callable[[], Any]] = {
        "ours": partial(make_vector_env, benchmark),
        "native": partial(make_vector_env, benchmark, simulators=native),
        "auto": partial(make_vector_env, benchmark, simulators=chosen),
    }
    for strategy in ("async", "sync"):
        make[strategy] = partial(
            gym.make_vec, GYMNASIUM[name], vector_strategy=strategy, seed=0, **theirs
        )
    ms: dict[str, float] = {}
    envs: dict[str, Any] = {}
    for who, maker in make.items():
        start = perf_counter()
        envs[who] = maker()
        envs[who].reset(seed=0)
        ms[f"{name}/{who}/start"] = (perf_counter() - start) * 1e3
    shape = (BLOCK, len(benchmark.tasks), 4)
    generator = np.random.default_rng(0)
    times: dict[str, list[float]] = {who: [] for who in envs}
    for _ in range(blocks):
        actions = generator.uniform(-1, 1, shape).astype(np.float32)
        for who, env in envs.items():
            start = perf_counter()
            for action in actions:
                env.step(action)
            times[who].append((perf_counter() - start) / BLOCK * 1e3)
    for env in envs.values():
        env.close()
    for who, values in times.items():
        ms[f"{name}/{who}"] = median(values)
        rate = len(benchmark.tasks) / ms[f"{name}/{who}"] * 1e3
        print(f"{name} {who:8} {rate:9,.0f} environment steps/s", flush=True)
    return ms


if __name__ == "__main__":
    main()
