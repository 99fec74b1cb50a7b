"""A step of the optimiser down a problem, and what of the networks it leaves as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtrl.nets.networks import HEAD, Function, MultiTaskNetworks
from mtrl.sac.optimizers import clip_by_network_
from mtrl.surgery import Gradients, Surgery
from mtrl.surgery.methods.none import NoSurgery
from mtrl.surgery.stacked import StackedProblem

_PLAIN = NoSurgery()


@dataclass(frozen=True)
class Frozen:
    """What no update changes.

    Attributes:
        parts: As in `TransferConfig.freeze`.
    """

    parts: frozenset[str] = field(default_factory=frozenset)

    def whole(self, networks: str) -> bool:
        """Whether nothing of `actor` or `critics` is trained."""
        return networks.removesuffix("s") in self.parts

    def trunk(self, networks: str) -> bool:
        """Whether their trunk is not trained."""
        kind = networks.removesuffix("s")
        return not self.parts.isdisjoint({kind, "trunk", f"{kind}-trunk"})

    @property
    def normalizer(self) -> bool:
        """Whether observations keep their scale, without which a frozen actor would not be one."""
        return not self.parts.isdisjoint({"normalizer", "actor"})


def split_shared(
    networks: MultiTaskNetworks, freeze_trunk: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The shared parameters that are trained, and those that are not; a head is no trunk."""
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
    """Surgery, clipping of each network's gradient, and a step of the optimiser.

    Without shared parameters to train there is nothing to do surgery on: the tasks' own get their
    gradients by one plain backward, and the method is not asked.
    """
    if not problem.shared:
        surgery = _PLAIN
    gradients = surgery(problem, generator)
    # Contiguous: torch's fused Adam takes a gradient's memory for laid out as its parameter's.
    tree: Mapping[str, Tensor] = {**gradients.shared, **gradients.per_task}
    found = {key: value.contiguous() for key, value in tree.items()}
    if max_grad_norm > 0:
        clip_by_network_(list(found.values()), max_grad_norm)
    for part in networks.named():
        for key, parameter in part.items():
            parameter.grad = None if key in problem.frozen else found[key]
    optimizer.step()
    surgery.after_step(problem.losses)
    return gradients


def stand_still(problem: StackedProblem) -> Gradients:
    """The losses of networks that are not trained."""
    losses = problem.losses()
    return Gradients({}, {}, losses, {}, torch.full_like(losses, 1 / losses.shape[-1]))


def follow_(targets: Function, critics: Function, tau: float) -> None:
    """Polyak averaging: targets go so far towards the critics."""
    theirs, ours = ([*each.shared.values(), *each.per_task.values()] for each in (targets, critics))
    torch._foreach_lerp_(theirs, ours, tau)
