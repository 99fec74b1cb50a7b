"""Noticing that numbers go wrong, without waiting for the device in every update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mtrl.errors import RunError

NEVER = 2**62
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
        self._first = torch.full((len(losses), n_tasks), NEVER, device=device)
        self._update = torch.zeros((), dtype=torch.int64, device=device)

    def note(self, *losses: Tensor) -> None:
        """After each update, its losses, each `[T]`; none of the host's numbers is used."""
        self._update += 1
        now = torch.where(torch.stack(losses).isfinite(), NEVER, self._update)
        torch.minimum(self._first, now, out=self._first)

    def expect_finite(self, tasks: Sequence[str], updates: int) -> None:
        """Wait for the device, and look.

        Args:
            updates: Made by now.

        Raises:
            RunError: naming the loss, the task and the update it began with.
        """
        first = self._first.cpu()
        if first.min() == NEVER:
            return
        loss, task = divmod(int(first.argmin()), len(tasks))
        update = updates - int(self._update) + int(first.min())
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
