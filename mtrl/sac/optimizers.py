"""Optimisers for N networks whose parameters are stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtrl.config.learner import LearnerConfig


class FusedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019); without weight decay it is Adam.

    State and settings are those of `torch.optim.AdamW`. Before it launches its kernel, torch's
    step checks properties of every parameter that cannot change, which takes as long as the kernel
    if networks are small. This step leaves these checks out.
    """

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the parameters that have a gradient."""
        groups = []
        for group in self.param_groups:
            rows = [self._row(p) for p in group["params"] if p.grad is not None]
            if rows:
                groups.append((group, list(map(list, zip(*rows, strict=True)))))
        if not groups:
            return
        with torch.no_grad():
            torch._foreach_add_([step for _, (*_, steps) in groups for step in steps], 1)
            for group, (parameters, gradients, means, squares, steps) in groups:
                torch._fused_adamw_(
                    parameters,
                    gradients,
                    means,
                    squares,
                    [],
                    steps,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    def _row(self, parameter: Tensor) -> tuple[Tensor | None, ...]:
        state = self.state[parameter]
        if not state:
            state |= _before_any_step(parameter)
        return parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]


def _before_any_step(parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def make_optimizer(
    decaying: Sequence[nn.Parameter], others: Sequence[nn.Parameter], config: LearnerConfig
) -> torch.optim.AdamW:
    """Create AdamW.

    Args:
        decaying: Parameters with weight decay.
        others: Parameters without.
        config: Learning rate, epsilon and weight decay.
    """
    decay, device = config.weight_decay, [*decaying, *others][0].device
    groups = [(decaying, decay), (others, 0.0)] if decay else [([*decaying, *others], 0.0)]
    on_cuda = device.type == "cuda"
    optimizer = FusedAdamW(
        [{"params": group, "weight_decay": each} for group, each in groups if group],
        lr=config.learning_rate,
        eps=config.adam_epsilon,
        fused=True,
        capturable=on_cuda,
    )
    if on_cuda:  # a graph reads the rate from a tensor; AdamW would wait for it to check it
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.learning_rate, device=device)
    return optimizer


def moments(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter, by the parameter's number as a string."""
    return {str(i): state for i, state in optimizer.state_dict()["state"].items()}


def load_moments_(optimizer: torch.optim.Optimizer, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore the states returned by `moments`; settings stay unchanged.

    Existing moments are overwritten in place, because a captured graph refers to these tensors,
    which torch's `load_state_dict` would replace. Moments missing in `saved` become zero.

    Raises:
        IndexError: If there are moments of a parameter that does not exist.
        RuntimeError: If their shape differs from the parameter's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for unknown in saved.keys() - {str(i) for i in range(len(parameters))}:
        raise IndexError(f"moments of parameter {unknown}, where there are {len(parameters)}")
    for i, parameter in enumerate(parameters):
        given = saved.get(str(i), {})
        if given and not optimizer.state.get(parameter):
            optimizer.state[parameter] = _before_any_step(parameter)
        for name, held in optimizer.state.get(parameter, {}).items():
            value = given.get(name, torch.zeros_like(held))
            if held.shape != value.shape:
                raise RuntimeError(
                    f"{name} of parameter {i}: expected shape {tuple(held.shape)}, got "
                    f"{tuple(value.shape)}"
                )
            held.copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the learning rate of all parameters, also in a captured graph."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_by_network_(gradients: list[Tensor], max_norm: float) -> None:
    """Clip the norm of each network's gradient, over all parameters `[N, …]`, to `max_norm`."""
    networks = list(zip(*(gradient.unbind() for gradient in gradients), strict=True))
    norms = torch.stack(torch._foreach_norm([part for parts in networks for part in parts]))
    norms = torch.linalg.vector_norm(norms.view(len(networks), -1), dim=1)
    # (norm + 1e-6) / max_norm, as in torch's clip_grad_norm_.
    excess = torch.rsub(norms, 1e-6 / max_norm, alpha=-1 / max_norm).clamp_(min=1)
    for parts, factor in zip(networks, excess.unbind(), strict=True):
        torch._foreach_div_(parts, factor)
