"""T losses on one shared trunk, differentiated in the ways that gradient surgery needs.

Gradients stay dictionaries by parameter name, so that no `[T, P]` matrix is ever copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves

Parameters = Mapping[str, Tensor]

Trunk = Callable[[Parameters, Parameters, Any], Tensor]
"""`(shared, per_task, inputs) -> features` of one task, `[B, d]`."""

TaskLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""`(shared, per_task, features, *targets) -> (loss, auxiliary)` of one task: what to minimise, a
scalar, and whatever else is wanted of the forward pass."""


class TaskGradients(NamedTuple):
    """Gradients of T losses."""

    shared: dict[str, Tensor]  # each [T, …]: one gradient per task on what the tasks share
    per_task: dict[str, Tensor]  # each [T, …]: the tasks' own parameters, each its own gradient
    losses: Tensor  # [T]
    auxiliary: dict[str, Tensor]  # what the loss returned beside, each [T, …]


class Gradients(NamedTuple):
    """The gradient an optimiser applies."""

    shared: dict[str, Tensor]  # each of the parameter's shape
    per_task: dict[str, Tensor]  # each [T, …]
    losses: Tensor  # [T]
    auxiliary: dict[str, Tensor]
    weights: Tensor  # [T]: how much of each task's gradient is in the shared one; the mean is 1/T


class FeatureGradients:
    """G_k = ∂L_k/∂z: what each task wants of the trunk's output z.

    Args:
        tasks: `[T, B, d]`, or one tensor `[B_k, …, d]` per task.
        scale: What they still have to be multiplied by.
    """

    def __init__(self, tasks: Tensor | Sequence[Tensor], scale: float = 1.0) -> None:
        self._tasks, self._scale = tasks, scale

    @cached_property
    def norms(self) -> Tensor:
        """‖G_k‖ over samples and features, `[T]`."""
        if isinstance(self._tasks, Tensor):
            return self._scale * torch.linalg.vector_norm(self._tasks.flatten(1), dim=1)
        norms = [torch.linalg.vector_norm(task) for task in self._tasks]
        return self._scale * torch.stack(norms)

    @cached_property
    def means(self) -> Tensor:
        """ḡ_k, the mean over a task's samples, `[T, d]`."""
        if isinstance(self._tasks, Tensor):
            return self._scale * self._tasks.mean(1)
        means = [task.flatten(0, -2).mean(0) for task in self._tasks]
        return self._scale * torch.stack(means)


Weigh = Callable[[Tensor, FeatureGradients], Tensor]
"""Losses `[T]` and feature gradients to the weights `[T]` of the tasks' gradients on the trunk."""


class Problem(Protocol):
    """T losses on one trunk. `Network` has its parameters stacked; `MultiTaskModel` any modules."""

    @property
    def tasks(self) -> Any:
        """Index of these T among all tasks: `slice(None)`, or a list if a batch lacks some."""

    @property
    def rotation(self) -> Tensor | None:
        """R_k between trunk and heads, `[T, m, m]`, to be turned in place, if there is one."""

    def task_gradients(self) -> TaskGradients:
        """A gradient of its own for each task."""

    def gradient(self, weigh: Weigh | None = None) -> Gradients:
        """Σ_k w_k ∇L_k on what is shared by one backward; without `weigh` their mean.

        A task's own parameters get their part of the mean loss's gradient whatever the weights.
        """


