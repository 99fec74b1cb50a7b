"""What a method of gradient surgery is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtrl.config import LearnerConfig
from mtrl.surgery.gradients import (
    FeatureGradients,
    Gradients,
    Problem,
    TaskGradients,
    combine,
    gramian,
)


class MultiTaskModule(Protocol):
    """What a method may know of the N networks it is for."""

    n_networks: int

    @property
    def n_tasks(self) -> int:
        """T."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As `torch.nn.Module`."""

    def add_rotation(self, size: int | None) -> None:
        """Put R_k = I in front of each head, over the first `size` features (None: all)."""

    def rotations(self) -> Sequence[Tensor]:
        """Each network's rotations, `[T, m, m]`, once they are added."""


class Surgery(nn.Module, ABC):
    """Turns the T losses of each of N networks into one gradient for each network.

    What a method remembers from update to update goes into buffers: they are saved with a run.
    """

    @classmethod
    def from_config(cls, config: LearnerConfig, **options: Any) -> Surgery:
        """Make one, with options of its own; overridden where the configuration has a say."""
        return cls(**options)

    def prepare(self, networks: MultiTaskModule) -> None:
        """Called once, before the first update, to make buffers for N networks and T tasks."""

    @abstractmethod
    def forward(self, problems: Sequence[Problem], generator: torch.Generator) -> list[Gradients]:
        """Compute what the optimiser applies.

        Args:
            problems: One per network.
            generator: The only source of randomness, on the parameters' device.
        """

    def after_step(self, losses: Callable[[], Tensor]) -> None:
        """Called once the optimiser has stepped; `losses()` are the new ones, `[N, T]`."""


class GramianSurgery(Surgery):
    """A method that only needs to know the tasks' dot products: a subclass gives `weights`.

    Per-task parameters get the gradient of the mean loss, their own task's divided by T, so a
    method whose weights are all 1/T is the plain average.
    """

    @abstractmethod
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        """Gramians `[N, T, T]` of N networks to weights `[N, T]`, without leaving the device."""

    def forward(self, problems: Sequence[Problem], generator: torch.Generator) -> list[Gradients]:
        """See `Surgery`."""
        found = [problem.task_gradients() for problem in problems]
        weights = self.weights(torch.stack([gramian(g.shared) for g in found]), generator)
        return [weighted(g, w) for g, w in zip(found, weights, strict=True)]


class FeatureSurgery(Surgery):
    """A method that looks at losses and feature gradients, and needs one plain backward.

    A subclass gives `weights`. Per-task parameters: as in `GramianSurgery`.
    """

    @abstractmethod
    def weights(self, n: int, tasks: Any, losses: Tensor, gradients: FeatureGradients) -> Tensor:
        """Weights `[T]` of the tasks' gradients on the trunk of network `n`.

        Args:
            n: Which of the N networks.
            tasks: Index of the T tasks that are here, for buffers over all tasks.
            losses: `[T]`.
            gradients: With `norms`, `[T]`, and `means`, `[T, d]`.
        """

    def forward(self, problems: Sequence[Problem], generator: torch.Generator) -> list[Gradients]:
        """See `Surgery`."""

        def solve(n: int, problem: Problem) -> Gradients:
            return problem.gradient(lambda *evidence: self.weights(n, problem.tasks, *evidence))

        return [solve(n, problem) for n, problem in enumerate(problems)]


def weighted(gradients: TaskGradients, weights: Tensor) -> Gradients:
    """Σ_t w_t g_t on what is shared; the mean loss's gradient on the tasks' own parameters."""
    return Gradients(
        combine(weights, gradients.shared),
        {name: value / len(weights) for name, value in gradients.per_task.items()},
        gradients.losses,
        gradients.auxiliary,
        weights,
    )
