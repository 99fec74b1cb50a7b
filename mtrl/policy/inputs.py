"""Inputs of a policy: normalised observations and the tasks they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mtrl.errors import unknown

CLIP = 10.0
"""Normalised observations are clipped to ± this [standard deviations]."""

_FLOOR = 1e-8  # of a variance
_TRUSTED = 1000  # so many observations are taken as they are
_INFLUENCE = 1e-3


class ObservationNormalizer(nn.Module):
    """Normalises observations by the running mean and standard deviation over all tasks.

    Batches are merged as in Chan et al. 1979, in float64, on the device, without synchronising.

    The influence of outliers is bounded: simulated objects now and then fly away, and then a few
    hundred observations among millions would shrink this component for all tasks at once. After
    the first 1,000 observations, each counts as at most `CLIP` standard deviations from the mean,
    or as many as add a thousandth to the sum of squares if that is more. So a component that
    begins to vary late is learned within some ten thousand observations that differ in it. Where
    nothing exceeds these bounds, the statistics are the ordinary ones.

    Attributes:
        frozen: Whether callers must not update the statistics.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.frozen = False

    @torch.no_grad()
    def observe(self, observations: Tensor) -> None:
        """Update the statistics with observations `[n, d]`."""
        rows = observations.to(self.mean.dtype)
        reach = ((self.variance + _FLOOR) * (_INFLUENCE * self.count).clamp_min(CLIP**2)).sqrt()
        reach = torch.where(self.count < _TRUSTED, torch.inf, reach)
        rows = rows.clamp(self.mean - reach, self.mean + reach)
        n, mean, variance = len(rows), rows.mean(0), rows.var(0, correction=0)
        total, away = self.count + n, mean - self.mean
        squares = self.variance * self.count + variance * n + away**2 * (self.count * n / total)
        self.mean += away * (n / total)
        self.variance.copy_(squares / total)
        self.count += n

    def forward(self, observations: Tensor) -> Tensor:
        """Normalise observations `[…, d]`; a component that never varied becomes 0."""
        deviation = (self.variance + _FLOOR).sqrt().to(observations.dtype)
        return ((observations - self.mean.to(observations.dtype)) / deviation).clamp(-CLIP, CLIP)


def by_task(
    observation: np.ndarray, tasks: Sequence[str], size: int, task: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return observations without their one-hot, `[n, size]`, and each one's task index, `[n]`.

    Args:
        observation: See `Policy.predict`.
        tasks: Task names.
        size: Length of an observation without the one-hot.
        task: Name of the task of all rows, or None.

    Raises:
        ValueError: If the task of a row is not given, or given in two ways that differ.
    """
    if task is not None and task not in tasks:
        raise ValueError(unknown("task", str(task), tasks))
    rows, n_tasks = np.atleast_2d(np.asarray(observation, np.float32)), len(tasks)
    if rows.ndim != 2 or rows.shape[-1] not in (size, size + n_tasks):
        raise ValueError(
            f"observation: expected length {size}, or {size + n_tasks} with the task's "
            f"one-hot, got shape {np.shape(observation)}"
        )
    if rows.shape[-1] == size + n_tasks:
        one_hot = rows[:, size:]
        index = one_hot.argmax(-1)
        if not np.array_equal(one_hot, np.eye(n_tasks)[index]):
            raise ValueError(
                f"observation: expected the last {n_tasks} of {size + n_tasks} numbers to be the "
                f"task's one-hot, got others, such as {one_hot[0]}"
            )
        if task is not None and any(tasks[i] != task for i in index):
            raise ValueError(f"task: expected that of the observation's one-hot, got {task!r}")
        return rows[:, :size], index
    if task is not None:
        return rows, np.full(len(rows), list(tasks).index(task))
    if n_tasks == 1 or len(rows) in (0, n_tasks):
        return rows, np.arange(len(rows)) % n_tasks
    raise ValueError(
        f"observation: expected one row for each of the {n_tasks} tasks, rows that end "
        f"with the task's one-hot, or `task=...`, got {len(rows)} rows"
    )
