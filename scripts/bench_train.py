"""Time the whole training loop and its two halves alone, and watch its memory.

    python scripts/bench_train.py [--quick] [--json FILE] [--device cuda] [--simulator envpool]
    python scripts/bench_train.py --soak 200000 [--seconds S] [--json FILE]

The halves are simulation (a vector step without updates: choosing actions, simulating, storing) and
learning (an update from a full replay), at the published sizes. Halves and loop take turns in
blocks on one `Trainer`, so that a machine that slows down slows all; what counts are the ratios of
the median blocks. With cores or a GPU of its own for each half, the loop takes as long as the
slower one; where both want the same cores, as long as their sum.

`--soak` makes a whole run of many vector steps with small networks, a small replay that is soon
full, evaluations, diagnoses and checkpoints, and compares what training process and simulators
hold at its end with what they held after a tenth of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from mtrl.config import TrainConfig
from mtrl.envs.processes import n_cores

# As in mtrl-train: a simulator process imports this file again, and is to be spared torch.
if TYPE_CHECKING:
    from mtrl.trainer import Trainer

Found = dict[str, dict[str, float]]
BENCHMARKS = {1: "mt1:reach-v3", 10: "mt10", 50: "mt50"}
SOAKED = ("reach-v3", "drawer-close-v3")


@contextmanager
def trainer_of(n_tasks: int, **settings: Any) -> Iterator[Trainer]:
    """A run about to begin, in a folder that goes with it."""
    from mtrl.run import check
    from mtrl.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        benchmark, device, config = check(
            TrainConfig.model_validate({"benchmark": BENCHMARKS.get(n_tasks, ""), **settings})
        )
        trainer = Trainer(config, benchmark, device, Path(folder))
        try:
            yield trainer
        finally:
            trainer.close()


def fill(trainer: Trainer) -> None:
    """A replay full of noise: the time of an update does not depend on the numbers."""
    n, agent, draw = trainer.envs.num_envs, trainer.agent, np.random.default_rng(0)
    observations = draw.normal(size=(n, agent.observation_size))
    actions, rewards = draw.uniform(-1, 1, (n, agent.action_size)), draw.uniform(size=n)
    for _ in range(trainer.config.learner.buffer_size // trainer.envs.envs_per_task):
        trainer.replay.add(
            observations, actions, rewards, np.zeros(n), observations, np.zeros(n, bool)
        )


def simulate(trainer: Trainer) -> None:
    """The loop's step without its updates."""
    trainer.collector.act(uniform=False)
    trainer.collector.store(trainer.collector.wait(), trainer.replay)


