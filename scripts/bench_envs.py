"""Time random steps of MT10: our vector environment against Gymnasium's `AsyncVectorEnv`.

    python scripts/bench_envs.py [--quick] [--json FILE]

Both step the same ten tasks on the same simulator, in turns of one block each; what counts is the
ratio of the median blocks. Start-up is timed once for each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import gymnasium as gym
import metaworld  # noqa: F401, registers its environments
import numpy as np

from mtrl.benchmarks import get_benchmark
from mtrl.envs.vector import make_vector_env

BLOCK = 100
"""Vector steps in one block."""


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    ms: dict[str, float] = {}
    envs: dict[str, Any] = {}
    start = perf_counter()
    envs["ours"] = make_vector_env(get_benchmark("mt10"))
    envs["ours"].reset(seed=0)
    ms["mt10/ours/start"] = (perf_counter() - start) * 1e3
    start = perf_counter()
    envs["async"] = gym.make_vec("Meta-World/MT10", vector_strategy="async", seed=0)
    envs["async"].reset()
    ms["mt10/async/start"] = (perf_counter() - start) * 1e3

    generator = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in envs}
    for _ in range(10 if arguments.quick else 40):
        actions = generator.uniform(-1, 1, (BLOCK, 10, 4)).astype(np.float32)
        for name, env in envs.items():
            start = perf_counter()
            for action in actions:
                env.step(action)
            times[name].append((perf_counter() - start) / BLOCK * 1e3)
    for env in envs.values():
        env.close()

    ms |= {f"mt10/{name}": median(values) for name, values in times.items()}
    # How much faster: theirs over ours.
    ratios = {
        "mt10/ours/async": ms["mt10/async"] / ms["mt10/ours"],
        "mt10/start/async": ms["mt10/async/start"] / ms["mt10/ours/start"],
    }
    for key, value in ms.items():
        print(f"{key:24} {value:9.2f} ms")
    for name in envs:
        print(f"{name:24} {10 / ms[f'mt10/{name}'] * 1e3:9,.0f} environment steps/s")
    for key, value in ratios.items():
        print(f"{key:24} {value:9.2f} times as fast")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ms": ms, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
