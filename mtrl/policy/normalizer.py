"""Running normalisation of observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLIP = 10.0
"""Normalised observations are clipped to ± this [standard deviations]."""


class ObservationNormalizer(nn.Module):
    """Normalises observations by the running mean and standard deviation over all tasks.

    Batches are merged as in Chan et al. 1979, in float64, on the device and without synchronising.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, observations: Tensor) -> None:
        """Update the statistics with observations `[n, d]`."""
        rows = observations.to(self.mean.dtype)
        n, mean, variance = len(rows), rows.mean(0), rows.var(0, correction=0)
        total, away = self.count + n, mean - self.mean
        squares = self.variance * self.count + variance * n + away**2 * (self.count * n / total)
        self.mean += away * (n / total)
        self.variance.copy_(squares / total)
        self.count += n

    def forward(self, observations: Tensor) -> Tensor:
        """Normalise observations `[…, d]`; a component that never varied becomes 0."""
        deviation = (self.variance + 1e-8).sqrt().to(observations.dtype)
        return ((observations - self.mean.to(observations.dtype)) / deviation).clamp(-CLIP, CLIP)
