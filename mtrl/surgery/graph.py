"""Surgery as two nodes of the autograd graph, so that a plain `loss.backward()` applies it.

    inputs → trunk → z → Weigh → Split → a copy of z for each task → heads → losses

In the backward, `Split` collects each task's gradient w.r.t. its copy. `Weigh` runs after all other
nodes that are ready, so that by then the gradients of all forward passes have been collected. It
gets weights from the method and passes on the weighted gradient. Everything else is left to
autograd.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mtrl.errors import UsageError
from mtrl.surgery.engine import Uses, below, current_backward, retains_graph

Wanted = dict[int, list[Tensor | None]]
"""Gradient of each task, by its index, w.r.t. each feature tensor."""


class Crossing:
    """One call of the trunk: the boundary between its features and the heads.

    Args:
        tasks: Tasks whose heads get these features.
        features: Differentiable tensors with the trunk's graph.

    Attributes:
        is_weighed: Whether there is a `Weigh` node.
        shared: Parameters subject to surgery: the trunk's parameters below these features, or all
            parameters below if there are none.
        hidden: Whether a node below hides parameters, as reentrant checkpointing does.
        uses: The graph below, if it is weighed.
        closed: Whether only the trunk's parameters are trained below. The graph is then cut at the
            features, and `Weigh` itself returns the gradients of these parameters.
    """

    def __init__(self, tasks: list[int], features: list[Tensor]) -> None:
        self.tasks, self.features = tasks, features
        self.shared: list[Tensor] = []
        self.uses: Uses = {}
        self.is_weighed = self.hidden = self.closed = False
        self._wanted: tuple[int, Wanted] | None = None
        self._moves: tuple[int, list[tuple[int, int, Tensor]]] | None = None
        self._split: Callable[[], Any] = lambda: None

    def weighed(self, trunk: nn.Module, weigh: Callable[[Crossing], Any]) -> list[Tensor]:
        """Return the features with a backward in which `weigh` computes gradients of `entering`.

        Args:
            trunk: Trunk whose parameters are subject to surgery.
            weigh: Called in the backward, after all other ready nodes.
        """
        self.is_weighed = True
        self.uses, leaves, names = below(self.features)
        # `trunk.parameters()` would take as long as everything else here.
        own = {id(p) for module in trunk.modules() for p in module._parameters.values()}
        self.shared = [leaf for leaf in leaves if id(leaf) in own] or leaves
        self.hidden = "CheckpointFunctionBackward" in names or not leaves
        fed = "SplitBackward" in names  # by another pass, which needs its gradient
        self.closed = not (self.hidden or fed) and all(id(leaf) in own for leaf in leaves)
        features = Weigh.apply(self, weigh, *self.entering)
        features[0].grad_fn._set_sequence_nr(0)
        return list(features)

    def copies(self, features: list[Tensor]) -> list[list[Tensor]]:
        """Return a copy of the features per task; their gradients are added in the backward."""
        found = Split.apply(self, *features)
        self._split = weakref.ref(found[0].grad_fn)
        n = len(self.features)
        return [list(found[i * n : (i + 1) * n]) for i in range(len(self.tasks))]

    @property
    def entering(self) -> list[Tensor]:
        """Tensors whose gradients `Weigh` returns."""
        return self.shared if self.closed else self.features

    @property
    def wanted(self) -> Wanted | None:
        """Gradients collected in the current backward, or None before they are."""
        if self._wanted is None or self._wanted[0] != current_backward():
            return None
        return self._wanted[1]

    @property
    def awaited(self) -> bool:
        """Whether its gradients are still to be collected in the current backward."""
        node = self._split()
        return node is not None and self.wanted is None and torch._C._will_engine_execute_node(node)

    def move(self, slot: int, task: int, gradient: Tensor) -> None:
        """Attribute part of the coming gradient of a copy to another task."""
        if self._moves is None or self._moves[0] != current_backward():
            self._moves = current_backward(), []
        self._moves[1].append((slot, task, gradient))

    def collect(self, rows: list[list[Tensor | None]]) -> None:
        """Record the gradient of each copy, attributed to the right tasks."""
        wanted = dict(zip(self.tasks, rows, strict=True))
        if self._moves is not None and self._moves[0] == current_backward():
            n = len(self.features)
            for slot, task, gradient in self._moves[1]:
                source, number = wanted[self.tasks[slot // n]], slot % n
                target = wanted.setdefault(task, [None] * n)
                source[number] = added([source[number], -gradient])
                target[number] = added([target[number], gradient])
        here = {task: row for task, row in wanted.items() if any(g is not None for g in row)}
        self._wanted = current_backward(), here

    def release(self) -> None:
        """Release the trunk's graph, unless the caller of the backward retains it."""
        self._wanted = self._moves = None
        if not retains_graph():
            self.features = [z.detach() for z in self.features]
            self.uses = {}


