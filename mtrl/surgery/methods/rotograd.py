"""RotoGrad (Javaloy & Valera 2022, "RotoGrad: Gradient Homogenization", arXiv 2103.02631)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from mtrl.config.learner import LearnerConfig
from mtrl.errors import expect
from mtrl.surgery.base import Surgery, SurgeryTarget, zeros_like_tasks
from mtrl.surgery.gradients import Gradients, Problem
from mtrl.surgery.methods.rotation import MatrixExponential, orthonormalise_, turn_along_geodesic_
from mtrl.surgery.registry import register

FLOOR = 0.01
"""Lower bound of a task's initial norm, as a fraction of the mean over tasks."""


@register("rotograd")
class RotoGrad(Surgery):
    """RotoScale, which equalises the norms of task gradients, and RotoRotate, which aligns them.

    G_k = ∂L_k/∂z is the gradient of task k w.r.t. the trunk's features z, and n_k = ‖G_k‖.

    *RotoScale* (section 3.1): the trunk receives Σ_k (C/n_k) G_k with C = Σ_k α_k n_k and
    α_k ∝ n_k/n_k⁰. All magnitudes are equal, and the tasks that have made the least progress since
    n_k⁰ was measured determine the length of the step.

    *RotoRotate* (section 3.2): the head of task k takes R_k z, and R_k ∈ SO(m) is rotated so that
    the directions of the tasks agree. The losses never train R_k. It follows its own objective at a
    learning rate that decays while the networks' does not: the leader of a Stackelberg game.

    Deviations from the paper:
        * In reinforcement learning each task has its own inputs, so no sample belongs to two tasks.
          The published objective compares the gradients of tasks sample by sample; it would have
          no gradient, and rotations would never change. Here the mean directions of the tasks are
          aligned: ḡ_k is the mean of G_k over samples, u_k = ḡ_k/‖ḡ_k‖, v = mean_k u_k is held
          constant, and R_k maximises ⟨u_k, v⟩. This aligns the *average* gradients w.r.t. the
          features. It does not align those of single samples, nor those w.r.t. the trunk's
          parameters, where equal gradients w.r.t. z at different inputs may still conflict.
        * The Riemannian gradient of that objective has rank two, so its geodesic is an exact
          rotation of a plane, O(m²); `matrix_exp` is the paper's O(m³). Neither keeps moments.
        * Gradients are averaged over tasks, as in `none`; the paper sums them.
        * Losses are not divided by their initial values, because an actor's loss can be negative.
        * n_k⁰ is at least a hundredth of the mean over tasks; otherwise a task whose first gradient
          is nearly zero would dominate C. n_k⁰ of the tasks present is measured again every
          `reset_every` updates, because a critic's target moves and its gradients do not compare
          with the very first.

    Args:
        rotation_lr: Initial η [radians per update, at most].
        rotation_decay: Factor on η after each update.
        rotation_size: Number m of leading features to rotate; default: all.
        rotation_step: `geodesic` or `matrix_exp`.
        reset_every: Number of updates after which n_k⁰ is measured again.
    """

    scales, rotates = True, True

    initial_norms: Tensor  # n_k⁰, [N, T]; 0 before the task's first gradient
    updates: Tensor  # number of updates; a tensor, so that captured updates are counted

    def __init__(
        self,
        rotation_lr: float = 1e-3,
        rotation_decay: float = 0.99999,
        rotation_size: int | None = None,
        rotation_step: Literal["geodesic", "matrix_exp"] = "geodesic",
        reset_every: int = 10_000,
    ) -> None:
        super().__init__()
        expect(0 <= rotation_lr < float("inf"), "rotation_lr >= 0", rotation_lr)
        expect(0 < rotation_decay <= 1, "rotation_decay in (0, 1]", rotation_decay)
        expect(rotation_size is None or rotation_size > 1, "rotation_size > 1", rotation_size)
        expect(
            rotation_step in ("geodesic", "matrix_exp"),
            "'geodesic' or 'matrix_exp' as rotation_step",
            rotation_step,
        )
        expect(reset_every > 0, "reset_every > 0", reset_every)
        self.rotation_lr, self.rotation_decay = rotation_lr, rotation_decay
        self.rotation_size, self.rotation_step = rotation_size, rotation_step
        self.reset_every = reset_every
        self.capturable = rotation_step == "geodesic"  # torch's matrix_exp synchronises
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.exponentials: Sequence[MatrixExponential] = ()

    @override
    @classmethod
    def from_config(cls, config: LearnerConfig, **options: Any) -> Surgery:
        names = ("rotation_lr", "rotation_decay", "rotation_size", "rotation_step")
        return cls(**{name: getattr(config, name) for name in names} | options)

    @override
    def prepare(self, networks: SurgeryTarget) -> None:
        zeros = zeros_like_tasks(networks)
        # On the parameters' device: a captured update would increment a host tensor only once.
        self.updates = self.updates.to(zeros.device)
        self.register_buffer("initial_norms", zeros)
        if self.rotates:
            networks.add_rotation(self.rotation_size)
            if self.rotation_step == "matrix_exp":
                modules = nn.ModuleList(MatrixExponential(r) for r in networks.rotations())
                self.exponentials = cast(Sequence[MatrixExponential], modules)

    @override
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        found = problem.features()
        norms = found.norms
        gradients = found.weighted(self.weights(problem.tasks, norms))
        sound = _zero(norms) == 0
        if self.rotates:  # after the backward, which needs R_k unchanged since the forward
            self._turn(problem, torch.where(sound[..., None], found.means, 0))  # 0: no rotation
        self.updates += sound.all()  # a step that is not finite is not counted
        return gradients

    def maintain(self, networks: SurgeryTarget) -> None:
        """Remove rounding errors from the rotations."""
        if not self.exponentials:
            for rotation in networks.rotations():
                orthonormalise_(rotation)

    def weights(self, tasks: Any, norms: Tensor) -> Tensor:
        """Compute RotoScale's C/n_k, divided by T; a task without a gradient has weight 0.

        If a norm is not finite, the stored norms stay unchanged and weights are NaN.

        Args:
            tasks: Index of the T tasks among all tasks.
            norms: n_k, `[N, T]`.
        """
        n_tasks = norms.shape[-1]
        if not self.scales:
            return torch.full_like(norms, 1 / n_tasks)
        initial = self.initial_norms[:, tasks]
        zero = _zero(norms)
        anew = (initial <= 0) | (self.updates % self.reset_every == 0)
        initial = torch.where(anew & (zero == 0), norms, initial)
        self.initial_norms[:, tasks] = initial
        tiny = torch.finfo(norms.dtype).tiny
        floor = (FLOOR * initial.mean(-1, keepdim=True)).clamp(min=tiny)
        progress = norms / initial.clamp(min=floor)
        alpha = progress / progress.sum(-1, keepdim=True).clamp(min=tiny)
        magnitude = (alpha * norms).sum(-1, keepdim=True)
        weights = torch.where(norms > 0, magnitude / norms, 0) / n_tasks
        return weights + zero

    def _turn(self, problem: Problem, means: Tensor) -> None:
        """Step all rotations; `means` is ḡ, `[N, T, d]`."""
        rotation = problem.rotation
        assert rotation is not None  # set by `prepare`
        size = rotation.shape[-1]
        means = means[..., :size].to(rotation.dtype)
        directions = normalize(means, dim=-1, eps=torch.finfo(means.dtype).tiny)
        v, u = directions.mean(1), directions
        if not isinstance(problem.tasks, slice):  # the batch has some tasks, in any order
            u = means.new_zeros(rotation.shape[:3])
            u[:, problem.tasks] = directions
        step = self.rotation_lr * self.rotation_decay ** self.updates.double()
        if self.exponentials:
            for n, exponential in enumerate(self.exponentials):
                exponential.turn_(rotation[n], u[n], v[n], step)
        else:
            turn_along_geodesic_(rotation, u, v, step)


def _zero(norms: Tensor) -> Tensor:
    """Return 0 for each network, `[N, 1]`, or NaN where a norm is not finite (as 0 · ∞ is NaN)."""
    return (norms * 0).sum(-1, keepdim=True)


@register("rotograd-scale")
class RotoScale(RotoGrad):
    """RotoScale without rotations; see `RotoGrad`."""

    scales, rotates = True, False


@register("rotograd-rotate")
class RotoRotate(RotoGrad):
    """RotoRotate without scaling; see `RotoGrad`."""

    scales, rotates = False, True
