"""One gradient per task on the shared parameters, their Gramian, and what is combined from them.

Everything stays a dictionary by parameter name, so that no `[T, P]` matrix is ever copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

Parameters = Mapping[str, Tensor]
TaskLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""`(shared, per_task, *batch) -> (loss, auxiliary)` of one task: what to minimise, a scalar, and
whatever else is wanted of the forward pass."""


class TaskGradients(NamedTuple):
    """Gradients of T losses on one network."""

    shared: dict[str, Tensor]  # each [T, …]: one gradient per task on what the tasks share
    per_task: dict[str, Tensor]  # each [T, …]: the tasks' own parameters, each its own gradient
    losses: Tensor  # [T]
    auxiliary: dict[str, Tensor]  # what the loss returned beside, each [T, …]


class Gradients(NamedTuple):
    """The gradient an optimiser applies to one network."""

    shared: dict[str, Tensor]  # each of the parameter's shape
    per_task: dict[str, Tensor]  # each [T, …]
    losses: Tensor  # [T]
    auxiliary: dict[str, Tensor]


def task_gradients(
    task_loss: TaskLoss, shared: Parameters, per_task: Parameters, *batch: Any
) -> TaskGradients:
    """Every task's own gradient, in one batched forward and backward.

    The shared parameters are not mapped over, so their gradient comes back once per task. A task's
    own parameters are, so each task's reach only its own: they cannot leak into another task's
    row, nor into the dot products and norms that decide about conflicts.

    Args:
        task_loss: The loss of one task; see `TaskLoss`. No randomness inside: noise is batch.
        shared: Parameters of the trunk.
        per_task: Each task's own parameters, `[T, …]`.
        batch: Further arguments, tensors or trees of tensors with a leading `[T]`.

    Example:
        >>> loss = lambda trunk, head, x, y: (((x @ trunk["w"] * head["v"]).sum(-1) - y) ** 2, {})
        >>> trunk, heads = {"w": torch.ones(2, 3)}, {"v": torch.ones(5, 3)}
        >>> g = task_gradients(loss, trunk, heads, torch.ones(5, 2), torch.zeros(5))
        >>> g.shared["w"].shape, g.per_task["v"].shape, g.losses.shape
        (torch.Size([5, 2, 3]), torch.Size([5, 3]), torch.Size([5]))
    """
    gradient = grad_and_value(task_loss, argnums=(0, 1), has_aux=True)
    in_dims = (None, 0, *(0 for _ in batch))
    (on_shared, on_own), (losses, auxiliary) = vmap(gradient, in_dims)(shared, per_task, *batch)
    return TaskGradients(on_shared, on_own, losses, auxiliary)


def mean_gradient(
    task_loss: TaskLoss, shared: Parameters, per_task: Parameters, *batch: Any
) -> Gradients:
    """The gradient of the tasks' mean loss, by one backward. Arguments as `task_gradients`."""

    def mean_loss(shared: Parameters, per_task: Parameters) -> tuple[Tensor, Any]:
        in_dims = (None, 0, *(0 for _ in batch))
        losses, auxiliary = vmap(task_loss, in_dims)(shared, per_task, *batch)
        return losses.mean(), (losses, auxiliary)

    gradient = grad_and_value(mean_loss, argnums=(0, 1), has_aux=True)
    (on_shared, on_own), (_, (losses, auxiliary)) = gradient(shared, per_task)
    return Gradients(on_shared, on_own, losses, auxiliary)


def gramian(gradients: Mapping[str, Tensor]) -> Tensor:
    """G = J Jᵀ, `[T, T]`, summed parameter by parameter."""
    flat = [gradient.flatten(1) for gradient in gradients.values()]
    return torch.stack([rows @ rows.mT for rows in flat]).sum(0)


def combine(weights: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ_t w_t g_t for each parameter; `weights` is `[T]`."""
    return {
        name: (weights @ gradient.flatten(1)).view(gradient.shape[1:])
        for name, gradient in gradients.items()
    }
