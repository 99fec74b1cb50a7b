"""Multi-task networks: a trunk the tasks share, and parameters one task alone owns.

Networks of one shape are computed together: in front of everything stands N, two for twin critics.
Then come the tasks and the samples of a task: `[N, T, B, …]`. Weights are stored `[in, out]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mtrl.linear import own_linear, shared_linear
from mtrl.validation import UsageError

Parameters = Mapping[str, Tensor]
"""By name: shared ones `[N, …]`, per-task ones `[N, T, …]`."""

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LOG_2PI = math.log(2 * math.pi)


def trunk(
    shared: Parameters, per_task: Parameters, inputs: Tensor, tape: dict[str, Tensor] | None = None
) -> Tensor:
    """ReLU layers, from inputs to the features z.

    The task enters as the bias of the first layer. That is the layer on [inputs, one-hot] without
    multiplying by zeros: row t of the bias is the one-hot's column t, plus the layer's own bias.

    Args:
        shared: Parameters all tasks share; see `shared_linear`.
        per_task: The tasks' own.
        inputs: `[N, T, B, in]`, or `[1, T, B, in]` for all networks.
        tape: Given one, writes down each weight's inputs under its name.

    Returns:
        `[N, T, B, d]`.
    """
    parameters = {**shared, **per_task}
    hidden = inputs
    for layer in range(sum(name.startswith("weight") for name in shared)):
        weight = f"weight{layer}"
        if tape is not None:
            tape[weight] = hidden
        hidden = shared_linear(hidden, shared[weight], parameters[f"bias{layer}"]).relu_()
    return hidden


def head(shared: Parameters, per_task: Parameters, features: Tensor) -> Tensor:
    """Linear head on the features, rotated if `per_task` holds a `rotation`; shapes as `trunk`.

    Its results are in the parameters' type whatever that of the features: rounding a value to 8
    bits would drown the differences that a target is made of.
    """
    with torch.autocast(features.device.type, enabled=False):
        if "head_weight" in shared:
            weight, bias = shared["head_weight"], shared["head_bias"]
            return shared_linear(features.to(bias.dtype), weight, bias)
        weight, bias = per_task["head_weight"], per_task["head_bias"]
        if "rotation" in per_task:
            weight = fold(per_task["rotation"], weight)
        return own_linear(features, weight, bias)


def fold(rotation: Tensor, weight: Tensor) -> Tensor:
    """The head that sees z as `weight` sees R z: Wᵀ(R z) = (Rᵀ W)ᵀ z, `[…, d, out]`.

    O(d² out) where rotating every sample's features would take O(B d²). A rotation `[…, m, m]`
    turns the first m features and leaves the others.
    """
    size = rotation.shape[-1]
    turned = (weight[..., :size, :].mT @ rotation).mT  # RᵀW, in the order that is fast in memory
    return torch.cat([turned, weight[..., size:, :]], -2) if size < weight.shape[-2] else turned


def multi_task_mlp(shared: Parameters, per_task: Parameters, inputs: Tensor) -> Tensor:
    """Trunk and head; arguments as `trunk`. Returns `[N, T, B, out]`."""
    return head(shared, per_task, trunk(shared, per_task, inputs))


class MultiTaskNetworks(nn.Module):
    """N networks of one shape for T tasks, their parameters split by who owns them.

    `shared` holds the trunk, and the head if there is a single one: `[N, …]`, subject to surgery.
    `per_task` holds the first layer's bias and, with several heads, each task's head: `[N, T, …]`,
    never touched by surgery. `rotation` is `[N, T, m, m]` where a method puts one between trunk
    and heads, and is no parameter: no loss trains it.

    Weights are He-uniform with zero bias; the head is uniform in ± `head_bound`.
    """

    def __init__(
        self,
        n_networks: int,
        n_tasks: int,
        n_inputs: int,
        n_outputs: int,
        hidden_sizes: Sequence[int],
        multi_head: bool,
        head_bound: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.n_networks = n_networks

        def uniform(bound: float, *shape: int) -> Tensor:
            return torch.empty(n_networks, *shape).uniform_(-bound, bound, generator=generator)

        # The one-hot counts as inputs of the first layer, as it does where it is concatenated.
        first = math.sqrt(6 / (n_inputs + n_tasks))
        shared = {"weight0": uniform(first, n_inputs, hidden_sizes[0])}
        per_task = {"bias0": uniform(first, n_tasks, hidden_sizes[0])}
        for layer, (fan_in, width) in enumerate(pairwise(hidden_sizes), start=1):
            shared[f"weight{layer}"] = uniform(math.sqrt(6 / fan_in), fan_in, width)
            shared[f"bias{layer}"] = torch.zeros(n_networks, width)
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
    def n_tasks(self) -> int:
        """T."""
        return self.per_task["bias0"].shape[1]

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

    def rotations(self) -> list[Tensor]:
        """Each network's rotations as views, `[T, m, m]`; empty without."""
        return [] if self.rotation is None else list(self.rotation)

    def folded(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Shared and per-task parameters as they are computed with: heads behind their rotation."""
        shared, per_task = dict(self.shared), dict(self.per_task)
        if self.rotation is not None:
            per_task["head_weight"] = fold(self.rotation, per_task["head_weight"])
        return shared, per_task

    def forward(self, inputs: Tensor) -> Tensor:
        """All networks, all tasks: `[T, B, in]` to `[N, T, B, out]`."""
        return multi_task_mlp(*self.folded(), inputs[None])


def squashed_gaussian(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a = tanh(u), u ~ N(μ, σ²), with its log-probability (SAC, appendix C).

    log π(a|s) = log N(u; μ, σ²) − Σ log(1 − tanh² u), where log(1 − tanh² u) is written as
    2(log 2 − u − softplus(−2u)): no epsilon, exact for any u.

    Args:
        outputs: The actor's `[…, 2A]`: mean and log standard deviation.
        noise: Standard normal, `[…, A]`.

    Returns:
        Actions in (−1, 1), `[…, A]`, and log-probabilities, `[…]`.
    """
    mean, log_std = outputs.chunk(2, -1)
    log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * (noise.square() + LOG_2PI) - log_std
    log_jacobian = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_jacobian).sum(-1)
