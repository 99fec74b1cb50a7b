"""Queue of training runs, a few at a time with their own cores, for ablation.py and noise.py.

Finished runs are skipped, and interrupted runs are resumed. A queue can therefore be stopped at any
time and continued with the same command. `mtrl-sweep` does this for grids; here agents are given in
Python.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtrl.analysis.methods import Method
from mtrl.analysis.runs import read_run
from mtrl.config.presets import preset
from mtrl.config.train import TrainConfig
from mtrl.sweep.attempt import Job
from mtrl.sweep.drive import drive
from mtrl.sweep.local import Local, cores, shares

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
    """Run missing runs, in this order; a failed run does not stop the others.

    Raises:
        SystemExit: At the end, if runs failed, with the last line of each, or if a signal came.
    """
    missing = {t.folder: t for t in trials if not (output / t.folder / KEPT[-1]).exists()}
    jobs = min(jobs, len(cores()))
    backend = Local(shares(jobs, len(cores()) // jobs))
    found = drive((_job(trial, runs) for trial in missing.values()), backend)
    for name in [ending.name for ending in found.having("finished")]:
        _keep(runs / name, output / name)
    if found.signal is not None:
        raise SystemExit(128 + found.signal)
    if failed := found.having("failed"):
        raise SystemExit("\n".join(f"{end.name} failed: {end.lines[-1]}" for end in failed))


def _job(trial: Trial, runs: Path) -> Job:
    runs.mkdir(parents=True, exist_ok=True)
    run_dir, written = runs / trial.folder, runs / f"{trial.folder}.yaml"
    written.write_text(trial.config.to_yaml(), encoding="utf-8")
    where = ("--config", str(written), "--run-dir", str(run_dir), "--resume-if-exists")
    log, state = runs / f"{trial.folder}.txt", runs / f"{trial.folder}.json"
    return Job(trial.folder, where, run_dir, log=log, state=state, variables=trial.variables)


def _keep(run_dir: Path, kept: Path) -> None:
    """Copy the files of a run to those of other runs."""
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(run_dir / file, kept)
