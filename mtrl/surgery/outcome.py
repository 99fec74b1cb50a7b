"""What surgery did in one backward of a `MultiTaskModel`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtrl.surgery.diagnostics import cosines


@dataclass(frozen=True)
class Outcome:
    """What surgery did in one backward.

    Attributes:
        weights: Of each task's gradient on the trunk; all 1 is the sum of the losses.
        gramian: Of the tasks' gradients on the trunk, `[T, T]` of these tasks in this order; None
            where the method does not look at them, see `MultiTaskModel.watch`.
    """

    weights: dict[str, Tensor]
    gramian: Tensor | None

    @property
    def cosines(self) -> Tensor | None:
        """Cos φ between the tasks' gradients, `[T, T]`; below zero is a conflict."""
        return None if self.gramian is None else cosines(self.gramian)
