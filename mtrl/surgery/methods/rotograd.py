"""RotoGrad (Javaloy & Valera 2022, "RotoGrad: Gradient Homogenization", arXiv 2103.02631)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from mtrl.config.sections import LearnerConfig
from mtrl.errors import expect
from mtrl.surgery.base import Surgery, SurgeryTarget, zeros_like_tasks
from mtrl.surgery.gradients import Gradients, Problem
from mtrl.surgery.methods.rotation import MatrixExponential, orthonormalise_, turn_along_geodesic_
from mtrl.surgery.registry import register

FLOOR = 0.01
"""Least initial norm of a task, as a fraction of the tasks' mean."""


@register("rotograd")
class RotoGrad(Surgery):
    """Both parts: RotoScale gives all tasks' gradients one magnitude, RotoRotate turns them.

    G_k = ∂L_k/∂z is what task k wants of the trunk's features z, n_k = ‖G_k‖.

    *RotoScale* (section 3.1): the trunk receives Σ_k (C/n_k) G_k with C = Σ_k α_k n_k,
    α_k ∝ n_k/n_k⁰: equal magnitudes, and the length of the step is set by the tasks that have made
    the least progress since n_k⁰ was taken.

    *RotoRotate* (section 3.2): the head of task k sees R_k z, and R_k ∈ SO(m) is turned so that the
    tasks' directions agree. The losses never train R_k. It follows an objective of its own at a
    rate that decays while the networks' does not: the leader of a Stackelberg game.

    Deviations from the paper:
        * With inputs of its own for each task, as in reinforcement learning, no sample belongs to
          two tasks, and the published objective, which compares the tasks' gradients sample by
          sample, has no gradient: a rotation that never turns. Here the tasks' mean directions are
          aligned: ḡ_k is the mean of G_k over the samples, u_k = ḡ_k/‖ḡ_k‖, v = mean_k u_k held
          constant, and R_k maximises ⟨u_k, v⟩. It makes the *average* pulls on the features agree.
          It says nothing about single samples, and nothing about the trunk's parameters: equal
          pulls on z at different inputs may still conflict there.
        * The Riemannian gradient of that objective has rank two, so that its geodesic is the exact
          rotation of a plane, O(m²); `matrix_exp` is the paper's O(m³). Neither keeps moments.
        * The mean over tasks, where the paper sums: the scale of `none`.
        * Losses are not divided by their initial values: an actor's loss can be negative.
        * n_k⁰ is floored at a hundredth of the tasks' mean, or a task whose first gradient is
          nearly zero would own C; and it is taken anew every `reset_every` updates, for a critic's
          gradients chase a moving target and never compare with the very first.

    Args:
        rotation_lr: η at the start [radians per update, at most].
        rotation_decay: Factor on η after each update.
        rotation_size: Turn the first m features only; default: all.
        rotation_step: `geodesic` or `matrix_exp`.
        reset_every: Updates after which n_k⁰ is taken anew.
    """

    scales, rotates = True, True

    initial_norms: Tensor  # n_k⁰, [N, T]; 0 until the task has been seen
    updates: Tensor  # so far; a tensor, for a captured update to count

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
        self.capturable = rotation_step == "geodesic"  # torch's matrix_exp waits for the device
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
        # On the parameters' device, or a captured update would count on the host: once for ever.
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
        if self.rotates:  # after the backward, which needs R_k as it was in the forward
            self._turn(problem, torch.where(sound[..., None], found.means, 0))  # 0 turns nothing
        self.updates += sound.all()  # else this step is none, and none is counted
        return gradients

    def maintain(self, networks: SurgeryTarget) -> None:
        """Take rounding errors out of the rotations."""
        if not self.exponentials:
            for rotation in networks.rotations():
                orthonormalise_(rotation)

    def weights(self, tasks: Any, norms: Tensor) -> Tensor:
        """RotoScale's C/n_k, divided by T; a task without a gradient has weight 0.

        Norms that are not finite leave what is remembered as it was, and no finite weights.

        Args:
            tasks: Index of the T tasks among all.
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
        """One step of all rotations; `means` is ḡ, `[N, T, d]`."""
        rotation = problem.rotation
        assert rotation is not None  # `prepare` has seen to it
        size = rotation.shape[-1]
        means = means[..., :size].to(rotation.dtype)
        directions = normalize(means, dim=-1, eps=torch.finfo(means.dtype).tiny)
        v, u = directions.mean(1), directions
        if not isinstance(problem.tasks, slice):  # the batch lacks some, or has them as they come
            u = means.new_zeros(rotation.shape[:3])
            u[:, problem.tasks] = directions
        step = self.rotation_lr * self.rotation_decay ** self.updates.double()
        if self.exponentials:
            for n, exponential in enumerate(self.exponentials):
                exponential.turn_(rotation[n], u[n], v[n], step)
        else:
            turn_along_geodesic_(rotation, u, v, step)


def _zero(norms: Tensor) -> Tensor:
    """0 for each network, or NaN where a norm is not finite, for 0 times ∞ is: `[N, 1]`."""
    return (norms * 0).sum(-1, keepdim=True)


@register("rotograd-scale")
class RotoScale(RotoGrad):
    """RotoScale alone; see `RotoGrad`."""

    scales, rotates = True, False


@register("rotograd-rotate")
class RotoRotate(RotoGrad):
    """RotoRotate alone; see `RotoGrad`."""

    scales, rotates = False, True
