"""Sweeps whose runs take seconds, and their expected results."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from mtrl.cli.train import main

HERE = Path(__file__).parent
TOTAL = 1_200
FLAGS = (
    f"--config mt10_plain --benchmark toy_tasks:POINTS --total-timesteps {TOTAL} "
    "--learning-starts 40 --log-every 200 --checkpoint-every 100 --eval-every 800 "
    "--eval-episodes 1 --diagnose-every 0 --hidden-sizes 8 --batch-size 8 --device cpu"
).split()


def command(out: Path, *arguments: str, flags: Sequence[str] = FLAGS) -> list[str]:
    """Return the command of a sweep over `arguments`."""
    program = [sys.executable, "-m", "mtrl.cli.sweep", *flags]
    return [*program, "--cpus-per-run", "1", "-o", str(out), *arguments]


def never_interrupted(folder: Path, *arguments: str) -> Path:
    """Train the same run outside a sweep, with equally many threads."""
    where = ["--threads", "1", "--workers", "1", "--run-dir", str(folder)]
    assert main([*FLAGS, *arguments, *where]) == 0
    return folder


def wait_for(what: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Wait until `what` is true; fail if the process ends first."""
    deadline = time.monotonic() + 500
    while not what():
        assert process is None or process.poll() is None, "it ended first"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def has_started(out: Path, method: str) -> Callable[[], bool]:
    """Return a function that tells whether a run of the method has written a checkpoint."""
    return lambda: any(out.glob(f"runs/*_{method}_*/checkpoints/step_*"))


def same_policy(first: Path, second: Path) -> bool:
    """Return whether two runs have equal weights."""
    a, b = (load_file(path / "policy_final.safetensors") for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
