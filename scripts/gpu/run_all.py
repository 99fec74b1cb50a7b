"""Run everything that needs a GPU, within a few minutes of GPU time.

    python scripts/gpu/run_all.py OUT [--seconds 510] [--wheels .gpu/whl]

Run it from the root of the checkout. Each phase is a separate process group with a time limit.
Results are written immediately, and no phase takes time from a more important later one: install
and probe; compare captured updates with eager ones; time captured updates (`times.py`); train MT10
with PCGrad in the remaining time; then test methods with newer kernels and the gradient engines.

`--wheels` is a folder of wheels, created by `prepare.sh`, for a machine without network. Files
written to OUT: log.txt, time.jsonl, progress.csv, cosines.jsonl, run.json, config.yaml,
actor.safetensors and engines.json, each at most 15 MiB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

HERE, ROOT, SITE, RUN = Path(__file__).resolve().parent, Path.cwd(), "/tmp/site", Path("/tmp/run")
LARGEST = 15 * 2**20
NEWER = "cagrad or mgda or fairgrad"
"""Methods that are tested last, as an expression for pytest's -k."""

PROBE = """
import os, platform, numpy, torch, triton
print(platform.platform(), os.cpu_count(), torch.__version__, triton.__version__, numpy.__version__)
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info())
import gymnasium, mujoco, metaworld, pydantic, safetensors, stable_baselines3, mtrl
from mtrl.config.environment import EnvironmentConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.envs.parity import choose_simulators
print(mtrl.__file__, choose_simulators(get_benchmark("mt10"), EnvironmentConfig()).note)
"""
EXPORT = f"""
from pathlib import Path
from safetensors.torch import save_file
from mtrl.folder import find_policy
from mtrl.policy.policy import Policy
save_file(Policy.load(find_policy(Path({str(RUN)!r}))).state_dict(), OUT)
"""


class Phases:
    """Runs commands one after the other.

    Args:
        out: Folder for results.
        seconds: Time for all commands [s].
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self._end = out, time.monotonic() + seconds
        path = os.pathsep.join([str(ROOT), SITE, os.environ.get("PYTHONPATH", "")])
        threads = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self._environment = os.environ | {"PYTHONPATH": path} | threads

    @property
    def left(self) -> float:
        """Time left [s]."""
        return self._end - time.monotonic()

    def run(self, name: str, command: Sequence[object], limit: float) -> int | str:
        """Run a Python command; return its exit code, or why it has none.

        Args:
            name: Name in the log.
            command: Arguments of the interpreter.
            limit: Time limit, at most the time left, after which it is sent SIGTERM [s].
        """
        limit = min(limit, self.left - 10)
        if limit < 8:
            print(f"=== {name}: no time")
            return "no time"
        log, start = Path(f"/tmp/{name}.log"), time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=self._environment,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code: int | str = "timeout"
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
            if code == "timeout":
                os.killpg(process.pid, signal.SIGTERM)  # mtrl-train writes a checkpoint and exits
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        text, took = log.read_text(errors="replace"), time.monotonic() - start
        with (self.out / "log.txt").open("a") as everything:
            everything.write(f"=== {name}: {code}, {took:.0f} s\n{text[-200_000:]}\n")
        print(
            f"=== {name}: {code}, {took:.0f} s, {self.left:.0f} s left\n{text[-2500:]}", flush=True
        )
        return code


def main() -> None:
    """Run all phases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=510)
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(exist_ok=True, parents=True)
    phases = Phases(out, given.seconds)
    if given.wheels:
        wheels = sorted(given.wheels.resolve().glob("*.whl"))
        pip = "-m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade"
        phases.run("install", [*pip.split(), "--target", SITE, *wheels], 40)
    phases.run("probe", ["-c", PROBE], 40)

    pytest = (
        "-m pytest -q -x --maxfail=30 -p no:cacheprovider -o addopts= -n 6 --timeout 60".split()
    )
    phases.run("equal", [*pytest, "tests/sac/test_cuda.py", "-k", f"not ({NEWER})"], 75)
    times = [HERE / "times.py", out / "time.jsonl"]
    if phases.run("time", [*times, 85], 95) not in (0, "timeout", "no time"):
        phases.run("time2", [*times, 40], 50)  # a new process recovers from a device error
    seconds = phases.left - 70
    if seconds > 60:
        train(phases, seconds)
    phases.run("equal2", [*pytest, "tests/sac/test_cuda.py", "-k", NEWER], 40)
    engines = "scripts/bench_engines.py --quick --device cuda --tasks 10 --width 400 1024 2048"
    phases.run("engines", [*engines.split(), "--json", out / "engines.json"], 40)
    for file in out.iterdir():
        if file.stat().st_size > LARGEST:
            print(f"{file.name}: {file.stat().st_size} bytes, skipped")
            file.unlink()
    print(f"done, {phases.left:.0f} s left")


def train(phases: Phases, seconds: float) -> None:
    """Train MT10 with PCGrad from its GPU preset for `seconds`; keep the curve and the actor."""
    flags = (
        "-m mtrl.cli.train --benchmark mt10 --surgery pcgrad --device cuda --seed 0 --workers 15 "
        "--threads 1 --eval-every 1000000 --eval-episodes 5 --checkpoint-every 20000000 "
        "--log-every 20000 --diagnose-every 400000"
    )
    hours = (seconds - 20) / 3600
    phases.run("train", [*flags.split(), "--max-runtime", hours, "--run-dir", RUN], seconds + 35)
    for name in ("progress.csv", "cosines.jsonl", "run.json", "config.yaml"):
        if (RUN / name).exists():
            shutil.copy(RUN / name, phases.out / name)
    actor = str(phases.out / "actor.safetensors")
    phases.run("export", ["-c", EXPORT.replace("OUT", repr(actor))], 20)


if __name__ == "__main__":
    main()
