"""Backward through a `MultiTaskModel` as a `Problem` for surgery."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mtrl.errors import UsageError
from mtrl.surgery.engine import retains_graph, without_hooks
from mtrl.surgery.gradients import at_least_float32
from mtrl.surgery.graph import Crossing, Wanted, added
from mtrl.surgery.layers import layers_of, stacked
from mtrl.surgery.module_gradients import ModuleFeatures, ModuleGradients
from mtrl.surgery.rows import Row, TaskRows, in_any_rank, mean_of_ranks, rows_added, world_size

AT_ONCE = 4
"""Number of tasks from which one pass for all is faster, if all nodes are `BATCHED`."""

BATCHED = {
    f"{name}Backward0"
    for name in (
        "Addmm Mm T View UnsafeView Add Mul Relu Tanh Sigmoid Gelu Silu Elu LeakyRelu Softplus "
        "Mish Hardtanh Hardswish"
    ).split()
} | {"AccumulateGrad"}
"""Autograd nodes that handle T gradients as one larger product, or elementwise.

Batching convolutions and attention did not make them faster.
"""


class ModuleProblem:
    """Task gradients of one backward, and of accumulated earlier ones.

    Args:
        crossings: Forward passes, each with the gradients of its tasks.
        n_tasks: Number of all tasks.
        trunk: Trunk whose gradients are computed.
        rotation: `[1, T, m, m]`, or None.
        losses: Losses by task, of each `Total` in this backward.
        kept: Problems of earlier backwards whose gradients are accumulated.
    """

    def __init__(
        self,
        crossings: Sequence[Crossing],
        n_tasks: int,
        trunk: nn.Module,
        *,
        rotation: Tensor | None = None,
        losses: Sequence[dict[int, Tensor]] = (),
        kept: Sequence[ModuleProblem] = (),
    ) -> None:
        self.crossings, self.rotation, self.trunk = crossings, rotation, trunk
        self._losses, self.kept = losses, kept
        self.wanted = [crossing.wanted or {} for crossing in crossings]
        # A parameter may have been frozen since the forward pass.
        self.shared = [[p for p in c.shared if p.requires_grad] for c in crossings]
        self.device = crossings[0].features[0].device
        present = {task for wanted in self.wanted for task in wanted}
        present |= {task for problem in kept for task in problem.tasks}
        self.tasks: list[int] = in_any_rank(sorted(present), n_tasks, self.device)
        self.seen: Tensor | None = None  # the Gramian, if it was computed

    @property
    def losses(self) -> Tensor:
        """Losses, `[1, T]`."""
        if not self._losses:
            raise UsageError(
                "surgery: expected the losses of the tasks for a method that uses them: call "
                "model.backward(losses), or model.total(losses).backward()"
            )
        told = [losses for problem in (*self.kept, self) for losses in problem._losses]
        found = [added(losses.get(task) for losses in told) for task in self.tasks]
        zero = torch.zeros((), device=self.device)  # for tasks of other ranks
        ordered = [zero if loss is None else at_least_float32(loss) for loss in found]
        return mean_of_ranks(torch.stack(ordered)[None])

    @cached_property
    def names(self) -> dict[int, str]:
        """Names of the trunk's parameters by their `id`."""
        return {id(p): name for name, p in self.trunk.named_parameters()}

    def task_gradients(self) -> ModuleGradients:
        """Return the gradient of each task; losses are unknown in a plain backward."""
        losses = torch.full((1, len(self.tasks)), torch.nan, device=self.device)
        return ModuleGradients({}, losses, {}, self)

    def features(self) -> ModuleFeatures:
        """Return the gradients of the tasks w.r.t. the features."""
        return ModuleFeatures(self)

    @cached_property
    def rows(self) -> dict[int, Row]:
        """Vector-Jacobian product of each task, added to the accumulated ones."""
        last = {i: max(wanted, default=None) for i, wanted in enumerate(self.wanted)}
        retain = retains_graph() or not all(c.closed for c in self.crossings)
        found: dict[int, Row] = {}
        for task in self.tasks:
            here = [i for i, wanted in enumerate(self.wanted) if task in wanted]
            gradients = {i: self.wanted[i][task] for i in here}
            keep = retain or any(last[i] != task for i in here)
            rows = [problem.rows.get(task, {}) for problem in self.kept]
            found[task] = rows_added([*rows, self._into_shared(gradients, keep)])
        return found

    @cached_property
    def jacobian(self) -> TaskRows:
        """Rows of all tasks, averaged over all processes."""
        one = self.crossings[0]
        if len(self.crossings) == 1 and one.closed and not self.kept and world_size() == 1:
            return self._jacobian_by_layers(one, self.wanted[0])
        shared: dict[int, Tensor] = {id(p): p for p in self.trunk.parameters()}
        shared |= {id(p): p for ps in self.shared for p in ps if id(p) not in shared}
        return TaskRows([self.rows[task] for task in self.tasks], shared=list(shared.values()))

    def _jacobian_by_layers(self, crossing: Crossing, wanted: Wanted) -> TaskRows:
        """Return the rows for one forward pass whose layers have equal inputs for all tasks."""
        n_tasks = len(self.tasks)
        layers = layers_of(crossing.uses, self.shared[0], n_tasks) if n_tasks > 1 else []
        taken = {id(parameter) for layer in layers for parameter in layer.parameters}
        others = [p for p in self.shared[0] if id(p) not in taken]
        targets: list[Tensor | GradientEdge] = [*others, *(layer.output for layer in layers)]
        found = self._by_task(targets, crossing, wanted)
        seen = []
        for layer, gradients in zip(layers, found[len(others) :], strict=True):
            at_outputs = stacked(gradients)
            if at_outputs is not None:
                layer.see(at_outputs)
                seen.append(layer)
        keys = [id(parameter) for parameter in others]
        by_task = zip(*found[: len(others)], strict=True)
        rows = [
            {key: g for key, g in zip(keys, row, strict=True) if g is not None} for row in by_task
        ]
        return TaskRows(rows or [{} for _ in self.tasks], seen)

    def _by_task(
        self, targets: Sequence[Tensor | GradientEdge], crossing: Crossing, wanted: Wanted
    ) -> Sequence[Tensor | Sequence[Tensor | None]]:
        """Return the T tasks' gradients at each target, in one pass where that is faster."""
        rows = [wanted[task] for task in self.tasks]
        if len(rows) >= AT_ONCE and {type(node).__name__ for node in crossing.uses} <= BATCHED:
            columns = [stacked(column) for column in zip(*rows, strict=True)]
            try:
                found = self._differentiate(targets, {0: columns}, retain=True, at_once=True)
                return [[None] * len(rows) if g is None else g for g in found]
            except RuntimeError:  # for example, a user's hook reads values, which vmap forbids
                pass
        last = len(rows) - 1
        each = [
            self._differentiate(targets, {0: row}, i < last or retains_graph())
            for i, row in enumerate(rows)
        ]
        return list(zip(*each, strict=True))

    def weighted(self, weights: Tensor, closed: bool) -> dict[int, list[Tensor | None]]:
        """Compute Σ_k w_k G_k for each feature tensor of closed (or of open) crossings."""
        by_task = dict(zip(self.tasks, weights, strict=True))
        found = {}
        for i, wanted in enumerate(self.wanted):
            if self.crossings[i].closed is not closed:
                continue
            rows = [
                [None if g is None else (by_task[task] * g).to(g.dtype) for g in row]
                for task, row in wanted.items()
            ]
            found[i] = [added(column) for column in zip(*rows, strict=True)]
        return found

    def into_shared(self, weights: Tensor) -> Row:
        """Compute Σ_k w_k ∇L_k for the shared parameters below closed crossings."""
        if "jacobian" in self.__dict__ and all(c.closed for c in self.crossings):
            return self.jacobian.combined(weights)
        here = self._into_shared(self.weighted(weights, closed=True), retains_graph())
        if not self.kept:
            return here
        rows = [rows_added([p.rows.get(task, {}) for p in self.kept]) for task in self.tasks]
        return rows_added([TaskRows(rows).combined(weights), here])

    def _into_shared(self, gradients: dict[int, list[Tensor | None]], retain: bool) -> Row:
        """Compute the vector-Jacobian product of the trunk for these crossings' gradients."""
        shared = list({id(p): p for i in gradients for p in self.shared[i]}.values())
        found = self._differentiate(shared, gradients, retain)
        return {id(p): g for p, g in zip(shared, found, strict=True) if g is not None}

    def _differentiate(
        self,
        targets: Sequence[Tensor | GradientEdge],
        gradients: dict[int, list[Tensor | None]],
        retain: bool,
        at_once: bool = False,
    ) -> Sequence[Tensor | None]:
        """Backpropagate these crossings' gradients to leaves and layer outputs below.

        With `at_once`, gradients and results have a leading dimension of tasks, `[T, …]`.
        """
        pairs = [
            (z, g)
            for i, row in gradients.items()
            for z, g in zip(self.crossings[i].features, row, strict=True)
            if g is not None
        ]
        if not pairs or not targets:
            return [None] * len(targets)
        outputs, given = zip(*pairs, strict=True)
        with without_hooks([target for target in targets if isinstance(target, Tensor)]):
            try:
                return torch.autograd.grad(
                    outputs,
                    targets,  # type: ignore[arg-type]  # a mixture of both is fine
                    given,
                    retain_graph=retain,
                    allow_unused=True,
                    is_grads_batched=at_once,
                )
            except RuntimeError as error:
                if "donated" not in str(error):
                    raise
                raise UsageError(
                    "trunk: expected a graph that can be differentiated once per task, got one "
                    "compiled for a single backward; before compiling, "
                    "set torch._functorch.config.donated_buffer = False"
                ) from error
