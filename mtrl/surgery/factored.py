"""Factored task gradients: the Gramian from layer inputs and output gradients.

The weight gradient of a linear layer for task t is X_tᵀ D_t, with the layer's inputs X_t `[B, in]`
and the gradient w.r.t. its outputs D_t `[B, out]`. Therefore, as in Goodfellow 2015 (arXiv
1510.01799) for norms of single samples,

    ⟨g_s, g_t⟩ = Σ (X_s X_tᵀ) ∘ (D_s D_tᵀ),        Σ_t w_t g_t = Xᵀ (w ∘ D).

This needs no `[T, in, out]` tensor, and one additional product of the plain backward's size at the
end. The cost is (T B)² numbers per layer, computed and summed task by task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.nets.params import Parameters
from mtrl.nets.precision import full_float32
from mtrl.surgery.gradients import (
    TaskGradients,
    along,
    at_least_float32,
    combine,
    gramian,
    products,
)

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class Factor(Protocol):
    """Task gradients of one parameter, `[N, T, …]`, with the operations of `TaskGradients`."""

    def gramian(self) -> Tensor:
        """Compute their dot products, `[N, T, T]`."""

    def combine(self, weights: Tensor) -> Tensor:
        """Compute Σ_t w_t g_t, `[N, …]`; weights `[N, T]`."""

    def along(self, direction: Tensor) -> Tensor:
        """Compute ⟨g_t, d⟩, `[N, T]`; the direction is `[N, …]`."""

    def products(self, other: Any) -> Tensor:
        """Compute ⟨g_t, g′_t⟩ with the gradients on another batch, `[N, T]`."""


@dataclass(frozen=True)
class OfLayer:
    """X_tᵀ D_t of a layer's matrix; for K experts, N means N K.

    Attributes:
        inputs: X, `[N or 1, T, B, in]`.
        at_output: D, `[N, T, B, out]`.
        experts: Number K of experts, or None.
    """

    inputs: Tensor
    at_output: Tensor
    experts: int | None = None

    def gramian(self) -> Tensor:
        """Σ (X_s X_tᵀ) ∘ (D_s D_tᵀ), `[N, T, T]`."""
        return self._summed(_layer_gramian(self.inputs, self.at_output))

    def combine(self, weights: Tensor) -> Tensor:
        """Xᵀ (w ∘ D) over all tasks' rows, `[N, in, out]`; weights `[N, T]`."""
        x, d = at_least_float32(self.inputs), at_least_float32(self.at_output)
        if self.experts is not None:
            weights = weights.repeat_interleave(self.experts, 0)
        found = x.flatten(1, 2).mT @ (weights[..., None, None] * d).flatten(1, 2)
        return found if self.experts is None else found.unflatten(0, (-1, self.experts))

    def along(self, direction: Tensor) -> Tensor:
        """⟨X_tᵀ D_t, d⟩ = Σ (X_t d) ∘ D_t, `[N, T]`."""
        x, d = at_least_float32(self.inputs), at_least_float32(self.at_output)
        direction = direction if self.experts is None else direction.flatten(0, 1)
        return self._summed((x @ direction[:, None] * d).sum((2, 3)))

    def products(self, other: OfLayer) -> Tensor:
        """⟨X_tᵀ D_t, X′_tᵀ D′_t⟩ = Σ (X_t X′_tᵀ) ∘ (D_t D′_tᵀ), `[N, T]`."""
        x, d = at_least_float32(self.inputs), at_least_float32(self.at_output)
        among_inputs = x @ other.inputs.to(x.dtype).mT
        among_outputs = d @ other.at_output.to(d.dtype).mT
        return self._summed((among_inputs * among_outputs).sum((2, 3)))

    def _summed(self, found: Tensor) -> Tensor:
        return found if self.experts is None else found.unflatten(0, (-1, self.experts)).sum(1)


@dataclass(frozen=True)
class Composed:
    """w_tk G_t of a layer with parameters θ_t = Σ_k w_tk φ_k: rank one over k.

    Attributes:
        gradients: G_t = ∂L_t/∂θ_t, `[N, T, …]`.
        mix: w, `[N, T, K]`.
    """

    gradients: Tensor
    mix: Tensor

    def gramian(self) -> Tensor:
        """(w wᵀ) ∘ (G Gᵀ), `[N, T, T]`."""
        return (self.mix @ self.mix.mT) * gramian({"": self.gradients})

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_t v_t w_tk G_t for weights v `[N, T]`: `[N, K, …]`."""
        scales = (weights[..., None] * self.mix).mT  # [N, K, T]
        found = scales @ at_least_float32(self.gradients.flatten(2))
        return found.unflatten(2, self.gradients.shape[2:])

    def along(self, direction: Tensor) -> Tensor:
        """Σ_k w_tk ⟨G_t, d_k⟩, `[N, T]`."""
        each = at_least_float32(self.gradients.flatten(2)) @ direction.flatten(2).mT  # [N, T, K]
        return (each * self.mix).sum(-1)

    def products(self, other: Composed) -> Tensor:
        """⟨w_t, w′_t⟩ ⟨G_t, G′_t⟩, `[N, T]`."""
        mixes = (self.mix * other.mix).sum(-1)
        return mixes * products({"": self.gradients}, {"": other.gradients})


@dataclass(frozen=True)
class FactoredGradients(TaskGradients):
    """Factored gradients of matrices, and explicit gradients of all other parameters.

    Attributes:
        formed: Explicit gradients, `[N, T, …]`.
        factors: Factored gradients by the parameter's name.
    """

    formed: dict[str, Tensor]
    factors: dict[str, Factor]

    @override
    def gramian(self) -> Tensor:
        formed = [gramian(self.formed)] if self.formed else []
        with full_float32(self.losses.device):
            found = [*(factor.gramian() for factor in self.factors.values()), *formed]
        return torch.stack(found).sum(0)

    @override
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        found = combine(weights, self.formed)
        with full_float32(weights.device):
            return found | {name: each.combine(weights) for name, each in self.factors.items()}

    @override
    def along(self, direction: Parameters) -> Tensor:
        found = [along(self.formed, direction)] if self.formed else []
        with full_float32(self.losses.device):
            found += [each.along(direction[name]) for name, each in self.factors.items()]
        return torch.stack(found).sum(0)

    @override
    def products(self, other: Self) -> Tensor:
        found = [products(self.formed, other.formed)] if self.formed else []
        with full_float32(self.losses.device):
            found += [each.products(other.factors[name]) for name, each in self.factors.items()]
        return torch.stack(found).sum(0)


def _layer_gramian(inputs: Tensor, at_output: Tensor) -> Tensor:
    """Compute Σ (X_s X_tᵀ) ∘ (D_s D_tᵀ), `[N, T, T]`, for task s and all t ≥ s at a time.

    The gradients of a narrow layer are smaller than these products and are computed instead.
    """
    x, d = at_least_float32(inputs), at_least_float32(at_output)
    n_networks, n_tasks, n_rows, n_outputs = d.shape
    if x.shape[-1] * n_outputs <= n_rows * (x.shape[-1] + n_outputs):
        return gramian({"weight": x.mT @ d})
    found = d.new_zeros(n_networks, n_tasks, n_tasks)
    for s in range(n_tasks):
        among_inputs = x[:, s] @ x[:, s:].flatten(1, 2).mT
        among_outputs = d[:, s] @ d[:, s:].flatten(1, 2).mT
        products = (among_inputs * among_outputs).view(n_networks, n_rows, -1, n_rows)
        found[:, s, s:] = found[:, s:, s] = products.sum((1, 3))
    return found
