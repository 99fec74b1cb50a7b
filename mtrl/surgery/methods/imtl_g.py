"""IMTL-G (Liu et al. 2021, "Towards Impartial Multi-task Learning", ICLR; not on arXiv).

https://openreview.net/forum?id=IMPnRXEWpvr
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.surgery.base import GramianSurgery
from mtrl.surgery.diagnostics import cosines
from mtrl.surgery.methods.simplex import ROUNDINGS
from mtrl.surgery.registry import register


@register("imtl-g")
class IMTLG(GramianSurgery):
    """The combination whose projections onto all task gradients are equal.

        G w = τ n,  n_i = ‖g_i‖,  Σ_i w_i = 1

    so w is G⁻¹ n divided by its sum. Weights can be negative, as in the paper.

    Deviations from the paper:
        * The paper gives the solution only for a regular G; here a pseudo-inverse allows linearly
          dependent gradients. It is taken of the cosines C, w_i ∝ (C⁺ 1)_i / n_i, which is the same
          for a regular G and does not drop gradients that are short compared with others.
        * A task whose gradient is zero has weight zero. If the weights sum to zero, all are zero.
        * Only shared parameters enter, not the shared features that the paper offers instead.
    """

    capturable = False  # `eigh` synchronises on CUDA

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        tolerance = ROUNDINGS * torch.finfo(gramian.dtype).eps
        symmetric = (gramian + gramian.mT).double() / 2
        norms = symmetric.diagonal(dim1=-2, dim2=-1).sqrt()
        values, vectors = torch.linalg.eigh(cosines(symmetric))
        inverse = torch.where(values > tolerance * values[..., -1:], 1 / values, 0)
        projections = vectors.mT @ torch.ones_like(norms)[..., None]
        solution = (vectors @ (inverse[..., None] * projections)).squeeze(-1)
        weights = torch.where(norms > 0, solution / norms, 0)
        total = weights.sum(-1, keepdim=True)
        scaled = weights / total
        sound = total.abs() > tolerance * weights.abs().sum(-1, keepdim=True)
        return torch.where(sound, scaled, 0).to(gramian.dtype)
