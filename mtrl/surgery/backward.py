"""The backward that is running: what torch tells about it, and hooks it should not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


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
