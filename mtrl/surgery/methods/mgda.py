"""MGDA (Désidéri 2012; Sener & Koltun 2018, "Multi-Task Learning as Multi-Objective Optimization").

arXiv 1810.04650.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.surgery.methods.simplex import FusedNewton, minimise
from mtrl.surgery.registry import register


@register("mgda")
class MGDA(FusedNewton):
    """The shortest convex combination of the gradients, along which no task's loss increases.

        min_w ‖Σ_i w_i g_i‖  over  w ≥ 0, Σ_i w_i = 1

    At the optimum, ⟨g_i, g_w⟩ ≥ ‖g_w‖² for every task i. A task whose gradient is zero gets all the
    weight, because no step improves other tasks without harm to it.

    Deviations from the paper:
        * The problem is solved by an interior-point method; the paper uses Frank-Wolfe steps.
        * As in the paper, only shared parameters enter; its upper bound by the gradients of the
          shared features is not used.
    """

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        ones = gramian.new_ones(gramian.shape[:-1], dtype=torch.float64)
        weights, _ = minimise(gramian, 0 * ones, ones[..., :1])
        return weights.to(gramian.dtype)
