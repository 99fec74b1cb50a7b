"""Gradient surgery for any PyTorch multi-task model, with no reinforcement learning in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm

from mtrl.errors import UsageError, unknown
from mtrl.surgery.base import MAINTAIN_EVERY, Surgery
from mtrl.surgery.diagnostics import cosines
from mtrl.surgery.gradients import at_least_float32
from mtrl.surgery.graph import Crossing, Total, splits_below
from mtrl.surgery.heads import Features, Heads
from mtrl.surgery.methods.none import NoSurgery
from mtrl.surgery.modules import ModuleProblem, Row
from mtrl.surgery.registry import get_surgery


@dataclass(frozen=True)
class Step:
    """What surgery did in one backward.

    Attributes:
        weights: Of each task's gradient on the trunk; all 1 is the sum of the losses.
        gramian: Of the tasks' gradients on the trunk, `[T, T]` of these tasks in this order; None
            where the method does not look at them, see `MultiTaskModel.watch`.
    """

    weights: dict[str, Tensor]
    gramian: Tensor | None

    @property
    def cosines(self) -> Tensor | None:
        """Cos φ between the tasks' gradients, `[T, T]`; below zero is a conflict."""
        return None if self.gramian is None else cosines(self.gramian)


class MultiTaskModel(nn.Module):
    """A trunk the tasks share, a head for each of them, and a method of surgery.

    Called with one input for all tasks, it gives each task's output. `loss.backward()` then does
    the surgery, for whatever loss was computed of the outputs: the sum of the tasks' losses, say,
    as Lightning or Hugging Face's Trainer call it. What is not the trunk's gets the gradient that
    autograd gives, heads and encoders in front of the model included. The trunk gets
    T Σ_k w_k g_k, where g_k is what comes through the k-th head, w_k is the method's weight, and T
    is the number of tasks in this backward: with weights of 1/T, autograd's own gradient. Several
    forward passes before one backward count together. A task whose output the loss does not use is
    left out. One backward is one step of surgery: losses that are to be weighed against each other
    have to be in it together.

    Args:
        trunk: From an input to features: a tensor `[B, …, d]`, or tuples, dictionaries or
            dataclasses of tensors.
        heads: From features to whatever the task's loss needs; shapes may differ.
        surgery: A name, see `get_surgery`, or a method. Of what a method returns the weights count.
        n_features: d; only rotations have to know it.
        seed: Of the method's random numbers.
        watch: Compute the tasks' cosines for methods too that do not need them.

    Attributes:
        last: What surgery did in the last backward, a `Step`; None before the first.

    Example:
        >>> trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        >>> model = MultiTaskModel(trunk, {"a": nn.Linear(32, 1), "b": nn.Linear(32, 3)}, "pcgrad")
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> outputs = model(torch.randn(16, 8))
        >>> loss = outputs["a"].square().mean() + outputs["b"].exp().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> model.last.cosines.shape
        torch.Size([2, 2])

    Raises:
        UsageError: for an unknown method.
    """

    n_networks = 1
    rotation: Tensor | None  # [1, T, m, m]

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        surgery: str | Surgery = "none",
        *,
        n_features: int | None = None,
        seed: int = 0,
        watch: bool = False,
    ) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, Heads(heads)
        self.n_features, self.seed, self.watch = n_features, seed, watch
        self.register_buffer("rotation", None)
        self.surgery = get_surgery(surgery) if isinstance(surgery, str) else surgery
        self.surgery.prepare(self)
        self.last: Step | None = None
        self._generator: torch.Generator | None = None
        self._n_backwards = 0
        self._forget()

    def _forget(self) -> None:
        """Start without any forward pass."""
        self._open: list[Any] = []  # weak references to crossings
        self._crossed = False  # in the last forward pass
        self._kept: list[ModuleProblem] = []
        self._keeps = False
        self._losses: dict[int, Tensor] | None = None
        self._found: Row = {}
        self._passed: dict[Crossing, list[Tensor | None]] = {}

    @property
    def n_tasks(self) -> int:
        """T."""
        return len(self.heads)

    def add_rotation(self, size: int | None = None) -> None:
        """Put a rotation between the trunk and each head; see `SurgeryTarget`."""
        size = size or self.n_features
        if size is None:
            raise UsageError(
                "n_features: expected the trunk's output width for rotations, got None"
            )
        if size > (self.n_features or size):
            raise UsageError(
                f"rotation_size: expected at most n_features ({self.n_features}), got {size}"
            )
        like = next(self.parameters())
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        self.rotation = at_least_float32(eye.real).repeat(1, self.n_tasks, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiTaskModel:
        super()._apply(fn, recurse)
        if self.rotation is not None:  # stays a rotation, in a model of half floats too
            self.rotation = at_least_float32(self.rotation.real)
        return self

    def rotations(self) -> list[Tensor]:
        """See `SurgeryTarget`."""
        return [] if self.rotation is None else list(self.rotation)

    def forward(self, *inputs: Any, **keywords: Any) -> dict[str, Any]:
        """Outputs of the heads by task.

        Args:
            inputs: The trunk's, for all tasks. Or a single mapping from tasks to inputs of their
                own, of which a mapping is taken for the trunk's keywords.
            keywords: The trunk's.

        Raises:
            UsageError: for batch normalisation in the trunk while tasks have their own inputs.
        """
        own = len(inputs) == 1 and not keywords and isinstance(inputs[0], Mapping)
        if not (own and inputs[0].keys() <= set(self.heads)):
            return self._outputs(list(self.heads), self.trunk(*inputs, **keywords))
        _refuse_batch_norm(self.trunk)
        outputs = {}
        for task, x in inputs[0].items():
            z = self.trunk(**x) if isinstance(x, Mapping) else self.trunk(x)
            outputs |= self._outputs([task], z)
        return outputs

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum of the tasks' losses, which tells surgery which is which.

        For methods that look at losses (`famo`, `gradnorm`), and for losses that use the outputs of
        several tasks: g_k is then the gradient of the k-th loss, through whichever head it comes.
        Losses without a gradient, a constant say, are left out.

        Args:
            losses: A scalar for each task, computed from the outputs.

        Returns:
            A scalar, for `backward()`, a `GradScaler`, or anything else.

        Raises:
            ValueError: if a loss is not a scalar, or was not computed from its task's output.
        """
        self._check(losses)
        names = [task for task in self.heads if task in losses and losses[task].requires_grad]
        if not names:
            raise ValueError("losses: expected one that depends on the model's outputs, got none")
        tasks = [list(self.heads).index(name) for name in names]
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
            self._losses = dict(zip(tasks, (loss.detach() for loss in ordered), strict=True))
            for loss, task, node, slot in foreign:
                edge = GradientEdge(node, slot)
                (found,) = torch.autograd.grad(
                    loss, [edge], scale.to(loss.dtype), retain_graph=True, allow_unused=True
                )
                if found is not None:
                    node.crossing.move(slot, task, found)

        return Total.apply(tell, *ordered)

    def backward(self, losses: Mapping[str, Tensor]) -> Step | None:
        """As `total(losses).backward()`.

        Returns:
            What was done; None where nothing is shared that learns.
        """
        self.last = None
        self.total(losses).backward()
        return self.last

    def accumulate(self, losses: Mapping[str, Tensor]) -> None:
        """As `backward`, but the trunk waits for the next backward.

        Its gradients are kept task by task, and weighed once, together with those to come. Heads
        get theirs at once. A mean over n batches is for the caller: `loss / n`.

        Raises:
            UsageError: if something in front of the trunk learns: it could not wait.
        """
        total = self.total(losses)
        self._keeps = True
        try:
            total.backward()
        finally:
            self._keeps = False

    def after_step(self, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let a method see what the optimiser's step has brought; only `famo` looks.

        Args:
            losses: Computes the losses of the last `backward` anew: its tasks, on its batch.
        """

        def ordered() -> Tensor:
            with torch.no_grad():
                found = losses()
            return torch.stack([found[task].detach() for task in self.heads if task in found])[None]

        self.surgery.after_step(ordered)

    @torch.compiler.disable
    def _outputs(self, names: list[str], output: Any) -> dict[str, Any]:
        features = Features(output)
        copies = [features] * len(names)
        self._crossed = torch.is_grad_enabled() and bool(features.tensors)
        if self._crossed:
            tasks = [list(self.heads).index(name) for name in names]
            plain = isinstance(self.surgery, NoSurgery) and not self.watch
            crossing = Crossing(tasks, features.tensors, set(self.trunk.parameters()))
            found = crossing.copies(None if plain else self._weigh)
            copies = [features.replaced(tensors) for tensors in found]
            self._open = [ref for ref in self._open if ref() is not None]
            self._open.append(weakref.ref(crossing))
        outputs = {}
        for name, copy in zip(names, copies, strict=True):
            turn = None if self.rotation is None else partial(self._turned, name)
            outputs[name] = self.heads[name](copy.for_head(self.heads[name], turn))
        return outputs

    def _turned(self, task: str, z: Tensor) -> Tensor:
        assert self.rotation is not None
        rotation = self.rotation[0, list(self.heads).index(task)].to(z.dtype)
        size = len(rotation)
        return torch.cat([z[..., :size] @ rotation.mT, z[..., size:]], -1)

    @torch.no_grad()
    def _weigh(self, crossing: Crossing) -> list[Tensor | None]:
        """Gradients for what enters a crossing; the first of a backward decides for all."""
        if crossing.wanted is not None and crossing not in self._passed:
            self._decide()
        passed = self._passed.pop(crossing, None) or [None] * len(crossing.features)
        crossing.release()
        if not crossing.closed:
            return passed
        return [self._found.pop(parameter, None) for parameter in crossing.shared]

    def _decide(self) -> None:
        crossings = [found for ref in self._open if (found := ref()) is not None]
        if any(crossing.awaited for crossing in crossings):
            raise UsageError(
                "backward: expected forward passes that do not feed each other, on one device: "
                "the tasks' gradients of one pass are wanted before those of another are known"
            )
        here = [crossing for crossing in crossings if crossing.wanted]
        losses, self._losses = self._losses, None
        kept = [] if self._keeps else self._kept
        problem = ModuleProblem(here, self.n_tasks, self.rotation, losses, kept)
        if self._keeps:
            self._keep(problem)
            return
        if self._generator is None:
            self._generator = torch.Generator(problem.device).manual_seed(self.seed)
        if self.watch and not all(crossing.hidden for crossing in here):
            problem.task_gradients().gramian()
        n = len(problem.tasks)
        weights = self.surgery(problem, self._generator).weights[0]
        names = list(self.heads)
        self.last = Step(
            {names[task]: n * w for task, w in zip(problem.tasks, weights, strict=True)},
            None if problem.seen is None else problem.seen[0],
        )
        self._found = problem.into_shared(n * weights)
        self._passed = {here[i]: row for i, row in problem.weighted(n * weights).items()}
        self._kept = []
        self._n_backwards += 1
        if self._n_backwards % MAINTAIN_EVERY == 0:
            self.surgery.maintain(self)

    def _keep(self, problem: ModuleProblem) -> None:
        if not all(crossing.closed for crossing in problem.crossings):
            raise UsageError("accumulate: expected nothing that learns in front of the trunk")
        problem.rows  # noqa: B018  # while the graph is there
        self._kept = [*self._kept, problem]
        self._found, self._passed = {}, {c: [] for c in problem.crossings}

    def _check(self, losses: Mapping[str, Tensor]) -> None:
        if not losses:
            raise ValueError("losses: expected at least one task's, got none")
        for task, loss in losses.items():
            if task not in self.heads:
                raise ValueError(unknown("losses", task, list(self.heads)))
            if loss.ndim:
                raise ValueError(
                    f"losses: expected a scalar for {task!r}, got shape {tuple(loss.shape)}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without the forward passes: a graph is neither copied nor saved."""
        state = super().__getstate__()  # type: ignore[misc]
        generator = state.pop("_generator")
        state["_generator"] = None if generator is None else generator.get_state()
        for name in ("_open", "_crossed", "_kept", "_keeps", "_losses", "_found", "_passed"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Forward passes begin anew."""
        super().__setstate__(state)
        self._forget()
        if self._generator is not None:
            at, state = next(self.parameters()).device, self._generator
            self._generator = torch.Generator(at)
            self._generator.set_state(state)


def _refuse_batch_norm(trunk: nn.Module) -> None:
    for name, module in trunk.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UsageError(
                f"trunk: expected one input for all tasks beside batch statistics, got {name!r} "
                "(BatchNorm) and inputs of their own: each task would be normalised by itself, and "
                "the running averages would fit none; use LayerNorm or GroupNorm, or eval mode"
            )
