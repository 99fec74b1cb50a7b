"""One backward through a `MultiTaskModel`, as a `Problem` for surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import UsageError
from mtrl.surgery.gradients import (
    FeatureGradients,
    Gradients,
    Parameters,
    TaskGradients,
    at_least_float32,
)
from mtrl.surgery.graph import Crossing, added, retains_graph, without_hooks
from mtrl.surgery.ranks import in_any_rank, mean_of_ranks, world_size
from mtrl.surgery.rows import Row, TaskRows, rows_added

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class ModuleProblem:
    """The tasks' gradients of one backward, and of those that were kept before it.

    Args:
        crossings: The forward passes, each with what its tasks want.
        n_tasks: All tasks.
        names: Of the trunk's parameters, by their `id`.
        rotation: `[1, T, m, m]`, or None.
        losses: By task, if they are known.
        kept: Problems of the backwards before, whose gradients count with these.
    """

    def __init__(
        self,
        crossings: Sequence[Crossing],
        n_tasks: int,
        names: Mapping[int, str],
        *,
        rotation: Tensor | None = None,
        losses: dict[int, Tensor] | None = None,
        kept: Sequence[ModuleProblem] = (),
    ) -> None:
        self.crossings, self.names, self.rotation = crossings, names, rotation
        self._losses, self.kept = losses, kept
        self.wanted = [crossing.wanted or {} for crossing in crossings]
        self.device = crossings[0].features[0].device
        present = {task for wanted in self.wanted for task in wanted}
        present |= {task for problem in kept for task in problem.tasks}
        self.tasks: list[int] = in_any_rank(sorted(present), n_tasks, self.device)
        self.seen: Tensor | None = None  # the Gramian, if it was asked for

    @property
    def losses(self) -> Tensor:
        """`[1, T]`."""
        if self._losses is None:
            raise UsageError(
                "surgery: expected the losses of the tasks for a method that looks at them: call "
                "model.backward(losses), or model.total(losses).backward()"
            )
        told = [problem._losses or {} for problem in (*self.kept, self)]
        found = [added(losses.get(task) for losses in told) for task in self.tasks]
        zero = torch.zeros((), device=self.device)  # of a task that other ranks have
        ordered = [zero if loss is None else at_least_float32(loss) for loss in found]
        return mean_of_ranks(torch.stack(ordered)[None])

    def task_gradients(self) -> ModuleGradients:
        """A gradient of its own for each task."""
        return ModuleGradients(self)

    def features(self) -> ModuleFeatures:
        """What the tasks want of the features."""
        return ModuleFeatures(self)

    @cached_property
    def rows(self) -> dict[int, Row]:
        """A vector-Jacobian product for each task, added to those that were kept."""
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
        """The rows of all tasks."""
        return TaskRows([self.rows[task] for task in self.tasks])

    def weighted(self, weights: Tensor, closed: bool) -> dict[int, list[Tensor | None]]:
        """Σ_k w_k G_k for each feature tensor of the crossings that are closed, or are not."""
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
        """Σ_k w_k ∇L_k on what is shared, below the crossings that are closed."""
        if "rows" in self.__dict__ and all(c.closed for c in self.crossings):
            return self.jacobian.combined(weights)
        here = self._into_shared(self.weighted(weights, closed=True), retains_graph())
        if not self.kept:
            return here
        rows = [rows_added([p.rows.get(task, {}) for p in self.kept]) for task in self.tasks]
        return rows_added([TaskRows(rows).combined(weights), here])

    def _into_shared(self, gradients: dict[int, list[Tensor | None]], retain: bool) -> Row:
        """Of these crossings, the product of the trunk's transposed Jacobian and the gradients."""
        pairs = [
            (z, g)
            for i, row in gradients.items()
            for z, g in zip(self.crossings[i].features, row, strict=True)
            if g is not None
        ]
        shared = list({id(p): p for i in gradients for p in self.crossings[i].shared}.values())
        if not pairs or not shared:
            return {}
        outputs, given = zip(*pairs, strict=True)
        with without_hooks(shared):
            try:
                found = torch.autograd.grad(
                    outputs, shared, given, retain_graph=retain, allow_unused=True
                )
            except RuntimeError as error:
                if "donated" not in str(error):
                    raise
                raise UsageError(
                    "trunk: expected a graph to differentiate once for each task, got one that is "
                    "compiled for a single time; before that, "
                    "set torch._functorch.config.donated_buffer = False"
                ) from error
        return {id(p): g for p, g in zip(shared, found, strict=True) if g is not None}


