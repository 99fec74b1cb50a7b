"""Measure time and memory of the training loop, and the time of its two halves.

    python scripts/bench_train.py [--quick] [--json FILE] [--device cuda] [--simulator envpool]

The halves are simulation (a vector step without updates: acting, simulating, storing) and learning
(an update from a full replay buffer), at the published sizes. Halves and loop alternate in blocks
on one `Trainer`, so that changes in the machine's speed affect all; the results are ratios of
median blocks. If each half has its own cores or a GPU, the loop takes as long as the slower half;
if both share cores, as long as their sum.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mtrl.config.train import TrainConfig
from mtrl.envs.processes import n_cores

# As in mtrl-train: simulator processes import this file again, and should not import torch.
if TYPE_CHECKING:
    from mtrl.training.trainer import Trainer

Found = dict[str, dict[str, float]]
BENCHMARKS = {1: "mt1:reach-v3", 10: "mt10", 50: "mt50"}


@contextmanager
def trainer_of(n_tasks: int, **settings: Any) -> Iterator[Trainer]:
    """Yield a trainer in a temporary run folder."""
    from mtrl.training.check import check
    from mtrl.training.trainer import Trainer

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
    """Fill the replay buffer with noise: the time of an update does not depend on values."""
    import torch

    state = trainer.state
    n, agent, replay = state.envs.num_envs, state.agent, state.replay
    rows = trainer.config.learner.buffer_size // state.envs.envs_per_task
    numbers = torch.randn(rows + 1, n, agent.observation_size + agent.action_size + 2)
    numbers[..., -1] = 0  # no episode ends
    filled = {"rows": numbers, "starts": torch.arange(rows), "next_row": torch.tensor(rows)}
    replay.load_state_dict(replay.state_dict() | filled)


def simulate(trainer: Trainer) -> None:
    """Make a step of the loop without updates."""
    trainer.state.collector.act(uniform=False)
    trainer.state.collector.store(trainer.state.collector.wait(), trainer.state.replay)


def measure(found: Found, n_tasks: int, seconds: float, **settings: Any) -> None:
    """Measure halves and loop for one number of tasks, for `seconds`."""
    import torch

    with trainer_of(n_tasks, learning_starts=128 * n_tasks, **settings) as trainer:
        fill(trainer)
        while trainer.state.steps < trainer.schedule.learning_starts:
            trainer.step()
        parts: dict[str, Callable[[], object]] = {
            "simulation": lambda: simulate(trainer),
            "learning": lambda: trainer.state.learner.step(trainer.state.replay),
            "loop": trainer.step,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for block in (1, 5):  # the first is warm-up
            trainer.pace.lap(trainer.state.steps, trainer.state.learner.updates)
            times = {name: [] for name in parts}
            end = perf_counter() + (seconds if block > 1 else 0)
            while not times["loop"] or perf_counter() < end:
                for name, run in parts.items():
                    start = perf_counter()
                    for _ in range(block):
                        run()
                    if trainer.state.agent.device.type == "cuda":
                        torch.cuda.synchronize()
                    times[name].append((perf_counter() - start) / block * 1e3)
        ms = {name: median(values) for name, values in times.items()}
        halves = ms["simulation"], ms["learning"]
        shares = trainer.pace.lap(trainer.state.steps, trainer.state.learner.updates)
        ratios = {
            "loop/slower-half": ms["loop"] / max(halves),
            "loop/sum": ms["loop"] / sum(halves),
        }
        ratios |= {k.removeprefix("time/"): v for k, v in shares.items() if "share" in k}
    # Peak of the process so far, hence of the largest number of tasks, and of its simulators.
    mib = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
    mib["simulator"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    if torch.cuda.is_available():
        mib["device"] = torch.cuda.max_memory_allocated() / 2**20
    for table, values in zip(found.values(), (ms, ratios, mib), strict=True):
        table |= {f"mt{n_tasks}/{name}": round(value, 3) for name, value in values.items()}
    print(f"mt{n_tasks}: {1e3 / ms['loop']:,.1f} vector steps/s")


def main() -> None:
    """Print a table, and write it to --json."""
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
