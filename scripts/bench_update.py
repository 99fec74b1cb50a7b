"""Time one full SAC update under every method, as published, and its matrix products alone.

    python scripts/bench_update.py [--quick] [--json FILE] [--device cuda]

All variants take turns within one loop, so that a machine that slows down slows all of them; what
counts are the ratios of the medians. An update is: next action, target, two critics forward and
backward, actor forward and backward through both critics, three optimisers, target networks. The
batch is drawn before, for all alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from published import ACTION, BATCH, DEPTH, OBSERVATION, WIDTH, Published
from torch import Tensor

from mtrl.agent import MTSAC
from mtrl.config import AgentConfig, LearnerConfig
from mtrl.learner import Learner
from mtrl.replay import Batch, ReplayBuffer
from mtrl.surgery import GramianSurgery, available


def random_batch(n_tasks: int, device: str) -> tuple[Batch, Tensor]:
    """A batch of noise: the time of an update does not depend on the numbers."""
    lead = (n_tasks, BATCH)
    batch = Batch(
        torch.randn(*lead, OBSERVATION, device=device),
        torch.rand(*lead, ACTION, device=device) * 2 - 1,
        torch.rand(*lead, device=device),
        torch.zeros(*lead, device=device),
        torch.randn(*lead, OBSERVATION, device=device),
    )
    return batch, torch.randn(2, *lead, ACTION, device=device)


def make_learner(n_tasks: int, surgery: str, device: str, **settings: Any) -> Learner:
    """Our learner at the published sizes."""
    config = AgentConfig(hidden_sizes=(WIDTH,) * DEPTH)
    tasks = tuple(f"task-{t}" for t in range(n_tasks))
    agent = MTSAC(tasks, config, OBSERVATION, ACTION).to(device)
    return Learner(agent, LearnerConfig(surgery=surgery, **settings))


def matrix_products(n_tasks: int, device: str) -> Callable[[], None]:
    """The products an update without surgery cannot avoid, into preallocated memory.

    Per layer and network: next action 1, target critics 2, critics 2 forward, 2 for weights and 2
    for inputs, actor 1 forward, 1 for weights and 1 for inputs, the actor's critics 2 forward and
    2 for inputs. A first layer passes nothing on to its inputs, except, for the actor's sake, to
    the actions.
    """
    rows = n_tasks * BATCH
    layers = [(OBSERVATION + ACTION, WIDTH)] + [(WIDTH, WIDTH)] * (DEPTH - 1)
    work = []
    for i, (fan_in, width) in enumerate(layers):
        x = torch.randn(rows, fan_in, device=device)
        y = torch.randn(rows, width, device=device)
        w = torch.randn(fan_in, width, device=device)
        out_y, out_x, out_w = torch.empty_like(y), torch.empty_like(x), torch.empty_like(w)
        inputs = 5 if i else 2
        work.append((x, y, w, out_y, out_x, out_w, 8, inputs, 3))

    def run() -> None:
        for x, y, w, out_y, out_x, out_w, forwards, inputs, weights in work:
            for _ in range(forwards):
                torch.mm(x, w, out=out_y)
            for _ in range(inputs):
                torch.mm(y, w.mT, out=out_x)
            for _ in range(weights):
                torch.mm(x.mT, y, out=out_w)

    return run


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, device: str) -> dict:
    """Median milliseconds of each, taking turns; two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 2):
        for name, run in variants.items():
            start = perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(perf_counter() - start)
    return {name: median(values[2:]) * 1e3 for name, values in times.items()}


class Bench:
    """Everything measured for one number of tasks.

    Attributes:
        ms: Median milliseconds of one update.
        ratios: Of these medians, each within its own loop.
        mib: What a method holds beside what `none` does: per-task gradients, rotations, state.
    """

    def __init__(self, n_tasks: int, device: str, quick: bool) -> None:
        self.n_tasks, self.device, self.quick = n_tasks, device, quick
        self.batch, self.noise = random_batch(n_tasks, device)
        self.ms: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self.mib: dict[str, float] = {}
        self.none = self.update("none")

    def update(self, surgery: str, **settings: Any) -> Callable[[], object]:
        """One update under a method."""
        learner = make_learner(self.n_tasks, surgery, self.device, **settings)
        held = 0
        for name, networks in learner.agent.networks().items():
            method = learner.surgeries[name]
            held += sum(tensor.nbytes for tensor in (*method.buffers(), *networks.rotations()))
            if isinstance(method, GramianSurgery):  # one network's at a time are freed with it
                held += self.n_tasks * sum(p.nbytes for p in networks.shared.values())
        self.mib[surgery] = held / 2**20
        return partial(learner.update, self.batch, self.noise)

    def compete(self, rounds: int, **variants: Callable[[], object]) -> None:
        """Let variants take turns with `none`, in a loop of their own: slow ones stretch others."""
        rounds = max(2, rounds // (5 if self.quick else 1) // (4 if self.n_tasks > 10 else 1))
        medians = interleaved({"none": self.none, **variants}, rounds, self.device)
        self.ms = medians | self.ms
        self.ratios |= {f"{k}/none": v / medians["none"] for k, v in medians.items() if k != "none"}

    def run(self) -> None:
        """Measure all."""
        first = ("pcgrad", "rotograd", "rotograd-scale", "rotograd-rotate")
        matmul = matrix_products(self.n_tasks, self.device)
        self.compete(60, matmul=matmul, **{name: self.update(name) for name in first})
        self.ratios["none/matmul"] = 1 / self.ratios.pop("matmul/none")
        others = [name for name in available() if name not in ("none", *first)]
        self.compete(30, **{name: self.update(name) for name in others})
        slow = {"rotograd, matrix_exp": self.update("rotograd", rotation_step="matrix_exp")}
        if importlib.util.find_spec("torchjd"):
            slow["torchjd:UPGrad"] = self.update("torchjd:UPGrad")
        if self.n_tasks == 10:
            slow["published"] = partial(Published(self.n_tasks, self.device).update, self.batch)
        slow["diagnosis"] = self.diagnosis()
        self.compete(10, **slow)
        full = ReplayBuffer(100_000, self.n_tasks, OBSERVATION, ACTION)
        self.mib["replay of 100,000 per task"] = full.nbytes / 2**20

    def diagnosis(self) -> Callable[[], object]:
        """What a look at the conflicts costs, at logging steps alone."""
        replay = ReplayBuffer(BATCH, self.n_tasks, OBSERVATION, ACTION, self.device)
        for _ in range(BATCH):
            row = [value[:, 0].cpu().numpy() for value in vars(self.batch).values()]
            replay.add(row[0], row[1], row[2], row[3], row[4], done=False)
        return partial(make_learner(self.n_tasks, "none", self.device).diagnose, replay)


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {"ms": {}, "ratios": {}, "MiB": {}}
    for n_tasks in (10, 50):
        bench = Bench(n_tasks, arguments.device, arguments.quick)
        bench.run()
        for table, values in zip(found.values(), (bench.ms, bench.ratios, bench.mib), strict=True):
            table |= {f"mt{n_tasks}/{name}": round(value, 3) for name, value in values.items()}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.device}")
    for unit, table in found.items():
        print(unit)
        for key, value in table.items():
            print(f"  {key:36} {value:9.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
