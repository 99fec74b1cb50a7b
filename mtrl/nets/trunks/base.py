"""`Trunk`, the base class of all trunks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtrl.errors import UsageError
from mtrl.nets.build import Build
from mtrl.nets.params import Params

WIDEST = 2**16
"""Maximum number of units."""
MOST = 256
"""Maximum number of layers, experts and the like.

A policy file names such numbers, and whoever opens it must not wait for a billion layers."""
EMBEDDING = 50
"""Length of a learned embedding where none is given, as in CARE's experiments."""
TASK_INPUTS = "one-hot", "embedding", "description"
"""How a trunk may be told the task."""


@dataclass(frozen=True)
class Trunk(ABC):
    """Maps the inputs of a task to the features z that its head takes.

    The one rule: **no row of task t may depend on a row of another task**, so nothing may be
    averaged over the batch. One ordinary backward through per-task views of the parameters then
    gives one gradient per task, which every method of surgery and both engines rely on.

    A subclass is a frozen dataclass whose fields are the options of the trunk.

    Args:
        widths: Of its layers [units].
        layer_norm: Whether a layer's outputs are normalised before each ReLU.
        task_input: How the task is told: `one-hot`; `embedding`, a vector that is learned; or
            `description`, a vector that is given and fixed. Default: the architecture's own.
        embedding: Length of a learned vector; given, it means `embedding`.
    """

    widths: tuple[int, ...] = (400, 400, 400)
    layer_norm: bool = False
    task_input: str | None = None
    embedding: int | None = None

    usual: ClassVar[str | None] = "one-hot"
    """How the task is told where nothing is said; None: not at all."""

    def __post_init__(self) -> None:
        if isinstance(self.widths, list):
            object.__setattr__(self, "widths", tuple(self.widths))
        if not isinstance(self.widths, tuple) or not 1 <= len(self.widths) <= MOST:
            raise UsageError(f"trunk: expected widths of 1 to {MOST} layers, got {self.widths!r}")
        if not isinstance(self.layer_norm, bool):
            raise UsageError(f"trunk: expected layer_norm True or False, got {self.layer_norm!r}")
        self._check_task_input()
        for width in self.widths:
            self._check("widths", width, WIDEST)
        for field in fields(self):
            value = getattr(self, field.name)
            if str(field.type).startswith("int") and value is not None:
                units = field.name in ("width", "size", "embedding")
                self._check(field.name, value, WIDEST if units else MOST)

    def _check(self, name: str, value: Any, maximum: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
            raise UsageError(f"trunk: expected {name} from 1 to {maximum}, got {value!r}")

    def _check_task_input(self) -> None:
        if self.task_input not in (None, *TASK_INPUTS):
            raise UsageError(
                f"trunk: expected task_input {', '.join(TASK_INPUTS)}, got {self.task_input!r}"
            )
        if self.embedding is not None and self.told != "embedding":
            raise UsageError(
                f"trunk: expected task_input 'embedding' beside embedding={self.embedding!r}, got "
                f"{self.task_input!r}"
            )

    @property
    def told(self) -> str | None:
        """How the task is told; None: not at all."""
        if self.task_input is None and self.embedding is not None:
            return "embedding"
        return self.task_input or self.usual

    def for_tasks(self, n_tasks: int) -> Trunk:
        """Return the trunk with unset sizes filled in from its paper for `n_tasks` tasks."""
        return self

    @property
    def n_features(self) -> int:
        """Length d of z."""
        return self.widths[-1]

    def n_told(self, make: Build) -> int:
        """Length of the vector by which the task is told.

        Raises:
            UsageError: for descriptions that the tasks do not have.
        """
        if self.told == "description":
            return make.descriptions().shape[-1]
        return make.n_tasks if self.told == "one-hot" else self.embedding or EMBEDDING

    def tell(self, make: Build, *, unit: bool = False) -> None:
        """Declare the vector by which the task is told; with `unit`, a learned one has length 1."""
        if self.told == "embedding":
            make.table("embedding", self.n_told(make), unit=unit)
        elif self.told == "description":
            make.fix("description", make.descriptions())
        else:
            make.fix("one_hot", np.eye(make.n_tasks, dtype=np.float32))

    def task(self, p: Params) -> Tensor:
        """The vector by which the task is told, as a sample of its own, `[N, T, 1, e]`."""
        return p[str(self.told).replace("-", "_")][:, :, None]

    def declare_vector(self, make: Build, name: str, size: int, *, unit: bool = False) -> None:
        """A vector of the task that is learned: a layer on what the task is told by.

        On a one-hot that layer is a table: its row is the task's own.

        Args:
            name: Of the table or the layer.
            size: The vector's length.
            unit: Its length in space is about 1 at first, and not the root of its size.
        """
        if self.told == "one-hot":
            make.table(name, size, unit=unit)
            return
        self.tell(make, unit=True)
        bound = math.sqrt(3 / size) if unit else math.sqrt(3)
        make.linear(name, self.n_told(make), size, bound=bound)

    def vector(self, p: Params, name: str) -> Tensor:
        """What `declare_vector` declared, `[N, T, size]`, in at least float32."""
        if self.told == "one-hot":
            return p[name]
        found = p.linear(name, self.task(p)).squeeze(2)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def loss_factors(self, losses: Tensor, alpha: Tensor) -> Tensor | None:
        """Factors on the tasks' gradients, `[T]` or `[N, T]`, that belong to the architecture.

        Args:
            losses: `[N, T]`.
            alpha: The tasks' temperatures, `[T]`.
        """
        return None

    def after_step(  # noqa: B027, most do nothing
        self, own: Mapping[str, Tensor], losses: Tensor, generator: torch.Generator
    ) -> None:
        """What the architecture does to the tasks' own parameters after an optimiser's step.

        It waits for no number of the device's: a captured update goes through it.

        Args:
            own: `[N, T, …]`, changed in place.
            losses: Of the step, `[N, T]`.
            generator: Of what is drawn.
        """

    @abstractmethod
    def build(self, make: Build, n_inputs: int) -> None:
        """Declare the parameters of a network with `n_inputs` inputs."""

    @abstractmethod
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        """Compute features `[N, T, B, d]` from inputs `[N or 1, T, B, in]`."""
