"""Time captured updates and their surroundings [ms], the most important first.

    python scripts/gpu/times.py OUT.jsonl SECONDS

Each measurement is written as a JSON line: `update` (median by device events, with the slowest
kernels), `gramian` (its sum in one product or in parts, and the time of reading the gradients at
4.3 TB/s), and `loop` (host time of acting, storing and launching). A failure is also a line, and
the next case follows, unless the device itself is in an error state.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mtrl.config.agent import AgentConfig
from mtrl.config.learner import LearnerConfig
from mtrl.config.presets import preset
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.replay import ReplayBuffer
from mtrl.surgery.gradients import split_gramian
from mtrl.training.acting import ActorSnapshot
from mtrl.training.noise import ExplorationNoise

OBSERVATION, ACTION, STORED = 39, 4, 2000
PLAIN = AgentConfig()


class Times:
    """Measures until its time is over.

    Args:
        file: File to which lines are appended.
        seconds: Time for all measurements [s].
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self._out, self._end = file.open("a", buffering=1), time.monotonic() + seconds

    def note(self, **found: Any) -> None:
        """Append one line."""
        print(json.dumps(found))
        self._out.write(json.dumps(found) + "\n")

    def attempt(self, what: Callable[..., None], *arguments: Any, **settings: Any) -> None:
        """Measure, or record the failure."""
        if time.monotonic() > self._end - 5:
            return
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # one per stream that a graph was captured on
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            what(*arguments, **settings)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:400]
            self.note(what="FAILED", case=[str(a) for a in arguments], error=reason, **settings)
            if "capturing" in reason or "illegal" in reason:
                sys.exit(f"stopped after {reason}")

    def machine(self) -> None:
        """Record the machine, and whether its matrix products are as fast as expected."""
        x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        rate = round(2 * 8192**3 / clock(lambda: x @ x, 10) / 1e9)
        gpu, version = torch.cuda.get_device_name(), torch.__version__
        self.note(what="machine", gpu=gpu, torch=version, bf16_TFLOPs=rate)

    def update(
        self, name: str, surgery: str, precision: str = "tf32", profile: bool = False, **more: Any
    ) -> None:
        """Time an update of a preset's networks, or of three layers of 400 (`… plain`)."""
        learner, replay = case(name, surgery, precision, **more)
        start = time.monotonic()
        for _ in range(5):
            learner.step(replay)
        torch.cuda.synchronize()
        first = time.monotonic() - start
        self.note(
            what="update", case=name, surgery=surgery, precision=precision,
            captured=learner.captures, ms=round(clock(lambda: learner.step(replay)), 4),
            warm_s=round(first, 1), peak_MiB=round(torch.cuda.max_memory_allocated() / 2**20),
            **more,
        )  # fmt: skip
        if profile:
            self._profile(name, surgery, learner, replay)

    def _profile(self, name: str, surgery: str, learner: Learner, replay: ReplayBuffer) -> None:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(3):
                learner.step(replay)
            torch.cuda.synchronize()
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
        kernels = [(r.key[:90], r.count // 3, round(r.self_device_time_total / 3, 1)) for r in rows]
        self.note(what="profile", case=name, surgery=surgery, kernels=kernels[:25])

    def gramian(self, n: int, n_tasks: int, length: int) -> None:
        """Time the Gramians of n networks."""
        x = torch.randn(n, n_tasks, length, device="cuda")
        whole, parts = clock(lambda: x @ x.mT), clock(lambda: split_gramian({"x": x}))
        self.note(
            what="gramian", N=n, T=n_tasks, K=length, ms=round(whole, 4), parts_ms=round(parts, 4),
            floor_ms=round(x.nbytes / 4.3e9, 4),
        )  # fmt: skip

    def loop(self, name: str, envs_per_task: int) -> None:
        """Time acting and storing of one vector step."""
        learner, _ = case(name, "none", "tf32")
        agent = learner.agent
        tasks = torch.arange(len(agent.tasks), device="cuda").repeat_interleave(envs_per_task)
        n, draw = len(tasks), np.random.default_rng(0)
        replay = ReplayBuffer(
            100 * envs_per_task, len(agent.tasks), OBSERVATION, ACTION, device="cuda",
            envs_per_task=envs_per_task,
        )  # fmt: skip
        x, zeros = draw.normal(size=(n, OBSERVATION)).astype(np.float32), np.zeros(n)
        actions = draw.uniform(-1, 1, (n, ACTION)).astype(np.float32)
        noise = ExplorationNoise("pink", (n, ACTION), torch.Generator("cuda"))
        snapshot = ActorSnapshot(agent, tasks, noise)
        parts = {
            "act": lambda: snapshot.act(x),
            "take": snapshot.take,
            "store": lambda: replay.add(x, actions, zeros, zeros, x, done=zeros > 0),
        }
        found = {}
        for part, run in parts.items():
            took = []
            for _ in range(60):
                start = time.perf_counter()
                run()
                took.append(time.perf_counter() - start)
                torch.cuda.synchronize()
            found[f"{part}_ms"] = round(median(took[-50:]) * 1e3, 4)
        self.note(what="loop", case=name, rows=n, **found)


def case(
    name: str, surgery: str, precision: str, capture: bool = True, **more: Any
) -> tuple[Learner, ReplayBuffer]:
    """Create a learner and its full replay buffer."""
    n_tasks = 50 if name.startswith("mt50") else 10
    plain = name.endswith("plain")
    agent = PLAIN if plain else preset(name).agent
    size = 128 if plain else preset(name).learner.batch_size
    policy = MTSAC(tuple(f"t{i}" for i in range(n_tasks)), agent, OBSERVATION, ACTION).to("cuda")
    how = {"surgery": surgery, "precision": precision, "batch_size": size, "capture": capture}
    learner = Learner(policy, LearnerConfig.model_validate(how | more))
    replay = ReplayBuffer(STORED, n_tasks, OBSERVATION, ACTION, device="cuda")
    replay.load_state_dict(
        {
            "rows": torch.randn(STORED + 1, n_tasks, OBSERVATION + ACTION + 2),
            "starts": torch.arange(STORED),
            "next_row": torch.tensor(STORED),
            "generator": replay.generator.get_state(),
            "scale": replay.scale.state_dict(),
        }
    )
    return learner, replay


def clock(run: Callable[[], object], times: int = 30) -> float:
    """Return the median device time by events around each call [ms]."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(times)]
    for before, after in marks:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) for before, after in marks)


def main() -> None:
    """Measure, the most important first."""
    times = Times(Path(sys.argv[1]), float(sys.argv[2]))
    times.machine()
    main_methods = ("none", "pcgrad", "rotograd")
    for name, precisions in (("mt10_plain", ("tf32", "bf16", "fp32")), ("mt10", ("tf32", "bf16"))):
        for surgery in main_methods:
            for precision in precisions:
                profile = precision == "tf32" and surgery != "rotograd"
                times.attempt(times.update, name, surgery, precision, profile)
    times.attempt(times.loop, "mt10", 16)
    for sizes in ((1, 10, 160_000), (2, 10, 160_000), (2, 10, 2**20), (2, 50, 2**20)):
        times.attempt(times.gramian, *sizes)
    times.attempt(times.update, "mt10_plain", "pcgrad", capture=False)
    for surgery in ("famo", "gradnorm", "rotograd-scale", "imtl-g", "aligned-mtl"):
        times.attempt(times.update, "mt10_plain", surgery)
    for surgery in ("none", "pcgrad"):
        times.attempt(times.update, "mt50", surgery)
        for engine in ("jacobian", "factored") if surgery != "none" else ():
            times.attempt(times.update, "mt50", surgery, gradient_engine=engine)
        times.attempt(times.update, "mt50", surgery, "bf16")
    for surgery in ("cagrad", "mgda", "fairgrad"):
        times.attempt(times.update, "mt10_plain", surgery)
    for surgery in ("none", "pcgrad"):  # a minute each
        times.attempt(times.update, "mt10", surgery, compile=True)


if __name__ == "__main__":
    main()
