"""Interior-point solver for convex weights, for many Gramians at once and without branching."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.surgery.base import GramianSurgery, SurgeryTarget, is_fused
from mtrl.surgery.diagnostics import cosines

ROUNDINGS = 100
"""Error of a Gramian in units of its dtype's epsilon: it sums a million products in float32."""

_ITERATIONS = 30
_REDUCTION = 0.1  # target factor on the complementarity μ per iteration
_COMPLEMENTARITY = 1e-13  # final μ
_TO_BOUNDARY = 0.99  # fraction of the way to where a slack or multiplier vanishes
_SMALLEST_NORM = 1e-8  # lower bound of a gradient's norm, relative to the largest


class FusedNewton(GramianSurgery):
    """Base class of methods with Newton iterations, which are one kernel on CUDA with Triton."""

    capturable = False  # torch's `cholesky_solve` allocates memory and synchronises on CUDA

    @override
    def prepare(self, networks: SurgeryTarget) -> None:
        device = next(iter(networks.parameters())).device
        self.capturable = is_fused(device, networks.n_tasks)


def unit_gramian(gramian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a Gramian into that of unit vectors, and norms, in float64.

    Args:
        gramian: `[N, T, T]`; symmetric up to rounding.

    Returns:
        The cosines C, `[N, T, T]`, with a ridge as large as the Gramian's rounding error; the
        norms in units of the largest, `[N, T]`; the largest norm, `[N, 1]`, or 1 if all are zero.
    """
    ridge = ROUNDINGS * torch.finfo(gramian.dtype).eps
    gramian = gramian.double()
    gramian = (gramian + gramian.mT) / 2
    largest = gramian.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    gramian = gramian / largest[..., None]
    norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
    eye = torch.eye(gramian.shape[-1], dtype=gramian.dtype, device=gramian.device)
    return cosines(gramian) + ridge * eye, norms, largest.sqrt()


def minimise(gramian: Tensor, prior: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Solve min ⟨g_w, p⟩ + r ‖g_w‖ over convex weights w: g_w = Σ_i w_i g_i and p = Σ_i b_i g_i.

    The dual is solved, max_u min_i ⟨g_i, p + u⟩ with ‖u‖ ≤ r: the norm has a kink at g_w = 0, which
    is where conflicting tasks lead, whereas a ball is smooth. The w are the multipliers of the T
    inequalities, and θ is that of the ball. In terms of the unit vectors e_i of the gradients,
    which avoids numerical problems with their lengths, u = r Σ_i c_i e_i and x_i = ‖g_i‖ w_i:

        z = m + r C c − τ a    slacks of the inequalities; m_i = ⟨e_i, p⟩, a_i = 1 / ‖g_i‖
        s = (1 − cᵀ C c) / 2   slack of the ball
        θ c = r x,  aᵀ x = 1   stationarity
        x_i z_i = θ s = μ      complementarity

    Each iteration is one Newton step on these equations for a smaller μ, shortened so that no slack
    or multiplier vanishes.

    Args:
        gramian: `[N, T, T]`.
        prior: b, `[N, T]`, in float64.
        radius: r, `[N, 1]`, in float64.

    Returns:
        w, `[N, T]`, and v, `[N, T]`, with the dual's u = Σ_i v_i g_i; both in float64. If g_w = 0,
        v is not unique; it stays below the inverse square root of the Gramian's precision.
    """
    n_tasks = gramian.shape[-1]
    directions, norms, unit = unit_gramian(gramian)
    slopes = _apply(directions, norms * prior)
    radius = radius / unit
    scale = radius + _dot(norms * prior, slopes).clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    norms = norms.clamp(min=_SMALLEST_NORM)
    middle = (norms.amin(-1, keepdim=True) * norms.amax(-1, keepdim=True)).sqrt()

    x, ones = norms / (n_tasks * middle), torch.ones_like(norms)
    if is_fused(directions.device, n_tasks):
        from mtrl.surgery.methods.newton_triton import interior_point

        x, c = interior_point(
            directions, slopes / scale, radius / scale, middle / norms, x,
            iterations=_ITERATIONS, reduction=_REDUCTION,
            complementarity=_COMPLEMENTARITY, to_boundary=_TO_BOUNDARY,
        )  # fmt: skip
        w = x / norms
        return w / w.sum(-1, keepdim=True), radius * c / norms
    start = [x, ones, 0 * ones, ones[..., :1], ones[..., :1] / 2, 0 * ones[..., :1]]
    state = torch.cat(start, -1)  # x, z, c, θ, s, τ
    for _ in range(_ITERATIONS):
        state = _iterate(directions, slopes / scale, radius / scale, middle / norms, state)
    x, _, c = state[..., : 3 * n_tasks].chunk(3, -1)
    w = x / norms
    return w / w.sum(-1, keepdim=True), radius * c / norms


def _iterate(directions: Tensor, m: Tensor, r: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """Make one Newton step; keep the state if rounding of the Gramian leaves none."""
    n_tasks = a.shape[-1]
    sizes = [n_tasks, n_tasks, n_tasks, 1, 1, 1]
    x, z, c, theta, s, tau = state.split(sizes, -1)
    mu = _REDUCTION * (_dot(x, z) + theta * s) / (n_tasks + 1)
    mu = mu.clamp(min=_COMPLEMENTARITY)

    # Residuals of the equations.
    y = _apply(directions, c)
    slack = m + r * y - tau * a - z
    ball = (1 - _dot(c, y)) / 2 - s
    stationary = r * x - theta * c

    # Eliminate all but θ and τ: dx = free + by_theta dθ + by_tau dτ, with two equations for these.
    weight = r / theta
    matrix = (r * weight)[..., None] * directions + torch.diag_embed(z / x)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    right = mu / x - z - slack - weight * _apply(directions, stationary)
    columns = torch.stack([right, weight * y, a], -1)
    free, by_theta, by_tau = torch.cholesky_solve(columns, factor).unbind(-1)
    ee, et, e0 = _dot(a, by_theta), _dot(a, by_tau), 1 - _dot(a, x) - _dot(a, free)
    be, bt = s + _dot(y, c) - r * _dot(y, by_theta), -r * _dot(y, by_tau)
    b0 = mu - theta * (s + ball) + _dot(y, stationary) + r * _dot(y, free)
    determinant = ee * bt - et * be
    d_theta = (e0 * bt - et * b0) / determinant
    d_tau = (ee * b0 - e0 * be) / determinant

    dx = free + by_theta * d_theta + by_tau * d_tau
    dz = (mu - z * dx) / x - z
    dc = (r * dx + stationary - c * d_theta) / theta
    ds = ball - _dot(y, dc)
    positive, change = torch.cat([x, z, theta, s], -1), torch.cat([dx, dz, d_theta, ds], -1)
    room = torch.where(change < 0, -positive / change, torch.inf).amin(-1, keepdim=True)
    length = (_TO_BOUNDARY * room).clamp(max=1)
    new = state + length * torch.cat([dx, dz, dc, d_theta, ds, d_tau], -1)
    sound = new.isfinite().all(-1, keepdim=True) & (failed[..., None] == 0)
    return torch.where(sound, new, state)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1, keepdim=True)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)
