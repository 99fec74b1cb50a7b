"""Gradients of T losses on a shared trunk, as needed by gradient surgery.

N networks of one shape are differentiated together; each has its own Gramian. Gradients stay
dictionaries by parameter name, so that they are never copied into one `[T, P]` matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.nets.params import Parameters
from mtrl.nets.precision import full_float32

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

SHORTEST = 2048
"""Number of terms that one processor of a GPU sums; modelled, not measured."""

_ADDS_HALVES_IN_FLOAT32 = "dtype_out" in torch.ops.aten.bmm.overloads()  # from torch 2.8 on


class Gradients(NamedTuple):
    """Gradients for the optimiser."""

    shared: dict[str, Tensor]  # each [N, …], of the parameter's shape
    per_task: dict[str, Tensor]  # each [N, T, …]
    losses: Tensor  # [N, T]
    auxiliary: dict[str, Tensor]
    weights: Tensor  # [N, T]: weight of each task in the shared gradient; 1/T for the mean


@dataclass(frozen=True)
class TaskGradients(ABC):
    """Gradients of each of T losses, with the operations that Gramian methods need.

    Attributes:
        per_task: Gradients of per-task parameters by their own task, each `[N, T, …]`.
        losses: `[N, T]`.
        auxiliary: Other results of the loss, each `[N, T, …]`.
    """

    per_task: dict[str, Tensor]
    losses: Tensor
    auxiliary: dict[str, Tensor]

    @abstractmethod
    def gramian(self) -> Tensor:
        """Compute ⟨g_s, g_t⟩ over shared parameters, `[N, T, T]`, in float32 or wider."""

    @abstractmethod
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        """Compute Σ_t w_t g_t for each shared parameter; `weights` is `[N, T]`."""

    @abstractmethod
    def along(self, direction: Parameters) -> Tensor:
        """Compute ⟨g_t, d⟩, `[N, T]`, with one direction d for all tasks, each part `[N, …]`."""

    @abstractmethod
    def products(self, other: Self) -> Tensor:
        """Compute ⟨g_t, g′_t⟩ of each task with itself on another batch, `[N, T]`."""

    def weighted(self, weights: Tensor) -> Gradients:
        """Return Σ_t w_t g_t for shared, and the mean loss's gradient for per-task parameters."""
        per_task = self.per_task
        if per_task:  # with a single head, a task may own no parameters; foreach needs one
            means = torch._foreach_div(list(per_task.values()), weights.shape[-1])
            per_task = dict(zip(per_task, means, strict=True))
        return Gradients(self.combine(weights), per_task, self.losses, self.auxiliary, weights)


@dataclass(frozen=True)
class Jacobian(TaskGradients):
    """Explicit gradients of every task.

    Attributes:
        shared: Gradients of shared parameters, each `[N, T, …]`.
    """

    shared: dict[str, Tensor]

    @override
    def gramian(self) -> Tensor:
        return gramian(self.shared)

    @override
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        return combine(weights, self.shared)

    @override
    def along(self, direction: Parameters) -> Tensor:
        return along(self.shared, direction)

    @override
    def products(self, other: Self) -> Tensor:
        return products(self.shared, other.shared)


