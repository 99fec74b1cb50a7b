"""Autograd on dictionaries of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrl.nets.params import Parameters


def leaves(parameters: Parameters) -> dict[str, Tensor]:
    """Fresh leaves of a graph on the same memory."""
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def detached(tensors: Parameters) -> dict[str, Tensor]:
    """The same tensors without their graph."""
    return {name: value.detach() for name, value in tensors.items()}


def differentiate(
    output: Tensor, gradient: Tensor | None, *trees: dict[str, Tensor]
) -> list[dict[str, Tensor]]:
    """The output's gradients by all leaves of the trees; what it does not depend on is left out."""
    wanted = [leaf for tree in trees for leaf in tree.values()]
    if not wanted or not output.requires_grad:  # nothing below it is trained
        return [{} for _ in trees]
    found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
    pairs = [[(name, next(found)) for name in tree] for tree in trees]
    return [{name: value for name, value in tree if value is not None} for tree in pairs]


def add(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entry by entry; what one lacks counts as 0."""
    return {**a, **b, **{name: a[name] + b[name] for name in a.keys() & b.keys()}}
