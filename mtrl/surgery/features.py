"""Backward of stacked losses, paused at the trunk's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.nets.params import Parameters
from mtrl.nets.precision import trunks_in
from mtrl.surgery.gradients import FeatureGradients, Gradients, at_least_float32


@dataclass(frozen=True)
class StackedFeatures(FeatureGradients):
    """Backward of the mean loss, paused at z.

    Attributes:
        precision: Precision of the trunk's products; see `trunks_in`.
        auxiliary: Other results of the loss.
        features: z, `[N, T, B, d]`, with its graph.
        at_features: Gradient of the mean loss w.r.t. z, G_k / T.
        above: Gradients of the mean loss w.r.t. those `leaves` that are above z.
        leaves: Shared and per-task parameters.
        uniform: 1/T, `[N, T]`.
    """

    precision: str
    auxiliary: dict[str, Tensor]
    features: Tensor
    at_features: Tensor
    above: list[dict[str, Tensor]]
    leaves: list[dict[str, Tensor]]
    uniform: Tensor

    @override
    @property
    def norms(self) -> Tensor:
        flat = at_least_float32(self.at_features).flatten(2)
        return self._n_tasks * torch.linalg.vector_norm(flat, dim=2)

    @override
    @property
    def means(self) -> Tensor:
        return self._n_tasks * at_least_float32(self.at_features).mean(2)

    @override
    def mean(self) -> Gradients:
        return self._below(self.at_features, self.uniform)

    def weighted(self, weights: Tensor) -> Gradients:
        """Compute Σ_k w_k ∇L_k for the parameters below z.

        The weights multiply the rows of the tasks before they are backpropagated into the trunk.
        They also apply to per-task parameters below z, such as a task's bias in the first layer,
        which is a column of the trunk's one-hot layer. A single head is shared but above z, so it
        gets the gradient of the mean loss.
        """
        factors = (self._n_tasks * weights)[..., None, None]
        return self._below(self.at_features * factors.to(self.at_features.dtype), weights)

    @property
    def _n_tasks(self) -> int:
        return self.losses.shape[-1]

    def _below(self, at_features: Tensor, weights: Tensor) -> Gradients:
        with trunks_in(self.precision, at_features.device):
            below = differentiate(self.features, at_features, *self.leaves)
        on_shared, on_own = (add(a, b) for a, b in zip(self.above, below, strict=True))
        on_shared = {name: at_least_float32(value) for name, value in on_shared.items()}
        return Gradients(on_shared, on_own, self.losses, self.auxiliary, weights)


def leaves(parameters: Parameters) -> dict[str, Tensor]:
    """Return new leaves of a graph that share the parameters' memory."""
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def detached(tensors: Parameters) -> dict[str, Tensor]:
    """Return the tensors without their graph."""
    return {name: value.detach() for name, value in tensors.items()}


def differentiate(
    output: Tensor, gradient: Tensor | None, *trees: dict[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Return gradients w.r.t. all leaves of the trees, without those the output ignores."""
    wanted = [leaf for tree in trees for leaf in tree.values()]
    if not wanted or not output.requires_grad:  # everything below is frozen
        return [{} for _ in trees]
    found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
    pairs = [[(name, next(found)) for name in tree] for tree in trees]
    return [{name: value for name, value in tree if value is not None} for tree in pairs]


def add(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add dictionaries by entry; missing entries count as 0."""
    return {**a, **b, **{name: a[name] + b[name] for name in a.keys() & b.keys()}}
