"""Batches of transitions."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mtrl.policy.policy import Policy


@dataclass(frozen=True)
class Batch:
    """B transitions of each task; row t belongs to task t."""

    observations: Tensor  # [T, B, observation]
    actions: Tensor  # [T, B, action]
    rewards: Tensor  # [T, B], scaled
    terminated: Tensor  # [T, B], 1 if the episode terminated; 0 for a time limit
    next_observations: Tensor  # [T, B, observation], never an observation after a reset

    def seen_by(self, policy: Policy) -> Batch:
        """Return the batch with observations normalised by a policy."""
        return replace(
            self,
            observations=policy.normalized(self.observations),
            next_observations=policy.normalized(self.next_observations),
        )
