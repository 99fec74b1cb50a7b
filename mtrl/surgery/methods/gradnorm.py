"""GradNorm (Chen et al. 2018, "GradNorm: Gradient Normalization …", arXiv 1711.02257)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import expect
from mtrl.surgery.base import FeatureSurgery, SurgeryTarget, zeros_like_tasks
from mtrl.surgery.gradients import FeatureGradients
from mtrl.surgery.registry import register


@register("gradnorm")
class GradNorm(FeatureSurgery):
    """Learned weights that set each task's gradient norm according to its rate of training.

    With n_k = ‖G_k‖, the weighted norms w_k n_k approach mean_j(w_j n_j) · r_k^α (eq. 2), where
    r_k = (L_k/L_k(0)) / mean_j(L_j/L_j(0)) measures how slowly task k trains. The weights minimise
    Σ_k |w_k n_k − mean_j(w_j n_j) r_k^α| with the target held constant. They sum to T.

    Deviations from the paper:
        * G_k is the gradient w.r.t. the features; the paper takes the one w.r.t. the weights of the
          last shared layer. A single backward gives G_k, and the two differ only by that layer's
          inputs.
        * Weights are updated by sign descent on log w_k; the paper uses Adam on w_k. They stay
          positive, and norms that differ by orders of magnitude are matched in few steps.
        * A ratio L_k/L_k(0) that is not positive has no meaning as a rate and is replaced by 1: an
          actor's loss can be negative.
        * Losses or norms that are not finite leave weights and initial losses unchanged.
        * The weights apply below the features; heads get their part of the mean loss's gradient.

    Args:
        alpha: Strength α with which slow tasks are favoured; 0 gives equal norms.
        lr: Step of log w_k per update.
    """

    log_weights: Tensor  # [N, T]
    initial_losses: Tensor  # [N, T]; NaN before a task's first loss

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        expect(0 <= alpha < float("inf"), "alpha >= 0 for gradnorm", alpha)
        expect(0 < lr < float("inf"), "lr > 0 for gradnorm", lr)
        self.alpha, self.lr = alpha, lr

    @override
    def prepare(self, networks: SurgeryTarget) -> None:
        zeros = zeros_like_tasks(networks)
        self.register_buffer("log_weights", zeros)
        self.register_buffer("initial_losses", torch.full_like(zeros, torch.nan))

    @override
    def weights(self, tasks: Any, found: FeatureGradients) -> Tensor:
        finite = (found.losses + found.norms).isfinite().all(-1, keepdim=True)
        initial = self.initial_losses[:, tasks]
        initial = torch.where(initial.isnan() & finite, found.losses.to(initial), initial)
        self.initial_losses[:, tasks] = initial
        ratio = found.losses / initial
        ratio = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1)
        log_weights = self.log_weights[:, tasks]
        norms = log_weights.exp() * found.norms
        target = norms.mean(-1, keepdim=True) * (ratio / ratio.mean(-1, keepdim=True)) ** self.alpha
        log_weights = log_weights - self.lr * (norms - target).sign()
        mean = log_weights.exp().mean(-1, keepdim=True)
        new = log_weights - mean.log()  # weights that sum to T
        self.log_weights[:, tasks] = torch.where(finite, new, self.log_weights[:, tasks])
        return log_weights.softmax(-1)  # the same weights divided by T
