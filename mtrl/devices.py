"""Devices, transfers to them, threads and memory."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtrl.errors import UsageError

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed, which comes with torch for CUDA."""


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`; `auto` is CUDA if available.

    Raises:
        UsageError: If CUDA is requested but not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: expected a machine with CUDA for 'cuda', found none")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device without synchronising.

    The copy is from pinned memory, whose allocator reuses a block only after copies from it are
    done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def restore(generator: torch.Generator, state: Tensor) -> None:
    """Set the state of a generator.

    Raises:
        UsageError: If it is that of a generator on another kind of device.
    """
    if len(state) != len(generator.get_state()):
        here = generator.device.type
        there = "cuda" if here == "cpu" else "cpu; CUDA_VISIBLE_DEVICES= hides the GPU"
        raise UsageError(
            f"device: expected that of the run so far, because random streams continue only on "
            f"the same kind of device, got {here} instead of {there}"
        )
    generator.set_state(state.cpu())


@contextmanager
def cpu_threads(n: int | None) -> Iterator[None]:
    """Return a context in which torch uses n threads; None keeps the current number."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def total_memory(device: torch.device) -> int | None:
    """Return the memory of the device, or of the machine available to this process [bytes].

    None if the system does not report it.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # limit of a container
    try:
        return min(found, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or no limit: "max"
        return found


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks for this process; do nothing on other systems.

    By default, glibc returns them to the kernel. Every update then page-faults the same megabytes
    of activations and gradients again, which takes 5 to 10% of its time.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)
