"""Queue of training runs, a few at a time with their own cores, for ablation.py and noise.py.

Finished runs are skipped, and interrupted runs are resumed. A queue can therefore be stopped at any
time and continued with the same command.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mtrl.analysis.methods import Method
from mtrl.analysis.runs import read_run
from mtrl.config.presets import preset
from mtrl.config.train import TrainConfig

KEPT = ("progress.csv", "config.yaml", "run.json", "eval.json", "eval.csv")
"""Files kept of a run; the last one marks it as complete."""


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        name: Name of the agent; runs of one agent differ in their seed.
        config: Configuration without its run folder.
        variables: Additional environment variables.
    """

    name: str
    config: TrainConfig
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder where its files are kept."""
        return label(self.name, self.config.seed)


def short(base: str, total_timesteps: int, seed: int, change: Mapping[str, Any]) -> TrainConfig:
    """Return a preset with changes, on one thread and with only a final evaluation."""
    flat = preset(base).flat() | {"seed": seed, "total_timesteps": total_timesteps, "threads": 1}
    rarely = {"eval_every": 1, "checkpoint_every": 5, "log_every": 20}
    flat |= {key: total_timesteps // times for key, times in rarely.items()}
    return TrainConfig(**flat | {"diagnose_every": 0} | dict(change))


def label(name: str, seed: int) -> str:
    """Return the folder name of a run, valid on any file system."""
    return re.sub(r"[^\w+-]+", "_", f"{name} seed {seed}")


def read(names: Sequence[str], output: Path) -> dict[str, Method]:
    """Read the agents that have results, with all their seeds."""
    found = {}
    for name in names:
        files = output.glob(f"{label(name, 0)[:-1]}[0-9]*/eval.csv")
        runs = sorted((read_run(file.parent) for file in files), key=lambda run: run.config.seed)
        if runs:
            found[name] = Method(name, tuple(runs))
    return found


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add flags for output folders and parallel runs."""
    parser.add_argument("-o", "--output", type=Path, default=Path("results") / name)
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="run folders")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel")


def train_all(trials: Sequence[Trial], output: Path, runs: Path, jobs: int) -> None:
    """Run what is missing, in this order; a failed run does not stop the others.

    Raises:
        SystemExit: At the end, if runs failed, with the last line of each.
    """
    shares: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(jobs):
        shares.put(cores[job::jobs])
    with ThreadPoolExecutor(jobs, initializer=_pin, initargs=(shares,)) as pool:
        results = [pool.submit(_train, trial, output, runs) for trial in trials]
        failures = [failure for result in results if (failure := result.result()) is not None]
    if failures:
        raise SystemExit("\n".join(failures))


def _train(trial: Trial, output: Path, runs: Path) -> str | None:
    """Run a trial to its end and keep its files; return the reason if it fails."""
    kept, run_dir = output / trial.folder, runs / trial.folder
    if (kept / KEPT[-1]).exists():
        return None
    command = [sys.executable, "-m", "mtrl.cli.train"]
    if list(run_dir.glob("checkpoints/step_*")):
        command += ["--resume", str(run_dir)]
    else:
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        written = run_dir.with_name(f"{run_dir.name}.yaml")
        config = trial.config.model_copy(update={"run_dir": run_dir})
        written.write_text(config.to_yaml(), encoding="utf-8")
        command += ["--config", str(written)]
    if not (run_dir / "eval.json").exists():  # else it was stopped before its files were kept
        variables = os.environ | trial.variables
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            print(failure := f"{trial.folder} failed: {''.join(last)}", flush=True)
            return failure
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(run_dir / file, kept)
    print(trial.folder, flush=True)
    return None


def _pin(shares: SimpleQueue[list[int]]) -> None:
    """Pin this thread, and the processes it starts, to a share of the cores (Linux)."""
    if share := shares.get():
        os.sched_setaffinity(0, share)
