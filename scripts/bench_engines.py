"""Compare time and memory of PCGrad's two gradient engines, `jacobian` and `factored`.

    python scripts/bench_engines.py [--quick] [--json FILE] [--device cuda] [--precision fp32]
                                    [--tasks 10 50] [--width 400 1024 2048 4096] [--memory-limit G]

A step is one of the critics: from networks and a batch to task gradients, their Gramian, PCGrad's
weights and the combined gradient, without the optimiser. The engines alternate, and their results
for the same random orders are compared.

Memory is the peak of a step beyond networks and batch. On CUDA, it is read from the allocator. On a
CPU, each engine runs in its own process, and its second step is measured: the peak of resident
memory minus the resident memory before the step, with a C library that returns freed memory at once
(unlike in training). It therefore includes the workspace of libraries, which torch's counters miss.
The result is exact on Linux with glibc, and an upper bound elsewhere.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from cases import Case
from published import ACTION, BATCH, DEPTH, OBSERVATION
from timing import Found, add_arguments, interleaved, precision_of, show

from mtrl.sac.capture import Captured
from mtrl.surgery import Gradients

ENGINES = ("jacobian", "factored")


def step_of(case: Case, engine: str) -> Callable[[], Gradients]:
    """Return PCGrad's step of the critics; networks, batch and orders do not depend on `engine`."""
    torch.manual_seed(0)
    learner = case.learner("pcgrad", gradient_engine=engine)
    problem = case.critics(learner, *case.batch())
    step = partial(torch.no_grad()(learner.surgeries["critics"]), problem, learner.generator)
    return Captured(step, [learner.generator]) if learner.captures else step


def difference(case: Case) -> float:
    """Return the difference of the engines' results, relative to their norm."""
    factored, jacobian = (
        torch.cat([gradient.flatten() for gradient in step_of(case, engine)().shared.values()])
        for engine in reversed(ENGINES)
    )
    return float((factored - jacobian).norm() / jacobian.norm())


def peak(case: Case, engine: str) -> float:
    """Return the memory of one step [MiB]; on a CPU, call this in a new process."""
    step = step_of(case, engine)
    step()  # libraries allocate memory that they keep
    if case.device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    give_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident()
    step()
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20 - before


def give_back() -> None:
    """Make glibc return free memory now, and tensors when freed, until a learner is created."""
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_threshold = ctypes.CDLL(None), -3
        libc.mallopt(mmap_threshold, 2**16)
        libc.malloc_trim(0)


def resident() -> float:
    """Return the resident memory of this process [MiB]."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def apart(case: Case, engine: str) -> float:
    """Return `peak`, measured in a separate process on a CPU."""
    if case.device == "cuda":
        return peak(case, engine)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak, case, engine).result()


def needed(case: Case) -> float:
    """Estimate the memory of a case: all gradients, and activations forward and backward [GiB]."""
    weights = (OBSERVATION + ACTION) * case.width + (DEPTH - 1) * case.width**2
    rows = 3 * DEPTH * BATCH * case.width
    return 2 * 4 * case.n_tasks * (weights + rows) / 2**30


def available(device: str) -> float:
    """Return the free memory [GiB]."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, and write it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 50], metavar="T")
    widths = [400, 1024, 2048, 4096]
    parser.add_argument("--width", type=int, nargs="+", default=widths, metavar="W")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GiB", help="default: half of the free memory"
    )
    add_arguments(parser)
    given = parser.parse_args(arguments)
    precision = precision_of(parser, given.precision, given.device)
    limit = given.memory_limit or available(given.device) / 2
    found: Found = {"ms": {}, "ratios": {}, "MiB": {}}
    for n_tasks in given.tasks:
        for width in given.width:
            case, name = Case(n_tasks, width, given.device, precision), f"mt{n_tasks}/w{width}"
            if needed(case) > limit:
                print(f"{name}: skipped, needs {needed(case):.1f} of {limit:.1f} GiB")
                continue
            memory = {engine: apart(case, engine) for engine in ENGINES}
            distance = difference(case)
            rounds = 3 if given.quick else max(5, min(40, 40 * 1024 // width * 10 // n_tasks))
            steps = {engine: step_of(case, engine) for engine in ENGINES}
            ms = interleaved(steps, rounds, given.device)
            steps.clear()
            give_back()
            found["ms"] |= {f"{name}/{engine}": round(ms[engine], 3) for engine in ENGINES}
            found["MiB"] |= {f"{name}/{engine}": round(memory[engine], 1) for engine in ENGINES}
            found["ratios"] |= {
                f"{name}/jacobian/factored": round(ms["jacobian"] / ms["factored"], 3),
                f"{name}/difference": float(f"{distance:.2g}"),
            }
    show(found, given.device, precision, given.json)


if __name__ == "__main__":
    main()
