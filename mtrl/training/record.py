"""Writing of benchmark.json and run.json, which record the origin of a run."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, one_line
from mtrl.folder import installed_versions, write_benchmark, write_text

if TYPE_CHECKING:
    import torch

    from mtrl.envs.benchmarks import Benchmark


def record_benchmark(run_dir: Path, benchmark: Benchmark) -> None:
    """Write benchmark.json at the start of a run, before any step has reported success."""
    from mtrl.envs.record import record_of

    write_benchmark(run_dir, record_of(benchmark, benchmark.by_success))


def record_process(
    run_dir: Path, config: TrainConfig, benchmark: Benchmark, device: torch.device
) -> None:
    """Add this process to run.json: its command, package versions, simulators and machine."""
    import torch

    from mtrl.envs.parity import choose_simulators
    from mtrl.envs.processes import n_cores

    path = run_dir / "run.json"
    try:
        processes = json.loads(path.read_bytes()) if path.exists() else []
    except ValueError as error:
        raise UsageError(f"resume: cannot read {path}: {one_line(error)}; remove it") from None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    simulators = choose_simulators(benchmark, config.environment).by_task
    processes.append(
        {
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": installed_versions(),
            "simulators": dict(zip(benchmark.tasks, simulators, strict=True)),
            "machine": {
                "platform": platform.platform(),
                "instructions": torch.backends.cpu.get_cpu_capability(),  # these change rounding
                "cores": n_cores(),
                "gpu": gpu,
            },
        }
    )
    write_text(path, json.dumps(processes, indent=2) + "\n")
