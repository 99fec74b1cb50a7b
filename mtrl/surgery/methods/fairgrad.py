"""FairGrad (Ban & Ji 2024, "Fair Resource Allocation in Multi-Task Learning", arXiv 2402.15638)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import expect
from mtrl.surgery.base import is_fused
from mtrl.surgery.methods.simplex import FusedNewton, unit_gramian
from mtrl.surgery.registry import register

_ITERATIONS = 30
_STEPS = 12  # step lengths tried at once in each iteration: 8, 4, …, 2⁻⁸
_TO_BOUNDARY = 0.99  # fraction of the way to where a weight vanishes
_CONVERGED = 1e-6  # squared Newton decrement below which full steps are safe


@register("fairgrad")
class FairGrad(FusedNewton):
    """The step whose gains ⟨g_i, d⟩ are an α-fair allocation to the tasks.

        G w = w^(−1/α),  w > 0

    α = 1 is proportional fairness; larger α favour the tasks that gain least. With v_i = ‖g_i‖ w_i
    and the cosines C, this is C v = h v^(−1/α), h_i = ‖g_i‖^(1/α − 1): the gradient of the convex
    function ½ vᵀ C v − Σ_i h_i ∫ v_i^(−1/α) is zero. Newton's method finds its minimum; each step
    takes the best of several lengths.

    Deviations from the paper:
        * The equation is solved by Newton's method; the authors' code calls SciPy's least squares.
          For α from 0.5 to 5, the residual is below 1e-8 even if squared norms differ by 1e8.
        * If a convex combination of gradients is zero, no w is finite; a ridge as large as the
          Gramian's rounding error bounds it. A zero gradient gets the weight of a single gradient
          as long as the longest.
        * Only shared parameters enter.

    The scale is that of the equation: for orthogonal gradients w_i = ‖g_i‖^(−2α / (1 + α)), without
    a factor 1/T.

    Args:
        alpha: α, greater than zero.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        expect(0 < alpha < float("inf"), "alpha > 0 for fairgrad", alpha)
        self.alpha = alpha

    @override
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        directions, norms, unit = unit_gramian(gramian)
        absent = norms == 0
        directions = directions + torch.diag_embed(absent.double())
        norms = torch.where(absent, 1, norms.clamp(min=1e-8))
        h = norms ** (1 / self.alpha - 1)
        v = self._minimise(directions, h, self._start(directions, h))
        scale = unit ** (-2 * self.alpha / (1 + self.alpha))
        return (v / norms * scale).to(gramian.dtype)

    def _start(self, directions: Tensor, h: Tensor) -> Tensor:
        """Return the minimum along the ray through the solution for orthogonal gradients."""
        exponent = self.alpha / (1 + self.alpha)
        ray = h**exponent
        gain = (h * ray ** (1 - 1 / self.alpha)).sum(-1, keepdim=True)
        square = _quadratic(directions, ray[..., None, :])
        return ray * (gain / torch.where(square > 0, square, gain)) ** exponent

    def _minimise(self, directions: Tensor, h: Tensor, v: Tensor) -> Tensor:
        if is_fused(directions.device, v.shape[-1]):
            from mtrl.surgery.methods.newton_triton import fair_newton

            return fair_newton(
                directions, h, v, alpha=float(self.alpha), iterations=_ITERATIONS, steps=_STEPS,
                to_boundary=_TO_BOUNDARY, converged=_CONVERGED,
            )  # fmt: skip
        for _ in range(_ITERATIONS):
            v = self._newton(directions, h, v)
        return v

    def _newton(self, directions: Tensor, h: Tensor, v: Tensor) -> Tensor:
        gain = h * v ** (-1 / self.alpha)
        downhill = gain - (directions @ v[..., None]).squeeze(-1)
        hessian = directions + torch.diag_embed(gain / (self.alpha * v))
        factor, failed = torch.linalg.cholesky_ex(hessian)
        change = torch.cholesky_solve(downhill[..., None], factor).squeeze(-1)

        room = torch.where(change < 0, -v / change, torch.inf).amin(-1, keepdim=True)
        room = _TO_BOUNDARY * room
        lengths = 8 * 0.5 ** torch.arange(_STEPS, dtype=v.dtype, device=v.device)
        lengths = torch.minimum(lengths, room)  # [N, steps]
        tried = v[..., None, :] + lengths[..., None] * change[..., None, :]
        best = lengths.gather(-1, self._potential(directions, h, tried).argmin(-1, keepdim=True))
        # This close to the minimum, differences of the potential are lost in rounding.
        close = (downhill * change).sum(-1, keepdim=True) < _CONVERGED
        new = v + torch.where(close, room.clamp(max=1), best) * change
        # If rounding has made the Gramian indefinite, iterations reach a point without a step.
        sound = new.isfinite().all(-1, keepdim=True) & (failed[..., None] == 0)
        return torch.where(sound, new, v)

    def _potential(self, directions: Tensor, h: Tensor, v: Tensor) -> Tensor:
        """Compute the potential of several v, `[N, steps, T]` to `[N, steps]`."""
        power = 1 - 1 / self.alpha
        integral = v.log() if power == 0 else v**power / power
        return _quadratic(directions, v) / 2 - (h[..., None, :] * integral).sum(-1)


def _quadratic(matrix: Tensor, v: Tensor) -> Tensor:
    """Compute vᵀ M v for several v, `[N, steps, T]` to `[N, steps]`."""
    return (v @ matrix * v).sum(-1)
