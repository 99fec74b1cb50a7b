"""No surgery: gradient of the mean loss."""

from __future__ import annotations

import torch
from typing_extensions import override

from mtrl.surgery.base import Surgery
from mtrl.surgery.gradients import Gradients, Problem
from mtrl.surgery.registry import register


@register("none")
class NoSurgery(Surgery):
    """The plain average, by one backward that never forms per-task gradients."""

    @override
    def forward(self, problem: Problem, generator: torch.Generator) -> Gradients:
        return problem.features().mean()
