"""FAMO (Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization", arXiv 2306.03792)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import expect
from mtrl.surgery.base import FeatureSurgery, SurgeryTarget, zeros_like_tasks
from mtrl.surgery.gradients import FeatureGradients
from mtrl.surgery.registry import register


@register("famo")
class FAMO(FeatureSurgery):
    """Weights, learned from losses alone, with which all losses fall at the same relative rate.

    The step is d = c Σ_k z_k ∇ log ℓ_k with z = softmax(ξ) and c = 1 / Σ_k (z_k/ℓ_k), so the
    weights are (z_k/ℓ_k) / Σ_j (z_j/ℓ_j). After the step, ξ is updated by the improvement of each
    task: its gradient is (∂z/∂ξ)ᵀ (log ℓ(θ) − log ℓ(θ′)) + γ ξ (algorithm 1), used by Adam as in
    the authors' code. This takes another forward pass on the same batch.

    Deviations from the paper:
        * Losses must be positive, but an actor's may be negative: once a task's loss has been
          negative, ℓ_k is the loss minus twice the lowest value so far.
        * Losses that are not finite, before or after the step, leave ξ unchanged.
        * The weights apply below the features; heads get their part of the mean loss's gradient.

    Args:
        gamma: Decay γ of ξ.
        lr: Adam's learning rate for ξ.
    """

    logits: Tensor  # ξ, [N, T]
    lowest: Tensor  # lowest loss so far, or 0, [N, T]
    before: Tensor  # log ℓ(θ), [N, T]
    moments: Tensor  # Adam's, [2, N, T]
    steps: Tensor  # scalar

    def __init__(self, gamma: float = 1e-3, lr: float = 0.025) -> None:
        super().__init__()
        expect(0 <= gamma < float("inf"), "gamma >= 0 for famo", gamma)
        expect(0 < lr < float("inf"), "lr > 0 for famo", lr)
        self.gamma, self.lr = gamma, lr
        self._tasks: Any = slice(None)

    @override
    def prepare(self, networks: SurgeryTarget) -> None:
        zeros = zeros_like_tasks(networks)
        for name in ("logits", "lowest", "before"):
            self.register_buffer(name, zeros.clone())
        self.register_buffer("moments", torch.stack([zeros, zeros]))
        self.register_buffer("steps", zeros.new_zeros(()))

    @override
    def weights(self, tasks: Any, found: FeatureGradients) -> Tensor:
        self._tasks = tasks
        losses = found.losses.to(self.lowest.dtype)
        finite = losses.isfinite().all(-1, keepdim=True)
        lowest = torch.where(finite, losses, torch.inf).minimum(self.lowest[:, tasks])
        self.lowest[:, tasks] = lowest
        log_loss = self._log(losses, lowest)
        # NaN tells `after_step` to ignore this step.
        self.before[:, tasks] = torch.where(finite, log_loss, torch.nan)
        return (self.logits[:, tasks].log_softmax(-1) - log_loss).softmax(-1)

    @override
    def after_step(self, losses: Callable[[], Tensor]) -> None:
        tasks = (slice(None), self._tasks)
        fallen = self.before[tasks] - self._log(losses(), self.lowest[tasks])
        finite = fallen.isfinite().all()
        fallen = torch.where(finite, fallen, 0)
        z = self.logits[tasks].softmax(-1)
        gradient = torch.zeros_like(self.logits)
        gradient[tasks] = z * (fallen - (z * fallen).sum(-1, keepdim=True))
        gradient += self.gamma * self.logits
        moments = torch.stack(
            [
                moment.lerp(value, 1 - beta)
                for moment, value, beta in zip(
                    self.moments, (gradient, gradient**2), (0.9, 0.999), strict=True
                )
            ]
        )
        self.steps += finite
        first = moments[0] / (1 - 0.9**self.steps)
        second = moments[1] / (1 - 0.999**self.steps)
        self.moments.copy_(torch.where(finite, moments, self.moments))
        self.logits -= torch.where(finite, self.lr * first / (second.sqrt() + 1e-8), 0)

    @staticmethod
    def _log(losses: Tensor, lowest: Tensor) -> Tensor:
        return (losses - 2 * lowest).clamp(min=1e-8).log()
