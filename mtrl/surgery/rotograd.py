"""RotoGrad (Javaloy & Valera 2022, "RotoGrad: Gradient Homogenization", arXiv 2103.02631)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mtrl.config import LearnerConfig
from mtrl.surgery.base import MultiTaskModule, Surgery
from mtrl.surgery.gradients import FeatureGradients, Gradients, Problem
from mtrl.surgery.registry import register
from mtrl.surgery.rotation import MatrixExponential, orthonormalise_, turn_along_geodesic_
from mtrl.validation import expect

ORTHONORMALISE_EVERY = 10_000
"""Updates after which rounding errors are taken out of the rotations."""

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
        self.updates = 0
        self.exponentials: Sequence[MatrixExponential] = ()

    @classmethod
    def from_config(cls, config: LearnerConfig, **options: Any) -> Surgery:
        """See `Surgery`."""
        names = ("rotation_lr", "rotation_decay", "rotation_size", "rotation_step")
        return cls(**{name: getattr(config, name) for name in names} | options)

    def prepare(self, networks: MultiTaskModule) -> None:
        """See `Surgery`."""
        like = next(networks.parameters())
        self.register_buffer("initial_norms", like.new_zeros(networks.n_networks, networks.n_tasks))
        if self.rotates:
            networks.add_rotation(self.rotation_size)
            if self.rotation_step == "matrix_exp":
                modules = nn.ModuleList(MatrixExponential(r) for r in networks.rotations())
                self.exponentials = cast(Sequence[MatrixExponential], modules)

    def forward(self, problems: Sequence[Problem], generator: torch.Generator) -> list[Gradients]:
        """See `Surgery`."""
        gradients = [self._solve(n, problem) for n, problem in enumerate(problems)]
        self.updates += 1
        return gradients

    def _solve(self, n: int, problem: Problem) -> Gradients:
        seen: list[FeatureGradients] = []

        def weigh(losses: Tensor, features: FeatureGradients) -> Tensor:
            seen.append(features)
            return self.weights(n, problem.tasks, features.norms)

        gradients = problem.gradient(weigh)
        if self.rotates:  # after the backward, which needs R_k as it was in the forward
            self._turn(n, problem, seen[0].means)
        return gradients

    def weights(self, n: int, tasks: Any, norms: Tensor) -> Tensor:
        """RotoScale's C/n_k, divided by T; a task without a gradient has weight 0.

        Args:
            n: Which network.
            tasks: Index of the T tasks among all.
            norms: n_k, `[T]`.
        """
        if not self.scales:
            return torch.full_like(norms, 1 / len(norms))
        initial = self.initial_norms[n, tasks]
        initial = torch.where(initial > 0, initial, norms)
        if self.updates % self.reset_every == 0:
            initial = norms
        self.initial_norms[n, tasks] = initial
        tiny = torch.finfo(norms.dtype).tiny
        progress = norms / initial.clamp(min=(FLOOR * initial.mean()).clamp(min=tiny))
        alpha = progress / progress.sum().clamp(min=tiny)
        magnitude = (alpha * norms).sum()
        return torch.where(norms > 0, magnitude / norms, 0) / len(norms)

    def _turn(self, n: int, problem: Problem, means: Tensor) -> None:
        """One step of the rotations of network `n`; `means` is ḡ, `[T, d]`."""
        rotation = problem.rotation
        assert rotation is not None  # `prepare` has seen to it
        size = rotation.shape[-1]
        u = means.new_zeros(rotation.shape[:2])
        u[problem.tasks] = normalize(means[:, :size], eps=torch.finfo(means.dtype).tiny)
        v = u[problem.tasks].mean(0)
        step = self.rotation_lr * self.rotation_decay**self.updates
        if self.exponentials:
            self.exponentials[n].turn_(rotation, u, v, step)
        else:
            turn_along_geodesic_(rotation, u, v, step)
            if (self.updates + 1) % ORTHONORMALISE_EVERY == 0:
                orthonormalise_(rotation)

    def get_extra_state(self) -> int:
        """The number of updates: saved beside the buffers."""
        return self.updates

    def set_extra_state(self, state: int) -> None:
        """See `get_extra_state`."""
        self.updates = state


@register("rotograd-scale")
class RotoScale(RotoGrad):
    """RotoScale alone; see `RotoGrad`."""

    scales, rotates = True, False


@register("rotograd-rotate")
class RotoRotate(RotoGrad):
    """RotoRotate alone; see `RotoGrad`."""

    scales, rotates = False, True
