"""Common code of the benchmarks: alternating timing, tables and JSON files."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch

from mtrl.errors import UsageError
from mtrl.nets.precision import resolve_precision

Found = dict[str, dict[str, float]]
"""Numbers by unit and name, as written by `--json`."""

WARM_UP = {"cpu": 2, "cuda": 5}
"""Rounds of warm-up; on CUDA, the fourth one captures a graph."""


CLOCKS = {"wall": perf_counter, "cpu": process_time}
"""Clocks: wall-clock time, or the CPU time of this process, which other processes on the same cores
affect little."""


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: str, clock: str = "wall"
) -> dict[str, float]:
    """Return median milliseconds of alternating runs, so that the machine's speed affects all."""
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(WARM_UP[device] + rounds):
        for name, run in variants.items():
            start = now()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(now() - start)
    return {name: median(values[-rounds:]) * 1e3 for name, values in times.items()}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of all benchmarks of updates."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")


def precision_of(parser: ArgumentParser, name: str, device: str) -> str:
    """Resolve `--precision` for this device."""
    try:
        return resolve_precision(name, torch.device(device))
    except UsageError as error:
        parser.error(str(error))


def show(found: Found, device: str, precision: str, file: Path | None) -> None:
    """Print a table for the device, and write it to --json."""
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else threads
    print(f"{device} ({name}), torch {torch.__version__}, {precision}")
    for unit, table in found.items():
        print(unit)
        for key, value in table.items():
            print(f"  {key:36} {value:12.4g}")
    if file:
        file.write_text(json.dumps(found, indent=2) + "\n")
