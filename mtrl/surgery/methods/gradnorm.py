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
    """Learned weights that give every task the gradient norm its rate of training calls for.

    With n_k = ‖G_k‖, the weighted norms w_k n_k are pulled towards mean_j(w_j n_j) · r_k^α (eq. 2),
    where r_k = (L_k/L_k(0)) / mean_j(L_j/L_j(0)) is how slowly task k trains, by descending
    Σ_k |w_k n_k − mean_j(w_j n_j) r_k^α| with the target held constant. Weights sum to T.

    Deviations from the paper:
        * G_k is the gradient on the features, where the paper takes that on the last shared layer's
          weights: it is at hand in one backward, and the two differ by that layer's inputs alone.
        * The descent is on log w_k and by sign, where the paper has Adam on w_k: weights stay
          positive, and norms that differ by orders of magnitude are met in as many steps.
        * A ratio L_k/L_k(0) that is not positive says nothing about a rate, and counts as 1: an
          actor's loss can be negative.
        * Losses or norms that are not finite leave weights and first losses as they were.
        * The weights act on what is shared; a head gets its own part of the mean loss's gradient.

    Args:
        alpha: α, how much a slow task is favoured; 0 is equal norms.
        lr: Step of log w_k per update.
    """

    log_weights: Tensor  # [N, T]
    initial_losses: Tensor  # [N, T]; NaN until a task has been seen

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
        return log_weights.softmax(-1)  # the same, divided by T
