"""Gradients per task that are never formed: a Gramian from what goes into a layer and comes back.

A linear layer's weight gradient of task t is X_tᵀ D_t, with the layer's inputs X_t `[B, in]` and
the gradient by its outputs D_t `[B, out]`. So, as Goodfellow 2015 (arXiv 1510.01799) has it for
norms of single samples,

    ⟨g_s, g_t⟩ = Σ (X_s X_tᵀ) ∘ (D_s D_tᵀ),        Σ_t w_t g_t = Xᵀ (w ∘ D):

no `[T, in, out]`, and one more product of the plain backward's size in the end. The price is
(T B)² numbers per layer, made and summed up task by task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.nets.precision import full_float32
from mtrl.surgery.gradients import (
    Parameters,
    TaskGradients,
    along,
    at_least_float32,
    combine,
    gramian,
    products,
)

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


@dataclass(frozen=True)
class FactoredGradients(TaskGradients):
    """Gradients of the layers' weights as factors, of all else formed.

    Attributes:
        formed: What is no such weight, `[N, T, …]`.
        inputs: X of each layer by its weight's name, `[N or 1, T, B, in]`.
        at_outputs: D, `[N, T, B, out]`.
    """

    formed: dict[str, Tensor]
    inputs: dict[str, Tensor]
    at_outputs: dict[str, Tensor]

    @override
    def gramian(self) -> Tensor:
        with full_float32(self.losses.device):
            parts = [
                _layer_gramian(self.inputs[name], at_output)
                for name, at_output in self.at_outputs.items()
            ]
            formed = [gramian(self.formed)] if self.formed else []
            return torch.stack([*parts, *formed]).sum(0)

    @override
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        found = combine(weights, self.formed)
        with full_float32(weights.device):
            for name, at_output in self.at_outputs.items():
                inputs, d = at_least_float32(self.inputs[name]), at_least_float32(at_output)
                weighted = (weights[..., None, None] * d).flatten(1, 2)
                found[name] = inputs.flatten(1, 2).mT @ weighted
        return found

    def along(self, direction: Parameters) -> Tensor:
        """See `TaskGradients`: ⟨X_tᵀ D_t, d⟩ = Σ (X_t d) ∘ D_t."""
        parts = [along(self.formed, direction)] if self.formed else []
        with full_float32(self.losses.device):
            for name, at_output in self.at_outputs.items():
                inputs, d = at_least_float32(self.inputs[name]), at_least_float32(at_output)
                parts.append((inputs @ direction[name][:, None] * d).sum((2, 3)))
        return torch.stack(parts).sum(0)

    def products(self, other: Self) -> Tensor:
        """See `TaskGradients`: ⟨X_tᵀ D_t, X′_tᵀ D′_t⟩ = Σ (X_t X′_tᵀ) ∘ (D_t D′_tᵀ)."""
        parts = [products(self.formed, other.formed)] if self.formed else []
        with full_float32(self.losses.device):
            for name in self.at_outputs:
                x, d = at_least_float32(self.inputs[name]), at_least_float32(self.at_outputs[name])
                among_inputs = x @ other.inputs[name].to(x.dtype).mT
                among_outputs = d @ other.at_outputs[name].to(d.dtype).mT
                parts.append((among_inputs * among_outputs).sum((2, 3)))
        return torch.stack(parts).sum(0)


def _layer_gramian(inputs: Tensor, at_output: Tensor) -> Tensor:
    """Σ (X_s X_tᵀ) ∘ (D_s D_tᵀ), `[N, T, T]`; task s against all t ≥ s at a time.

    A thin layer's gradients are smaller than these products, and are formed.
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
