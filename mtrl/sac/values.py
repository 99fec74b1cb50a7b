"""Interpretation of critic outputs: as the value itself, or as a histogram over values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import huber_loss


@dataclass(frozen=True)
class ScalarValue:
    """The value is the single output of the critic."""

    n_outputs = 1

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the value, `[…, 1]` to `[…]`."""
        return outputs.squeeze(-1)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Compute ½ (Q − y)², `[…, 1]` and `[…]` to `[…]`."""
        values = self.mean(outputs)
        # A Huber loss that never becomes linear takes one operation in each direction.
        return huber_loss(values, target.expand_as(values), reduction="none", delta=math.inf)


@dataclass(frozen=True)
class CategoricalValue:
    """The value is the mean of a histogram, whose logits are the outputs of the critic.

    The loss is the cross-entropy with the histogram of a normal distribution around the target:
    HL-Gauss (Farebrother et al. 2024, "Stop regressing", arXiv 2403.03950, section 3.1). As in the
    paper, its standard deviation is three quarters of a bin. Targets outside the bins are clamped.

    Deviation from the paper: the outermost bins extend to infinity, so that the masses sum to 1;
    the paper divides by the mass between the edges instead.

    Args:
        n_outputs: Number K of bins.
        limit: Centres of the bins range from −limit to limit [scaled return].
    """

    n_outputs: int
    limit: float

    @property
    def width(self) -> float:
        """Width of a bin [scaled return]."""
        return 2 * self.limit / (self.n_outputs - 1)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the expected value under the histogram, `[…, K]` to `[…]`."""
        limit, k = self.limit, self.n_outputs
        centres = torch.linspace(-limit, limit, k, device=outputs.device, dtype=outputs.dtype)
        # Not a matrix product, which would round values to three digits in TF32 or bf16.
        return (outputs.softmax(-1) * centres).sum(-1)

    def histogram(self, target: Tensor) -> Tensor:
        """Return the probabilities of the bins, `[…]` to `[…, K]`."""
        edge = self.limit - self.width / 2
        edges = torch.linspace(
            -edge, edge, self.n_outputs - 1, device=target.device, dtype=target.dtype
        )
        scale = 0.75 * math.sqrt(2) * self.width
        within = target.clamp(-self.limit, self.limit)[..., None]
        below = 0.5 * (1 + torch.erf((edges - within) / scale))
        return torch.diff(
            below, dim=-1, prepend=torch.zeros_like(within), append=torch.ones_like(within)
        )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropy [nats], `[N, T, B, K]` and `[T, B]` to `[N, T, B]`."""
        losses: Tensor = _CrossEntropy.apply(outputs, self.histogram(target))
        return losses


class _CrossEntropy(torch.autograd.Function):
    """−Σ p log softmax(x) for p that sum to 1, whose gradient w.r.t. x is softmax(x) − p."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, probabilities: Tensor) -> Tensor:
        logs = outputs.log_softmax(-1)
        ctx.save_for_backward(logs, probabilities)
        return -(logs * probabilities).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logs, probabilities = ctx.saved_tensors
        return logs.exp().sub_(probabilities).mul_(gradients[0][..., None]), None


Value = ScalarValue | CategoricalValue
