"""Multi-task networks: a trunk the tasks share, and parameters one task alone owns.

Networks of one shape are computed together: in front of everything stands N, two for twin critics.
Then come the tasks and the samples of a task: `[N, T, B, …]`. Weights are stored `[in, out]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from mtrl.errors import UsageError
from mtrl.nets.build import Build, Layer
from mtrl.nets.fused import layer
from mtrl.nets.params import Parameters, Params, Record
from mtrl.nets.precision import float32_products, full_float32
from mtrl.nets.trunks.base import Trunk


@dataclass(frozen=True, eq=False)
class TrunkFunction:
    """A trunk as a function of parameters by name.

    Args:
        trunk: What it computes.
        layers: What it declared; see `Build`.
    """

    trunk: Trunk
    layers: Mapping[str, Layer]

    def __call__(
        self,
        shared: Parameters,
        per_task: Parameters,
        inputs: Tensor,
        record: Record | None = None,
    ) -> Tensor:
        """The features, `[N, T, B, d]`.

        Args:
            shared: Parameters all tasks share, `[N, …]`, or views of them `[N, T, …]`.
            per_task: The tasks' own.
            inputs: `[N, T, B, in]`, or `[1, T, B, in]` for all networks.
            record: See `Record`.
        """
        return self.trunk(Params(self.layers, shared, per_task, record), inputs)


def head(shared: Parameters, per_task: Parameters, features: Tensor) -> Tensor:
    """Linear head on the features, rotated if `per_task` holds a `rotation`; shapes as `trunk`.

    Its results are in the parameters' type whatever that of the features: rounding a value to 8
    bits would drown the differences that a target is made of.
    """
    with float32_products("highest"):
        if "head_weight" in shared:
            return layer(features, shared["head_weight"], shared["head_bias"], exact=True)
        weight, bias = per_task["head_weight"], per_task["head_bias"]
        if "rotation" in per_task:
            rotation = per_task["rotation"]
            if features.shape[2] < weight.shape[-1]:  # fewer samples than outputs
                features = rotate(rotation, features)
            else:
                weight = fold(rotation, weight)
        return own_linear(features, weight, bias)


def fold(rotation: Tensor, weight: Tensor) -> Tensor:
    """The head that sees z as `weight` sees R z: Wᵀ(R z) = (Rᵀ W)ᵀ z, `[…, d, out]`.

    O(d² out) where rotating every sample's features would take O(B d²). A rotation `[…, m, m]`
    turns the first m features and leaves the others.
    """
    size = rotation.shape[-1]
    with full_float32(weight.device):
        # RᵀW, in the order that is fast in memory
        turned = own_product(weight[..., :size, :].mT, rotation).mT
    return torch.cat([turned, weight[..., size:, :]], -2) if size < weight.shape[-2] else turned


def rotate(rotation: Tensor, features: Tensor) -> Tensor:
    """R z of every sample, `[…, B, d]`, in the rotation's type: O(B d²)."""
    size = rotation.shape[-1]
    turned = own_product(features[..., :size], rotation.mT)
    rest = features[..., size:].to(turned.dtype)
    return torch.cat([turned, rest], -1) if size < features.shape[-1] else turned