class ModuleGradients(TaskGradients):
    """Every task's gradient, formed."""

    def __init__(self, problem: ModuleProblem) -> None:
        nan = torch.full((1, len(problem.tasks)), torch.nan, device=problem.device)
        super().__init__({}, nan, {})  # a plain backward does not know the losses
        object.__setattr__(self, "problem", problem)

    problem: ModuleProblem

    @override
    def gramian(self) -> Tensor:
        for crossing in self.problem.crossings:
            if crossing.hidden:
                raise UsageError(
                    "trunk: expected autograd to see its parameters below the features, for a "
                    "method that looks at them; checkpointing needs use_reentrant=False"
                )
        found = self.problem.jacobian.gramian()
        self.problem.seen = mean_of_ranks(found.to(self.problem.device))
        return self.problem.seen

    @override
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        found = self.problem.jacobian.combined(weights[0])
        return {self.problem.names[p]: value[None] for p, value in found.items()}

    @override
    def along(self, direction: Parameters) -> Tensor:
        here = {key: direction[name][0] for key, name in self.problem.names.items()}
        return self._with([here] * len(self.problem.tasks))

    @override
    def products(self, other: Self) -> Tensor:
        return self._with([other.problem.rows.get(task, {}) for task in self.problem.tasks])

    def _with(self, others: list[Row]) -> Tensor:
        zero = torch.zeros((), device=self.problem.device)
        rows = [self.problem.rows[task] for task in self.problem.tasks]
        sums = [
            sum(((g * other[key]).sum() for key, g in row.items() if key in other), zero)
            for row, other in zip(rows, others, strict=True)
        ]
        return torch.stack(sums)[None]

    def weighted(self, weights: Tensor) -> Gradients:
        """The weights: what is shared is left to the graph, see `MultiTaskModel`."""
        return Gradients({}, {}, self.losses, {}, weights)


class ModuleFeatures(FeatureGradients):
    """What the tasks want of the features, of all forward passes together."""

    def __init__(self, problem: ModuleProblem) -> None:
        self.problem = problem

    @override
    @property
    def losses(self) -> Tensor:
        return self.problem.losses

    @cached_property
    def norms(self) -> Tensor:
        """‖G_k‖, `[1, T]`, over the batch of all processes together."""
        squares = [
            added(torch.linalg.vector_norm(at_least_float32(g)).square() for g in self._of(task))
            for task in self.problem.tasks
        ]
        zero = torch.zeros((), device=self.problem.device)  # of a task that other ranks have
        found = torch.stack([zero if square is None else square for square in squares])
        return (mean_of_ranks(found[None]) / world_size()).sqrt()

    @override
    @cached_property
    def means(self) -> Tensor:
        means = {
            task: torch.cat([at_least_float32(g.flatten(0, -2)) for g in found]).mean(0)
            for task in self.problem.tasks
            if (found := self._of(task))
        }
        zero = torch.zeros_like(next(iter(means.values())))
        rows = torch.stack([means.get(task, zero) for task in self.problem.tasks])
        return mean_of_ranks(rows[None]) / world_size()

    @override
    def mean(self) -> Gradients:
        n = len(self.problem.tasks)
        return self.weighted(torch.full((1, n), 1 / n, device=self.problem.device))

    def weighted(self, weights: Tensor) -> Gradients:
        """The weights; what is shared is left to the graph, see `MultiTaskModel`."""
        return Gradients({}, {}, torch.full_like(weights, torch.nan), {}, weights)

    def _of(self, task: int) -> list[Tensor]:
        problems = [*self.problem.kept, self.problem]
        rows = [wanted[task] for p in problems for wanted in p.wanted if task in wanted]
        return [g for row in rows for g in row if g is not None]
