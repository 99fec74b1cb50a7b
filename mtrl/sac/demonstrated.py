"""Sampling a share of every batch from demonstrations."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from mtrl.demonstrations.data import Demonstrations
from mtrl.errors import UsageError
from mtrl.policy.inputs import ObservationNormalizer
from mtrl.sac.reward_scale import RewardScale


class Demonstrated:
    """Demonstrations that provide a fixed share of each batch of a replay buffer.

    With a share of one half this is the symmetric sampling of RLPD (Ball et al. 2023, arXiv
    2302.02948, section 4.1). The share does not decrease as the buffer fills, and demonstrations
    are never overwritten, as they would be in the ring. Rows are sampled uniformly with replacement
    from the demonstrations of each task. A task without demonstrations uses the buffer only.

    Args:
        demonstrations: Demonstrations of some of the tasks; other tasks in them are ignored.
        tasks: Tasks of the buffer.
        share: Share of each batch, in (0, 1); at least one transition.
        device: Device of the buffer.

    Raises:
        UsageError: If no task has demonstrations, or the share is out of range.
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        tasks: Sequence[str],
        share: float,
        device: torch.device | str,
    ) -> None:
        if not 0 < share < 1:
            raise UsageError(f"demonstration_share: expected between 0 and 1, got {share:g}")
        shown = [task for task in tasks if task in demonstrations.tasks]
        if not shown:
            raise UsageError(
                f"demonstrations: expected some of {', '.join(tasks)}, got "
                f"{', '.join(demonstrations.tasks)}"
            )
        self._tasks, self._shown = tuple(tasks), shown
        self._data, self.share = demonstrations.select(shown), share
        data = self._data
        ends = data.rewards[:, None], data.terminated[:, None]
        rows = np.hstack([data.observations, data.actions, *ends, data.next_observations])
        self._rows = torch.from_numpy(rows.astype(np.float32)).to(device)
        lengths = torch.from_numpy(np.bincount(data.task, minlength=len(shown)))
        place = torch.tensor([tasks.index(task) for task in shown])
        # Tasks without demonstrations draw row 0, which `fill` ignores.
        counts, first = lengths.new_ones(len(tasks)), lengths.new_zeros(len(tasks))
        counts[place], first[place] = lengths, lengths.cumsum(0) - lengths
        self._counts, self._first = (found[:, None].to(device) for found in (counts, first))
        self._has = torch.tensor([[[task in shown]] for task in tasks], device=device)

    def show(self, normalizer: ObservationNormalizer | None, tasks: Collection[str]) -> None:
        """Include the demonstrations of these tasks in the statistics of observations."""
        wanted = [index for index, task in enumerate(self._shown) if task in tasks]
        if wanted and normalizer is not None and not normalizer.frozen:
            rows = torch.from_numpy(np.isin(self._data.task, wanted)).to(self._rows.device)
            observations = self._rows[rows, : self._data.observations.shape[1]]
            # In parts, as from simulators: each bounds the next one's outliers, so a component that
            # begins to vary here is learned.
            for part in observations.split(100):
                normalizer.observe(part)

    def fill(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Replace the first transitions of a batch, for tasks that have demonstrations.

        Args:
            batch: `[T, B, observation | action | reward | terminated | next observation]`.
            generator: Generator of the sample.
        """
        n = max(1, round(self.share * batch.shape[1]))
        shape, device = (len(batch), n), batch.device
        draw = torch.randint(2**63 - 1, shape, generator=generator, device=device)
        rows = self._rows[draw.remainder_(self._counts).add_(self._first)]
        mixed = torch.where(self._has, rows, batch[:, :n])
        return torch.cat([mixed, batch[:, n:]], 1)

    def tell(self, scale: RewardScale) -> None:
        """Include the returns of the demonstrations in a reward scale."""
        returns: list[np.ndarray] = [np.zeros(0)] * len(self._tasks)
        for task in self._shown:
            episodes = self._data.episodes(task)
            found = [scale.peak(self._data.rewards[rows]) for rows in episodes]
            returns[self._tasks.index(task)] = np.array(found)
        scale.demonstrate(returns, self.share)
