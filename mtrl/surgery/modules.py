"""One step of a `MultiTaskModel`, as a `Problem` for surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtrl.errors import unknown
from mtrl.surgery.gradients import (
    FeatureGradients,
    Gradients,
    Jacobian,
    at_least_float32,
    combine,
)


class ModuleProblem:
    """The `Problem` of one step: the losses of one batch, or of several that were accumulated.

    Args:
        trunk: The shared parameters to be trained.
        heads: The heads' parameters to be trained.
        names: All tasks.
        rotation: `[1, T, m, m]`, or None.
    """

    def __init__(
        self,
        trunk: dict[str, nn.Parameter],
        heads: list[nn.Parameter],
        names: Sequence[str],
        rotation: Tensor | None,
    ) -> None:
        self.trunk, self.heads, self.names, self.rotation = trunk, heads, names, rotation
        self.losses: dict[str, Tensor] = {}
        self.head_gradients: list[Tensor | None] = [None] * len(heads)
        self._at_features: dict[str, list[Tensor]] = {}  # G_k of each batch
        self._open: list[tuple[str, Tensor, Tensor]] = []  # task, z, G_k still to go into the trunk
        self._rows: dict[str, list[Tensor]] = {}  # a task's gradient on the trunk, so far

    @property
    def tasks(self) -> list[int]:
        """See `Problem`."""
        return [self.names.index(task) for task in self.losses]

    def add(
        self, passed: Mapping[str, tuple[Tensor, Tensor]], losses: Mapping[str, Tensor]
    ) -> None:
        """Take the backward of a batch's losses as far as the features."""
        _check(passed, losses, self.names)
        self._into_trunk()
        tasks = [task for task in self.names if task in losses]  # in the order of the tasks
        cuts = [passed[task][1] for task in tasks]
        wanted = [*cuts, *self.heads]
        found = torch.autograd.grad([losses[t] for t in tasks], wanted, allow_unused=True)
        for task, gradient in zip(tasks, found, strict=False):
            if gradient is None:
                raise ValueError(f"losses: expected {task!r} to depend on its head's last output")
        for task, gradient in zip(tasks, found, strict=False):
            self._at_features.setdefault(task, []).append(gradient)
            self._open.append((task, passed[task][0], gradient))
            self.losses[task] = self.losses.get(task, 0) + losses[task].detach()
        self.losses = {task: self.losses[task] for task in self.names if task in self.losses}
        for i, gradient in enumerate(found[len(cuts) :]):
            self.head_gradients[i] = _sum(self.head_gradients[i], gradient)

    def task_gradients(self) -> Jacobian:
        """See `Problem`: one backward through the trunk for each task."""
        self._into_trunk()
        rows = [self._rows[task] for task in self.losses]
        shared = {
            name: torch.stack(row)[None] for name, *row in zip(self.trunk, *rows, strict=True)
        }
        return Jacobian({}, self._stacked(), {}, shared)

    def features(self) -> ModuleFeatures:
        """See `Problem`."""
        return ModuleFeatures(self._stacked(), self)

    def _into_trunk(self) -> None:
        for task, z, gradient in self._open:
            found = self._backward([z], [gradient])
            row = self._rows.get(task)
            self._rows[task] = found if row is None else list(torch._foreach_add(row, found))
        self._open = []

    def _backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        parameters = list(self.trunk.values())
        if not parameters:  # a frozen trunk, under heads that learn
            return []
        found = torch.autograd.grad(
            outputs, parameters, gradients, retain_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]

    def _stacked(self) -> Tensor:
        return torch.stack([at_least_float32(loss) for loss in self.losses.values()])[None]


@dataclass(frozen=True)
class ModuleFeatures(FeatureGradients):
    """A single backward through the trunk, unless batches were accumulated."""

    problem: ModuleProblem

    @property
    def norms(self) -> Tensor:
        """See `FeatureGradients`."""
        return torch.stack([torch.linalg.vector_norm(task) for task in self._tasks()])[None]

    @property
    def means(self) -> Tensor:
        """See `FeatureGradients`."""
        return torch.stack([task.mean(0) for task in self._tasks()])[None]

    def mean(self) -> Gradients:
        """See `FeatureGradients`."""
        return self.weighted(torch.full_like(self.losses, 1 / self.losses.shape[-1]))

    def weighted(self, weights: Tensor) -> Gradients:
        """See `FeatureGradients`."""
        problem = self.problem
        if problem._rows:
            shared = combine(weights, problem.task_gradients().shared)
        else:
            by_task = dict(zip(problem.losses, weights[0], strict=True))
            outputs = [z for _, z, _ in problem._open]
            scaled = [by_task[task].to(g.dtype) * g for task, _, g in problem._open]
            found = problem._backward(outputs, scaled)
            shared = {name: value[None] for name, value in zip(problem.trunk, found, strict=True)}
        return Gradients(shared, {}, self.losses, {}, weights)

    def _tasks(self) -> list[Tensor]:
        batches = [self.problem._at_features[task] for task in self.problem.losses]
        return [at_least_float32(torch.cat([g.flatten(0, -2) for g in task])) for task in batches]


def _check(
    passed: Mapping[str, object], losses: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    if not losses:
        raise ValueError("losses: expected at least one task's, got none")
    for task, loss in losses.items():
        if task not in names:
            raise ValueError(unknown("losses", task, names))
        if loss.ndim:
            raise ValueError(
                f"losses: expected a scalar for {task!r}, got shape {tuple(loss.shape)}"
            )
        if task not in passed:
            raise ValueError(
                f"losses: expected a forward pass of {task!r} before its loss, got none"
            )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
