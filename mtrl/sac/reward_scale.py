"""A running scale for the rewards of tasks whose returns differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtrl.devices import upload


class RewardScale:
    """A factor on each task's rewards.

    Running, it gives every task's returns the same magnitude: values then fill the range of a
    categorical critic, and temperatures mean the same for all tasks. Rewards are multiplied when
    they are sampled, so old transitions follow.

    What is scaled to `magnitude` is an episode's largest discounted return |Σ γᵏ r| up to any of
    its steps: the largest of all episodes so far, as in Nauman et al. 2025 (arXiv 2505.23150) with
    the extreme alone; or, with a `memory`, the mean over the last episodes. The first bounds the
    values. The second does not, but one lucky episode of a task that is hardly ever solved does not
    make all its other returns, and so its share in the networks, vanish.

    Demonstrations count too: in the largest as any episode, and in the mean by their share of a
    batch. Otherwise a policy that has seen nothing yet would set a scale under which an expert's
    values are beyond what a categorical critic represents.

    Args:
        n_tasks: T.
        envs_per_task: E.
        gamma: Discount factor.
        magnitude: What the return becomes; None for a constant factor.
        constant: A factor on top, or alone.
        device: Of `factors`.
        memory: Episodes of a task whose mean is taken; None for the largest of all.

    Attributes:
        factors: `[T]`; stays in place.
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
        self._peaks = np.zeros((n_tasks, envs_per_task))  # of the episodes under way
        self._largest = np.zeros(n_tasks)  # of all
        self._past = np.zeros((n_tasks, memory or 0))  # peaks of the last episodes
        self._episodes = np.zeros(n_tasks, np.int64)
        self._demonstrated = np.zeros(n_tasks)  # the demonstrations' mean peak
        self._share = np.zeros(n_tasks)  # what it counts

    @property
    def changes(self) -> bool:
        """Whether a factor may be another than 1."""
        return self.magnitude is not None or self.constant != 1

    def observe(self, rewards: np.ndarray, done: np.ndarray) -> None:
        """Take in a vector step's rewards and ends of episodes, `[T·E]`."""
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
        """The largest discounted return of an episode up to any of its steps; rewards `[n]`."""
        found = total = 0.0
        for reward in rewards.tolist():
            total = self.gamma * total + reward
            found = max(found, abs(total))
        return found

    def demonstrate(self, peaks: Sequence[np.ndarray], share: float) -> None:
        """Take in demonstrations, which are not part of `state_dict`.

        Args:
            peaks: Each task's episodes' `peak`s; none for a task without demonstrations.
            share: Of a batch that is drawn from them.
        """
        for task, found in enumerate(peaks):
            if len(found):
                self._demonstrated[task], self._share[task] = found.mean(), share
                self._largest[task] = max(self._largest[task], found.max())
        self._set()

    def forget(self, rows: np.ndarray) -> None:
        """Episodes of these rows, `[T·E]`, are over."""
        ended = rows.reshape(self._returns.shape)
        self._returns[ended] = self._peaks[ended] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on exactly."""
        return {name: torch.from_numpy(getattr(self, f"_{name}")) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        for name in self._STATE:
            setattr(self, f"_{name}", state[name].numpy().copy())
        self._set()

    def _scale(self) -> np.ndarray:
        """What becomes `magnitude`, `[T]`; 0 where nothing has been seen."""
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
