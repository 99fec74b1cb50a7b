"""No surgery: the gradient of the mean loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mtrl.surgery.gradients import Gradients, TaskLoss, mean_gradient
from mtrl.surgery.registry import Network, Surgery, register


@register("none")
class NoSurgery(Surgery):
    """The plain average, by one backward that never forms a gradient per task."""

    def __call__(
        self,
        task_loss: TaskLoss,
        networks: Sequence[Network],
        batch: Sequence[Any],
        generator: torch.Generator,
    ) -> list[Gradients]:
        """See `Surgery`."""
        return [mean_gradient(task_loss, *network, *batch) for network in networks]
