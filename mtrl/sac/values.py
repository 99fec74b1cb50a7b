"""What a critic's outputs mean: the value itself, or a histogram over values."""

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
    """A critic's one output is the value."""

    n_outputs = 1

    def mean(self, outputs: Tensor) -> Tensor:
        """`[…, 1]` to `[…]`."""
        return outputs.squeeze(-1)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """½ (Q − y)²: `[…, 1]` and `[…]` to `[…]`."""
        values = self.mean(outputs)
        # Huber's loss that never turns linear: one operation each way.
        return huber_loss(values, target.expand_as(values), reduction="none", delta=math.inf)


@dataclass(frozen=True)
class CategoricalValue:
    """A critic's outputs are the logits of a histogram over values, whose mean is the value.

    Trained by cross-entropy with the histogram of a normal distribution around the target: HL-Gauss
    (Farebrother et al. 2024, "Stop regressing", arXiv 2403.03950, section 3.1), whose width is
    three quarters of a bin, as there. What lies beyond the bins counts as the last one.

    Args:
        n_outputs: Bins.
        limit: Centres of the bins go from −limit to limit [scaled return].
    """

    n_outputs: int
    limit: float

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2 * self.limit / (self.n_outputs - 1)

    def mean(self, outputs: Tensor) -> Tensor:
        """Expected value under the histogram, `[…, K]` to `[…]`."""
        limit, k = self.limit, self.n_outputs
        centres = torch.linspace(-limit, limit, k, device=outputs.device, dtype=outputs.dtype)
        # No matrix product: in TF32 or bf16 it would round values to three digits.
        return (outputs.softmax(-1) * centres).sum(-1)

    def histogram(self, target: Tensor) -> Tensor:
        """Probabilities of the bins, `[…]` to `[…, K]`."""
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
        """Cross-entropy [nats], `[N, T, B, K]` and `[T, B]` to `[N, T, B]`."""
        losses: Tensor = _CrossEntropy.apply(outputs, self.histogram(target))
        return losses


class _CrossEntropy(torch.autograd.Function):
    """−Σ p log softmax(x), for p that sum to 1: its gradient is (softmax(x) − p) times theirs."""

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
