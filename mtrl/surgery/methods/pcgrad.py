"""PCGrad (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.surgery.base import GramianSurgery, is_fused
from mtrl.surgery.registry import register


@register("pcgrad")
class PCGrad(GramianSurgery):
    """Algorithm 1: project away each gradient's conflict with every other, in random order.

    For each task i, the other tasks j are visited in a random order. If ⟨g_i, g_j⟩ is negative,
    g_i ← g_i − ⟨g_i, g_j⟩ / ‖g_j‖² · g_j, where g_i is the current and g_j the original gradient.
    The results are averaged.

    The current g_i stays in the span of the original gradients, g_i = Σ_t C_it g_t, so the method
    only needs G = J Jᵀ: ⟨g_i, g_j⟩ = (C G)_ij. All i and all networks are processed together, in
    T − 1 steps on T-vectors.

    Deviations from the paper:
        * Projected gradients are averaged, as in `none`; the paper sums them.
        * Only shared parameters enter the dot products. Per-task parameters would add to ‖g_j‖² but
          not to ⟨g_i, g_j⟩, and the projections would be too small.
        * A task whose gradient is zero conflicts with no other and is never divided by.
    """

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        n_networks, n_tasks, _ = gramian.shape
        if is_fused(gramian.device, n_tasks):
            from mtrl.surgery.methods import pcgrad_triton

            return pcgrad_triton.weights(gramian, random_keys(n_networks, n_tasks, generator))
        return _projected(gramian, random_orders(n_networks, n_tasks, generator)).mean(-2)

    @override
    def weights_or_nan(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        """Do what the base class does; our kernel does it without further launches."""
        if is_fused(gramian.device, gramian.shape[-1]):
            return self.weights(gramian, generator)
        return super().weights_or_nan(gramian, generator)


def _projected(gramian: Tensor, orders: Tensor) -> Tensor:
    """Compute C, `[N, T, T]`, in T − 1 rounds of three small operations.

    G is first permuted into each task's order. In round s, the products of the current gradient
    with the gradients still to visit are then available, and the projection updates them by row s.
    """
    n_networks, n_tasks, n_others = orders.shape
    squared_norms = gramian.diagonal(dim1=-2, dim2=-1)
    tiny = torch.finfo(gramian.dtype).tiny
    negative = torch.where(squared_norms > tiny, -1 / squared_norms, 0)
    negative = negative[:, None].expand_as(gramian).gather(-1, orders)
    products = gramian.gather(-1, orders)
    rows = gramian.gather(-2, orders.flatten(1)[..., None].expand(-1, -1, n_tasks))
    among = rows.view(n_networks, n_tasks, n_others, n_tasks).gather(
        -1, orders[:, :, None].expand(-1, -1, n_others, -1)
    )
    given = []
    for s in range(n_others):
        given.append(products[..., s].clamp(max=0).mul_(negative[..., s]))
        products.addcmul_(given[-1][..., None], among[:, :, s])
    coefficients = torch.eye(n_tasks, dtype=gramian.dtype, device=gramian.device)
    coefficients = coefficients.expand_as(gramian).clone()
    return coefficients.scatter_(-1, orders, torch.stack(given, -1)) if given else coefficients


def random_keys(n_networks: int, n_tasks: int, generator: torch.Generator) -> Tensor:
    """Draw keys of random orders, uniform in [0, 1), `[N, T, T]` on the generator's device."""
    shape = (n_networks, n_tasks, n_tasks)
    return torch.rand(shape, generator=generator, device=generator.device)


def random_orders(n_networks: int, n_tasks: int, generator: torch.Generator) -> Tensor:
    """Draw an order of all other tasks for each network and task, on the generator's device.

    Returns:
        Task indices, `[N, T, T - 1]`.
    """
    keys = random_keys(n_networks, n_tasks, generator)
    keys.diagonal(dim1=-2, dim2=-1).fill_(2.0)  # sort the task itself last, and drop it
    return keys.argsort(-1)[..., :-1]
