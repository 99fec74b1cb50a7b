"""CAGrad (Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning").

arXiv 2110.14048.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import expect
from mtrl.surgery.methods.simplex import FusedNewton, minimise
from mtrl.surgery.registry import register


@register("cagrad")
class CAGrad(FusedNewton):
    """Algorithm 1: the step near the average gradient g_0 that is best for the worst task.

        max_d min_i ⟨g_i, d⟩  with  ‖d − g_0‖ ≤ c ‖g_0‖,
        d = g_0 + c ‖g_0‖ / ‖g_w‖ g_w  where w minimises  ⟨g_w, g_0⟩ + c ‖g_0‖ ‖g_w‖

    over convex weights w, g_w = Σ_i w_i g_i. With c = 0 this is the average; with a large c it
    approaches MGDA.

    Deviations from the paper:
        * The problem is solved by an interior-point method; the authors' code calls SLSQP. That
          code can also divide d by 1 + c² or 1 + c.
        * If the optimal g_w is zero, by which the paper divides, d is a point inside the ball with
          the same gain for the worst task.
        * Only shared parameters enter.

    Args:
        c: Radius of the ball in units of ‖g_0‖.
    """

    def __init__(self, c: float = 0.5) -> None:
        super().__init__()
        expect(0 <= c < float("inf"), "c >= 0 for cagrad", c)
        self.c = c

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        average = gramian.new_full(gramian.shape[:-1], 1 / gramian.shape[-1], dtype=torch.float64)
        squared_norm = gramian.double().mean((-1, -2))[..., None].clamp(min=0)
        _, step = minimise(gramian, average, self.c * squared_norm.sqrt())
        return (average + step).to(gramian.dtype)
