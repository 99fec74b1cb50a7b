"""Steps of the optimisers, for N networks whose parameters are held together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtrl.config.sections import LearnerConfig


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: LearnerConfig
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); without decay it is Adam.

    Args:
        parameters: By name. Those called some weight decay, of trunk and heads; biases, embeddings
            and temperatures do not.
        config: Step size, epsilon and decay.
    """
    decays = {name: "weight" in name for name in parameters}
    groups = [
        {
            "params": [p for name, p in parameters.items() if decays[name] is decay],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    device = next(iter(parameters.values())).device
    on_cuda = device.type == "cuda"
    rate = config.learning_rate
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=torch.tensor(rate, device=device) if on_cuda else rate,  # a graph reads it anew
        eps=config.adam_epsilon,
        fused=True,
        capturable=on_cuda,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the step size of all parameters, in a captured graph too."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_by_network_(gradients: list[Tensor], max_norm: float) -> None:
    """Scale each network's gradient, all its parameters `[N, …]` together, to at most this norm."""
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    norms = torch.linalg.vector_norm(norms, dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
