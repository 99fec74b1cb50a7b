"""What a trunk is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from mtrl.errors import UsageError
from mtrl.nets.build import Build
from mtrl.nets.params import Params

WIDEST = 2**16
"""Largest number of units."""
MOST = 256
"""Largest number of layers, experts and the like.

A policy file names such numbers, and whoever opens it must not wait for a billion layers."""


@dataclass(frozen=True)
class Trunk(ABC):
    """From a task's inputs to the features z that its head sees.

    The one law: **no row of task t depends on another task's row**, so nothing is averaged over the
    batch. Then one ordinary backward through views of the parameters for each task gives one
    gradient per task, which every method of surgery and both engines build on.

    A subclass is a frozen dataclass whose fields are the trunk's options.

    Args:
        widths: Of its layers [units].
        layer_norm: Whether a layer's outputs are normalised before each ReLU.
    """

    widths: tuple[int, ...] = (400, 400, 400)
    layer_norm: bool = False

    sees_task: ClassVar[bool] = True
    """Whether z depends on the task, as it must where all tasks have one head."""

    def __post_init__(self) -> None:
        if isinstance(self.widths, list):
            object.__setattr__(self, "widths", tuple(self.widths))
        if not isinstance(self.widths, tuple) or not 1 <= len(self.widths) <= MOST:
            raise UsageError(f"trunk: expected widths of 1 to {MOST} layers, got {self.widths!r}")
        if not isinstance(self.layer_norm, bool):
            raise UsageError(f"trunk: expected layer_norm True or False, got {self.layer_norm!r}")
        for width in self.widths:
            self._check("widths", width, WIDEST)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("widths", "layer_norm") and value is not None:
                units = field.name in ("width", "size", "embedding")
                self._check(field.name, value, WIDEST if units else MOST)

    def _check(self, name: str, value: Any, most: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UsageError(f"trunk: expected {name} from 1 to {most}, got {value!r}")

    def for_tasks(self, n_tasks: int) -> Trunk:
        """This trunk with its paper's sizes for so many tasks, where none are given."""
        return self

    @property
    def n_features(self) -> int:
        """d, the length of z."""
        return self.widths[-1]

    @abstractmethod
    def build(self, make: Build, n_inputs: int) -> None:
        """Declare the parameters, of a network with `n_inputs` inputs."""

    @abstractmethod
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        """The features `[N, T, B, d]` of inputs `[N or 1, T, B, in]`."""
