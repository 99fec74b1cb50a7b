"""Gradient surgery for any PyTorch multi-task model, with no reinforcement learning in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtrl.errors import UsageError
from mtrl.surgery.base import MAINTAIN_EVERY, Surgery
from mtrl.surgery.modules import ModuleProblem
from mtrl.surgery.registry import get_surgery


class MultiTaskModel(nn.Module):
    """A trunk the tasks share, a head for each of them, and a method of surgery.

    Called with one input for all tasks, or with a mapping from task to its own input, it gives each
    task's output. `backward` takes the tasks' losses and adds to `.grad`, as `Tensor.backward`
    does; any optimiser may follow. A task that is missing from the inputs or the losses is left out
    of that step. Parameters that do not require a gradient stay as they are.

    Args:
        trunk: From an input to features, one tensor `[B, …, d]`.
        heads: From features to whatever the task's loss needs; shapes may differ.
        surgery: A name, see `get_surgery`, or a method.
        n_features: d; only rotations have to know it.
        seed: Of the method's random numbers.

    Example:
        >>> trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        >>> model = MultiTaskModel(trunk, {"a": nn.Linear(32, 1), "b": nn.Linear(32, 3)}, "pcgrad")
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> outputs = model(torch.randn(16, 8))
        >>> model.backward({"a": outputs["a"].square().mean(), "b": outputs["b"].exp().mean()})
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    Raises:
        UsageError: for an unknown method, or a trunk with BatchNorm in training mode: it makes a
            sample's features, and so a task's gradient, depend on the other samples of the batch.
    """

    n_networks = 1
    rotation: Tensor | None  # [1, T, m, m]

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        surgery: str | Surgery = "none",
        n_features: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)
        self.n_features, self.seed = n_features, seed
        self.register_buffer("rotation", None)
        _refuse_batch_norm(trunk)
        self.surgery = get_surgery(surgery) if isinstance(surgery, str) else surgery
        self.surgery.prepare(self)
        self._generator: torch.Generator | None = None
        self._passed: dict[str, tuple[Tensor, Tensor]] = {}
        self._step: ModuleProblem | None = None
        self._n_backwards = 0

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
        self.rotation = eye.repeat(1, self.n_tasks, 1, 1)

    def rotations(self) -> list[Tensor]:
        """See `SurgeryTarget`."""
        return [] if self.rotation is None else list(self.rotation)

    def forward(self, inputs: Any) -> dict[str, Any]:
        """Outputs of the heads by task.

        Args:
            inputs: The trunk's input for all tasks; or a mapping from tasks to their own.
        """
        _refuse_batch_norm(self.trunk)
        if isinstance(inputs, Mapping) and inputs.keys() <= set(self.heads):
            features = {task: self.trunk(own) for task, own in inputs.items()}
        else:
            features = dict.fromkeys(self.heads, self.trunk(inputs))
        self._passed = {}
        return {task: self._output(task, z) for task, z in features.items()}

    def accumulate(self, losses: Mapping[str, Tensor]) -> None:
        """Keep one batch's gradients, task by task, for the `backward` of a later batch.

        Arguments and errors as `backward`. A mean over n batches is for the caller: `loss / n`.
        """
        if self._step is None:
            trunk = {k: p for k, p in self.trunk.named_parameters() if p.requires_grad}
            heads = [p for p in self.heads.parameters() if p.requires_grad]
            self._step = ModuleProblem(trunk, heads, list(self.heads), self.rotation)
        passed, self._passed = self._passed, {}
        self._step.add(passed, losses)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add to `.grad`, as `Tensor.backward` does.

        The trunk gets what surgery makes of the tasks' gradients, a head its own task's part of the
        mean loss's gradient.

        Args:
            losses: A scalar for each task, computed from the outputs of the last call.

        Raises:
            ValueError: if a loss is not a scalar, or was not computed from these outputs.
        """
        self.accumulate(losses)
        assert self._step is not None
        step, self._step = self._step, None
        device = next(iter(step.losses.values())).device
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        # Signs decide: no lower precision from here on, not even inside the caller's autocast.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if step.trunk:
                gradients = self.surgery(step, self._generator)
                for name, parameter in step.trunk.items():
                    _add_gradient(parameter, gradients.shared[name][0])
            for parameter, gradient in zip(step.heads, step.head_gradients, strict=True):
                if gradient is not None:
                    _add_gradient(parameter, gradient / len(step.losses))
            self._n_backwards += 1
            if self._n_backwards % MAINTAIN_EVERY == 0:
                self.surgery.maintain(self)

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

    def _output(self, task: str, z: Tensor) -> Any:
        if not isinstance(z, Tensor):
            raise ValueError(f"trunk: expected one tensor of features, got {type(z).__name__}")
        if torch.is_grad_enabled():
            cut = z.detach().requires_grad_()  # the backward pauses here; see `ModuleProblem`
            self._passed[task] = (z, cut)
            z = cut
        if self.rotation is not None:
            rotation = self.rotation[0, list(self.heads).index(task)].to(z.dtype)
            size = len(rotation)
            z = torch.cat([z[..., :size] @ rotation.mT, z[..., size:]], -1)
        return self.heads[task](z)


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _refuse_batch_norm(trunk: nn.Module) -> None:
    for name, module in trunk.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise UsageError(
                f"trunk: expected no BatchNorm in training mode, got {name!r}: through the batch's "
                "statistics a task's gradient would depend on other samples, and tasks with inputs "
                "of their own share running averages that fit none; use LayerNorm or GroupNorm"
            )
