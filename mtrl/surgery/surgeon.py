"""Backward of a `MultiTaskModel`: collect gradients, apply the method, pass on the result."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtrl.errors import UsageError
from mtrl.surgery.base import MAINTAIN_EVERY, Surgery
from mtrl.surgery.diagnostics import cosines
from mtrl.surgery.engine import current_backward
from mtrl.surgery.graph import Crossing, Total, splits_below
from mtrl.surgery.heads import Features
from mtrl.surgery.methods.none import NoSurgery
from mtrl.surgery.modules import ModuleProblem
from mtrl.surgery.rows import Row, mean_of_ranks, world_size

if TYPE_CHECKING:
    from mtrl.surgery.model import MultiTaskModel

PATIENCE = 10
"""Backwards without `after_step` after which a method that needs it gives a warning."""


@dataclass(frozen=True)
class Outcome:
    """Result of surgery in one backward.

    Attributes:
        weights: Weight of each task's gradient of the trunk; all 1 is the sum of the losses.
        gramian: Gramian of the task gradients of the trunk, `[T, T]`, in the order of `weights`;
            None if the method does not compute it, see `MultiTaskModel.watch`.
    """

    weights: dict[str, Tensor]
    gramian: Tensor | None

    @property
    def cosines(self) -> Tensor | None:
        """Cosines between the task gradients, `[T, T]`; negative ones are conflicts."""
        return None if self.gramian is None else cosines(self.gramian)


class Surgeon:
    """Tracks the forward passes of a model, and applies the method once per backward."""

    def __init__(self, model: MultiTaskModel) -> None:
        self.model = model
        self.last: Outcome | None = None
        self._generator: torch.Generator | Tensor | None = None
        self._n_backwards = 0
        self._stepped = False
        self._forget()

    def _forget(self) -> None:
        """Forget all forward passes."""
        self._open: list[Any] = []  # weak references to crossings
        self._crossed = False  # whether the last forward pass has a crossing
        self._kept: list[ModuleProblem] = []
        self._keeps = False
        self._told: list[tuple[int, dict[int, Tensor]]] = []  # losses, by the backward
        self._found: Row = {}
        self._passed: dict[Crossing, list[Tensor | None]] = {}

    def copies(self, features: Features, tasks: list[int]) -> Sequence[Features]:
        """Return the features for each task's head, whose backward applies surgery."""
        model = self.model
        self._crossed = torch.is_grad_enabled() and bool(features.tensors)
        if not self._crossed:
            return [features] * len(tasks)
        plain = isinstance(model.surgery, NoSurgery) and not model.watch
        crossing = Crossing(tasks, features.tensors)
        tensors = crossing.features
        if not plain:
            tensors = crossing.weighed(model.trunk, self._weigh)
            self._open = [ref for ref in self._open if ref() is not None]
            self._open.append(weakref.ref(crossing))
        found = crossing.copies(tensors)
        return [features.replaced(tensors) for tensors in found]

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the losses, whose backward gives surgery access to each loss."""
        self.model.heads.expect(losses)
        names = [task for task in self.model.heads if task in losses and losses[task].requires_grad]
        if not names:
            raise ValueError("losses: expected a loss that depends on the model, got none")
        tasks = [list(self.model.heads).index(name) for name in names]
        foreign = []
        for name, task in zip(names, tasks, strict=True):
            edges = splits_below(losses[name])
            served = [node.crossing.tasks[n // len(node.crossing.features)] for node, n in edges]
            if task not in served and self._crossed:
                raise ValueError(f"losses: expected {name!r} to depend on its head's last output")
            foreign += [
                (losses[name], task, *edge)
                for edge, owner in zip(edges, served, strict=True)
                if owner != task
            ]
        ordered = [losses[name] for name in names]

        def tell(scale: Tensor) -> None:
            told = dict(zip(tasks, (loss.detach() for loss in ordered), strict=True))
            self._told.append((current_backward(), told))
            for loss, task, node, slot in foreign:
                edge = GradientEdge(node, slot)
                (found,) = torch.autograd.grad(
                    loss, [edge], scale.to(loss.dtype), retain_graph=True, allow_unused=True
                )
                if found is not None:
                    node.crossing.move(slot, task, found)

        return Total.apply(tell, *ordered)

    def after_step(self, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """Give the method the losses after the optimiser's step, averaged over the processes."""
        self._stepped = True
        tasks = list(self.last.weights) if self.last else []  # of the last backward

        def ordered() -> Tensor:
            found = torch.no_grad()(losses)()
            self.model.heads.expect(found, () if world_size() > 1 else tasks)  # else on any rank
            zero = torch.zeros((), device=next(iter(found.values())).device)
            rows = [found.get(task, zero).detach() for task in tasks]
            return mean_of_ranks(torch.stack(rows)[None])

        if tasks:
            self.model.surgery.after_step(ordered)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Return a context in which backwards accumulate the trunk's gradients for a later one."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False

    @torch.no_grad()
    def _weigh(self, crossing: Crossing) -> list[Tensor | None]:
        """Return gradients for a crossing's inputs; a backward's first call decides for all."""
        if crossing.wanted is not None and crossing not in self._passed:
            self._decide()
        passed = self._passed.pop(crossing, None) or [None] * len(crossing.features)
        crossing.release()
        if not crossing.closed:
            return passed
        return [self._found.pop(id(parameter), None) for parameter in crossing.shared]

    def _decide(self) -> None:
        crossings = [found for ref in self._open if (found := ref()) is not None]
        if any(crossing.awaited for crossing in crossings):
            raise UsageError(
                "backward: expected independent forward passes on one device: the task gradients "
                "of one pass are needed before those of another are known"
            )
        here = [crossing for crossing in crossings if crossing.wanted]
        if not here:
            return
        losses = [told for backward, told in self._told if backward == current_backward()]
        self._told = []
        kept = [] if self._keeps else self._kept
        problem = ModuleProblem(
            here,
            self.model.n_tasks,
            self.model.trunk,
            rotation=self.model.rotation,
            losses=losses,
            kept=kept,
        )
        if self._keeps:
            self._keep(problem)
            return
        generator = self._random_numbers(problem.device)
        if self.model.watch and not all(crossing.hidden for crossing in here):
            problem.task_gradients().gramian()
        weights = len(problem.tasks) * self.model.surgery(problem, generator).weights[0]
        tasks = list(self.model.heads)
        self.last = Outcome(
            {tasks[task]: w for task, w in zip(problem.tasks, weights, strict=True)},
            None if problem.seen is None else problem.seen[0],
        )
        self._found = problem.into_shared(weights)
        passed = problem.weighted(weights, closed=False)
        self._passed = {crossing: passed.get(i, []) for i, crossing in enumerate(here)}
        self._kept = []
        self._n_backwards += 1
        self._expect_steps()
        if self._n_backwards % MAINTAIN_EVERY == 0:
            self.model.surgery.maintain(self.model)

    def _expect_steps(self) -> None:
        method = type(self.model.surgery)
        if method.after_step is Surgery.after_step or self._stepped:
            return
        if self._n_backwards == PATIENCE:
            warnings.warn(
                f"{method.__name__}: expected model.after_step(losses) after each optimiser step, "
                f"got none in {PATIENCE} backwards: the method learns its weights there",
                stacklevel=2,
            )

    def _random_numbers(self, device: torch.device) -> torch.Generator:
        if not isinstance(self._generator, torch.Generator):
            state, self._generator = self._generator, torch.Generator(device)
            self._generator.manual_seed(self.model.seed)
            if state is not None:  # from a model that was copied or saved
                self._generator.set_state(state)
        return self._generator

    def _keep(self, problem: ModuleProblem) -> None:
        if not all(crossing.closed for crossing in problem.crossings):
            raise UsageError("accumulate: expected no trainable parameters before the trunk")
        problem.rows  # noqa: B018  # compute them while the graph exists
        self._kept = [*self._kept, problem]
        self._found, self._passed = {}, {c: [] for c in problem.crossings}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without forward passes: graphs are neither copied nor saved."""
        generator = self._generator
        if isinstance(generator, torch.Generator):
            generator = generator.get_state()
        return {
            "model": self.model,
            "last": self.last,
            "n_backwards": self._n_backwards,
            "generator": generator,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, without forward passes."""
        self.model, self.last = state["model"], state["last"]
        self._n_backwards, self._generator = state["n_backwards"], state["generator"]
        self._stepped = False
        self._forget()
