"""Time an SAC update with every method, compared with its matrix products and other libraries.

    python scripts/bench_update.py [--quick] [--json FILE] [--device cuda] [--precision fp32]
                                   [--tasks 1 10 50] [--width 400] [--compile]
                                   [--config mt10_cpu] [--threads 1 2] [--clock cpu]
                                   [--trunk moore paco]

All variants alternate within one loop, so that changes in the machine's speed affect all of them;
the results are ratios of medians. An update consists of: next action, target, forward and backward
of two critics, forward and backward of the actor through both critics, three optimisers, and target
networks. The batch is sampled before, equally for all; only the comparison with Stable-Baselines3,
on one task, includes sampling on both sides. On CUDA, our update and the matrix products are
replayed as graphs. TorchJD is skipped if it is not installed.

`--config`, a preset or a file, sets networks, batch size, number of tasks and, unless given,
precision; methods are then compared only with each other and with the matrix products of these
shapes. `--trunk` measures only PCGrad on these trunks, with the sizes of their papers unless
`--width` is given; `cases:UserMLP` is `mlp` as a user's module. `--threads` repeats everything for
each number of threads.

Ratios are named by what is divided, `pcgrad/none`, except `ours/sb3`: our updates per second over
those of Stable-Baselines3. `-fp32` is our update in the precision of the others.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case
from peer_sb3 import StableBaselines
from products import matrix_products
from published import ACTION, BATCH, OBSERVATION, WIDTH, Published
from timing import CLOCKS, Found, add_arguments, interleaved, precision_of, show

from mtrl.config.presets import named
from mtrl.config.train import TrainConfig
from mtrl.devices import cpu_threads
from mtrl.envs.benchmarks import get_benchmark
from mtrl.errors import UsageError
from mtrl.sac.capture import Captured
from mtrl.sac.diagnose import diagnose
from mtrl.sac.learner import Learner
from mtrl.sac.replay import ReplayBuffer
from mtrl.surgery import GramianSurgery, available
from mtrl.surgery.gradients import Jacobian

PER_TASK = 100_000
"""Transitions per task in a full replay buffer."""
HAS_TORCHJD = importlib.util.find_spec("torchjd") is not None


class Bench:
    """All measurements of one case.

    Attributes:
        ms: Median milliseconds of one update.
        ratios: Ratios of these medians, each within its own loop.
        mib: Memory of a method beyond that of `none`: per-task gradients if it forms them,
            rotations and state [MiB].
    """

    def __init__(self, case: Case, quick: bool, clock: str = "wall") -> None:
        self.case, self.quick, self.clock = case, quick, clock
        self.batch, self.noise = case.batch()
        self.ms: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self.mib: dict[str, float] = {}
        self.none = self.update("none")

    def update(self, surgery: str, **settings: Any) -> Callable[[], object]:
        """Return an update with a method."""
        learner = self.case.learner(surgery, **settings)
        problem = self.case.critics(learner, self.batch, self.noise)
        forms = isinstance(problem.task_gradients(), Jacobian)
        held = 0
        for name, networks in learner.agent.networks().items():
            method = learner.surgeries[name]
            held += sum(tensor.nbytes for tensor in (*method.buffers(), *networks.rotations()))
            if forms and isinstance(method, GramianSurgery):
                held += self.case.n_tasks * sum(p.nbytes for p in networks.shared.values())
            elif isinstance(method, GramianSurgery):  # for composed layers, one set per task
                for layer in networks.trunk.layers.values():
                    if layer.composed and layer.experts:
                        held += (
                            self.case.n_tasks
                            * networks.shared[layer.weight].nbytes
                            // layer.experts
                        )
        self.mib.setdefault(surgery, held / 2**20)
        return self.graph(learner, partial(learner.update, self.batch, self.noise))

    def graph(self, learner: Learner, run: Callable[[], object]) -> Callable[[], object]:
        """Return the update as the learner launches it."""
        return Captured(run, [learner.generator]) if learner.captures else run

    def compete(
        self, rounds: int, variants: dict[str, Callable[[], object]], over: Collection[str] = ()
    ) -> None:
        """Alternate between variants in a loop of their own, because slow ones delay others.

        Args:
            rounds: Rounds of the full benchmark for ten tasks with the published width.
            variants: Variants by name.
            over: Variants by which all others are divided; default: `none`, which is added.
        """
        if not over:
            variants, over = {"none": self.none, **variants}, ("none",)
        size = self.case.n_tasks / 10 * (self.case.width / WIDTH) ** 2
        rounds = max(3, int(rounds / (5 if self.quick else 1) / min(max(size, 0.5), 4)))
        medians = interleaved(variants, rounds, self.case.device, self.clock)
        self.ms = medians | self.ms
        for base in over:
            others = {name: value for name, value in medians.items() if name not in over}
            self.ratios |= {f"{k}/{base}": value / medians[base] for k, value in others.items()}

    def run(self) -> None:
        """Run all measurements."""
        n_tasks, device = self.case.n_tasks, self.case.device
        if self.case.trunk is not None:
            self.compete(60, {"pcgrad": self.update("pcgrad")})
            return
        several = ("rotograd", "rotograd-scale", "rotograd-rotate") if n_tasks > 1 else ()
        first = ("pcgrad", *several)
        case = self.case
        matmul = matrix_products(case.agent(), case.rows, device, case.precision)
        if device == "cuda":
            matmul = Captured(matmul, [])
        self.compete(60, {"matmul": matmul, **{name: self.update(name) for name in first}})
        self.ratios["none/matmul"] = 1 / self.ratios.pop("matmul/none")
        if n_tasks == 1 and self.case.config is None:
            self.single()
        elif n_tasks > 1:
            self.compete(30, {k: self.update(k) for k in available() if k not in ("none", *first)})
        if n_tasks > 1 and self.case.config is None:
            self.slow()
            self.peers()
        rows = ReplayBuffer(PER_TASK, n_tasks, OBSERVATION, ACTION)
        self.mib[f"replay of {PER_TASK:,} per task"] = rows.nbytes / 2**20

    def single(self) -> None:
        """Compare the whole step of a learner of one task, sampling included, with SB3's."""
        replay = self.case.full_replay(PER_TASK)
        ours = {"ours": {}, **({"ours-fp32": {"precision": "fp32"}} if self.is_not_fp32() else {})}
        steps: dict[str, Callable[[], object]] = {
            name: partial(self.case.learner("none", **settings).step, replay)
            for name, settings in ours.items()
        }
        sb3 = StableBaselines(self.case.device, self.case.width, PER_TASK)
        self.compete(60, {**steps, "sb3": sb3.update}, over=("sb3",))
        for name in ours:
            self.ratios[f"{name}/sb3"] **= -1  # updates per second

    def slow(self) -> None:
        """Measure methods as in their papers, and operations that are not part of every update."""
        slow = {"rotograd, matrix_exp": self.update("rotograd", rotation_step="matrix_exp")}
        if HAS_TORCHJD:
            slow["torchjd:UPGrad"] = self.update("torchjd:UPGrad")
        replay = self.case.full_replay(BATCH)
        slow["diagnosis"] = partial(diagnose, self.case.learner("none"), replay)
        self.compete(10, slow)

    def peers(self) -> None:
        """Measure others' PCGrad; those with T backwards over all rows for at most ten tasks."""
        sizes = self.case.n_tasks, self.case.device, self.case.width
        ours = {"pcgrad": self.update("pcgrad")}
        if self.is_not_fp32():
            ours["pcgrad-fp32"] = self.update("pcgrad", precision="fp32")
        theirs: dict[str, Callable[[], object]] = {}
        if HAS_TORCHJD:
            from peer_torchjd import TorchJD

            theirs["torchjd-autogram"] = partial(TorchJD(*sizes, "autogram").update, self.batch)
        if HAS_TORCHJD and self.case.n_tasks <= 10:
            theirs["torchjd"] = partial(TorchJD(*sizes).update, self.batch)
        if self.case.n_tasks <= 10:
            theirs["published"] = partial(Published(*sizes).update, self.batch)
        self.compete(10, ours | theirs, over=ours)

    def is_not_fp32(self) -> bool:
        """Return whether our update in float32 is another variant."""
        return self.case.precision != "fp32"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, and write it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 50], metavar="T")
    parser.add_argument("--width", type=int, nargs="+", default=[WIDTH], metavar="W")
    parser.add_argument("--compile", action="store_true", help="compile our update")
    parser.add_argument("--config", metavar="C", help="preset or file that sets sizes")
    parser.add_argument("--trunk", nargs="+", metavar="NAME", help="only PCGrad on these trunks")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: torch's")
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="wall-clock or CPU time, for one thread"
    )
    add_arguments(parser)
    given = parser.parse_args(arguments)
    config = _config(parser, given.config)
    if config is not None and given.precision == "auto":
        given.precision = config.learner.precision
    precision = precision_of(parser, given.precision, given.device)
    how = given.device, precision, given.compile, config
    if config is not None:
        n_tasks = len(get_benchmark(config.benchmark, config.tasks).tasks)
        cases = {Path(given.config).stem: Case(n_tasks, WIDTH, *how)}
    elif given.trunk:
        cases = {
            f"mt{n}/{trunk}": Case(n, width, *how, trunk)
            for width in given.width
            for n in given.tasks
            for trunk in given.trunk
        }
    else:
        cases = {
            f"mt{n_tasks}" + (f"/w{width}" if width != WIDTH else ""): Case(n_tasks, width, *how)
            for width in given.width
            for n_tasks in given.tasks
        }
    found: Found = {"ms": {}, "ratios": {}, "MiB": {}}
    for n_threads in given.threads or [None]:
        with cpu_threads(n_threads):
            several = given.threads is not None and len(given.threads) > 1
            for prefix, case in cases.items():
                if given.compile:
                    torch.compiler.reset()  # otherwise sizes would become dynamic
                bench = Bench(case, given.quick, given.clock)
                bench.run()
                prefix += f"/threads={n_threads}" if several else ""
                measured = (bench.ms, bench.ratios, bench.mib)
                for table, values in zip(found.values(), measured, strict=True):
                    table |= {f"{prefix}/{name}": round(v, 3) for name, v in values.items()}
    show(found, given.device, precision, given.json)


def _config(parser: argparse.ArgumentParser, name: str | None) -> TrainConfig | None:
    try:
        return None if name is None else named(name).config
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
