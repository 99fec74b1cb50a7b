"""Time the two engines of PCGrad, and watch their memory: every task's gradient formed, or factors.

    python scripts/bench_engines.py [--quick] [--json FILE] [--device cuda] [--precision fp32]
                                    [--tasks 10 50] [--width 400 1024 2048 4096] [--memory-limit G]

A step is the critics': from networks and a batch to the tasks' gradients, their Gramian, PCGrad's
weights and the combined gradient; without optimiser. Both engines take turns, and what they give
for the same random orders is compared.

Memory is what a step takes at its peak, beyond networks and batch. On CUDA the allocator counts.
On a CPU an engine has a process of its own, and its second step counts: the peak is what the kernel
saw resident less what was resident before, with a C library that gives back at once what is freed,
as a learner's does not. So it includes what libraries take to multiply, which no counter of torch's
sees. This is exact on Linux with glibc, and at most too much elsewhere.
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
    """PCGrad of the critics; networks, batch and orders are the same for both engines."""
    torch.manual_seed(0)
    learner = case.learner("pcgrad", gradient_engine=engine)
    problem = case.critics(learner, *case.batch())
    step = partial(torch.no_grad()(learner.surgeries["critics"]), problem, learner.generator)
    return Captured(step, [learner.generator]) if learner.captures else step


def difference(case: Case) -> float:
    """Between what the engines give, relative to its norm."""
    factored, jacobian = (
        torch.cat([gradient.flatten() for gradient in step_of(case, engine)().shared.values()])
        for engine in reversed(ENGINES)
    )
    return float((factored - jacobian).norm() / jacobian.norm())


def peak(case: Case, engine: str) -> float:
    """Memory of one step [MiB]; on a CPU to be called in a fresh process."""
    step = step_of(case, engine)
    step()  # libraries take memory for good
    if case.device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    give_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident()
    step()
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20 - before


def give_back() -> None:
    """Let glibc return what is free, and each tensor as it is freed, until a learner is made."""
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_threshold = ctypes.CDLL(None), -3
        libc.mallopt(mmap_threshold, 2**16)
        libc.malloc_trim(0)


def resident() -> float:
    """Memory this process holds now [MiB]."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def apart(case: Case, engine: str) -> float:
    """`peak`, in a process of its own on a CPU."""
    if case.device == "cuda":
        return peak(case, engine)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak, case, engine).result()


def needed(case: Case) -> float:
    """What a case takes, roughly: all gradients, and activations forward and backward [GiB]."""
    weights = (OBSERVATION + ACTION) * case.width + (DEPTH - 1) * case.width**2
    rows = 3 * DEPTH * BATCH * case.width
    return 2 * 4 * case.n_tasks * (weights + rows) / 2**30


def available(device: str) -> float:
    """Memory that nobody uses [GiB]."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 50], metavar="T")
    widths = [400, 1024, 2048, 4096]
    parser.add_argument("--width", type=int, nargs="+", default=widths, metavar="W")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GiB", help="default: half of what is free"
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
                print(f"{name}: left out, takes {needed(case):.1f} GiB of {limit:.1f}")
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
