"""Detection of NaN, infinite and diverging values without synchronising in every update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mtrl.errors import RunError

DIVERGING = 1e6
"""Squared-error critic loss above which a run counts as diverging. Its values are then off by more
than a thousand, which no task can return."""


class LossWatch:
    """Records, on the device, in which update each task's losses were first not finite.

    Args:
        losses: Names of the losses.
        n_tasks: Number T of tasks.
    """

    def __init__(self, losses: Sequence[str], n_tasks: int, device: torch.device) -> None:
        self.losses = tuple(losses)
        # Zero until a loss that is not finite turns it into NaN for good.
        self._zero = torch.zeros(len(losses), n_tasks, device=device)
        self._finite = torch.zeros(len(losses), n_tasks, dtype=torch.int64, device=device)
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    def note(self, *losses: Tensor) -> None:
        """Record the losses of an update, each `[T]`; uses no values from the host."""
        self._updates += 1
        self._zero.add_(torch.stack(losses), alpha=0)
        self._finite += self._zero == 0

    def expect_finite(self, tasks: Sequence[str], updates: int) -> None:
        """Synchronise with the device, and check all losses since the start.

        Args:
            updates: Number of updates made so far.

        Raises:
            RunError: Naming the loss, the task and the first such update.
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
    """Synchronise with the device, and check weights and statistics of the normaliser.

    Raises:
        RunError: Naming the first tensor that holds an infinite number or NaN.
    """
    named = dict(tensors)
    wide = torch.float64
    values = [value if value.dtype == wide else value.float() for value in named.values()]
    norms = torch.stack([norm.to(wide) for norm in torch._foreach_norm(values)])
    for name, finite in zip(named, norms.isfinite().tolist(), strict=True):
        if not finite:
            raise RunError(f"weights {name} are infinite or NaN")


def diverging(losses: Mapping[str, float]) -> str | None:
    """Return a warning if the largest critic loss is diverging, else None; losses by task."""
    task = max(losses, key=lambda task: losses[task])
    if losses[task] <= DIVERGING:
        return None
    return (
        f"warning: the critic loss of task {task!r} is {losses[task]:.1e}, above {DIVERGING:.0e}: "
        "its values diverge. --return-scale, --layer-norm or --critic-bins may prevent this."
    )
