"""The losses of N networks with parameters stacked by task: how an SAC update poses its problem."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mtrl.nets.precision import trunks_in
from mtrl.surgery.autograd import detached, differentiate, leaves
from mtrl.surgery.factored import FactoredGradients
from mtrl.surgery.features import StackedFeatures
from mtrl.surgery.gradients import (
    Jacobian,
    Parameters,
    TaskGradients,
)


class TrunkFunction(Protocol):
    """From inputs `[N, T, B, in]` to features `[N, T, B, d]`.

    Matrices are called `weight…`, their biases `bias…`, and both go into `shared_linear`.
    """

    def __call__(
        self,
        shared: Parameters,
        per_task: Parameters,
        inputs: Tensor,
        tape: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """See `mtrl.nets.networks.Trunk`, which is one."""


TaskLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""`(shared, per_task, features, *targets) -> (losses, auxiliary)`: what to minimise, `[N, T]`, and
whatever else is wanted of the forward pass."""


@dataclass(frozen=True)
class StackedProblem:
    """N networks on one batch.

    Args:
        trunk: See `TrunkFunction`.
        loss: See `TaskLoss`. No randomness in either: noise is part of the batch.
        shared: Parameters all tasks share, subject to surgery, `[N, …]`.
        per_task: Each task's own parameters, `[N, T, …]`. They reach only their own task's
            gradient: they cannot leak into another's, nor into the dot products that decide on
            conflicts.
        inputs: What the trunk sees, `[N, T, B, in]`, or `[1, T, B, in]` for all networks.
        targets: Further arguments of the loss.
        rotation: Joins `per_task` under this name, as a constant.
        engine: What `task_gradients` gives: `jacobian` or `factored`; `auto` is what measures
            best for these sizes.
        precision: Of the trunk's products; see `trunks_in`.
    """

    trunk: TrunkFunction
    loss: TaskLoss
    shared: Parameters
    per_task: Parameters
    inputs: Tensor
    targets: tuple[Any, ...] = ()
    rotation: Tensor | None = None
    engine: str = "auto"
    precision: str = "fp32"
    tasks: ClassVar[Any] = slice(None)

    def task_gradients(self) -> TaskGradients:
        """Every task's own gradient, in one batched forward and backward.

        Each task is given its own view of the shared parameters (`expand`: nothing is copied). The
        ordinary backward of Σ_t L_t then leaves in task t's view the gradient of L_t alone. That is

            vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(shared, per_task, batch)

        at the price of the plain backward: `shared_linear` sees the view and multiplies but once.
        """
        if self.engine == "factored" or (self.engine == "auto" and self._is_wide()):
            return self._factors()
        return self._jacobian()

    def _is_wide(self) -> bool:
        """Whether T gradients take longer to form than to do without.

        A layer's gradients are T in·out numbers to write and to read; without them there are
        T² B² (in + out) products to make. On a CPU the times cross between 2,048 and 4,096 units
        for ten tasks as for fifty (`scripts/bench_engines.py`). In bf16 forming them was faster
        at every width up to 2,048.

        A GPU moves more numbers in the time of a product: at 4 TB/s and 40 TFLOP/s of float32,
        which no Gramian may leave, the times cross at 2,700 units for ten tasks of 128 samples and
        at 3,400 for fifty of 64. That is modelled, not measured. Below, bf16 halves the traffic.
        """
        _, n_tasks, n_rows, _ = self.inputs.shape
        shapes = [v.shape[-2:] for name, v in self.shared.items() if name.startswith("weight")]
        ratio = sum(a * b for a, b in shapes) / sum(a + b for a, b in shapes)
        rows = 120 if self.inputs.is_cuda else 550
        return self.precision != "bf16" and ratio > max(1000, n_tasks * n_rows**2 / rows)

    def _jacobian(self) -> Jacobian:
        shared = leaves(self._by_task(self._rounded()))
        per_task = leaves(self.per_task)
        with torch.enable_grad(), self._precision():
            losses, auxiliary = self._losses(shared, per_task)
            on_shared, on_own = differentiate(losses, torch.ones_like(losses), shared, per_task)
        return Jacobian(on_own, losses.detach(), detached(auxiliary), on_shared)

    def _factors(self) -> FactoredGradients:
        """As `_jacobian`, but the backward stops at the layers' outputs, where the biases enter."""
        weights = {name: value for name, value in self.shared.items() if name.startswith("weight")}
        of = {name: name.replace("weight", "bias") for name in weights}
        biases = {**self._by_task(self.shared), **self.per_task}
        n_rows = self.inputs.shape[2]
        outputs = leaves(
            {name: biases[of[name]][:, :, None].expand(-1, -1, n_rows, -1) for name in weights}
        )
        entering = {of[name]: leaf for name, leaf in outputs.items()}
        shared, per_task = (
            leaves({n: v for n, v in tree.items() if n not in weights and n not in entering})
            for tree in (self._by_task(self.shared), self.per_task)
        )
        tape: dict[str, Tensor] = {}
        with torch.enable_grad(), self._precision():
            features = self.trunk(
                {**weights, **shared}, {**per_task, **entering}, self.inputs, tape
            )
            losses, auxiliary = self._heads(shared, per_task, features)
            found = differentiate(losses, torch.ones_like(losses), outputs, shared, per_task)
        at_outputs, formed, on_own = found
        for name in weights:
            at_bias = at_outputs[name].sum(2)
            (formed if of[name] in self.shared else on_own)[of[name]] = at_bias
        return FactoredGradients(
            on_own, losses.detach(), detached(auxiliary), formed, detached(tape), at_outputs
        )

    def features(self) -> StackedFeatures:
        """By the backward of the mean loss to z, which gives all G_k at once: rows are tasks'."""
        n_tasks = self.inputs.shape[1]
        shared, per_task = leaves(self._rounded()), leaves(self.per_task)
        with torch.enable_grad(), self._precision():
            features = self.trunk(shared, per_task, self.inputs)
            z = features.detach().requires_grad_()
            losses, auxiliary = self._heads(shared, per_task, z)
            # Σ_n of the networks' mean losses: each network gets its own gradient.
            each = torch.full_like(losses, 1 / n_tasks)
            above = differentiate(losses, each, {"z": z}, shared, per_task)
        return StackedFeatures(
            losses.detach(),
            self.precision,
            detached(auxiliary),
            features,
            above[0]["z"],
            above[1:],
            [shared, per_task],
            each,
        )

    def losses(self) -> Tensor:
        """The losses at the present parameters, `[N, T]`."""
        with self._precision():
            return self._losses(self.shared, self.per_task)[0]

    def only(self, n: int) -> StackedProblem:
        """The n-th network alone."""
        part = slice(n, n + 1)
        inputs = self.inputs if len(self.inputs) == 1 else self.inputs[part]
        return replace(
            self,
            shared={name: value[part] for name, value in self.shared.items()},
            per_task={name: value[part] for name, value in self.per_task.items()},
            inputs=inputs,
            rotation=None if self.rotation is None else self.rotation[part],
        )

    def _by_task(self, parameters: Parameters) -> dict[str, Tensor]:
        """`[N, …]` to views `[N, T, …]`."""
        n_tasks = self.inputs.shape[1]
        return {
            name: value[:, None].expand(-1, n_tasks, *value.shape[1:])
            for name, value in parameters.items()
        }

    def _rounded(self) -> dict[str, Tensor]:
        """Shared parameters, the trunk's matrices as they are multiplied with."""
        return {
            name: value.bfloat16()
            if self.precision == "bf16"
            and name.startswith("weight")
            and value.dtype != torch.float64
            else value
            for name, value in self.shared.items()
        }

    def _precision(self) -> AbstractContextManager[None]:
        return trunks_in(self.precision, self.inputs.device)

    def _losses(self, shared: Parameters, per_task: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
        return self._heads(shared, per_task, self.trunk(shared, per_task, self.inputs))

    def _heads(
        self, shared: Parameters, per_task: Parameters, features: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = dict(per_task)
        if self.rotation is not None:
            own["rotation"] = self.rotation
        return self.loss(shared, own, features, *self.targets)