def measure(found: Found, n_tasks: int, seconds: float, **settings: Any) -> None:
    """Halves and loop for one number of tasks, `seconds` long."""
    import torch

    with trainer_of(n_tasks, learning_starts=128 * n_tasks, **settings) as trainer:
        fill(trainer)
        while trainer.steps < trainer.schedule.learning_starts:
            trainer.step()
        parts: dict[str, Callable[[], object]] = {
            "simulation": lambda: simulate(trainer),
            "learning": lambda: trainer.learner.step(trainer.replay),
            "loop": trainer.step,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for block in (1, 5):  # the first is warm-up
            trainer.pace.lap(trainer.steps, trainer.learner.updates)
            times = {name: [] for name in parts}
            end = perf_counter() + (seconds if block > 1 else 0)
            while not times["loop"] or perf_counter() < end:
                for name, run in parts.items():
                    start = perf_counter()
                    for _ in range(block):
                        run()
                    if trainer.agent.device.type == "cuda":
                        torch.cuda.synchronize()
                    times[name].append((perf_counter() - start) / block * 1e3)
        ms = {name: median(values) for name, values in times.items()}
        halves = ms["simulation"], ms["learning"]
        shares = trainer.pace.lap(trainer.steps, trainer.learner.updates)
        ratios = {
            "loop/slower-half": ms["loop"] / max(halves),
            "loop/sum": ms["loop"] / sum(halves),
        }
        ratios |= {k.removeprefix("time/"): v for k, v in shares.items() if "share" in k}
    # Of the process so far, so of the largest number of tasks; and of its largest simulator.
    mib = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
    mib["simulator"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    if torch.cuda.is_available():
        mib["device"] = torch.cuda.max_memory_allocated() / 2**20
    for table, values in zip(found.values(), (ms, ratios, mib), strict=True):
        table |= {f"mt{n_tasks}/{name}": round(value, 3) for name, value in values.items()}
    print(f"mt{n_tasks}: {1e3 / ms['loop']:,.1f} vector steps/s")


def resident(pid: int) -> float:
    """Memory a process holds now, shared pages included [MiB]."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(found: Found, vector_steps: int, seconds: float | None, **settings: Any) -> None:
    """A long run of two tasks, one on each simulator, whose memory is looked at every second."""
    n_tasks = len(SOAKED)
    total = n_tasks * vector_steps
    # All that a run does besides comes early and often, so that warm-up has seen it.
    every = ("eval_every", "checkpoint_every", "diagnose_every")
    schedule = dict.fromkeys(every, n_tasks * 1_000)
    learner = {"buffer_size": 1_000, "batch_size": 32, **settings.pop("learner")}
    environment = {"horizon": 100, **settings.pop("environment")}
    small = {
        **schedule,
        "total_timesteps": total,
        "learning_starts": n_tasks * 100,
        "log_every": n_tasks * 500,
        "tasks": SOAKED,
        "eval_episodes": 1,
        "agent": {"hidden_sizes": [32, 32]},
        "learner": learner,
        "environment": environment,
    }
    seen: list[tuple[int, float, float]] = []
    over = threading.Event()
    with trainer_of(n_tasks, **small, **settings) as trainer:
        simulators = [process.pid for process in multiprocessing.active_children()]

        def watch() -> None:
            start = perf_counter()
            while not over.wait(1.0) and trainer.interrupt.signal is None:
                if trainer.steps < total:  # the simulators are there
                    workers = sum(resident(pid) for pid in simulators if pid is not None)
                    seen.append((trainer.steps // n_tasks, resident(os.getpid()), workers))
                if seconds is not None and perf_counter() > start + seconds:
                    os.kill(os.getpid(), signal.SIGTERM)  # the run ends in good order

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            trainer.run()
        finally:
            over.set()
            watcher.join()
    warm = next(sample for sample in seen if sample[0] >= seen[-1][0] / 10)
    for steps, host, workers in seen[:: max(1, len(seen) // 20)]:
        print(f"{steps:9,} vector steps  {host:8.1f} MiB  simulators {workers:8.1f} MiB")
    for column, name in ((1, "host"), (2, "simulators")):
        found["MiB"][f"soak/{name}"] = round(seen[-1][column], 1)
        found["ratios"][f"soak/{name}"] = round(seen[-1][column] / warm[column], 4)
    found["ratios"]["soak/vector-steps"] = seen[-1][0]


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="MT1 and MT10, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--surgery", default="pcgrad")
    parser.add_argument(
        "--simulator",
        default="auto",
        choices=["auto", "metaworld", "envpool"],
        help="as mtrl-train",
    )
    parser.add_argument("--envs-per-task", type=int, default=1, metavar="E")
    parser.add_argument("--soak", type=int, metavar="N", help="a run of N vector steps instead")
    parser.add_argument("--seconds", type=float, metavar="S", help="end the soak after S seconds")
    arguments = parser.parse_args()
    settings = {
        "device": arguments.device,
        "learner": {"surgery": arguments.surgery},
        "environment": {
            "envs_per_task": arguments.envs_per_task,
            "simulator": arguments.simulator,
        },
    }
    found: Found = {"ms": {}, "ratios": {}, "MiB": {}}
    if arguments.soak:
        soak(found, arguments.soak, arguments.seconds, **settings)
    else:
        for n_tasks in (1, 10) if arguments.quick else (1, 10, 50):
            measure(found, n_tasks, 15 if arguments.quick else 60, **settings)
    print(f"{n_cores()} cores, torch {version('torch')}, {arguments.device}")
    for unit, table in found.items():
        print(unit)
        for key, value in table.items():
            print(f"  {key:28} {value:11.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
