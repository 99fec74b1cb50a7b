"""Optimiser step on a problem, with frozen parts of the networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtrl.nets.heads import HEAD
from mtrl.nets.networks import Function, MultiTaskNetworks
from mtrl.sac.optimizers import clip_by_network_
from mtrl.surgery import Gradients, Surgery
from mtrl.surgery.methods.none import NoSurgery
from mtrl.surgery.stacked import StackedProblem

_PLAIN = NoSurgery()


@dataclass(frozen=True)
class Frozen:
    """Parts that updates do not change.

    Attributes:
        parts: Names as in `TransferConfig.freeze`.
    """

    parts: frozenset[str] = field(default_factory=frozenset)

    def whole(self, networks: str) -> bool:
        """Return whether all of `actor` or `critics` is frozen."""
        return networks.removesuffix("s") in self.parts

    def trunk(self, networks: str) -> bool:
        """Return whether their trunk is frozen."""
        kind = networks.removesuffix("s")
        return not self.parts.isdisjoint({kind, "trunk", f"{kind}-trunk"})

    @property
    def normalizer(self) -> bool:
        """Whether the normaliser is frozen, as it must be for a frozen actor to stay the same."""
        return not self.parts.isdisjoint({"normalizer", "actor"})


def split_shared(
    networks: MultiTaskNetworks, freeze_trunk: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return trained and frozen shared parameters; a single head is not part of the trunk."""
    shared, _ = networks.named()
    if not freeze_trunk:
        return shared, {}
    trained = {name: value for name, value in shared.items() if name in HEAD}
    return trained, {name: value for name, value in shared.items() if name not in HEAD}


def descend(
    networks: MultiTaskNetworks,
    problem: StackedProblem,
    surgery: Surgery,
    optimizer: torch.optim.Optimizer,
    *,
    generator: torch.Generator,
    max_grad_norm: float,
) -> Gradients:
    """Apply surgery, clip each network's gradient, and step the optimiser.

    If no shared parameters are trained, surgery does not apply: per-task parameters get their
    gradients by one plain backward, without the method.
    """
    if not problem.shared:
        surgery = _PLAIN
    gradients = surgery(problem, generator)
    # Contiguous, because torch's fused Adam assumes that a gradient has its parameter's layout.
    tree: Mapping[str, Tensor] = {**gradients.shared, **gradients.per_task}
    found = {key: value.contiguous() for key, value in tree.items()}
    if max_grad_norm > 0:
        clip_by_network_(list(found.values()), max_grad_norm)
    for part in networks.named():
        for key, parameter in part.items():
            parameter.grad = None if key in problem.frozen else found[key]
    optimizer.step()
    networks.after_step(gradients.losses, generator)
    surgery.after_step(problem.losses)
    return gradients


def stand_still(problem: StackedProblem) -> Gradients:
    """Compute the losses of frozen networks, without gradients."""
    losses = problem.losses()
    return Gradients({}, {}, losses, {}, torch.full_like(losses, 1 / losses.shape[-1]))


def follow_(targets: Function, critics: Function, tau: float) -> None:
    """Move targets towards the critics by Polyak averaging with coefficient `tau`."""
    theirs, ours = ([*each.shared.values(), *each.per_task.values()] for each in (targets, critics))
    torch._foreach_lerp_(theirs, ours, tau)
