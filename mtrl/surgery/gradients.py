"""One gradient per task on the shared parameters, their Gramian, and what is combined from them.

Everything stays a dictionary by parameter name, so that no `[T, P]` matrix is ever copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves

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

    Each task is given its own view of the shared parameters (`expand`: nothing is copied). The
    ordinary backward of Σ_t L_t then leaves in task t's view the gradient of L_t alone. That is

        vmap(grad(task_loss, argnums=(0, 1)), in_dims=(None, 0, 0))(shared, per_task, batch)

    at the price of the plain backward, where torch.func's nested transforms cost a fifth more.
    A task's own parameters reach only its own gradient: they cannot leak into another task's row,
    nor into the dot products and norms that decide about conflicts.

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
    n_tasks = len(tree_leaves((per_task, batch))[0])
    views = {name: value.expand(n_tasks, *value.shape) for name, value in shared.items()}
    return TaskGradients(*_backward(Tensor.sum, task_loss, (views, per_task), (0, 0), batch))


def mean_gradient(
    task_loss: TaskLoss, shared: Parameters, per_task: Parameters, *batch: Any
) -> Gradients:
    """The gradient of the tasks' mean loss, by one backward. Arguments as `task_gradients`."""
    return Gradients(*_backward(Tensor.mean, task_loss, (shared, per_task), (None, 0), batch))


def _backward(
    reduce: Callable[[Tensor], Tensor],
    task_loss: TaskLoss,
    parameters: tuple[Parameters, Parameters],
    in_dims: tuple[int | None, int],
    batch: Sequence[Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Differentiate the reduced losses of all tasks with respect to both dictionaries."""
    with torch.enable_grad():
        leaves = [{k: v.detach().requires_grad_() for k, v in tree.items()} for tree in parameters]
        mapped = vmap(task_loss, (*in_dims, *(0 for _ in batch)))
        losses, auxiliary = mapped(*leaves, *batch)
        wanted = [leaf for tree in leaves for leaf in tree.values()]
        gradients = iter(torch.autograd.grad(reduce(losses), wanted))
    on_shared, on_own = ({name: next(gradients) for name in tree} for tree in leaves)
    return on_shared, on_own, losses.detach(), {k: v.detach() for k, v in auxiliary.items()}


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