def own_linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer each task has for itself: X_t W_t + b_t, in the weight's type.

    Args:
        inputs: `[N, T, B, in]`.
        weight: `[N, T, in, out]`.
        bias: `[N, T, out]`.

    Returns:
        `[N, T, B, out]`.
    """
    n_networks, n_tasks = weight.shape[:2]
    rows = inputs.reshape(n_networks * n_tasks, 1, *inputs.shape[2:])
    outputs = layer(rows, weight.flatten(0, 1), bias.flatten(0, 1), exact=True)
    return outputs.view(n_networks, n_tasks, *outputs.shape[2:])


def own_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """`[…, B, in] @ […, in, out]`, forward and backward in one precision of float32."""
    rows = inputs.reshape(-1, 1, *inputs.shape[-2:])
    weights = weight.reshape(-1, *weight.shape[-2:])
    outputs = layer(rows, weights, weights.new_zeros(len(weights), weight.shape[-1]), exact=True)
    return outputs.view(*inputs.shape[:-1], weight.shape[-1])


class Function(NamedTuple):
    """Networks as a function of their inputs, with these parameters."""

    trunk: TrunkFunction
    shared: Parameters
    per_task: Parameters

    def __call__(self, inputs: Tensor) -> Tensor:
        """Trunk and head: `[N or 1, T, B, in]` to `[N, T, B, out]`."""
        return head(self.shared, self.per_task, self.trunk(self.shared, self.per_task, inputs))


class MultiTaskNetworks(nn.Module):
    """N networks of one shape for T tasks, their parameters split by who owns them.

    `shared` holds the trunk, and the head if there is a single one: `[N, …]`, subject to surgery.
    `per_task` holds what of the trunk is a task's own, such as the one-hot's column, and with
    several heads each task's head: `[N, T, …]`, never touched by surgery. `rotation` is
    `[N, T, m, m]` where a method puts one between trunk and heads, and `fixed` what a trunk is told
    of the tasks, `[N, T, …]`: no loss trains them.

    The trunk's parameters begin as it says; the head is uniform in ± `head_bound`.

    Args:
        trunk: From inputs to features; sizes it leaves open become its paper's for T tasks.
        descriptions: See `Build`.
    """

    def __init__(
        self,
        n_networks: int,
        n_tasks: int,
        n_inputs: int,
        n_outputs: int,
        trunk: Trunk,
        *,
        multi_head: bool,
        head_bound: float,
        generator: torch.Generator,
        descriptions: Callable[[], np.ndarray | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.n_networks, self.n_tasks = n_networks, n_tasks
        if not (multi_head or trunk.told):
            raise UsageError(
                "heads: expected 'multi', a head per task, for a trunk that does not see the task; "
                "--task-input would tell it"
            )
        make = Build(n_networks, n_tasks, generator, descriptions)
        trunk = trunk.for_tasks(n_tasks)
        trunk.build(make, n_inputs)
        self.trunk = TrunkFunction(trunk, make.layers)
        self.n_features = trunk.n_features
        shared, per_task = make.shared, make.own
        lead = (n_tasks,) if multi_head else ()
        (per_task if multi_head else shared).update(
            head_weight=make.uniform(head_bound, *lead, trunk.n_features, n_outputs),
            head_bias=make.uniform(head_bound, *lead, n_outputs),
        )
        self.rotation: Tensor | None
        self.register_buffer("rotation", None)  # see `add_rotation`
        self.shared = nn.ParameterDict(shared)
        self.per_task = nn.ParameterDict(per_task)
        self.fixed = nn.Module()
        for name, value in make.fixed.items():
            self.fixed.register_buffer(name, value)

    def add_rotation(self, size: int | None = None) -> None:
        """Put a rotation R_k between the trunk and the head of each task, the identity at first.

        Args:
            size: Turn the first so many features; default: all.

        Raises:
            UsageError: if there are not so many, or all tasks have one head.
        """
        if "head_weight" not in self.per_task:
            raise UsageError(
                "heads: expected 'multi', a head per task, for rotations, got 'single'"
            )
        size = self.n_features if size is None else size
        if size > self.n_features:
            raise UsageError(
                f"rotation_size: expected at most {self.n_features}, the trunk's last width, "
                f"got {size}"
            )
        like = self.per_task["head_weight"]
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        self.rotation = eye.repeat(self.n_networks, self.n_tasks, 1, 1)

    def for_tasks(self, descriptions: np.ndarray) -> MultiTaskNetworks:
        """A copy for other tasks, of which only the descriptions `[T, e]` tell them apart.

        Raises:
            ValueError: if these networks hold something else of a task's own.
        """
        if self.per_task or self.fixed_inputs().keys() != {"description"}:
            raise ValueError("expected networks with nothing of a task's own but its description")
        copied = copy.deepcopy(self)
        copied.n_tasks = len(descriptions)
        known = torch.from_numpy(descriptions).to(self.fixed_inputs()["description"])
        copied.fixed.register_buffer("description", known.repeat(self.n_networks, 1, 1))
        return copied

    def named(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The shared and the tasks' own parameters by name; faster than through `ParameterDict`."""
        shared, per_task = (module._parameters for module in (self.shared, self.per_task))
        return cast(dict[str, Tensor], {**shared}), cast(dict[str, Tensor], {**per_task})

    def fixed_inputs(self) -> dict[str, Tensor]:
        """What nothing trains, by name."""
        return cast(dict[str, Tensor], {**self.fixed._buffers})

    def after_step(self, losses: Tensor, generator: torch.Generator) -> None:
        """What the architecture does after a step with these losses `[N, T]`."""
        self.trunk.trunk.after_step(self.named()[1], losses, generator)

    def rotations(self) -> list[Tensor]:
        """Each network's rotations as views, `[T, m, m]`; empty without."""
        return [] if self.rotation is None else list(self.rotation)

    def folded(self) -> Function:
        """The function that is computed, heads behind their rotation; what is fixed is a task's."""
        shared, per_task = self.named()
        if self.rotation is not None:
            per_task["head_weight"] = fold(self.rotation, per_task["head_weight"])
        return Function(self.trunk, shared, per_task | self.fixed_inputs())
