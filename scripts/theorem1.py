r"""Theorem 1 of PCGrad (Yu et al. 2020) on two pairs of quadratics; landscape.py draws it.

For two convex losses, with g = g₁ + g₂ = ∇L, φ the angle between g₁ and g₂, and cos φ < 0, PCGrad's
sum is p = g₁ + g₂ − (g₁·g₂/‖g₁‖²) g₁ − (g₁·g₂/‖g₂‖²) g₂. Expanding gives

    g·p = (1 − cos²φ) (‖g₁‖² + ‖g₂‖²),
    ‖p‖² = (1 − cos²φ) (‖g₁‖² + ‖g₂‖² − 2 g₁·g₂).

If ∇L is λ-Lipschitz, then L(θ − αp) ≤ L(θ) − α g·p + ½ λα² ‖p‖², and for α ≤ 1/λ

    L(θ − αp) ≤ L(θ) − ½ α (1 − cos²φ) ‖g₁ + g₂‖².

Without a conflict, p = g, and the factor 1 − cos²φ is replaced by 1. The loss therefore decreases
until g = 0, the minimum, or cos φ = −1, where PCGrad stops although the sum could still decrease.
The figure shows an example of each. The bound is asserted at every step, so the script fails if it
does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from descent import COLORS, MARKS, Run, descend, finish, table, total
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from mtrl.surgery import gramian
from mtrl.surgery.diagnostics import cosines

PINK = "#cc79a7"


class Quadratic(nn.Module):
    """½ (θ − c)ᵀ A (θ − c), A with eigenvalues `along` the direction at `degrees` and `across`."""

    def __init__(
        self, center: Sequence[float], degrees: float, along: float, across: float
    ) -> None:
        super().__init__()
        n = torch.tensor(np.deg2rad(degrees)).double()
        n = torch.stack([n.cos(), n.sin()])
        self.center = torch.tensor(center).double()
        self.hessian = across * torch.eye(2).double() + (along - across) * torch.outer(n, n)

    def forward(self, theta: Tensor) -> Tensor:
        """Compute the loss, `[…, 2]` to `[…]`."""
        d = theta - self.center
        return 0.5 * ((d @ self.hessian) * d).sum(-1)


class Case(NamedTuple):
    """Two quadratics and a start."""

    heads: dict[str, Any]
    start: tuple[float, float]


SEPARATE = "a minimum for each loss"
CASES = {
    "one minimum for both losses": Case(
        {
            "L₁": Quadratic((0, 0), 40, along=4, across=0.02),
            "L₂": Quadratic((0, 0), 80, along=1, across=0.02),
        },
        (-1.7, 1.6),
    ),
    SEPARATE: Case(
        {
            "L₁": Quadratic((-1, 0), 100, along=3, across=1),
            "L₂": Quadratic((1, 0.4), 0, along=0.3, across=0.3),
        },
        (1.7, 1.4),
    ),
}
THEOREM_STEPS = 40


class Descent(NamedTuple):
    """A run of gradient descent with PCGrad, and the theorem's bounds."""

    path: Run
    bounds: Tensor  # on the sum after each step, [steps]
    cosines: Tensor  # [steps + 1]
    lowest: Tensor  # the sum's minimum
    step_size: float  # α


def check_theorem(name: str) -> Descent:
    """Descend, and check the bound at every step."""
    heads, start = CASES[name]
    hessian = torch.stack([head.hessian for head in heads.values()]).sum(0)
    alpha = 1 / torch.linalg.eigvalsh(hessian)[-1].item()
    path = descend(heads, start, "pcgrad", torch.optim.SGD, lr=alpha, steps=THEOREM_STEPS)
    rows = torch.stack([(path.thetas - h.center) @ h.hessian for h in heads.values()], 1)
    cos = cosines(gramian({"theta": rows}))[:, 0, 1]
    descent = 0.5 * alpha * (1 - cos.clamp(max=0).square()) * rows.sum(1).square().sum(-1)
    bounds = (path.losses - descent)[:-1]
    rounding = 8 * torch.finfo(torch.float64).eps * path.losses[0]
    worst = (path.losses[1:] - bounds).max()
    if worst > rounding:
        raise SystemExit(f"{name}: the bound of theorem 1 is violated by {worst:.3g}")
    return Descent(path, bounds, cos, total(heads, minimum(heads)), alpha)


