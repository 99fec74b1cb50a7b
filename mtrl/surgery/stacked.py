"""The losses of N networks with parameters stacked by task: how an SAC update poses its problem."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mtrl.nets.precision import trunks_in
from mtrl.surgery.factored import FactoredGradients
from mtrl.surgery.gradients import (
    FeatureGradients,
    Gradients,
    Jacobian,
    Parameters,
    TaskGradients,
    at_least_float32,
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
        shared = _leaves(self._by_task(self._rounded()))
        per_task = _leaves(self.per_task)
        with torch.enable_grad(), self._precision():
            losses, auxiliary = self._losses(shared, per_task)
            on_shared, on_own = _differentiate(losses.sum(), None, shared, per_task)
        return Jacobian(on_own, losses.detach(), _detached(auxiliary), on_shared)

    def _factors(self) -> FactoredGradients:
        """As `_jacobian`, but the backward stops at the layers' outputs, where the biases enter."""
        weights = {name: value for name, value in self.shared.items() if name.startswith("weight")}
        of = {name: name.replace("weight", "bias") for name in weights}
        biases = {**self._by_task(self.shared), **self.per_task}
        n_rows = self.inputs.shape[2]
        outputs = _leaves(
            {name: biases[of[name]][:, :, None].expand(-1, -1, n_rows, -1) for name in weights}
        )
        entering = {of[name]: leaf for name, leaf in outputs.items()}
        shared, per_task = (
            _leaves({n: v for n, v in tree.items() if n not in weights and n not in entering})
            for tree in (self._by_task(self.shared), self.per_task)
        )
        tape: dict[str, Tensor] = {}
        with torch.enable_grad(), self._precision():
            features = self.trunk(
                {**weights, **shared}, {**per_task, **entering}, self.inputs, tape
            )
            losses, auxiliary = self._heads(shared, per_task, features)
            found = _differentiate(losses.sum(), None, outputs, shared, per_task)
        at_outputs, formed, on_own = found
        for name in weights:
            at_bias = at_outputs[name].sum(2)
            (formed if of[name] in self.shared else on_own)[of[name]] = at_bias
        return FactoredGradients(
            on_own, losses.detach(), _detached(auxiliary), formed, _detached(tape), at_outputs
        )

    def features(self) -> StackedFeatures:
        """By the backward of the mean loss to z, which gives all G_k at once: rows are tasks'."""
        n_tasks = self.inputs.shape[1]
        shared, per_task = _leaves(self._rounded()), _leaves(self.per_task)
        with torch.enable_grad(), self._precision():
            features = self.trunk(shared, per_task, self.inputs)
            z = features.detach().requires_grad_()
            losses, auxiliary = self._heads(shared, per_task, z)
            # Σ_n of the networks' mean losses: each network gets its own gradient.
            above = _differentiate(losses.sum() / n_tasks, None, {"z": z}, shared, per_task)
        return StackedFeatures(
            losses.detach(),
            self,
            _detached(auxiliary),
            features,
            above[0]["z"],
            above[1:],
            [shared, per_task],
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


@dataclass(frozen=True)
class StackedFeatures(FeatureGradients):
    """The mean loss's backward, paused at z.

    Attributes:
        problem: Whose it is.
        auxiliary: What the loss returned beside.
        features: z, `[N, T, B, d]`, with its graph.
        at_features: The mean loss's gradient by z, G_k / T.
        above: The mean loss's gradients by `leaves`, as far as these lie above z.
        leaves: Shared and per-task parameters.
    """

    problem: StackedProblem
    auxiliary: dict[str, Tensor]
    features: Tensor
    at_features: Tensor
    above: list[dict[str, Tensor]]
    leaves: list[dict[str, Tensor]]

    @property
    def norms(self) -> Tensor:
        """See `FeatureGradients`."""
        flat = at_least_float32(self.at_features).flatten(2)
        return self._n_tasks * torch.linalg.vector_norm(flat, dim=2)

    @property
    def means(self) -> Tensor:
        """See `FeatureGradients`."""
        return self._n_tasks * at_least_float32(self.at_features).mean(2)

    def mean(self) -> Gradients:
        """See `FeatureGradients`."""
        return self._below(self.at_features, torch.full_like(self.losses, 1 / self._n_tasks))

    def weighted(self, weights: Tensor) -> Gradients:
        """See `FeatureGradients`.

        The weights are factors on the tasks' rows before these go on into the trunk. What belongs
        to a task but lies below z, its bias in the first layer, goes with them: it is the one-hot's
        column of the trunk. A single head is shared but lies above z: it gets the mean.
        """
        factors = (self._n_tasks * weights)[..., None, None]
        return self._below(self.at_features * factors.to(self.at_features.dtype), weights)

    @property
    def _n_tasks(self) -> int:
        return self.losses.shape[-1]

    def _below(self, at_features: Tensor, weights: Tensor) -> Gradients:
        with self.problem._precision():
            below = _differentiate(self.features, at_features, *self.leaves)
        on_shared, on_own = (_add(a, b) for a, b in zip(self.above, below, strict=True))
        on_shared = {name: at_least_float32(value) for name, value in on_shared.items()}
        return Gradients(on_shared, on_own, self.losses, self.auxiliary, weights)


def _leaves(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}


def _detached(tensors: Parameters) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in tensors.items()}


def _differentiate(
    output: Tensor, gradient: Tensor | None, *trees: dict[str, Tensor]
) -> list[dict[str, Tensor]]:
    """The output's gradients by all leaves of the trees; what it does not depend on is left out."""
    wanted = [leaf for tree in trees for leaf in tree.values()]
    found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
    pairs = [[(name, next(found)) for name in tree] for tree in trees]
    return [{name: value for name, value in tree if value is not None} for tree in pairs]


def _add(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**a, **b, **{name: a[name] + b[name] for name in a.keys() & b.keys()}}
