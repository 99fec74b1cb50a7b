"""Running scales: of observations, and of the rewards of tasks whose returns differ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mtrl.devices import upload

CLIP = 10.0
"""Observations are clipped to so many standard deviations."""


class ObservationNormalizer(nn.Module):
    """Subtracts the mean of all observations seen, over all tasks, and divides by their deviation.

    Merges batches by Chan et al. 1979, in float64, on the device and without waiting for it.
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
        """Take in observations `[n, d]`."""
        rows = observations.to(self.mean.dtype)
        n, mean, variance = len(rows), rows.mean(0), rows.var(0, correction=0)
        total, away = self.count + n, mean - self.mean
        squares = self.variance * self.count + variance * n + away**2 * (self.count * n / total)
        self.mean += away * (n / total)
        self.variance.copy_(squares / total)
        self.count += n

    def forward(self, observations: Tensor) -> Tensor:
        """`[…, d]` on their common scale; one that never varies is 0."""
        deviation = (self.variance + 1e-8).sqrt().to(observations.dtype)
        return ((observations - self.mean.to(observations.dtype)) / deviation).clamp(-CLIP, CLIP)


class RewardScale:
    """A factor on each task's rewards.

    Running, it gives every task's largest discounted return so far, |Σ γᵏ r| over the steps of an
    episode up to now, the same magnitude: values then fill the range of a categorical critic, and
    temperatures mean the same for all tasks. As in Nauman et al. 2025 (arXiv 2505.23150), with
    the extreme alone: it bounds the values. Rewards are multiplied when they are sampled, so old
    transitions follow.

    Args:
        n_tasks: T.
        envs_per_task: E.
        gamma: Discount factor.
        magnitude: What the largest return becomes; None for a constant factor.
        constant: A factor on top, or alone.
        device: Of `factors`.

    Attributes:
        factors: `[T]`; stays in place.
    """

    def __init__(
        self,
        n_tasks: int,
        envs_per_task: int = 1,
        gamma: float = 0.99,
        magnitude: float | None = None,
        constant: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.gamma, self.magnitude, self.constant = gamma, magnitude, constant
        self.factors = torch.full((n_tasks,), constant, device=device)
        self._returns = np.zeros((n_tasks, envs_per_task))
        self._largest = np.zeros(n_tasks)

    def observe(self, rewards: np.ndarray, done: np.ndarray) -> None:
        """Take in a vector step's rewards and ends of episodes, `[T·E]`."""
        if self.magnitude is None:
            return
        shape = self._returns.shape
        self._returns = self.gamma * self._returns + rewards.reshape(shape)
        self._grow(np.abs(self._returns).max(1))
        self.forget(done)

    def forget(self, rows: np.ndarray) -> None:
        """Episodes of these rows, `[T·E]`, are over."""
        self._returns[rows.reshape(self._returns.shape)] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on exactly."""
        state = {"returns": self._returns, "largest": self._largest}
        return {name: torch.from_numpy(value) for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self._returns = state["returns"].numpy().copy()
        self._grow(state["largest"].numpy())

    def _grow(self, seen: np.ndarray) -> None:
        larger = np.maximum(self._largest, seen)
        if self.magnitude is not None and (larger > self._largest).any():
            self._largest = larger
            factors = self.constant * self.magnitude / np.where(larger > 0, larger, self.magnitude)
            self.factors.copy_(upload(factors.astype(np.float32), self.factors.device))
