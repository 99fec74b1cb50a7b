"""Sweeps whose runs take seconds, and what they are to come to."""

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
    f"--benchmark toy_tasks:POINTS --total-timesteps {TOTAL} --learning-starts 40 --log-every 200 "
    "--checkpoint-every 100 --eval-every 800 --eval-episodes 1 --diagnose-every 0 "
    "--hidden-sizes 8 --batch-size 8 --device cpu"
).split()


def command(out: Path, *arguments: str, flags: Sequence[str] = FLAGS) -> list[str]:
    """A sweep over `arguments`."""
    program = [sys.executable, "-m", "mtrl.cli.sweep", *flags]
    return [*program, "--cpus-per-run", "1", "-o", str(out), *arguments]


def never_interrupted(folder: Path, *arguments: str) -> Path:
    """The same run by itself, on as many threads as a sweep gives it."""
    where = ["--threads", "1", "--workers", "1", "--run-dir", str(folder)]
    assert main([*FLAGS, *arguments, *where]) == 0
    return folder


def wait_for(what: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Until it is true; fails if the process ends first."""
    deadline = time.monotonic() + 500
    while not what():
        assert process is None or process.poll() is None, "it ended first"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def has_begun(out: Path, method: str) -> Callable[[], bool]:
    """Whether a run of the method has written a checkpoint."""
    return lambda: any(out.glob(f"runs/*_{method}_*/checkpoints/step_*"))


def same_policy(first: Path, second: Path) -> bool:
    """Whether two runs have come to equal weights."""
    a, b = (load_file(path / "policy_final.safetensors") for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
