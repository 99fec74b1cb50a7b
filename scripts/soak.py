"""Soak test: resources of a long run with small networks must not grow.

    python scripts/soak.py 1000000 [--seconds S] [--json FILE]

The run has two tasks, one per simulator if EnvPool is installed, a small replay buffer that is soon
full, evaluations, diagnoses and checkpoints. The script samples memory, open files, threads and
processes of the training process and its simulators every second, and compares the maximum of the
last tenth of the run with that of the second tenth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

from bench_train import trainer_of

TASKS = ("reach-v3", "drawer-close-v3")


def resident(pid: int) -> float:
    """Return the resident memory of a process, including shared pages [MiB]."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(pid: int) -> int:
    """Return the number of file descriptors of a process, including pipes and sockets."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process, including Python's helper processes."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for found in lists for child in found]
    return children + [further for child in children for further in descendants(child)]


def held(simulators: Sequence[int]) -> dict[str, float]:
    """Return the current resources of training process and simulators."""
    here = os.getpid()
    return {
        "host MiB": resident(here),
        "simulators MiB": sum(map(resident, simulators)),
        "host files": open_files(here),
        "simulators files": sum(map(open_files, simulators)),
        "host threads": len(list(Path(f"/proc/{here}/task").iterdir())),
        "processes": len(descendants(here)),
    }


def soak(vector_steps: int, seconds: float | None, surgery: str) -> dict[str, dict[str, float]]:
    """Run two tasks, one per simulator, for long, and sample resources every second."""
    n_tasks = len(TASKS)
    # Everything else that a run does comes early and often, so that warm-up includes it.
    every = ("eval_every", "checkpoint_every", "diagnose_every")
    schedule = dict.fromkeys(every, n_tasks * 2_500)
    small = {
        **schedule,
        "total_timesteps": n_tasks * vector_steps,
        "learning_starts": n_tasks * 100,
        "log_every": n_tasks * 1_000,
        "tasks": TASKS,
        "eval_episodes": 1,
        "agent": {"hidden_sizes": [16]},
        "learner": {"buffer_size": 1_000, "batch_size": 16, "surgery": surgery},
        "environment": {"horizon": 100},
    }
    seen: list[tuple[int, dict[str, float]]] = []
    over = threading.Event()
    with trainer_of(n_tasks, **small) as trainer:
        simulators = [p.pid for p in multiprocessing.active_children() if p.pid is not None]

        def watch() -> None:
            start = perf_counter()
            while not over.wait(1.0) and trainer.interrupt.signal is None:
                with suppress(OSError):  # a thread or the run has just ended
                    seen.append((trainer.state.steps // n_tasks, held(simulators)))
                if seconds is not None and perf_counter() > start + seconds:
                    os.kill(os.getpid(), signal.SIGTERM)  # the run stops cleanly

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            trainer.run()
        finally:
            over.set()
            watcher.join()
    warm = next(index for index, (steps, _) in enumerate(seen) if steps >= seen[-1][0] / 10)
    for steps, values in seen[:: max(1, len(seen) // 20)]:
        print(f"{steps:9,} vector steps", *(f"{k} {v:.0f}" for k, v in values.items()), sep="  ")
    found: dict[str, dict[str, float]] = {"held": {}, "ratios": {}}
    # Use the peak of an interval, because evaluations open files and close them again.
    until = 2 * warm
    for name in seen[0][1]:
        early, late = (
            max(values[name] for _, values in part) for part in (seen[warm:until], seen[-warm:])
        )
        found["held"] |= {f"{name}, early": round(early, 1), name: round(late, 1)}
        found["ratios"][name] = round(late / early, 4)
    found["ratios"]["vector-steps"] = seen[-1][0]
    return found


def main() -> None:
    """Print a table, and write it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vector_steps", type=int)
    parser.add_argument("--surgery", default="pcgrad")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop after S seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = soak(arguments.vector_steps, arguments.seconds, arguments.surgery)
    for unit, table in found.items():
        print(unit)
        for key, value in table.items():
            print(f"  {key:28} {value:13,.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
