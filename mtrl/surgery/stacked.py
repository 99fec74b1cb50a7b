"""Problem of an SAC update: losses of N networks with parameters stacked by network and task."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtrl.nets.networks import TrunkFunction
from mtrl.nets.params import Parameters, Record
from mtrl.nets.precision import trunks_in
from mtrl.surgery.factored import Composed, Factor, FactoredGradients, OfLayer
from mtrl.surgery.features import StackedFeatures, detached, differentiate, leaves
from mtrl.surgery.gradients import Jacobian, TaskGradients

TaskLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""`(shared, per_task, features, *targets) -> (losses, auxiliary)`: losses to minimise, `[N, T]`,
and other results of the forward pass."""


@dataclass(frozen=True)
class StackedProblem:
    """N networks on one batch.

    Args:
        trunk: Maps inputs to features. Draws no random numbers: noise is part of the batch.
        loss: Maps features to the loss of each task; see `TaskLoss`. Draws no random numbers.
        shared: Parameters all tasks share, subject to surgery, `[N, …]`.
        per_task: Parameters of each task, `[N, T, …]`. They affect only the gradient of their own
            task, and neither that of another task nor the dot products that determine conflicts.
        inputs: Inputs of the trunk, `[N, T, B, in]`, or `[1, T, B, in]` if shared by all networks.
        targets: Further arguments of the loss.
        rotation: Added to `per_task` under this name, as a constant.
        engine: Result of `task_gradients`: `jacobian` or `factored`; `auto` chooses the faster one
            for these sizes.
        precision: Precision of the trunk's products; see `trunks_in`.
        fixed: Other inputs of the trunk, `[N, T, …]`, as constants.
        compiled: Fuses the trunk's operations, except for factored gradients.
        frozen: Shared parameters that get no gradient and are not subject to surgery, `[N, …]`.
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
    fixed: Parameters = field(default_factory=dict)
    compiled: Callable[[Any], Any] = field(default=lambda trunk: trunk, repr=False)
    frozen: Parameters = field(default_factory=dict)
    tasks: ClassVar[Any] = slice(None)

    def task_gradients(self) -> TaskGradients:
        """Compute every task's gradient in one batched forward and backward.

        Each task gets its own view of the shared parameters (`expand`, without a copy). An ordinary
        backward of Σ_t L_t then accumulates only the gradient of L_t in the view of task t. This is

            vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(shared, per_task, batch)

        at the cost of a plain backward, because a layer recognises the view and multiplies once.
        """
        if self.frozen:  # at most a head is left
            return self._jacobian()
        factored = self.engine == "factored" or (self.engine == "auto" and self._is_wide())
        if factored or any(layer.composed for layer in self.trunk.layers.values()):
            return self._factors(factored)
        return self._jacobian()

    def _is_wide(self) -> bool:
        """Return whether forming T gradients takes longer than the factored engine.

        Forming a layer's gradients writes and reads T in·out numbers; without them, T² B² (in +
        out) products are needed. On a CPU, the times cross between 2,048 and 4,096 units, for ten
        tasks as for fifty (`scripts/bench_engines.py`). In bf16, forming them was faster at every
        width up to 2,048.

        A GPU moves more numbers in the time of a product. At 4 TB/s and 40 TFLOP/s of float32,
        which every Gramian needs, the times cross at 2,700 units for ten tasks of 128 samples and
        at 3,400 for fifty of 64. This is modelled, not measured. Below, bf16 halves the traffic.
        """
        _, n_tasks, n_rows, _ = self.inputs.shape
        matrices = [self.shared[layer.weight] for layer in self.trunk.layers.values()]
        sizes = [(v.numel() // len(v), *v.shape[-2:]) for v in matrices]
        if not matrices:  # a custom module has no factors
            return False
        ratio = sum(n for n, _, _ in sizes) / sum(n // (a * b) * (a + b) for n, a, b in sizes)
        rows = 120 if self.inputs.is_cuda else 550
        return self.precision != "bf16" and ratio > max(1000, n_tasks * n_rows**2 / rows)

    def _jacobian(self) -> Jacobian:
        shared = leaves(self._by_task(self._rounded(self.shared)))
        per_task = leaves(self.per_task)
        with torch.enable_grad(), self._precision():
            losses, auxiliary = self._losses(shared, per_task)
            on_shared, on_own = differentiate(losses, torch.ones_like(losses), shared, per_task)
        return Jacobian(on_own, losses.detach(), detached(auxiliary), on_shared)

    def _factors(self, factored: bool) -> FactoredGradients:
        """Compute `_jacobian` with a backward that stops earlier for the layers' matrices.

        It stops at X W + b, and at W_t and b_t of a composed layer with either engine.
        """
        apart: set[str] = set()
        for layer in self.trunk.layers.values():
            if layer.composed or factored:
                apart.add(layer.weight)
            if layer.composed and layer.bias is not None:
                apart.add(layer.bias)
        constants = {name: value for name, value in self.shared.items() if name in apart}
        others = {
            name: value for name, value in self._rounded(self.shared).items() if name not in apart
        }
        shared, per_task = leaves(self._by_task(others)), leaves(self.per_task)
        record = Record(factored)
        with torch.enable_grad(), self._precision():
            features = self.trunk(
                {**constants, **shared}, {**per_task, **self.fixed}, self.inputs, record
            )
            losses, auxiliary = self._heads(shared, per_task, features)
            weights = {name: pair[0] for name, pair in record.composed.items()}
            biases = {name: pair[1] for name, pair in record.composed.items()}
            trees = record.outputs, weights, biases, shared, per_task
            at_outputs, at_weights, at_biases, formed, on_own = differentiate(
                losses, torch.ones_like(losses), *trees
            )
        factors: dict[str, Factor] = {}
        for name, layer in self.trunk.layers.items():
            if name in at_outputs:
                inputs = record.inputs[name]
                factors[layer.weight] = OfLayer(inputs, at_outputs[name], layer.experts)
            elif layer.composed:
                assert layer.bias is not None
                factors[layer.weight] = Composed(at_weights[name], record.mixes[name])
                factors[layer.bias] = Composed(at_biases[name], record.mixes[name])
        return FactoredGradients(on_own, losses.detach(), detached(auxiliary), formed, factors)

    def features(self) -> StackedFeatures:
        """Compute feature gradients by a backward of the mean loss to z, which gives all G_k."""
        n_tasks = self.inputs.shape[1]
        shared, per_task = leaves(self._rounded(self.shared)), leaves(self.per_task)
        with torch.enable_grad(), self._precision():
            features = self._features(shared, per_task)
            z = features.detach().requires_grad_()
            losses, auxiliary = self._heads(shared, per_task, z)
            # Sum over networks of their mean losses: each network gets its own gradient.
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
        """Compute the losses with the current parameters, `[N, T]`."""
        with self._precision():
            return self._losses(self.shared, self.per_task)[0]

    def only(self, n: int) -> StackedProblem:
        """Return the problem of only the n-th network."""
        part = slice(n, n + 1)
        inputs = self.inputs if len(self.inputs) == 1 else self.inputs[part]
        return replace(
            self,
            shared={name: value[part] for name, value in self.shared.items()},
            per_task={name: value[part] for name, value in self.per_task.items()},
            fixed={name: value[part] for name, value in self.fixed.items()},
            frozen={name: value[part] for name, value in self.frozen.items()},
            inputs=inputs,
            rotation=None if self.rotation is None else self.rotation[part],
        )

    def _by_task(self, parameters: Parameters) -> dict[str, Tensor]:
        """Expand parameters `[N, …]` to views `[N, T, …]`."""
        n_tasks = self.inputs.shape[1]
        return {
            name: value[:, None].expand(-1, n_tasks, *value.shape[1:])
            for name, value in parameters.items()
        }

    def _rounded(self, shared: Parameters) -> dict[str, Tensor]:
        """Return shared parameters, with the trunk's matrices in the type of their products."""
        if self.precision != "bf16":
            return dict(shared)
        matrices = {layer.weight for layer in self.trunk.layers.values()}
        return {
            name: value.bfloat16() if name in matrices and value.dtype != torch.float64 else value
            for name, value in shared.items()
        }

    def _precision(self) -> AbstractContextManager[None]:
        return trunks_in(self.precision, self.inputs.device)

    def _losses(self, shared: Parameters, per_task: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
        return self._heads(shared, per_task, self._features(shared, per_task))

    def _features(self, shared: Parameters, per_task: Parameters) -> Tensor:
        shared, known = {**self._rounded(self.frozen), **shared}, {**per_task, **self.fixed}
        found: Tensor = self.compiled(self.trunk)(shared, known, self.inputs)
        return found

    def _heads(
        self, shared: Parameters, per_task: Parameters, features: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = dict(per_task)
        if self.rotation is not None:
            own["rotation"] = self.rotation
        return self.loss(shared, own, features, *self.targets)