@dataclass(frozen=True)
class Network:
    """One network on one batch, all tasks' own parameters stacked: how an SAC update poses it.

    Args:
        trunk: From inputs to features; see `Trunk`.
        loss: From features to one task's loss; see `TaskLoss`. No randomness in either: noise is
            part of the batch.
        shared: Parameters all tasks share, subject to surgery.
        per_task: Each task's own parameters, `[T, …]`. They reach only their own task's gradient:
            they cannot leak into another's, nor into the dot products that decide on conflicts.
        inputs: What the trunk sees, a tensor or a tree of tensors with a leading `[T]`.
        targets: Further arguments of the loss, likewise.
        rotation: Joins `per_task` under this name, as a constant.

    Example:
        >>> network = Network(
        ...     trunk=lambda shared, own, x: x @ shared["w"],
        ...     loss=lambda shared, own, z, y: (((z * own["v"]).sum(-1) - y).square().mean(), {}),
        ...     shared={"w": torch.ones(2, 3)},
        ...     per_task={"v": torch.ones(5, 3)},
        ...     inputs=torch.ones(5, 8, 2),
        ...     targets=(torch.zeros(5, 8),),
        ... )
        >>> found = network.task_gradients()
        >>> found.shared["w"].shape, found.per_task["v"].shape, found.losses.shape
        (torch.Size([5, 2, 3]), torch.Size([5, 3]), torch.Size([5]))
    """

    trunk: Trunk
    loss: TaskLoss
    shared: Parameters
    per_task: Parameters
    inputs: Any
    targets: tuple[Any, ...] = ()
    rotation: Tensor | None = None
    tasks: ClassVar[Any] = slice(None)

    @property
    def n_tasks(self) -> int:
        """T."""
        return len(tree_leaves((self.per_task, self.inputs))[0])

    def task_gradients(self) -> TaskGradients:
        """Every task's own gradient, in one batched forward and backward.

        Each task is given its own view of the shared parameters (`expand`: nothing is copied). The
        ordinary backward of Σ_t L_t then leaves in task t's view the gradient of L_t alone. That is

            vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(shared, per_task, batch)

        at the price of the plain backward, where torch.func's nested transforms cost a fifth more.
        """
        shared = {k: v.expand(self.n_tasks, *v.shape) for k, v in self.shared.items()}
        shared, per_task = _leaves(shared), _leaves(self.per_task)
        with torch.enable_grad():
            features = self._features(shared, per_task, 0)
            losses, auxiliary = self._heads(shared, per_task, features, 0)
            on_shared, on_own = _differentiate(losses.sum(), None, shared, per_task)
        return TaskGradients(on_shared, on_own, losses.detach(), _detached(auxiliary))

    def gradient(self, weigh: Weigh | None = None) -> Gradients:
        """Σ_k w_k ∇L_k on the trunk, by one backward that pauses at the features.

        Every task has rows of its own in z, so the backward of the mean loss to z gives all
        G_k = ∂L_k/∂z at once, and the weights are factors on these rows before they go on into the
        trunk. What belongs to a task but lies below z, its bias in the first layer, goes with them:
        it is the one-hot's column of the trunk. A single head is shared but lies above z: it gets
        the mean loss's gradient.
        """
        n_tasks = self.n_tasks
        shared, per_task = _leaves(self.shared), _leaves(self.per_task)
        with torch.enable_grad():
            features = self._features(shared, per_task, None)
            z = features.detach().requires_grad_()
            losses, auxiliary = self._heads(shared, per_task, z, None)
            above = _differentiate(losses.mean(), None, {"z": z}, shared, per_task)
            at_features, weights = above[0]["z"], losses.new_full((n_tasks,), 1 / n_tasks)
            if weigh is not None:
                weights = weigh(losses.detach(), FeatureGradients(at_features, n_tasks))
                at_features = (n_tasks * weights)[:, None, None] * at_features
            below = _differentiate(features, at_features, shared, per_task)
        on_shared, on_own = (_add(a, b) for a, b in zip(above[1:], below, strict=True))
        return Gradients(on_shared, on_own, losses.detach(), _detached(auxiliary), weights)

    def losses(self, shared: Parameters | None = None) -> Tensor:
        """The losses at these, or other, shared parameters, `[T]`."""
        shared = self.shared if shared is None else shared
        features = self._features(shared, self.per_task, None)
        return self._heads(shared, self.per_task, features, None)[0]

    def _features(self, shared: Parameters, per_task: Parameters, dim: int | None) -> Tensor:
        return vmap(self.trunk, (dim, 0, 0))(shared, per_task, self.inputs)

    def _heads(
        self, shared: Parameters, per_task: Parameters, features: Tensor, dim: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = dict(per_task)
        if self.rotation is not None:
            own["rotation"] = self.rotation
        in_dims = (dim, 0, 0, *(0 for _ in self.targets))
        return vmap(self.loss, in_dims)(shared, own, features, *self.targets)


def _leaves(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in tensors.items()}


def _differentiate(
    output: Tensor, gradient: Tensor | None, *trees: dict[str, Tensor]
) -> list[dict[str, Tensor]]:
    """The output's gradients by all leaves of the trees; what it does not depend on is left out."""
    wanted = [leaf for tree in trees for leaf in tree.values()]
    found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
    pairs = [[(name, next(found)) for name in tree] for tree in trees]
    return [{name: value for name, value in tree if value is not None} for tree in pairs]


def _add(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**a, **b, **{name: a[name] + b[name] for name in a.keys() & b.keys()}}


def gramian(gradients: Mapping[str, Tensor]) -> Tensor:
    """G = J Jᵀ, `[T, T]`, summed parameter by parameter; signs decide, so never in half floats."""
    flat = [at_least_float32(gradient).flatten(1) for gradient in gradients.values()]
    return torch.stack([rows @ rows.mT for rows in flat]).sum(0)


def combine(weights: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ_t w_t g_t for each parameter; `weights` is `[T]`."""
    return {
        name: (weights @ at_least_float32(gradient).flatten(1)).view(gradient.shape[1:])
        for name, gradient in gradients.items()
    }


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half floats to float32; others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
