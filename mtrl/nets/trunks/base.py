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

A policy file contains such numbers, and opening it must not create a billion layers."""
EMBEDDING = 50
"""Default length of a learned task embedding, as in CARE's experiments."""
TASK_INPUTS = "one-hot", "embedding", "description"
"""Values of `task_input`: the vectors that can identify the task to a trunk."""


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
        task_input: Vector that identifies the task: `one-hot`; `embedding`, which is learned; or
            `description`, which is given and fixed. Default: `usual`.
        embedding: Length of a learned embedding; implies `task_input="embedding"`.
    """

    widths: tuple[int, ...] = (400, 400, 400)
    layer_norm: bool = False
    task_input: str | None = None
    embedding: int | None = None

    usual: ClassVar[str | None] = "one-hot"
    """Default of `task_input`; None: the trunk does not receive the task."""

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
        """The `task_input` in use; None: the trunk does not receive the task."""
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
        """Return the length of the task vector.

        Raises:
            UsageError: If it is a description and the tasks have none.
        """
        if self.told == "description":
            return make.descriptions().shape[-1]
        return make.n_tasks if self.told == "one-hot" else self.embedding or EMBEDDING

    def tell(self, make: Build, *, unit: bool = False) -> None:
        """Declare the task vector; with `unit`, an embedding is a unit vector at first."""
        if self.told == "embedding":
            make.table("embedding", self.n_told(make), unit=unit)
        elif self.told == "description":
            make.fix("description", make.descriptions())
        else:
            make.fix("one_hot", np.eye(make.n_tasks, dtype=np.float32))

    def task(self, p: Params) -> Tensor:
        """Return the task vector as a batch of one sample, `[N, T, 1, e]`."""
        return p[str(self.told).replace("-", "_")][:, :, None]

    def declare_vector(self, make: Build, name: str, size: int, *, unit: bool = False) -> None:
        """Declare a learned vector per task, which is a linear layer on the task vector.

        On a one-hot, that layer is a table with one row per task.

        Args:
            name: Name of the table or layer.
            size: Number of components.
            unit: Whether the initial norm is about 1 instead of √size.
        """
        if self.told == "one-hot":
            make.table(name, size, unit=unit)
            return
        self.tell(make, unit=True)
        bound = math.sqrt(3 / size) if unit else math.sqrt(3)
        make.linear(name, self.n_told(make), size, bound=bound)

    def vector(self, p: Params, name: str) -> Tensor:
        """Return the vectors of `declare_vector`, `[N, T, size]`, in at least float32."""
        if self.told == "one-hot":
            return p[name]
        found = p.linear(name, self.task(p)).squeeze(2)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def loss_factors(self, losses: Tensor, alpha: Tensor) -> Tensor | None:
        """Return factors for the task gradients, applied before surgery; None: all 1.

        Args:
            losses: Losses, `[N, T]`.
            alpha: Entropy temperatures, `[T]`.

        Returns:
            `[T]` or `[N, T]`.
        """
        return None

    def after_step(  # noqa: B027, most do nothing
        self, own: Mapping[str, Tensor], losses: Tensor, generator: torch.Generator
    ) -> None:
        """Modify per-task parameters after an optimiser step; by default nothing changes.

        This is part of a captured update, so it must not synchronise with the device.

        Args:
            own: Per-task parameters, `[N, T, …]`, changed in place.
            losses: Losses of the step, `[N, T]`.
            generator: Generator of random numbers.
        """

    @abstractmethod
    def build(self, make: Build, n_inputs: int) -> None:
        """Declare the parameters of a network with `n_inputs` inputs."""

    @abstractmethod
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        """Compute features `[N, T, B, d]` from inputs `[N or 1, T, B, in]`."""