def theorem_table(found: dict[str, Descent]) -> str:
    """Return a table of how each case ended, and how close it came to the bound."""
    rows = []
    for name, run in found.items():
        fallen = run.path.losses[:-1] - run.path.losses[1:]
        promised = run.path.losses[:-1] - run.bounds
        steps = promised > 1e-12  # below, both are rounding errors
        least = (fallen[steps] / promised[steps]).min()
        conflicts = int((run.cosines[:-1] < 0).sum())
        end = run.path.losses[-1] - run.lowest
        rows.append(
            (name, f"{run.step_size:.3f}", f"{conflicts} of {len(fallen)}", f"{least:.2f}",
             f"{run.cosines[-1]:.6f}", f"{end:.2g}")
        )  # fmt: skip
    head = "losses|α = 1/λ|steps in conflict|least descent ÷ bound|final cos φ|final sum − minimum"
    return f"Theorem 1: the bound held at every step\n\n{table(head, rows)}"


def draw_theorem(found: dict[str, Descent], file: Path) -> None:
    """Draw each case's trajectory, its loss with the bound, and the angle."""
    figure = Figure(figsize=(6.75, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots(3, 2, height_ratios=[1.7, 1.2, 0.7], sharex="row")
    xs, ys = torch.linspace(-2.2, 2.2, 200).double(), torch.linspace(-0.8, 1.9, 200).double()
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    levels = np.geomspace(1e-3, 30, 16)
    blue: dict[str, Any] = {"color": COLORS["pcgrad"], "linewidth": 1}
    blue |= {"marker": ".", "markersize": 4}
    tick: dict[str, Any] = {"color": COLORS["none"], "linestyle": "none"}
    tick |= {"marker": "_", "markersize": 5, "markeredgewidth": 1.3}
    for (plane, losses, angle), (name, run) in zip(axes.T, found.items(), strict=True):
        heads, thetas = CASES[name].heads, run.path.thetas
        field = (total(heads, grid) - run.lowest).clamp(levels[0], levels[-1])
        plane.contourf(xs, ys, field, levels, cmap="bone", norm=LogNorm(2e-5, 30))
        if name == SEPARATE:
            between = [minimum(heads, weight) for weight in np.linspace(0, 1, 100)]
            plane.plot(*torch.stack(between).T, color=PINK, linewidth=1.5)
        plane.plot(*thetas.T, color="white", linewidth=2)
        plane.plot(*thetas.T, **blue)
        plane.plot(*thetas[0], **MARKS["start"])
        plane.plot(*minimum(heads), **MARKS["minimum of the sum"])
        plane.plot(*thetas[-1], **MARKS["end"])
        plane.set(title=name, aspect="equal", xticks=range(-2, 3), yticks=(0, 1))

        excess = run.path.losses - run.lowest
        losses.plot(excess, **blue)
        losses.plot(range(1, len(excess)), run.bounds - run.lowest, **tick)
        bottom = 10 ** np.floor(np.log10(excess[-1].item()))
        losses.set(yscale="log", ylim=(bottom, 10))
        angle.plot(run.cosines, color="black", linewidth=1)
        angle.set(ylim=(-1.1, 1.1), yticks=(-1, 0, 1), xlabel="step")
    axes[1, 0].set_ylabel("L − min L")
    axes[2, 0].set_ylabel("cos φ")
    for axis in axes[1:].flat:
        axis.grid(alpha=0.3)
    handles = [Line2D([], [], label=text, **mark) for text, mark in MARKS.items()]
    handles += [
        Line2D([], [], color=PINK, linewidth=1.5, label="cos φ = −1"),
        Line2D([], [], label="gradient descent with PCGrad", **blue),
        Line2D([], [], label="bound, from the step before", **tick),
    ]
    finish(figure, handles, file)


def minimum(heads: dict[str, Any], weight: float = 0.5) -> Tensor:
    """Return the minimum of (1 − weight) L₁ + weight L₂."""
    parts = list(zip((1 - weight, weight), heads.values(), strict=True))
    hessian = torch.stack([w * head.hessian for w, head in parts]).sum(0)
    pulls = torch.stack([w * head.hessian @ head.center for w, head in parts]).sum(0)
    return torch.linalg.solve(hessian, pulls)
