"""Surgery methods by name, and what a method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtrl.config import UsageError, unknown
from mtrl.surgery.gradients import (
    Gradients,
    Parameters,
    TaskLoss,
    combine,
    gramian,
    task_gradients,
)

Network = tuple[Parameters, Parameters]
"""One network's parameters: shared, and per task `[T, …]`."""


class Surgery(ABC):
    """Turns the tasks' losses into one gradient for each of N networks."""

    @abstractmethod
    def __call__(
        self,
        task_loss: TaskLoss,
        networks: Sequence[Network],
        batch: Sequence[Any],
        generator: torch.Generator,
    ) -> list[Gradients]:
        """Compute what the optimiser applies; arguments as `task_gradients`.

        Args:
            generator: The only source of randomness, on the parameters' device.
        """


class GramianSurgery(Surgery):
    """A method that only needs to know the tasks' dot products: a subclass gives `weights`.

    Per-task parameters get the gradient of the mean loss, their own task's divided by T, so a
    method whose weights are all 1/T is the plain average.
    """

    @abstractmethod
    def weights(self, gramian: Tensor, generator: torch.Generator) -> Tensor:
        """Gramians `[N, T, T]` of N networks to weights `[N, T]`, without leaving the device."""

    def __call__(
        self,
        task_loss: TaskLoss,
        networks: Sequence[Network],
        batch: Sequence[Any],
        generator: torch.Generator,
    ) -> list[Gradients]:
        """See `Surgery`."""
        found = [task_gradients(task_loss, *network, *batch) for network in networks]
        weights = self.weights(torch.stack([gramian(g.shared) for g in found]), generator)
        return [
            Gradients(
                combine(w, g.shared),
                {name: gradient / len(w) for name, gradient in g.per_task.items()},
                g.losses,
                g.auxiliary,
            )
            for w, g in zip(weights, found, strict=True)
        ]


Method = TypeVar("Method", bound=type[Surgery])
_METHODS: dict[str, type[Surgery]] = {}


def register(name: str) -> Callable[[Method], Method]:
    """Class decorator that makes a method known to `--surgery` and `TrainConfig` by name.

    Example:
        >>> @register("first-task-only")
        ... class FirstTaskOnly(GramianSurgery):
        ...     def weights(self, gramian, generator):
        ...         return torch.eye(gramian.shape[-1])[0].expand(gramian.shape[:2])
        >>> "first-task-only" in available()
        True

    Raises:
        ValueError: if another class has the name.
    """

    def add(method: Method) -> Method:
        if _METHODS.get(name, method) is not method:
            raise ValueError(f"surgery: expected a new name, got {name!r} a second time")
        _METHODS[name] = method
        return method

    return add


def available() -> list[str]:
    """The names that are registered."""
    return sorted(_METHODS)


def get_surgery(name: str) -> Surgery:
    """Make the method of that name.

    Raises:
        UsageError: if there is none; the nearest name is given.
    """
    if name not in _METHODS:
        raise UsageError(unknown("surgery", name, available()))
    return _METHODS[name]()
