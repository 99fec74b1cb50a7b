"""What the networks' outputs mean: a policy over actions, and a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LOG_2PI = math.log(2 * math.pi)


def squashed_gaussian(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a = tanh(u), u ~ N(μ, σ²), with its log-probability (SAC, appendix C).

    log π(a|s) = log N(u; μ, σ²) − Σ log(1 − tanh² u), where log(1 − tanh² u) is written as
    2(log 2 − u − softplus(−2u)): no epsilon, exact for any u.

    Args:
        outputs: The actor's `[…, 2A]`: mean and log standard deviation.
        noise: Standard normal, `[…, A]`.

    Returns:
        Actions in (−1, 1), `[…, A]`, and log-probabilities, `[…]`.
    """
    mean, log_std = outputs.chunk(2, -1)
    log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * (noise.square() + LOG_2PI) - log_std
    log_jacobian = 2 * (math.log(2) - u - softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_jacobian).sum(-1)


@dataclass(frozen=True)
class ScalarValue:
    """A critic's one output is the value."""

    n_outputs = 1

    def mean(self, outputs: Tensor) -> Tensor:
        """`[…, 1]` to `[…]`."""
        return outputs.squeeze(-1)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """½ (Q − y)²: `[…, 1]` and `[…]` to `[…]`."""
        return 0.5 * (self.mean(outputs) - target).square()


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
        return outputs.softmax(-1) @ centres

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
        probabilities = self.histogram(target).expand_as(outputs)
        k = self.n_outputs
        losses = cross_entropy(outputs.view(-1, k), probabilities.reshape(-1, k), reduction="none")
        return losses.view(outputs.shape[:-1])


Value = ScalarValue | CategoricalValue
