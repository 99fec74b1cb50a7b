"""Measure the overhead of mtrl-sweep: many short runs, alone and with each backend.

    python scripts/bench_sweep.py [--runs 40] [--backends local ray] [--json FILE]

"Alone" runs the same command lines one after another on the same cores. The ratio is that of
wall-clock times from start to end of the command, without the report of the sweep. The CPU time of
the runs is shown too. Use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = (
    "--tasks reach-v3 --total-timesteps 2000 --learning-starts 500 --horizon 50 --log-every 500 "
    "--eval-every 1000 --eval-episodes 1 --checkpoint-every 1000 --diagnose-every 0 "
    "--hidden-sizes 32 --batch-size 32 --simulator metaworld --device cpu"
)


def timed(commands: list[list[str]]) -> dict[str, float]:
    """Return wall-clock and CPU time of commands, run one after another [s]."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - start, "processor": used}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--backends", nargs="+", default=["local", "ray"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seeds = [str(seed) for seed in range(arguments.runs)]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        sweep = [sys.executable, "-m", "mtrl.cli.sweep", *FLAGS.split(), "--seeds", *seeds]
        sweep += ["--cpus-per-run", "1", "--max-parallel", "1"]
        planned = [*sweep, "-o", f"{name}/alone", "--dry-run"]
        lines = subprocess.run(planned, check=True, capture_output=True, text=True).stdout
        alone = [
            [sys.executable, "-m", "mtrl.cli.train", *shlex.split(line)[1:]]
            for line in lines.splitlines()
        ]
        if hasattr(os, "sched_setaffinity"):  # as the local backend pins them
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        found["alone"] = timed(alone)
        for backend in arguments.backends:
            found[backend] = timed([[*sweep, "-o", f"{name}/{backend}", "--backend", backend]])
    print("| backend | wall-clock [s] | ÷ alone | CPU time [s] |\n|---|---|---|---|")
    for by, times in found.items():
        ratio = times["wall"] / found["alone"]["wall"]
        print(f"| {by} | {times['wall']:.1f} | {ratio:.3f} | {times['processor']:.1f} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
