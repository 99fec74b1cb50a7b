"""Surgery as two nodes of the autograd graph, so that a plain `loss.backward()` does it.

    inputs → trunk → z → Weigh → Split → a copy of z for each task → heads → losses

In the backward, `Split` collects what each task wants of its copy. `Weigh` runs after all else that
is ready, so that by then every forward pass of this backward has been collected. It asks the method
for weights and hands on the weighted gradient. Everything around them is autograd's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Wanted = dict[int, list[Tensor | None]]
"""What each task, by its index, wants of each feature tensor."""

Uses = dict[Any, list[tuple[Any, int]]]
"""A graph: for each node those that take what it gives, with the place there; None is the caller.
"""


class Crossing:
    """One call of the trunk: where its features cross over to the heads.

    Args:
        tasks: Whose heads get these features.
        features: Differentiable tensors, with the trunk's graph.

    Attributes:
        shared: The parameters that surgery is about: the trunk's below these features; if it has
            none there, all that are below.
        hidden: Whether a node below hides parameters, as reentrant checkpointing does.
        uses: The graph below, as far as `Weigh` is there.
        closed: Whether nothing but the trunk's parameters is learned below. The graph is then cut
            at the features, and `Weigh` gives these parameters their gradients itself.
    """

    def __init__(self, tasks: list[int], features: list[Tensor]) -> None:
        self.tasks, self.features = tasks, features
        self.shared: list[Tensor] = []
        self.uses: Uses = {}
        self.hidden = self.closed = False
        self._wanted: tuple[int, Wanted] | None = None
        self._moves: tuple[int, list[tuple[int, int, Tensor]]] | None = None
        self._split: Callable[[], Any] = lambda: None

    def weighed(self, trunk: nn.Module, weigh: Callable[[Crossing], Any]) -> list[Tensor]:
        """The features, in whose backward `weigh` gives gradients to `entering`.

        Args:
            trunk: Whose parameters surgery is about.
            weigh: Called in the backward, once all else that is ready has run.
        """
        self.uses, leaves = _below(self.features)
        names = {type(node).__name__ for node in self.uses}
        # `trunk.parameters()` would take as long as all else here.
        own = {id(p) for module in trunk.modules() for p in module._parameters.values()}
        self.shared = [leaf for leaf in leaves if id(leaf) in own] or leaves
        self.hidden = "CheckpointFunctionBackward" in names or not leaves
        fed = "SplitBackward" in names  # by another pass, through which a gradient must go on
        self.closed = not (self.hidden or fed) and all(id(leaf) in own for leaf in leaves)
        features = Weigh.apply(self, weigh, *self.entering)
        features[0].grad_fn._set_sequence_nr(0)
        return list(features)

    def copies(self, features: list[Tensor]) -> list[list[Tensor]]:
        """The features once for each task, with the sum of what the tasks want as gradient."""
        found = Split.apply(self, *features)
        self._split = weakref.ref(found[0].grad_fn)
        n = len(self.features)
        return [list(found[i * n : (i + 1) * n]) for i in range(len(self.tasks))]

    @property
    def entering(self) -> list[Tensor]:
        """What `Weigh` gives gradients to."""
        return self.shared if self.closed else self.features

    @property
    def wanted(self) -> Wanted | None:
        """What has been collected in the present backward, if it has come by."""
        if self._wanted is None or self._wanted[0] != _backward():
            return None
        return self._wanted[1]

    @property
    def awaited(self) -> bool:
        """Whether it is still to come by in the present backward."""
        node = self._split()
        return node is not None and self.wanted is None and torch._C._will_engine_execute_node(node)

    def move(self, slot: int, task: int, gradient: Tensor) -> None:
        """Part of what will come for a copy is what another task wants."""
        if self._moves is None or self._moves[0] != _backward():
            self._moves = _backward(), []
        self._moves[1].append((slot, task, gradient))

    def collect(self, rows: list[list[Tensor | None]]) -> None:
        """Take down what each copy's gradient is, and put it under the right tasks."""
        wanted = dict(zip(self.tasks, rows, strict=True))
        if self._moves is not None and self._moves[0] == _backward():
            n = len(self.features)
            for slot, task, gradient in self._moves[1]:
                source, number = wanted[self.tasks[slot // n]], slot % n
                target = wanted.setdefault(task, [None] * n)
                source[number] = added([source[number], -gradient])
                target[number] = added([target[number], gradient])
        here = {task: row for task, row in wanted.items() if any(g is not None for g in row)}
        self._wanted = _backward(), here

    def release(self) -> None:
        """Let go of the trunk's graph, unless the caller of the backward retains it."""
        self._wanted = self._moves = None
        if not retains_graph():
            self.features = [z.detach() for z in self.features]
            self.uses = {}


class Split(torch.autograd.Function):
    """Features to a copy for each task; its backward sees what all tasks want at once."""

    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *features: Tensor) -> tuple[Tensor, ...]:
        """Views: torch refuses to change one of several in place."""
        ctx.crossing = crossing
        ctx.set_materialize_grads(False)
        return tuple(z.view_as(z) for _ in crossing.tasks for z in features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Collect, and hand on the sum."""
        n = len(ctx.crossing.features)
        rows = [list(gradients[i : i + n]) for i in range(0, len(gradients), n)]
        sums = [added(column) for column in zip(*rows, strict=True)]
        ctx.crossing.collect(rows)
        return None, *sums


class Weigh(torch.autograd.Function):
    """Features to themselves; its backward hands on what the method makes of all wishes."""

    @staticmethod
    def forward(
        ctx: Any, crossing: Crossing, weigh: Callable[[Crossing], Any], *entering: Tensor
    ) -> tuple[Tensor, ...]:
        """The backward gives gradients to `entering`."""
        ctx.crossing, ctx.weigh = crossing, weigh
        ctx.set_materialize_grads(False)
        return tuple(z.detach() for z in crossing.features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Signs decide: no lower precision here, not even inside the caller's autocast."""
        with torch.autocast(ctx.crossing.features[0].device.type, enabled=False):
            return None, None, *ctx.weigh(ctx.crossing)


class Total(torch.autograd.Function):
    """The sum of losses; its backward tells which is which before anything else happens."""

    @staticmethod
    def forward(ctx: Any, tell: Callable[[Tensor], None], *losses: Tensor) -> Tensor:
        """`tell` is called with the gradient of the sum."""
        ctx.tell, ctx.n = tell, len(losses)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        """Each loss counts once."""
        ctx.tell(scale)
        return None, *[scale] * ctx.n


def splits_below(loss: Tensor) -> list[tuple[Any, int]]:
    """The copies that a loss depends on, each as its `Split` node and its number there."""
    return [edge for edge in _walk([loss]) if isinstance(edge[0], Split._backward_cls)]


def retains_graph() -> bool:
    """Whether the present backward was called with `retain_graph`."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, hooks of these leaves do not run: they wait for the gradient that is their own."""
    hooks = [p._backward_hooks for p in parameters if p._backward_hooks]
    saved = [dict(found) for found in hooks]
    for found in hooks:
        found.clear()
    try:
        yield
    finally:
        for found, entries in zip(hooks, saved, strict=True):
            found.update(entries)


def added(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    found = [g for g in gradients if g is not None]
    return sum(found[1:], found[0]) if found else None


def _backward() -> int:
    """The number of the present backward."""
    return torch._C._current_graph_task_id()


def _walk(tensors: list[Tensor]) -> Iterator[tuple[Any, int]]:
    """Each edge of the graph, as a node and the number of its output, down to `Split` nodes."""
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


def _below(features: list[Tensor]) -> tuple[Uses, list[Tensor]]:
    """The graph under the features, and its leaves."""
    uses: Uses = {z.grad_fn: [(None, i)] for i, z in enumerate(features) if z.grad_fn is not None}
    nodes = list(uses)
    for node in nodes:  # grows meanwhile
        for place, (parent, _) in enumerate(node.next_functions):
            if parent is None:
                continue
            if parent not in uses:
                uses[parent] = []
                nodes.append(parent)
            uses[parent].append((node, place))
    leaves = [node.variable for node in nodes if type(node).__name__ == "AccumulateGrad"]
    bare = [z for z in features if z.grad_fn is None]  # parameters that are features themselves
    return uses, bare + leaves
