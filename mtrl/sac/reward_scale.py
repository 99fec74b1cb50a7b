"""Reward normalisation by return: a running scale per task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtrl.devices import upload


class RewardScale:
    """Multiplies the rewards of each task by a running or constant factor.

    A running factor gives the returns of all tasks the same magnitude. Values then fill the range
    of a categorical critic, and temperatures mean the same for all tasks. Rewards are scaled when
    they are sampled, so that old transitions follow the current factor.

    The quantity scaled to `magnitude` is the peak of an episode: the largest |Σ_k γᵏ r_{t−k}| over
    its steps t, the return discounted backwards from t, as in Gymnasium's `NormalizeReward`.
    Without `memory`, the largest peak of all episodes so far is used, as in Nauman et al. 2025
    (arXiv 2505.23150) but only with the extreme; this bounds the values. With `memory`, the mean
    peak of the last episodes is used. This does not bound the values, but a single successful
    episode of a rarely solved task does not make all its other returns, and with them its share in
    the networks, vanish.

    Demonstrations count too: towards the largest return like any episode, and towards the mean
    with their share of a batch as weight. Otherwise a failing policy would set a scale under which
    an expert's values lie beyond the range of a categorical critic.

    Args:
        n_tasks: Number T of tasks.
        envs_per_task: Number E of environments per task.
        gamma: Discount factor.
        magnitude: Return after scaling; None for a constant factor.
        constant: Constant factor, applied in addition to the running one.
        device: Device of `factors`.
        memory: Number of episodes per task to average over; None for the maximum over all
            episodes.

    Attributes:
        factors: Factor of each task, `[T]`; updated in place.
    """

    _STATE = ("returns", "peaks", "largest", "past", "episodes")

    def __init__(
        self,
        n_tasks: int,
        envs_per_task: int = 1,
        *,
        gamma: float = 0.99,
        magnitude: float | None = None,
        constant: float = 1.0,
        device: torch.device | str = "cpu",
        memory: int | None = None,
    ) -> None:
        self.gamma, self.magnitude, self.constant = gamma, magnitude, constant
        self.memory = memory
        self.factors = torch.full((n_tasks,), constant, device=device)
        self._returns = np.zeros((n_tasks, envs_per_task))
        self._peaks = np.zeros((n_tasks, envs_per_task))  # of the current episodes
        self._largest = np.zeros(n_tasks)  # largest peak so far
        self._past = np.zeros((n_tasks, memory or 0))  # peaks of the last episodes
        self._episodes = np.zeros(n_tasks, np.int64)
        self._demonstrated = np.zeros(n_tasks)  # mean peak of demonstrations
        self._share = np.zeros(n_tasks)  # weight of that mean

    @property
    def changes(self) -> bool:
        """Whether a factor may differ from 1."""
        return self.magnitude is not None or self.constant != 1

    def observe(self, rewards: np.ndarray, done: np.ndarray) -> None:
        """Update with the rewards and ends of episodes of a vector step, `[T·E]` each."""
        if self.magnitude is None:
            return
        shape, before = self._returns.shape, self._scale()
        self._returns = self.gamma * self._returns + rewards.reshape(shape)
        self._peaks = np.maximum(self._peaks, np.abs(self._returns))
        if self.memory:
            for task, copy in np.argwhere(done.reshape(shape)):
                self._past[task, self._episodes[task] % self.memory] = self._peaks[task, copy]
                self._episodes[task] += 1
        self._largest = np.maximum(self._largest, self._peaks.max(1))
        self.forget(done)
        if (self._scale() != before).any():
            self._set()

    def peak(self, rewards: np.ndarray) -> float:
        """Return the largest discounted return up to any step of an episode with rewards `[n]`."""
        found = total = 0.0
        for reward in rewards.tolist():
            total = self.gamma * total + reward
            found = max(found, abs(total))
        return found

    def demonstrate(self, peaks: Sequence[np.ndarray], share: float) -> None:
        """Include demonstrations, which are not part of `state_dict`.

        Args:
            peaks: For each task the `peak` of each episode; empty without demonstrations.
            share: Share of a batch that is sampled from them.
        """
        for task, found in enumerate(peaks):
            if len(found):
                self._demonstrated[task], self._share[task] = found.mean(), share
                self._largest[task] = max(self._largest[task], found.max())
        self._set()

    def forget(self, rows: np.ndarray) -> None:
        """Reset the running returns of these rows, bool `[T·E]`, whose episodes are over."""
        ended = rows.reshape(self._returns.shape)
        self._returns[ended] = self._peaks[ended] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for `load_state_dict`."""
        return {name: torch.from_numpy(getattr(self, f"_{name}")) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from `state_dict`."""
        for name in self._STATE:
            setattr(self, f"_{name}", state[name].numpy().copy())
        self._set()

    def take_over(self, other: RewardScale, tasks: Sequence[tuple[int, int]]) -> None:
        """Copy the statistics of some tasks, given each one's index in this and the other scale."""
        for here, there in tasks:
            for name in self._STATE:
                getattr(self, f"_{name}")[here] = getattr(other, f"_{name}")[there]
        self._set()

    def _scale(self) -> np.ndarray:
        """Return the return to be scaled to `magnitude`, `[T]`; 0 before the first reward."""
        if not self.memory:
            return self._largest
        counted = np.minimum(self._episodes, self.memory)
        mean = self._past.sum(1) / np.maximum(counted, 1)
        own = np.where(counted > 0, mean, self._largest)
        return self._share * self._demonstrated + (1 - self._share) * own

    def _set(self) -> None:
        if self.magnitude is not None:
            scale = self._scale()
            factors = self.constant * self.magnitude / np.where(scale > 0, scale, self.magnitude)
            self.factors.copy_(upload(factors.astype(np.float32), self.factors.device))
