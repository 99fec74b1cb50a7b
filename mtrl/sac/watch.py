"""Noticing that numbers go wrong, without waiting for the device in every update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mtrl.errors import RunError

DIVERGING = 1e6
"""A squared-error critic loss beyond this is of values beyond a thousand: no task pays that."""


class LossWatch:
    """In which update each task's losses were first not finite; stays on the device.

    Args:
        losses: What they are called.
        n_tasks: T.
    """

    def __init__(self, losses: Sequence[str], n_tasks: int, device: torch.device) -> None:
        self.losses = tuple(losses)
        # Zero, until a loss that is not finite has turned it to NaN for ever.
        self._zero = torch.zeros(len(losses), n_tasks, device=device)
        self._finite = torch.zeros(len(losses), n_tasks, dtype=torch.int64, device=device)
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    def note(self, *losses: Tensor) -> None:
        """After each update, its losses, each `[T]`; none of the host's numbers is used."""
        self._updates += 1
        self._zero.add_(torch.stack(losses), alpha=0)
        self._finite += self._zero == 0

    def expect_finite(self, tasks: Sequence[str], updates: int) -> None:
        """Wait for the device, and look.

        Args:
            updates: Made by now.

        Raises:
            RunError: naming the loss, the task and the update it began with.
        """
        finite, noted = self._finite.cpu(), int(self._updates)
        if int(finite.min()) == noted:
            return
        loss, task = divmod(int(finite.argmin()), len(tasks))
        update = updates - noted + int(finite.min()) + 1
        raise RunError(
            f"{self.losses[loss]} of task {tasks[task]!r} became infinite or NaN in update {update}"
        )


def expect_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Wait for the device, and look at the weights, and the normaliser's statistics.

    Raises:
        RunError: naming the first tensor that holds an infinite number or NaN.
    """
    named = dict(tensors)
    wide = torch.float64
    values = [value if value.dtype == wide else value.float() for value in named.values()]
    norms = torch.stack([norm.to(wide) for norm in torch._foreach_norm(values)])
    for name, finite in zip(named, norms.isfinite().tolist(), strict=True):
        if not finite:
            raise RunError(f"weights {name} are infinite or NaN")


def diverging(losses: Mapping[str, float]) -> str | None:
    """A warning about the largest critic loss, if it is beyond reason; losses by task."""
    task = max(losses, key=lambda task: losses[task])
    if losses[task] <= DIVERGING:
        return None
    return (
        f"warning: the critic loss of task {task!r} is {losses[task]:.1e}, above {DIVERGING:.0e}: "
        "its values run away. --return-scale, --layer-norm or --critic-bins keep them in bounds."
    )
