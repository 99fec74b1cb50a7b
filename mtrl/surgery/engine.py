"""What torch's autograd tells about a graph, and about the backward that is running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Uses = dict[Any, list[tuple[Any, int]]]
"""A graph: for each node, the nodes (None: the caller) that use its output, with the position."""


def current_backward() -> int:
    """Return the id of the current backward."""
    return torch._C._current_graph_task_id()


def retains_graph() -> bool:
    """Return whether the current backward was called with `retain_graph`."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Return a context without the hooks of these leaves, which run once for the final gradient."""
    hooks = [p._backward_hooks for p in parameters if p._backward_hooks]
    saved = [dict(found) for found in hooks]
    for found in hooks:
        found.clear()
    try:
        yield
    finally:
        for found, entries in zip(hooks, saved, strict=True):
            found.update(entries)


def below(features: list[Tensor]) -> tuple[Uses, list[Tensor], set[str]]:
    """Return the graph below the features, its leaves, and the names of its kinds of nodes."""
    uses: Uses = {z.grad_fn: [(None, i)] for i, z in enumerate(features) if z.grad_fn is not None}
    nodes, names = list(uses), set()
    leaves = [z for z in features if z.grad_fn is None]  # parameters used as features
    for node in nodes:  # grows in the loop
        name = type(node).__name__
        names.add(name)
        if name == "AccumulateGrad":
            leaves.append(node.variable)
            continue
        for place, (parent, _) in enumerate(node.next_functions):
            if parent is None:
                continue
            if parent not in uses:
                uses[parent] = []
                nodes.append(parent)
            uses[parent].append((node, place))
    return uses, leaves, names
