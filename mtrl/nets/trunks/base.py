"""`Trunk`, the base class of all trunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from mtrl.errors import UsageError
from mtrl.nets.build import Build
from mtrl.nets.params import Params

WIDEST = 2**16
"""Maximum number of units."""
MOST = 256
"""Maximum number of layers, experts and the like.

A policy file contains such numbers, and opening it must not create a billion layers."""


@dataclass(frozen=True)
class Trunk(ABC):
    """Maps the inputs of a task to the features z that its head takes.

    The one rule: **no row of task t may depend on a row of another task**, so nothing may be
    averaged over the batch. One ordinary backward through per-task views of the parameters then
    gives one gradient per task, which every method of surgery and both engines rely on.

    A subclass is a frozen dataclass whose fields are the options of the trunk.

    Args:
        widths: Widths of the layers [units].
        layer_norm: Whether to apply LayerNorm before each ReLU.
    """

    widths: tuple[int, ...] = (400, 400, 400)
    layer_norm: bool = False

    sees_task: ClassVar[bool] = True
    """Whether z depends on the task, as it must if there is a single head."""

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

    def _check(self, name: str, value: Any, maximum: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
            raise UsageError(f"trunk: expected {name} from 1 to {maximum}, got {value!r}")

    def for_tasks(self, n_tasks: int) -> Trunk:
        """Return the trunk with unset sizes filled in from its paper for `n_tasks` tasks."""
        return self

    @property
    def n_features(self) -> int:
        """Length d of z."""
        return self.widths[-1]

    @abstractmethod
    def build(self, make: Build, n_inputs: int) -> None:
        """Declare the parameters of a network with `n_inputs` inputs."""

    @abstractmethod
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        """Compute features `[N, T, B, d]` from inputs `[N or 1, T, B, in]`."""
