"""The squashed Gaussian, the distribution of actions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from mtrl.devices import HAS_TRITON

LIMITS = -20.0, 2.0
"""Limits of log σ, as in the authors' code."""

LOG_2PI = math.log(2 * math.pi)


def squashed_gaussian(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a = tanh(u), u ~ N(μ, σ²), with its log-probability (SAC, appendix C).

    log π(a|s) = log N(u; μ, σ²) − Σ log(1 − tanh² u), where log(1 − tanh² u) is computed as
    2(log 2 − u − softplus(−2u)), which is exact for any u and needs no epsilon.

    Its derivative with respect to u is −2 tanh u, so the backward pass takes only a few operations
    on values from the forward pass.

    Args:
        outputs: Outputs of the actor, `[…, 2A]`: mean and log standard deviation.
        noise: Standard normal, `[…, A]`.

    Returns:
        Actions in (−1, 1), `[…, A]`, and log-probabilities, `[…]`.
    """
    noise = noise.expand(*outputs.shape[:-1], -1)
    if not torch.is_grad_enabled():
        return _sample(outputs, noise)[:2]
    action, log_prob = _SquashedGaussian.apply(outputs, noise)
    return action, log_prob


def _is_fused(outputs: Tensor) -> bool:
    """Return whether to use our Triton kernel; torch.compile generates its own."""
    return outputs.is_cuda and HAS_TRITON and not torch.compiler.is_compiling()


def _sample(outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return actions, log-probabilities and, without the kernel, σ ε."""
    if _is_fused(outputs):
        from mtrl.policy import gaussian_triton

        return *gaussian_triton.sample(outputs.contiguous(), noise, LIMITS), None
    mean, log_std = outputs.chunk(2, -1)
    log_std = log_std.clamp(*LIMITS)
    away = log_std.exp() * noise
    u = mean + away
    # Half of each action's log π, up to a constant: u + softplus(−2u) − (log σ + ½ ε²) / 2.
    half = u.sub(softplus(u, beta=-2), alpha=2)
    half = half.sub(torch.addcmul(log_std, noise, noise, value=0.5), alpha=0.5)
    constant = -noise.shape[-1] * (2 * math.log(2) + 0.5 * LOG_2PI)
    return torch.tanh(u), torch.rsub(half.sum(-1), constant, alpha=-2), away


class _SquashedGaussian(torch.autograd.Function):
    """A sample and its log-probability, differentiable by μ and log σ; not by the noise."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        action, log_prob, away = _sample(outputs, noise)
        ctx.save_for_backward(outputs, noise, action, away)
        return action, log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_action: Tensor, at_log_prob: Tensor) -> tuple[Tensor, None]:
        outputs, noise, action, away = ctx.saved_tensors
        if away is None:
            from mtrl.policy import gaussian_triton

            given = outputs.contiguous(), noise, action
            return gaussian_triton.derivative(*given, (at_action, at_log_prob), LIMITS), None
        at_log_prob = at_log_prob[..., None]
        at_u = torch.ops.aten.tanh_backward(at_action, action)
        at_u = at_u.addcmul_(at_log_prob, action, value=2)
        at_log_std = torch.addcmul(-at_log_prob, at_u, away)
        log_std = outputs.chunk(2, -1)[1]
        at_log_std = torch.ops.aten.hardtanh_backward(at_log_std, log_std, *LIMITS)
        return torch.cat([at_u, at_log_std], -1), None
