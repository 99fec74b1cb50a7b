"""Measure what mtrl-sweep costs beside its runs: many short runs with each backend.

    python scripts/bench_sweep.py [--runs 40] [--backends local ray] [--json FILE]

All processes that descend from the sweep are sampled in /proc, so this needs Linux. The runs are
`mtrl-train` and its descendants; everything else is the overhead: the sweep itself from its checks
to its report, and Ray's daemons and workers. CPU times are compared, because a busy machine
stretches wall-clock times. "Between runs" is the wall-clock time from the first run's start to the
last one's end in which no run was alive; a busy machine stretches it, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
FLAGS = (
    "--config mt10_plain --benchmark toy_tasks:POINTS --total-timesteps 400 --learning-starts 40 "
    "--log-every 100 --checkpoint-every 200 --eval-every 200 --eval-episodes 1 --diagnose-every 0 "
    "--hidden-sizes 8 --batch-size 8 --device cpu --cpus-per-run 1 --max-parallel 1"
)
INTERVAL = 0.2
"""Time between samples [s]; the last interval of a process is not seen."""


@dataclass
class Process:
    """A process of the sweep.

    Attributes:
        kind: `run`, or the name of its program.
        seconds: CPU time at its last sample [s].
    """

    kind: str
    seconds: float = 0.0


@dataclass
class Family:
    """All processes that descend from one.

    Attributes:
        alive: Time of each sample [s], and whether a run was alive in it.
    """

    root: int
    members: dict[tuple[int, int], Process] = field(default_factory=dict)
    alive: list[tuple[float, bool]] = field(default_factory=list)

    def sample(self) -> None:
        """Read the CPU time of every member."""
        ticks = os.sysconf("SC_CLK_TCK")
        stats = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parent, start = int(words[1]), int(words[19])
            stats[int(path.parent.name)] = parent, start, (int(words[11]) + int(words[12])) / ticks
        keys = {pid: (pid, start) for pid, (_, start, _) in stats.items()}
        runs = False
        for pid in sorted(stats, key=lambda pid: stats[pid][1]):  # parents before their children
            parent, start, seconds = stats[pid]
            key, above = (pid, start), self.members.get(keys.get(parent, (0, 0)))
            if key not in self.members and (pid == self.root or above is not None):
                self.members[key] = Process("")
            if (process := self.members.get(key)) is not None:
                process.seconds = seconds
                if process.kind != "run":  # a program may have been replaced by `exec`
                    is_run = above is not None and above.kind == "run"
                    process.kind = "run" if is_run else _kind(pid, process.kind)
                runs |= process.kind == "run"
        self.alive.append((time.perf_counter(), runs))

    def seconds(self) -> dict[str, float]:
        """Return the CPU time by kind [s]."""
        found: dict[str, float] = {}
        for process in self.members.values():
            found[process.kind] = found.get(process.kind, 0.0) + process.seconds
        return found

    def between(self) -> float:
        """Return the time without a run, from the first run's start to the last one's end [s]."""
        at_work = [i for i, (_, is_alive) in enumerate(self.alive) if is_alive]
        inside = self.alive[at_work[0] : at_work[-1] + 1]
        return sum(b - a for (a, _), (b, runs) in itertools.pairwise(inside) if not runs)


def _kind(pid: int, before: str) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return before
    if "mtrl.cli.train" in words:
        return "run"
    if "mtrl.cli.sweep" in words:
        return "sweep"
    return Path(words[0].split()[0]).name if words[0].strip() else before


def measured(command: list[str]) -> dict[str, Any]:
    """Execute a sweep, and return the times of its processes [s]."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        family = Family(process.pid)
        while process.poll() is None:
            family.sample()
            time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"the sweep ended with exit code {process.returncode}")
    found = family.seconds()
    runs = found.pop("run")
    return {
        "wall": time.perf_counter() - start,
        "between": family.between(),
        "runs": runs,
        "overhead": found,
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--backends", nargs="+", default=["local", "ray"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seeds = [str(seed) for seed in range(arguments.runs)]
    sweep = [sys.executable, "-m", "mtrl.cli.sweep", *FLAGS.split(), "--seeds", *seeds]
    results = {}
    print("| backend | runs: CPU [s] | overhead: CPU [s] | ÷ runs | between runs [s] | wall [s] |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for backend in arguments.backends:
            found = measured([*sweep, "-o", f"{name}/{backend}", "--backend", backend])
            results[backend] = found
            overhead = sum(found["overhead"].values())
            print(
                f"| {backend} | {found['runs']:.1f} | {overhead:.1f} | "
                f"{overhead / found['runs']:.3f} | {found['between']:.1f} | {found['wall']:.0f} |",
                flush=True,
            )
    for backend, found in results.items():
        parts = sorted(found["overhead"].items(), key=lambda part: -part[1])
        print(f"{backend}: " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in parts))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
