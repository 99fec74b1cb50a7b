"""Base classes of gradient surgery methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtrl.config.learner import LearnerConfig
from mtrl.devices import HAS_TRITON
from mtrl.errors import UsageError
from mtrl.surgery.gradients import FeatureGradients, Gradients, Problem, at_least_float32

MAINTAIN_EVERY = 10_000
"""Number of updates between two calls of `Surgery.maintain`."""
LARGEST = 64
"""Maximum number of tasks whose T × T matrix fits into the registers of a kernel."""


class SurgeryTarget(Protocol):
    """Properties of the N networks that a method may use."""

    n_networks: int

    @property
    def n_tasks(self) -> int:
        """Number T of tasks."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `torch.nn.Module`."""

    def add_rotation(self, size: int | None) -> None:
        """Insert R_k = I before each head, for the first `size` features (None: all)."""

    def rotations(self) -> Sequence[Tensor]:
        """Return each network's rotations, `[T, m, m]`, after `add_rotation`."""


def zeros_like_tasks(networks: SurgeryTarget) -> Tensor:
    """Return real zeros per network and task, `[N, T]`, on their device, in float32 or wider."""
    like = next(iter(networks.parameters()))
    dtype = torch.promote_types(like.real.dtype, torch.float32)
    return torch.zeros(networks.n_networks, networks.n_tasks, dtype=dtype, device=like.device)


def is_fused(device: torch.device, n_tasks: int) -> bool:
    """Return whether a method's loop over T × T matrices runs as one Triton kernel there."""
    return device.type == "cuda" and HAS_TRITON and n_tasks <= LARGEST


class Surgery(nn.Module, ABC):
    """Turns the T losses of each of N networks into one gradient per network.

    State that a method keeps between updates belongs in buffers, which are saved with a run.

    Attributes:
        capturable: Whether an update may be captured as a CUDA graph. `forward` and `after_step`
            must then not synchronise with the device, and must only depend on tensors that stay in
            place.
    """

    capturable = True

    @classmethod
    def from_config(cls, config: LearnerConfig, **options: Any) -> Surgery:
        """Create the method with its options; override this to use the configuration."""
        return cls(**options)

    def prepare(self, networks: SurgeryTarget) -> None:
        """Create buffers for N networks and T tasks; called once, before the first update."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Surgery:
        """Keep buffers in float32 or wider, also in a half-precision model."""
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() or buffer.is_complex():
                setattr(self, name, at_least_float32(buffer.real))
        return self

    @abstractmethod
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        """Compute the gradients for the optimiser.

        Args:
            problem: Losses of T tasks in each of N networks.
            generator: The only source of randomness, on the device of the parameters.
        """

    def maintain(self, networks: SurgeryTarget) -> None:
        """Do maintenance; called every `MAINTAIN_EVERY` updates, outside CUDA graphs."""

    def after_step(self, losses: Callable[[], Tensor]) -> None:
        """Learn from a step; called after the optimiser's step, with new `losses()`, `[N, T]`."""


class GramianSurgery(Surgery):
    """Base class of methods that only need dot products of task gradients; implement `weights`.

    Per-task parameters get the gradient of the mean loss, which is that of their own task divided
    by T. A method whose weights are all 1/T is therefore the plain average.
    """

    @abstractmethod
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        """Map the Gramians of N networks, `[N, T, T]`, to weights `[N, T]` on the device.

        Weights of any other shape are a `UsageError`.
        """

    @override
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        found = problem.task_gradients()
        return found.weighted(self.weights_or_nan(found.gramian(), generator))

    def weights_or_nan(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        """Return the weights, or NaN for a network whose Gramian is not finite.

        A solver may raise on values that are not finite, so it gets the Gramian of equal gradients
        instead. The weights become NaN, so that a GradScaler, say, skips the step.
        """
        zero = (gramian * 0).sum((-2, -1))[:, None]  # or NaN, as 0 · ∞ is
        finite = (gramian + zero[..., None]).nan_to_num_(nan=1.0)
        weights = self.weights(finite, generator)
        expect_weights(weights, gramian, type(self).__name__)
        return weights + zero


def expect_weights(weights: Any, gramian: Tensor, name: str) -> None:
    """Check the weights of a method; other shapes would be broadcast, or fail far from here."""
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    if shape != (expected := tuple(gramian.shape[:-1])):
        raise UsageError(
            f"surgery: expected weights of shape {expected} for a Gramian of shape "
            f"{tuple(gramian.shape)}, got {shape} from {name}"
        )


class FeatureSurgery(Surgery):
    """Base class of methods that use losses and feature gradients, from one plain backward.

    Implement `weights`. They apply to all parameters below the features, also to those of a single
    task, such as its bias in the first layer. Heads get the gradient of the mean loss.
    """

    @abstractmethod
    def weights(self, tasks: Any, found: FeatureGradients) -> Tensor:
        """Compute weights `[N, T]` of the task gradients of the trunks.

        Args:
            tasks: Index of the T present tasks, for buffers over all tasks.
            found: Has `losses` and `norms`, `[N, T]`, and `means`, `[N, T, d]`.
        """

    @override
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        found = problem.features()
        return found.weighted(self.weights(problem.tasks, found))
