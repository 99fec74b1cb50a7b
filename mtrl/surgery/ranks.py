"""What the processes of a data-parallel run have to agree on, for all of them to weigh alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_of_ranks(tensor: Tensor) -> Tensor:
    """Over all processes."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / world_size()


def in_any_rank(tasks: list[int], n_tasks: int, device: torch.device) -> list[int]:
    """The tasks that are there in any process."""
    if world_size() == 1:
        return tasks
    here = torch.zeros(n_tasks, dtype=torch.int32, device=device)
    here[tasks] = 1
    dist.all_reduce(here)
    return here.nonzero().flatten().tolist()
