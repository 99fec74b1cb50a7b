"""Where tensors live, how they get there, and what becomes of their memory."""

from __future__ import annotations

import ctypes
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


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device; `auto` is cuda where there is one.

    Raises:
        UsageError: if cuda is asked for and missing.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: expected a machine with CUDA for 'cuda', found none")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, without waiting for what the device is at.

    From pinned memory, whose allocator hands a block out again only after copies from it are done.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@contextmanager
def cpu_threads(n: int | None) -> Iterator[None]:
    """Inside, torch computes with n threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def total_memory(device: torch.device) -> int | None:
    """All memory of the device, or what this process may use of the machine's [bytes].

    None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    try:
        return min(found, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or no limit: "max"
        return found


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks for this process; elsewhere, do nothing.

    By default it returns them to the kernel, which then faults in the same megabytes of
    activations and gradients page by page in every update: 5 to 10% of its time.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)
