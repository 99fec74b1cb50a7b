"""Where tensors live, and how they get there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtrl.validation import UsageError


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
