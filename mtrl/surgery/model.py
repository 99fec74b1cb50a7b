"""Gradient surgery for any PyTorch multi-task model, independent of reinforcement learning."""

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
from mtrl.surgery.registry import method_of
from mtrl.surgery.surgeon import Outcome, Surgeon


class MultiTaskModel(nn.Module):
    """A trunk shared by all tasks, a head for each task, and a method of surgery.

    A call with one input for all tasks returns the output of each task. `loss.backward()` then
    applies surgery, for any loss computed from the outputs, such as the sum of the tasks' losses;
    Lightning or Hugging Face's Trainer may call it. All parameters above the trunk, such as heads
    and learned loss weights, get the gradient of autograd. The trunk gets T Σ_k w_k g_k, where g_k
    is the gradient through the k-th head, w_k is the weight from the method, and T is the number of
    tasks in this backward; with weights 1/T, this is the gradient of autograd. Encoders before the
    model get what flows through the trunk then, with the same weights. Several
    forward passes before one backward are combined. Tasks whose output the loss does not use are
    left out. One backward is one step of surgery: losses to be weighed against each other must be
    part of the same backward.

    Args:
        trunk: Maps an input to features: a tensor `[B, …, d]`, or tuples, dictionaries or
            dataclasses of tensors.
        heads: Map features to the inputs of each task's loss; shapes may differ.
        surgery: Name of a method, see `get_surgery`; a method, of whose result only the weights
            are used; or a function from a Gramian `[T, T]` to weights `[T]`.
        n_features: Number d of features; only needed for rotations.
        seed: Seed of the method's random numbers.
        watch: Whether to compute the cosines also for methods that do not need them.

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
        UsageError: If the method is unknown, or not a method; if the trunk or a head is no module.
    """

    n_networks = 1
    rotation: Tensor | None  # [1, T, m, m]

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        surgery: str | Surgery | Callable[[Tensor], Tensor] = "none",
        *,
        n_features: int | None = None,
        seed: int = 0,
        watch: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(trunk, nn.Module):
            raise UsageError(f"trunk: expected a torch.nn.Module, got {trunk!r}")
        self.trunk, self.heads = trunk, Heads(heads)
        self.n_features, self.seed, self.watch = n_features, seed, watch
        self.register_buffer("rotation", None)
        self.surgery = method_of(surgery)
        self.surgery.prepare(self)
        self._surgeon = Surgeon(self)

    @property
    def n_tasks(self) -> int:
        """Number T of tasks."""
        return len(self.heads)

    @property
    def last(self) -> Outcome | None:
        """Result of surgery in the last backward; None before the first."""
        return self._surgeon.last

    def add_rotation(self, size: int | None = None) -> None:
        """Insert a rotation between the trunk and each head; see `SurgeryTarget`."""
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
        if self.rotation is not None:  # keep float32, also in a half-precision model
            self.rotation = at_least_float32(self.rotation.real)
        return self

    def rotations(self) -> list[Tensor]:
        """Return the rotations R_k before the heads, `[T, m, m]`, after `add_rotation`."""
        return [] if self.rotation is None else list(self.rotation)

    def forward(self, *inputs: Any, **keywords: Any) -> dict[str, Any]:
        """Compute the outputs of the heads, by task.

        Args:
            inputs: Inputs of the trunk for all tasks; or a single mapping from each task to its own
                input, where a mapping as input gives the trunk's keyword arguments.
            keywords: Keyword arguments of the trunk.

        Raises:
            UsageError: For batch normalisation in the trunk if tasks have their own inputs.
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
        """Return the sum of the losses, with which surgery knows each task's loss.

        Use this for methods that need losses (`famo`, `gradnorm`), and for losses that use the
        outputs of several tasks: g_k is then the gradient of the k-th loss, through any head.
        Losses without a gradient, such as constants, are left out.

        Args:
            losses: Scalar loss of each task, computed from the outputs.

        Returns:
            A scalar, for `backward()`, a `GradScaler` or the like.

        Raises:
            ValueError: If a loss is no scalar tensor, or was not computed from its task's output.
        """
        return self._surgeon.total(losses)

    def backward(self, losses: Mapping[str, Tensor]) -> Outcome | None:
        """Call `total(losses).backward()`.

        Returns:
            The result of surgery; None if there are no trainable shared parameters.
        """
        self._surgeon.last = None
        self.total(losses).backward()
        return self.last

    def accumulate(self, losses: Mapping[str, Tensor]) -> None:
        """Call `backward`, but accumulate the trunk's gradients for the next backward.

        Its gradients are stored for each task and weighed once, together with those of the next
        backward. Heads get their gradients at once. For a mean over n batches, use `loss / n`.

        Raises:
            UsageError: If there are trainable parameters before the trunk, which cannot wait.
        """
        total = self.total(losses)
        with self._surgeon.keeping():
            total.backward()

    def after_step(self, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """Give the method the losses after the optimiser's step; only `famo` needs this.

        Args:
            losses: Computes the losses of the last `backward` again, for its tasks and batch.
        """
        self._surgeon.after_step(losses)

    @torch.compiler.disable
    def _outputs(self, names: list[str], output: Any) -> dict[str, Any]:
        heads, rotation, order = self.heads, self.rotation, list(self.heads)
        tasks = [order.index(name) for name in names]
        copies = self._surgeon.copies(Features(output), tasks)
        outputs = {}
        for name, task, copy in zip(names, tasks, copies, strict=True):
            turn = None if rotation is None else partial(self._turned, rotation[0, task])
            head = heads[name]
            outputs[name] = head(copy.for_head(head, turn))
        return outputs

    def _turned(self, rotation: Tensor, z: Tensor) -> Tensor:
        size, width = len(rotation), z.shape[-1]
        if size > width or (self.n_features or width) != width:
            raise UsageError(
                f"n_features: expected {width}, the trunk's output width, got "
                f"{self.n_features or size}"
            )
        return torch.cat([z[..., :size] @ rotation.to(z.dtype).mT, z[..., size:]], -1)


def _refuse_batch_norm(trunk: nn.Module) -> None:
    for name, module in trunk.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UsageError(
                f"trunk: expected one input for all tasks with batch statistics, got {name!r} "
                "(BatchNorm) and separate inputs: each task would be normalised separately, and "
                "the running averages would fit none; use LayerNorm, GroupNorm or eval mode"
            )
