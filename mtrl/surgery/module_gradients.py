"""Gradients that a method may request in a backward through a `MultiTaskModel`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import UsageError
from mtrl.nets.params import Parameters
from mtrl.surgery.gradients import FeatureGradients, Gradients, TaskGradients, at_least_float32
from mtrl.surgery.graph import added
from mtrl.surgery.rows import Row, mean_of_ranks, world_size

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

    from mtrl.surgery.modules import ModuleProblem


@dataclass(frozen=True)
class ModuleGradients(TaskGradients):
    """Gradients of every task."""

    problem: ModuleProblem

    @override
    def gramian(self) -> Tensor:
        for crossing in self.problem.crossings:
            if crossing.hidden:
                raise UsageError(
                    "trunk: expected parameters that are visible to autograd, for a method that "
                    "uses their gradients; checkpointing needs use_reentrant=False"
                )
        self.problem.seen = self.problem.jacobian.gramian().to(self.problem.device)
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
        return self._with(other.problem.jacobian.each())

    def _with(self, others: list[Row]) -> Tensor:
        zero = torch.zeros((), device=self.problem.device)
        sums = [
            sum(((g * other[key]).sum() for key, g in row.items() if key in other), zero)
            for row, other in zip(self.problem.jacobian.each(), others, strict=True)
        ]
        return torch.stack(sums)[None]

    def weighted(self, weights: Tensor) -> Gradients:
        """Return only the weights; gradients are left to the graph, see `MultiTaskModel`."""
        return Gradients({}, {}, self.losses, {}, weights)


class ModuleFeatures(FeatureGradients):
    """Gradients of all tasks w.r.t. the features, over all forward passes."""

    def __init__(self, problem: ModuleProblem) -> None:
        self.problem = problem

    @override
    @property
    def losses(self) -> Tensor:
        return self.problem.losses

    @cached_property
    def norms(self) -> Tensor:
        """‖G_k‖, `[1, T]`, over the joint batch of all processes."""
        squares = [
            added(torch.linalg.vector_norm(at_least_float32(g)).square() for g in self._of(task))
            for task in self.problem.tasks
        ]
        zero = torch.zeros((), device=self.problem.device)  # for tasks of other ranks
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
        """Return only the weights; gradients are left to the graph, see `MultiTaskModel`."""
        return Gradients({}, {}, torch.full_like(weights, torch.nan), {}, weights)

    def _of(self, task: int) -> list[Tensor]:
        problems = [*self.problem.kept, self.problem]
        rows = [wanted[task] for p in problems for wanted in p.wanted if task in wanted]
        return [g for row in rows for g in row if g is not None]
