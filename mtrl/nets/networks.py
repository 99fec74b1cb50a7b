"""Multi-task networks: a trunk shared by all tasks, and parameters that belong to a single task.

N networks of one shape are computed together (N = 2 for twin critics). The leading axes of all
tensors are networks, tasks and samples of a task: `[N, T, B, …]`. Weights are stored `[in, out]`.
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
from mtrl.nets.heads import fold, head
from mtrl.nets.params import Parameters, Params, Record
from mtrl.nets.trunks.base import Trunk


@dataclass(frozen=True, eq=False)
class TrunkFunction:
    """A trunk as a function of its parameters by name.

    Args:
        trunk: Architecture.
        layers: Layers it declared; see `Build`.
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
        """Compute the features, `[N, T, B, d]`.

        Args:
            shared: Parameters shared by all tasks, `[N, …]`, or views of them `[N, T, …]`.
            per_task: Parameters of each task, `[N, T, …]`.
            inputs: `[N, T, B, in]`, or `[1, T, B, in]` if shared by all networks.
            record: See `Record`.
        """
        return self.trunk(Params(self.layers, shared, per_task, record), inputs)


class Function(NamedTuple):
    """Networks with fixed parameters, as a function of their inputs."""

    trunk: TrunkFunction
    shared: Parameters
    per_task: Parameters

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply trunk and head, `[N or 1, T, B, in]` to `[N, T, B, out]`."""
        return head(self.shared, self.per_task, self.trunk(self.shared, self.per_task, inputs))


class MultiTaskNetworks(nn.Module):
    """N networks of one shape for T tasks, with shared and per-task parameters kept apart.

    `shared` holds the trunk, and the head if there is a single one: `[N, …]`, subject to surgery.
    `per_task` holds the per-task parameters of the trunk, such as the task's column of a one-hot
    layer, and with several heads the head of each task: `[N, T, …]`, never combined by surgery.
    `rotation`, `[N, T, m, m]`, exists if a method puts one between trunk and heads. `fixed` holds
    fixed inputs that describe the tasks, `[N, T, …]`. No loss trains `rotation` and `fixed`.

    The trunk defines its own initialisation; the head is uniform in ± `head_bound`.

    Args:
        trunk: Maps inputs to features; unset sizes are taken from its paper for T tasks.
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
        self._decaying = {*make.decaying, "head_weight"}
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
        """Insert a rotation R_k, initially the identity, between the trunk and each task's head.

        An existing rotation is first merged into the heads, so that outputs stay the same.

        Args:
            size: Number of leading features to rotate; default: all.

        Raises:
            UsageError: If `size` exceeds the number of features, or there is a single head.
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
        if self.rotation is not None:
            with torch.no_grad():
                like.copy_(fold(self.rotation, like))
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        self.rotation = eye.repeat(self.n_networks, self.n_tasks, 1, 1)

    def for_tasks(self, descriptions: np.ndarray) -> MultiTaskNetworks:
        """Copy them for other tasks, with descriptions `[T, e]`; per-task parameters are none."""
        copied = copy.deepcopy(self)
        copied.n_tasks = len(descriptions)
        known = torch.from_numpy(descriptions).to(self.fixed_inputs()["description"])
        copied.fixed.register_buffer("description", known.repeat(self.n_networks, 1, 1))
        return copied

    def named(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return shared and per-task parameters by name; faster than `ParameterDict`."""
        shared, per_task = (module._parameters for module in (self.shared, self.per_task))
        return cast(dict[str, Tensor], {**shared}), cast(dict[str, Tensor], {**per_task})

    def by_decay(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters with weight decay, which are matrices of layers, and the others."""
        decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for module in (self.shared, self.per_task):
            for name, parameter in module.items():
                decays[name in self._decaying].append(parameter)
        return decays[True], decays[False]

    def fixed_inputs(self) -> dict[str, Tensor]:
        """Return the fixed inputs, which nothing trains, by name."""
        return cast(dict[str, Tensor], {**self.fixed._buffers})

    def after_step(self, losses: Tensor, generator: torch.Generator) -> None:
        """Apply the trunk's `after_step` to the per-task parameters; losses are `[N, T]`."""
        self.trunk.trunk.after_step(self.named()[1], losses, generator)

    def rotations(self) -> list[Tensor]:
        """Return each network's rotations as views, `[T, m, m]`; empty if there are none."""
        return [] if self.rotation is None else list(self.rotation)

    def folded(self) -> Function:
        """Return the networks as a function, with rotations folded into the heads."""
        shared, per_task = self.named()
        if self.rotation is not None:
            per_task["head_weight"] = fold(self.rotation, per_task["head_weight"])
        return Function(self.trunk, shared, per_task | self.fixed_inputs())
