"""No surgery: the gradient of the mean loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtrl.surgery.base import Surgery
from mtrl.surgery.gradients import Gradients, Problem
from mtrl.surgery.registry import register


@register("none")
class NoSurgery(Surgery):
    """The plain average, by one backward that never forms a gradient per task."""

    def forward(self, problems: Sequence[Problem], generator: torch.Generator) -> list[Gradients]:
        """See `Surgery`."""
        return [problem.gradient() for problem in problems]
