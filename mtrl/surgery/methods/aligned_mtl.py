"""Aligned-MTL (Senushkin et al. 2023, "Independent Component Alignment for Multi-Task Learning").

arXiv 2305.19000.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.surgery.base import GramianSurgery
from mtrl.surgery.methods.simplex import ROUNDINGS
from mtrl.surgery.registry import register


@register("aligned-mtl")
class AlignedMTL(GramianSurgery):
    """Algorithm 1: the average of the gradients after making them orthogonal and equally long.

    With G = V Λ Vᵀ and σ² the smallest nonzero eigenvalue, the gradients are transformed by the
    balance matrix B, the closest one that makes the condition number of their system 1:

        w = B 1/T,  B = σ V Λ^(−1/2) Vᵀ  on the eigenvectors with nonzero eigenvalue

    Deviations from the paper:
        * Every task has importance 1/T, the scale of `none`; the authors' code sums.
        * Eigenvalues within the Gramian's rounding error count as zero.
        * Only shared parameters enter, not the shared features that the paper offers instead.
    """

    capturable = False  # `eigh` synchronises on CUDA

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        symmetric = (gramian + gramian.mT).double() / 2
        values, vectors = torch.linalg.eigh(symmetric)
        tolerance = ROUNDINGS * torch.finfo(gramian.dtype).eps * values[..., -1:]
        kept = values > tolerance
        smallest = torch.where(kept, values, torch.inf).amin(-1, keepdim=True)
        shrink = torch.where(kept, (smallest / values).sqrt(), 0)
        average = torch.full_like(values, 1 / values.shape[-1])[..., None]
        weights = vectors @ (shrink[..., None] * (vectors.mT @ average))
        return weights.squeeze(-1).to(gramian.dtype)
