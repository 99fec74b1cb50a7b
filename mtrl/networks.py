"""Multi-task networks: a trunk the tasks share, and parameters one task alone owns.

A network is written once, for one task and one member, and is mapped over tasks by `vmap`; called
with the whole dictionary of per-task parameters it computes all tasks at once. Weights are stored
`[in, out]`. In front of every parameter stands the member dimension N: two for twin critics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Parameters = Mapping[str, Tensor]

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
LOG_2PI = math.log(2 * math.pi)


def multi_task_mlp(shared: Parameters, per_task: Parameters, inputs: Tensor) -> Tensor:
    """ReLU trunk and linear head.

    The task enters as the bias of the first layer. That is the layer on [inputs, one-hot] without
    multiplying by zeros: row t of the bias is the one-hot's column t, plus the layer's own bias.

    Args:
        shared: Parameters all tasks share.
        per_task: One task's parameters, or all tasks' with a leading `[T, …]`.
        inputs: `[B, in]` for one task, `[T, B, in]` for all.

    Returns:
        `[B, out]`, or `[T, B, out]`.
    """
    parameters = {**shared, **per_task}
    hidden = inputs
    for layer in range(sum(name.startswith("weight") for name in parameters)):
        weight, bias = parameters[f"weight{layer}"], parameters[f"bias{layer}"]
        hidden = (hidden @ weight).add_(bias.unsqueeze(-2)).relu_()
    return hidden @ parameters["head_weight"] + parameters["head_bias"].unsqueeze(-2)


class MultiTaskNetworks(nn.Module):
    """N networks of one shape for T tasks, their parameters split by who owns them.

    `shared` holds the trunk, and the head if there is a single one: `[N, …]`, subject to surgery.
    `per_task` holds the first layer's bias and, with several heads, each task's head: `[N, T, …]`,
    never touched by surgery.

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
        self.shared = nn.ParameterDict(shared)
        self.per_task = nn.ParameterDict(per_task)

    def members(self) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Each network's parameters as views: shared, and per task `[T, …]`."""
        return [
            (
                {name: value[n] for name, value in self.shared.items()},
                {name: value[n] for name, value in self.per_task.items()},
            )
            for n in range(self.n_networks)
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        """All networks, all tasks: `[T, B, in]` to `[N, T, B, out]`."""
        return torch.stack([multi_task_mlp(*member, inputs) for member in self.members()])


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
