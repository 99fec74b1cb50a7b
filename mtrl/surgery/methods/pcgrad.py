"""PCGrad (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782)."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.surgery.base import GramianSurgery
from mtrl.surgery.registry import register

_HAS_TRITON = importlib.util.find_spec("triton") is not None


@register("pcgrad")
class PCGrad(GramianSurgery):
    """Algorithm 1: each task's gradient gives up its conflict with every other, in random order.

    For task i the others j are visited in an order drawn anew for each i. If the running ⟨g_i, g_j⟩
    is negative, g_i ← g_i − ⟨g_i, g_j⟩ / ‖g_j‖² · g_j, where g_j is the original gradient. The
    results are averaged.

    A running g_i stays in the span of the originals, g_i = Σ_t C_it g_t, so the method only ever
    needs G = J Jᵀ: ⟨g_i, g_j⟩ = (C G)_ij. All i, and all networks, are visited at once, in T − 1
    steps on T-vectors.

    Deviations from the paper:
        * The mean of the projected gradients, where the paper sums: the scale of `none`.
        * Only shared parameters enter the dot products. Per-task ones would add to ‖g_j‖² but not
          to ⟨g_i, g_j⟩, and the projections would come out too small.
        * A task whose gradient is zero conflicts with none and divides nothing.
    """

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        keys = random_keys(len(gramian), gramian.shape[-1], generator)
        if gramian.is_cuda and _HAS_TRITON:
            from mtrl.surgery.methods.pcgrad_triton import projected

            return projected(gramian, keys).mean(-2)
        return _projected(gramian, _orders(keys)).mean(-2)


def _projected(gramian: Tensor, orders: Tensor) -> Tensor:
    """As `pcgrad_triton.projected`, on any device, in T − 1 rounds of three small operations.

    G is put in each task's order first. Then in its round s a task's products with those it is yet
    to meet are at hand, and what it gives up changes them along row s.
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
    """Numbers uniform in [0, 1) on the generator's device, `[N, T, T]`: orders, to be sorted."""
    shape = (n_networks, n_tasks, n_tasks)
    return torch.rand(shape, generator=generator, device=generator.device)


def random_orders(n_networks: int, n_tasks: int, generator: torch.Generator) -> Tensor:
    """For each network and task an order of all the other tasks, drawn on the generator's device.

    Returns:
        Task indices, `[N, T, T - 1]`.
    """
    return _orders(random_keys(n_networks, n_tasks, generator))


def _orders(keys: Tensor) -> Tensor:
    """All the other tasks in ascending order of each task's keys."""
    keys.diagonal(dim1=-2, dim2=-1).fill_(2.0)  # sorts a task itself last, where it is left out
    return keys.argsort(-1)[..., :-1]
