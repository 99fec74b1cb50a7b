"""Everything that needs a GPU, in one run: equality first, then speed, then a timed training run.

    python scripts/gpu.py --json results/gpu.json [--minutes 9] [--wheels DIR]

Each part is a command of its own with a time limit, and what it measured goes into one JSON file;
what could not be run stands there with the reason. On a machine without network, `--wheels` names
a folder of wheels for what is missing there, made on another machine: this package's by `pip wheel
--no-deps -w DIR .`, and those in `WHEELS` by `pip download --no-deps --only-binary=:all:
--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d DIR …`.
torch, numpy, scipy and TensorBoard are taken as they are there.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
WHEELS = (
    "metaworld mujoco gymnasium glfw PyOpenGL stable-baselines3 Farama-Notifications cloudpickle "
    "pydantic pydantic-core annotated-types typing-inspection pyyaml safetensors tqdm "
    "pytest pytest-timeout iniconfig pluggy packaging"
)
TRAINING = [
    "-m",
    "mtrl.cli.train",
    "--benchmark",
    "mt10",
    "--surgery",
    "pcgrad",
    "--device",
    "cuda",
]


class Report:
    """What was measured, and what was not and why; written after every part.

    Args:
        path: JSON file.
        minutes: For all parts together.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {"machine": machine(), "skipped": {}}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def part(self, name: str, command: list[str], needs: str, limit: float) -> None:
        """Run a Python command that writes JSON where `{json}` stands; keep what it wrote.

        Args:
            name: Key in the report.
            command: Arguments of the interpreter.
            needs: Packages without which there is no sense in trying, separated by spaces.
            limit: Seconds, if so many are left.
        """
        missing = [package for package in needs.split() if not importlib.util.find_spec(package)]
        limit = min(limit, self.left - 5)
        if missing or limit < 20:
            reason = f"no {', '.join(missing)} here" if missing else "no time left"
            return self.skip(name, reason)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "found.json"
            arguments = [part.replace("{json}", str(output)) for part in command]
            start = time.monotonic()
            try:
                done = subprocess.run(
                    [sys.executable, *arguments], cwd=ROOT, timeout=limit, capture_output=True,
                    text=True, env=ENVIRONMENT,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return self.skip(name, f"not done after {limit:.0f} s")
            print(
                f"--- {name}: {time.monotonic() - start:.0f} s\n{done.stdout[-3000:]}", flush=True
            )
            found: Any = {"exit": done.returncode, "output": done.stdout[-2000:]}
            if output.exists():
                found = json.loads(output.read_text())
            if done.returncode:
                found = {"exit": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}
                print(done.stderr[-3000:], flush=True)
        self.found[name] = found
        self.write()

    def skip(self, name: str, reason: str) -> None:
        """Note what was not measured."""
        print(f"--- {name}: skipped, {reason}", flush=True)
        self.found["skipped"][name] = reason
        self.write()

    def write(self) -> None:
        """Keep what there is, in case the machine is taken away."""
        self.path.write_text(json.dumps(self.found, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def training(report: Report, simulator: str, minutes: float) -> None:
    """The main job for some minutes, interrupted as a scheduler would: its curve and its speed."""
    name = f"training/{simulator}"
    seconds = min(60 * minutes, report.left - 40)
    if not importlib.util.find_spec("metaworld"):
        return report.skip(name, "no metaworld here")
    if seconds < 60:
        return report.skip(name, "no time left")
    run_dir = Path(tempfile.mkdtemp()) / "run"
    command = [*TRAINING, "--simulator", simulator, "--run-dir", str(run_dir), "--seed", "0"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # it writes a checkpoint and leaves
        process.wait(60)
    if not (run_dir / "progress.csv").exists():
        return report.skip(name, f"ended with {process.returncode} before its first log")
    with (run_dir / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    tags = ("time/total_timesteps", "time/elapsed", "time/fps", "time/updates_per_second",
            "eval/success_rate/mean")  # fmt: skip
    curve = [{tag: float(row[tag]) for tag in tags if row.get(tag)} for row in rows]
    report.found[name] = {"command": command[2:], "curve": curve}
    report.write()


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help=f"install these first: {WHEELS}")
    arguments = parser.parse_args()
    report = Report(arguments.json.absolute(), arguments.minutes)
    if arguments.wheels:
        wheels = [str(wheel) for wheel in sorted(arguments.wheels.glob("*.whl"))]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, *wheels], check=True)
        importlib.invalidate_caches()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: error: expected a machine with CUDA, found none")
    bench = ["--device", "cuda", "--json", "{json}"]
    tests = ["-m", "pytest", "-q", "tests/test_cuda.py", "-p", "no:cacheprovider"]
    report.part("equality", tests, "pytest pydantic", 90)
    for precision in ("tf32", "bf16", "fp32"):
        update = [
            "scripts/bench_update.py",
            "--quick",
            "--tasks",
            "1",
            "10",
            "--precision",
            precision,
        ]
        report.part(f"update/{precision}", [*update, *bench], "stable_baselines3", 60)
    compiled = ["scripts/bench_update.py", "--quick", "--tasks", "10", "--compile", *bench]
    report.part("update/compiled", compiled, "stable_baselines3", 120)
    report.part("engines", ["scripts/bench_engines.py", *bench], "pydantic", 60)
    report.part("envs", ["scripts/bench_envs.py", "--quick", "--json", "{json}"], "metaworld", 60)
    for simulator in ("auto", "metaworld"):
        loop = ["scripts/bench_train.py", "--quick", "--simulator", simulator, *bench]
        report.part(f"loop/{simulator}", loop, "metaworld", 60)
    training(report, "auto", arguments.minutes)


if __name__ == "__main__":
    main()
