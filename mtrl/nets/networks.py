"""Multi-task networks: a trunk the tasks share, and parameters one task alone owns.

Networks of one shape are computed together: in front of everything stands N, two for twin critics.
Then come the tasks and the samples of a task: `[N, T, B, …]`. Weights are stored `[in, out]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mtrl.errors import UsageError
from mtrl.nets.fused import layer
from mtrl.nets.linear import own_linear, own_product, shared_linear
from mtrl.nets.precision import float32_products, full_float32

Parameters = Mapping[str, Tensor]
"""By name: shared ones `[N, …]`, per-task ones `[N, T, …]`."""


@dataclass(frozen=True)
class Trunk:
    """From inputs to the features z.

    The task enters as the bias of the first layer. That is the layer on [inputs, one-hot] without
    multiplying by zeros: row t of the bias is the one-hot's column t, plus the layer's own bias.
    With a learned embedding of the task, it is the layer on [inputs, embedding / its norm].

    Deviation from LayerNorm (Ba et al. 2016): no factor and no shift are learned after it; the bias
    before it and the weights behind it do their work.

    Args:
        layer_norm: Whether a layer's outputs are normalised before ReLU.
        residual: Whether layers after the first come in pairs that are added to what they are
            given, x + W₂ relu(W₁ x), each W x normalised if there is LayerNorm: BroNet (Nauman et
            al. 2024, arXiv 2405.16158, section 3). Otherwise they are layers with ReLU in a row.
    """

    layer_norm: bool = False
    residual: bool = False

    def __call__(
        self,
        shared: Parameters,
        per_task: Parameters,
        inputs: Tensor,
        tape: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The features, `[N, T, B, d]`.

        Args:
            shared: Parameters all tasks share; see `shared_linear`.
            per_task: The tasks' own.
            inputs: `[N, T, B, in]`, or `[1, T, B, in]` for all networks.
            tape: Given one, writes down each weight's inputs under its name.
        """
        parameters = {**shared, **per_task}
        if "embedding" in per_task:
            parameters["bias0"] = _with_task(parameters)

        def numbered(number: int, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
            weight = f"weight{number}"
            if tape is not None:
                tape[weight] = inputs
            relu, bias = residual is None, parameters[f"bias{number}"]
            norm = self.layer_norm
            return layer(inputs, shared[weight], bias, norm=norm, relu=relu, residual=residual)

        n_layers = sum(name.startswith("weight") for name in shared)
        hidden = numbered(0, inputs)
        if self.residual:
            for first in range(1, n_layers, 2):
                hidden = numbered(first + 1, numbered(first, hidden), hidden)
        else:
            for number in range(1, n_layers):
                hidden = numbered(number, hidden)
        return hidden


def _with_task(parameters: Parameters) -> Tensor:
    """The first layer's bias with what the embeddings add, `[N, T, out]` or `[N, T, B, out]`."""
    bias, weight = parameters["bias0"], parameters["task_weight"]
    if weight.ndim == 3:  # not a view for each task
        bias, weight = bias[:, None], weight[:, None]
    directions = normalize(parameters["embedding"], dim=-1)
    added = (directions[:, :, None] @ weight).squeeze(2)
    return bias + (added if bias.ndim == 3 else added[:, :, None])


def head(shared: Parameters, per_task: Parameters, features: Tensor) -> Tensor:
    """Linear head on the features, rotated if `per_task` holds a `rotation`; shapes as `trunk`.

    Its results are in the parameters' type whatever that of the features: rounding a value to 8
    bits would drown the differences that a target is made of.
    """
    with float32_products("highest"):
        if "head_weight" in shared:
            return shared_linear(features, shared["head_weight"], shared["head_bias"], exact=True)
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


class Function(NamedTuple):
    """Networks as a function of their inputs, with these parameters."""

    trunk: Trunk
    shared: Parameters
    per_task: Parameters

    def __call__(self, inputs: Tensor) -> Tensor:
        """Trunk and head: `[N or 1, T, B, in]` to `[N, T, B, out]`."""
        return head(self.shared, self.per_task, self.trunk(self.shared, self.per_task, inputs))


class MultiTaskNetworks(nn.Module):
    """N networks of one shape for T tasks, their parameters split by who owns them.

    `shared` holds the trunk, and the head if there is a single one: `[N, …]`, subject to surgery.
    `per_task` holds the first layer's bias, or an embedding of the task, and with several heads
    each task's head: `[N, T, …]`, never touched by surgery. `rotation` is `[N, T, m, m]` where a
    method puts one between trunk and heads, and is no parameter: no loss trains it.

    Weights are He-uniform with zero bias; the head is uniform in ± `head_bound`; embeddings have
    random directions.

    Args:
        trunk: How layers follow each other.
        embedding_size: Tell tasks apart by learned embeddings of this size, instead of one-hots.
    """

    def __init__(
        self,
        n_networks: int,
        n_tasks: int,
        n_inputs: int,
        n_outputs: int,
        hidden_sizes: Sequence[int],
        *,
        multi_head: bool,
        head_bound: float,
        generator: torch.Generator,
        trunk: Trunk | None = None,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.n_networks, self.n_tasks = n_networks, n_tasks
        self.trunk = trunk or Trunk()

        def uniform(bound: float, *shape: int) -> Tensor:
            return torch.empty(n_networks, *shape).uniform_(-bound, bound, generator=generator)

        n_blocks = 2 if self.trunk.residual else 1
        widths = [hidden_sizes[0], *(w for w in hidden_sizes[1:] for _ in range(n_blocks))]
        # The one-hot counts as inputs of the first layer, as it does where it is concatenated.
        first = math.sqrt(6 / (n_inputs + (embedding_size or n_tasks)))
        shared = {"weight0": uniform(first, n_inputs, widths[0])}
        if embedding_size is None:
            per_task = {"bias0": uniform(first, n_tasks, widths[0])}
        else:
            shared["bias0"] = torch.zeros(n_networks, widths[0])
            shared["task_weight"] = uniform(first, embedding_size, widths[0])
            normal = torch.empty(n_networks, n_tasks, embedding_size).normal_(generator=generator)
            per_task = {"embedding": normalize(normal, dim=-1)}
        for number, (fan_in, width) in enumerate(pairwise(widths), start=1):
            shared[f"weight{number}"] = uniform(math.sqrt(6 / fan_in), fan_in, width)
            shared[f"bias{number}"] = torch.zeros(n_networks, width)
        lead = (n_tasks,) if multi_head else ()
        (per_task if multi_head else shared).update(
            head_weight=uniform(head_bound, *lead, hidden_sizes[-1], n_outputs),
            head_bias=uniform(head_bound, *lead, n_outputs),
        )
        self.rotation: Tensor | None
        self.register_buffer("rotation", None)  # see `add_rotation`
        self.shared = nn.ParameterDict(shared)
        self.per_task = nn.ParameterDict(per_task)

    @property
    def n_features(self) -> int:
        """d, the width of the trunk's output."""
        return ({**self.shared, **self.per_task})["head_weight"].shape[-2]

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

    def named(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The shared and the tasks' own parameters by name; faster than through `ParameterDict`."""
        shared, per_task = (module._parameters for module in (self.shared, self.per_task))
        return cast(dict[str, Tensor], {**shared}), cast(dict[str, Tensor], {**per_task})

    def rotations(self) -> list[Tensor]:
        """Each network's rotations as views, `[T, m, m]`; empty without."""
        return [] if self.rotation is None else list(self.rotation)

    def folded(self) -> Function:
        """The function that is computed, heads behind their rotation."""
        shared, per_task = self.named()
        if self.rotation is not None:
            per_task["head_weight"] = fold(self.rotation, per_task["head_weight"])
        return Function(self.trunk, shared, per_task)
