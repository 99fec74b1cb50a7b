"""What a method of gradient surgery is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtrl.config.sections import LearnerConfig
from mtrl.surgery.gradients import FeatureGradients, Gradients, Problem, at_least_float32

MAINTAIN_EVERY = 10_000
"""Updates between two calls of `Surgery.maintain`."""


class SurgeryTarget(Protocol):
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


def zeros_like_tasks(networks: SurgeryTarget) -> Tensor:
    """Zeros for each network and task, `[N, T]`: real, on the networks' device, float32 or more."""
    like = next(iter(networks.parameters()))
    dtype = torch.promote_types(like.real.dtype, torch.float32)
    return torch.zeros(networks.n_networks, networks.n_tasks, dtype=dtype, device=like.device)


class Surgery(nn.Module, ABC):
    """Turns the T losses of each of N networks into one gradient for each network.

    What a method remembers from update to update goes into buffers: they are saved with a run.

    Attributes:
        capturable: Whether an update may be captured as a CUDA graph: `forward` and `after_step`
            then must neither wait for the device nor depend on anything but tensors that stay in
            place.
    """

    capturable = True

    @classmethod
    def from_config(cls, config: LearnerConfig, **options: Any) -> Surgery:
        """Make one, with options of its own; overridden where the configuration has a say."""
        return cls(**options)

    def prepare(self, networks: SurgeryTarget) -> None:
        """Called once, before the first update, to make buffers for N networks and T tasks."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Surgery:
        """What is remembered stays in float32 at least, in a model of half floats too."""
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() or buffer.is_complex():
                setattr(self, name, at_least_float32(buffer.real))
        return self

    @abstractmethod
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        """Compute what the optimiser applies.

        Args:
            problem: The losses of T tasks, in each of N networks.
            generator: The only source of randomness, on the parameters' device.
        """

    def maintain(self, networks: SurgeryTarget) -> None:
        """Called after every `MAINTAIN_EVERY` updates, between two of them, outside of graphs."""

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

    @override
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        found = problem.task_gradients()
        gramian = found.gramian()
        # A solver may raise on what is not finite, and is given the Gramian of equal gradients. The
        # weights are NaN there, so that whoever looks at the gradient, a GradScaler say, finds that
        # this step is none.
        zero = (gramian * 0).sum((-2, -1))[:, None]  # or NaN: 0 times ∞ is
        weights = self.weights(torch.where(zero[..., None] == 0, gramian, 1), generator)
        return found.weighted(weights + zero)


class FeatureSurgery(Surgery):
    """A method that looks at losses and feature gradients, and needs one plain backward.

    A subclass gives `weights`. Per-task parameters: as in `GramianSurgery`.
    """

    @abstractmethod
    def weights(self, tasks: Any, found: FeatureGradients) -> Tensor:
        """Weights `[N, T]` of the tasks' gradients on the trunks.

        Args:
            tasks: Index of the T tasks that are here, for buffers over all tasks.
            found: With `losses` and `norms`, `[N, T]`, and `means`, `[N, T, d]`.
        """

    @override
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        found = problem.features()
        return found.weighted(self.weights(problem.tasks, found))