@dataclass(frozen=True)
class FeatureGradients(ABC):
    """G_k = ∂L_k/∂z: gradients of each task w.r.t. the trunk's output z.

    Attributes:
        losses: `[N, T]`.
    """

    losses: Tensor

    @property
    @abstractmethod
    def norms(self) -> Tensor:
        """‖G_k‖ over samples and features, `[N, T]`."""

    @property
    @abstractmethod
    def means(self) -> Tensor:
        """ḡ_k, the mean of G_k over a task's samples, `[N, T, d]`."""

    @abstractmethod
    def mean(self) -> Gradients:
        """Return the gradient of the mean loss."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Gradients:
        """Compute Σ_k w_k ∇L_k for all parameters below z; weights are `[N, T]`.

        Everything above z gets the gradient of the mean loss.
        """


class Problem(Protocol):
    """T losses on the trunks of N networks.

    `StackedProblem` has stacked parameters; `MultiTaskModel` is one network of arbitrary modules.
    """

    @property
    def tasks(self) -> Any:
        """Index of the T tasks among all tasks: `slice(None)`, or a list if some are missing."""

    @property
    def rotation(self) -> Tensor | None:
        """R_k between trunk and heads, `[N, T, m, m]`, to be updated in place; or None."""

    def task_gradients(self) -> TaskGradients:
        """Compute the gradient of each task."""

    def features(self) -> FeatureGradients:
        """Compute gradients w.r.t. the features, by a backward that pauses there."""


def gramian(gradients: Parameters) -> Tensor:
    """Compute G = J Jᵀ of gradients `[N, T, …]`, `[N, T, T]`.

    The signs of its entries matter, so it is computed in float32 or wider, and long sums are
    accumulated in float64.
    """
    device = next(iter(gradients.values())).device
    with full_float32(device):
        if device.type != "cpu":
            return split_gramian(gradients)
        products = [
            torch.bmm(rows, rows.mT) for value in gradients.values() for rows in _chunks(value)
        ]
        return torch.stack(products).double().sum(0).to(products[0].dtype)


def split_gramian(gradients: Parameters) -> Tensor:
    """Compute `gramian` on a GPU, with each parameter's sum split into many short ones.

    A product of T × T numbers, each a sum over 10⁵ to 10⁶ terms, would use only one or two of a
    GPU's hundred processors; here, every part occupies one. bf16 numbers are multiplied directly if
    torch can accumulate in float32, which is as exact as float32 and halves the traffic.
    """
    rows = [value.flatten(2) for value in gradients.values()]
    splits = [equal_parts(value.shape[-1]) for value in rows]
    n_networks, n_tasks = rows[0].shape[:2]
    dtype = torch.promote_types(torch.float32, rows[0].dtype)
    parts = rows[0].new_empty((n_networks, sum(splits), n_tasks, n_tasks), dtype=dtype)
    for value, found in zip(rows, parts.split(splits, 1), strict=True):
        products = [(value, found[:, 0])]
        if found.shape[1] > 1:  # [parts, T, K / parts] of each network
            factors = value.unflatten(-1, (found.shape[1], -1)).transpose(1, 2)
            products = list(zip(factors, found, strict=True))
        for factor, out in products:
            if factor.dtype != dtype and factor.is_cuda and _ADDS_HALVES_IN_FLOAT32:
                torch.bmm(factor, factor.mT, out_dtype=dtype, out=out)
            else:
                factor = factor.to(dtype)
                torch.bmm(factor, factor.mT, out=out)
    return parts.sum(1, dtype=torch.float64).to(dtype)


def equal_parts(length: int) -> int:
    """Return the number of equal parts of a sum, each of at least `SHORTEST` terms if possible."""
    return next(n for n in range(max(1, length // SHORTEST), 0, -1) if length % n == 0)


def combine(weights: Tensor, gradients: Parameters) -> dict[str, Tensor]:
    """Compute Σ_t w_t g_t for each parameter, `[N, …]`; weights `[N, T]`, gradients `[N, T, …]`."""
    with full_float32(weights.device):
        found = {}
        for name, value in gradients.items():
            sums = [torch.bmm(weights[:, None], rows) for rows in _chunks(value)]
            whole = torch.cat(sums, -1) if len(sums) > 1 else sums[0]
            found[name] = whole.view(len(weights), *value.shape[2:])
    return found


def along(gradients: Parameters, direction: Parameters) -> Tensor:
    """Compute ⟨g_t, d⟩ over all parameters, `[N, T]`; gradients `[N, T, …]`, direction `[N, …]`."""
    with full_float32(next(iter(gradients.values())).device):
        products = [
            at_least_float32(value.flatten(2)) @ direction[name].flatten(1)[..., None]
            for name, value in gradients.items()
        ]
        return torch.stack(products).sum(0)[..., 0]


def products(gradients: Parameters, others: Parameters) -> Tensor:
    """Compute ⟨g_t, g′_t⟩ over all parameters, `[N, T]`; both `[N, T, …]`."""
    found = [
        (at_least_float32(value) * others[name]).flatten(2).sum(-1)
        for name, value in gradients.items()
    ]
    return torch.stack(found).sum(0)


def _chunks(gradient: Tensor) -> Iterator[Tensor]:
    """Yield `[N, T, …]` as matrices `[N, T, size or less]` in float32 or wider.

    On a CPU, they fit into the cache, so that casting and multiplying read memory once.
    """
    size = 2**15 if gradient.device.type == "cpu" else 2**22
    return (at_least_float32(rows) for rows in gradient.flatten(2).split(size, -1))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half-precision tensors to float32; return others unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
