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
        n_tasks = gramian.shape[-1]
        squared_norms = gramian.diagonal(dim1=-2, dim2=-1)
        tiny = torch.finfo(gramian.dtype).tiny
        inverse = torch.where(squared_norms > tiny, 1 / squared_norms, 0)
        orders = random_orders(len(gramian), n_tasks, generator)
        if gramian.is_cuda and _HAS_TRITON:
            from mtrl.surgery.methods.pcgrad_triton import projected

            return projected(gramian, inverse, orders).mean(-2)
        return _projected(gramian, inverse, orders).mean(-2)


def _projected(gramian: Tensor, inverse: Tensor, orders: Tensor) -> Tensor:
    """As `projection.projected`, on any device, in T − 1 rounds of small operations."""
    coefficients = torch.eye(gramian.shape[-1], dtype=gramian.dtype, device=gramian.device)
    coefficients = coefficients.expand_as(gramian).clone()
    for j in orders.unbind(-1):  # j[n, i]: whom task i of network n meets in this step
        rows = gramian.gather(-2, j[..., None].expand_as(gramian))
        dots = (coefficients * rows).sum(-1)
        step = dots.clamp(max=0) * inverse.gather(-1, j)
        coefficients.scatter_add_(-1, j[..., None], -step[..., None])
    return coefficients


def random_orders(n_networks: int, n_tasks: int, generator: torch.Generator) -> Tensor:
    """For each network and task an order of all the other tasks, drawn on the generator's device.

    Returns:
        Task indices, `[N, T, T - 1]`.
    """
    shape = (n_networks, n_tasks, n_tasks)
    rank = torch.rand(shape, generator=generator, device=generator.device)
    rank.diagonal(dim1=-2, dim2=-1).fill_(2.0)  # sorts a task itself last, where it is left out
    return rank.argsort(-1)[..., :-1]
