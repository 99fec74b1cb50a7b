"""T losses on a shared trunk, differentiated in the ways that gradient surgery needs.

N networks of one shape are differentiated together; each has a Gramian of its own. Gradients stay
dictionaries by parameter name, so that no `[T, P]` matrix is ever copied together.
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
"""Terms of a sum that one processor of a GPU adds up; modelled, not measured."""

_ADDS_HALVES_IN_FLOAT32 = "dtype_out" in torch.ops.aten.bmm.overloads()  # from torch 2.8 on


class Gradients(NamedTuple):
    """The gradient an optimiser applies."""

    shared: dict[str, Tensor]  # each [N, …], of the parameter's shape
    per_task: dict[str, Tensor]  # each [N, T, …]
    losses: Tensor  # [N, T]
    auxiliary: dict[str, Tensor]
    weights: Tensor  # [N, T]: how much of each task is in the shared gradient; the mean is 1/T


@dataclass(frozen=True)
class TaskGradients(ABC):
    """A gradient for each of T losses, by what a method on the Gramian asks of them.

    Attributes:
        per_task: Each `[N, T, …]`: the tasks' own parameters, each its own gradient.
        losses: `[N, T]`.
        auxiliary: What the loss returned beside, each `[N, T, …]`.
    """

    per_task: dict[str, Tensor]
    losses: Tensor
    auxiliary: dict[str, Tensor]

    @abstractmethod
    def gramian(self) -> Tensor:
        """⟨g_s, g_t⟩ over what the tasks share, `[N, T, T]`, in float32 or better."""

    @abstractmethod
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        """Σ_t w_t g_t for each shared parameter; `weights` is `[N, T]`."""

    @abstractmethod
    def along(self, direction: Parameters) -> Tensor:
        """⟨g_t, d⟩ with one direction d of all tasks, each `[N, …]` as the parameter, `[N, T]`."""

    @abstractmethod
    def products(self, other: Self) -> Tensor:
        """⟨g_t, g′_t⟩ of each task with itself on another batch, `[N, T]`."""

    def weighted(self, weights: Tensor) -> Gradients:
        """Σ_t w_t g_t on what is shared; the mean loss's gradient on the tasks' own parameters."""
        means = torch._foreach_div(list(self.per_task.values()), weights.shape[-1])
        per_task = dict(zip(self.per_task, means, strict=True))
        return Gradients(self.combine(weights), per_task, self.losses, self.auxiliary, weights)


@dataclass(frozen=True)
class Jacobian(TaskGradients):
    """Every task's gradient, formed.

    Attributes:
        shared: Each `[N, T, …]`.
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
    """G_k = ∂L_k/∂z: what each task wants of the trunk's output z.

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
        """ḡ_k, the mean over a task's samples, `[N, T, d]`."""

    @abstractmethod
    def mean(self) -> Gradients:
        """The mean loss's gradient."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Gradients:
        """Σ_k w_k ∇L_k on what is shared below z; weights are `[N, T]`.

        A task's own parameters, and all above z, get the mean loss's gradient whatever the weights.
        """


class Problem(Protocol):
    """T losses on the trunks of N networks.

    `StackedProblem` has parameters stacked by task; `MultiTaskModel` is one network of any modules.
    """

    @property
    def tasks(self) -> Any:
        """Index of these T among all tasks: `slice(None)`, or a list if a batch lacks some."""

    @property
    def rotation(self) -> Tensor | None:
        """R_k between trunk and heads, `[N, T, m, m]`, to be turned in place, if there is one."""

    def task_gradients(self) -> TaskGradients:
        """A gradient of its own for each task."""

    def features(self) -> FeatureGradients:
        """What the tasks want of the features, by one backward that pauses there."""


def gramian(gradients: Parameters) -> Tensor:
    """G = J Jᵀ of gradients `[N, T, …]`, `[N, T, T]`.

    Signs of its entries decide, so it is never computed in less than float32, and long sums go on
    in float64.
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
    """`gramian` for a GPU, each parameter's sum as many short ones beside each other.

    A product of T × T numbers, each a sum over 10⁵ to 10⁶, would keep one or two of a GPU's
    hundred processors busy; every part here is one's work. Numbers of bf16 are multiplied as they
    are where torch can add the products up in float32, which is exact to float32, and in half the
    traffic.
    """
    rows = [value.flatten(2) for value in gradients.values()]
    splits = [equal_parts(value.shape[-1]) for value in rows]
    n_networks, n_tasks = rows[0].shape[:2]
    dtype = torch.promote_types(torch.float32, rows[0].dtype)
    parts = rows[0].new_empty((n_networks, sum(splits), n_tasks, n_tasks), dtype=dtype)
    for n in range(n_networks):
        for value, out in zip(rows, parts[n].split(splits), strict=True):
            factor = value[n].unflatten(-1, (len(out), -1)).transpose(0, 1)  # [parts, T, K / parts]
            if factor.dtype != dtype and factor.is_cuda and _ADDS_HALVES_IN_FLOAT32:
                torch.bmm(factor, factor.mT, out_dtype=dtype, out=out)
            else:
                factor = factor.to(dtype)
                torch.bmm(factor, factor.mT, out=out)
    return parts.sum(1, dtype=torch.float64).to(dtype)


def equal_parts(length: int) -> int:
    """Into how many equal parts a sum is split, each of at least `SHORTEST` terms, if it can be."""
    return next(n for n in range(max(1, length // SHORTEST), 0, -1) if length % n == 0)


def combine(weights: Tensor, gradients: Parameters) -> dict[str, Tensor]:
    """Σ_t w_t g_t for each parameter, `[N, …]`; weights `[N, T]`, gradients `[N, T, …]`."""
    with full_float32(weights.device):
        found = {}
        for name, value in gradients.items():
            sums = [torch.bmm(weights[:, None], rows) for rows in _chunks(value)]
            whole = torch.cat(sums, -1) if len(sums) > 1 else sums[0]
            found[name] = whole.view(len(weights), *value.shape[2:])
    return found


def along(gradients: Parameters, direction: Parameters) -> Tensor:
    """⟨g_t, d⟩ over all parameters, `[N, T]`; gradients `[N, T, …]`, the direction `[N, …]`."""
    with full_float32(next(iter(gradients.values())).device):
        products = [
            at_least_float32(value.flatten(2)) @ direction[name].flatten(1)[..., None]
            for name, value in gradients.items()
        ]
        return torch.stack(products).sum(0)[..., 0]


def products(gradients: Parameters, others: Parameters) -> Tensor:
    """⟨g_t, g′_t⟩ over all parameters, `[N, T]`; both `[N, T, …]`."""
    found = [
        (at_least_float32(value) * others[name]).flatten(2).sum(-1)
        for name, value in gradients.items()
    ]
    return torch.stack(found).sum(0)


def _chunks(gradient: Tensor) -> Iterator[Tensor]:
    """`[N, T, …]` as matrices `[N, T, at most so many]` in at least float32, one after the other.

    On a CPU they fit into its cache, so that casting and multiplying read memory once.
    """
    size = 2**15 if gradient.device.type == "cpu" else 2**22
    return (at_least_float32(rows) for rows in gradient.flatten(2).split(size, -1))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half floats to float32; others as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
