"""What the networks' outputs mean: a policy over actions, and a value."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

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
