"""Steps of RotoGrad's rotations: along geodesics in O(d²), or by matrix exponentials in O(d³).

R_k maximises ⟨u_k, v⟩, where u_k is the direction of task k's gradient w.r.t. the features, and v
the mean direction of all tasks, held constant. With g̃_k = R_k u_k, the direction at the input of
the head, u_k = R_kᵀ g̃_k depends on R_k, and d⟨u_k, v⟩ = ⟨dR_k, g̃_k vᵀ⟩.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


def turn_along_geodesic_(rotation: Tensor, u: Tensor, v: Tensor, step: Tensor | float) -> None:
    """Step along the Riemannian gradient of ⟨Rᵀ g̃, v⟩, in place: R ← R exp(η (u vᵀ − v uᵀ)).

    The skew matrix has rank two, so its exponential is a rotation of one plane: with
    e₁ = u, e₂ = (v − ⟨v, u⟩ u)/s, s = ‖v − ⟨v, u⟩ u‖ and θ = η s,

        exp(·) = I + sin θ (e₁ e₂ᵀ − e₂ e₁ᵀ) + (cos θ − 1)(e₁ e₁ᵀ + e₂ e₂ᵀ).

    Args:
        rotation: `[…, T, m, m]`.
        u: Unit vectors, `[…, T, m]`; zero for tasks whose rotation stays unchanged.
        v: `[…, m]`, of any length.
        step: η.
    """
    v = v[..., None, :]
    across = v * (u * u).sum(-1, keepdim=True) - (u * v).sum(-1, keepdim=True) * u
    across = across - (across * u).sum(-1, keepdim=True) * u  # repeat, against cancellation
    s = across.norm(dim=-1, keepdim=True)
    e1, e2 = u, across / s.clamp(min=torch.finfo(s.dtype).tiny)
    angle = step * s
    sin, versin = angle.sin(), 2 * (angle / 2).sin().square()  # 1 − cos, without cancellation
    plane = torch.stack([e1, e2], -2) @ rotation.mT  # rows: R e₁, R e₂
    rows = torch.stack([sin * e2 - versin * e1, -sin * e1 - versin * e2], -2)
    rotation.flatten(0, -3).baddbmm_(plane.mT.flatten(0, -3), rows.flatten(0, -3))


def orthonormalise_(rotation: Tensor) -> None:
    """Remove rounding errors by one Newton–Schulz step: R ← R (3 I − RᵀR) / 2."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    rotation.copy_(rotation @ (1.5 * eye - 0.5 * rotation.mT @ rotation))


class MatrixExponential(nn.Module):
    """The paper's R_k = exp(A_k − A_kᵀ), by torch's orthogonal parametrisation; O(T m³) per step.

    Args:
        like: `[T, m, m]`; all matrices start as the identity.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(like))  # A, lower triangular: exp(0) = I
        orthogonal(self, "weight", orthogonal_map="matrix_exp", use_trivialization=False)

    def turn_(self, rotation: Tensor, u: Tensor, v: Tensor, step: Tensor | float) -> None:
        """Step A ← A + η ∂/∂A Σ_k ⟨R_kᵀ g̃_k, v⟩, and write the new R to `rotation`.

        Takes the arguments of `turn_along_geodesic_`; `rotation` must be as this module left it.
        """
        pull = (rotation @ u[..., None]).squeeze(-1)  # g̃
        with torch.enable_grad():
            aligned = self.weight @ v
            (gradient,) = torch.autograd.grad((aligned * pull).sum(), list(self.parameters()))
        with torch.no_grad():
            next(self.parameters()).add_(step * gradient)
            rotation.copy_(self.weight)
