"""Gradient surgery for any PyTorch multi-task model, with no reinforcement learning in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtrl.errors import UsageError
from mtrl.surgery.base import Surgery
from mtrl.surgery.gradients import at_least_float32
from mtrl.surgery.heads import Features, Heads
from mtrl.surgery.registry import get_surgery
from mtrl.surgery.surgeon import Outcome, Surgeon


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
        self._surgeon = Surgeon(self)

    @property
    def n_tasks(self) -> int:
        """T."""
        return len(self.heads)

    @property
    def last(self) -> Outcome | None:
        """What surgery did in the last backward; None before the first."""
        return self._surgeon.last

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
        """R_k in front of each head, `[T, m, m]`, once they are added."""
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
        outputs: dict[str, Any] = {}
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
        return self._surgeon.total(losses)

    def backward(self, losses: Mapping[str, Tensor]) -> Outcome | None:
        """As `total(losses).backward()`.

        Returns:
            What was done; None where nothing is shared that learns.
        """
        self._surgeon.last = None
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
        with self._surgeon.keeping():
            total.backward()

    def after_step(self, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let a method see what the optimiser's step has brought; only `famo` looks, and needs it.

        Args:
            losses: Computes the losses of the last `backward` anew: its tasks, on its batch.
        """
        self._surgeon.after_step(losses)

    @torch.compiler.disable
    def _outputs(self, names: list[str], output: Any) -> dict[str, Any]:
        features = Features(output)
        tasks = [list(self.heads).index(name) for name in names]
        copies = self._surgeon.copies(features, tasks)
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


def _refuse_batch_norm(trunk: nn.Module) -> None:
    for name, module in trunk.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UsageError(
                f"trunk: expected one input for all tasks beside batch statistics, got {name!r} "
                "(BatchNorm) and inputs of their own: each task would be normalised by itself, and "
                "the running averages would fit none; use LayerNorm or GroupNorm, or eval mode"
            )