class Split(torch.autograd.Function):
    """Copies features for each task; its backward gets the gradients of all tasks at once."""

    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *features: Tensor) -> tuple[Tensor, ...]:
        """Return views, because torch forbids in-place changes of one of several views."""
        ctx.crossing = crossing
        ctx.set_materialize_grads(False)
        return tuple(z.view_as(z) for _ in crossing.tasks for z in features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Collect the gradients for `Weigh`, or else pass on their sum.

        Raises:
            UsageError: If surgery would miss what second derivatives add to the trunk's gradients.
        """
        crossing = ctx.crossing
        n = len(crossing.features)
        rows = [list(gradients[i : i + n]) for i in range(0, len(gradients), n)]
        columns = [[g for g in column if g is not None] for column in zip(*rows, strict=True)]
        if not crossing.is_weighed:
            return None, *map(added, columns)
        if torch.is_grad_enabled():
            raise UsageError(
                "backward: expected create_graph=False: losses with derivatives of outputs "
                "(gradient penalties, PDE residuals) work with surgery 'none' only"
            )
        crossing.collect(rows)
        return None, *[added(column[:1]) for column in columns]  # which `Weigh` ignores


class Weigh(torch.autograd.Function):
    """Returns features unchanged; its backward passes on the method's combined gradient."""

    @staticmethod
    def forward(
        ctx: Any, crossing: Crossing, weigh: Callable[[Crossing], Any], *entering: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the features; `entering` are the tensors that get gradients."""
        ctx.crossing, ctx.weigh = crossing, weigh
        ctx.set_materialize_grads(False)
        return tuple(z.detach() for z in crossing.features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Disable the caller's autocast, because signs of dot products need full precision."""
        with torch.autocast(ctx.crossing.features[0].device.type, enabled=False):
            return None, None, *ctx.weigh(ctx.crossing)


class Total(torch.autograd.Function):
    """Sums losses; its backward reports the individual losses before anything else runs."""

    @staticmethod
    def forward(ctx: Any, tell: Callable[[Tensor], None], *losses: Tensor) -> Tensor:
        """Sum the losses; `tell` is called in the backward with the gradient of the sum."""
        ctx.tell, ctx.n = tell, len(losses)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        """Report the losses, and give each the gradient of the sum."""
        ctx.tell(scale)
        return None, *[scale] * ctx.n


def splits_below(loss: Tensor) -> list[tuple[Any, int]]:
    """Return the copies that a loss depends on, each as a `Split` node and its output number."""
    return [edge for edge in _walk([loss]) if isinstance(edge[0], Split._backward_cls)]


def added(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """Return the sum of the gradients that are not None, or None."""
    found = [g for g in gradients if g is not None]
    return sum(found[1:], found[0]) if found else None


def _walk(tensors: list[Tensor]) -> Iterator[tuple[Any, int]]:
    """Yield the edges of the graph, as node and output number, down to `Split` nodes."""
    edges: list[tuple[Any, int]] = [(z.grad_fn, z.output_nr) for z in tensors]
    seen: set[Any] = set()
    while edges:
        edge = edges.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        yield edge
        if node not in seen and not isinstance(node, Split._backward_cls):
            edges.extend(node.next_functions)
        seen.update((edge, node))
