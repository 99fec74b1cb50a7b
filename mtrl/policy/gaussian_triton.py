"""Triton kernels of the squashed Gaussian for CUDA: one for sampling, one for the derivative."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 256
"""Elements of one program: rows times actions, padded to a power of two."""


def sample(outputs: Tensor, noise: Tensor, limits: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Compute actions and log-probabilities; see `squashed_gaussian`.

    Args:
        outputs: `[…, 2A]`, contiguous.
        noise: `[…, A]`, with the same number of rows.
        limits: Limits of the log standard deviation.
    """
    action = outputs.new_empty(*outputs.shape[:-1], noise.shape[-1])
    log_prob = outputs.new_empty(outputs.shape[:-1])
    sizes, grid = _sizes(log_prob.numel(), noise.shape[-1])
    with torch.cuda.device_of(outputs):  # Triton launches on the current device
        _sample[grid](outputs, noise.contiguous(), action, log_prob, *limits, *sizes)
    return action, log_prob


def derivative(
    outputs: Tensor,
    noise: Tensor,
    action: Tensor,
    at_results: tuple[Tensor, Tensor],
    limits: tuple[float, float],
) -> Tensor:
    """Compute the gradient w.r.t. `outputs` from those w.r.t. actions and log-probabilities."""
    found = torch.empty_like(outputs)
    at_action, at_log_prob = (gradient.contiguous() for gradient in at_results)
    sizes, grid = _sizes(at_log_prob.numel(), noise.shape[-1])
    given = outputs, noise.contiguous(), action, at_action, at_log_prob
    with torch.cuda.device_of(outputs):
        _derivative[grid](*given, found, *limits, *sizes)
    return found


def _sizes(n_rows: int, n_actions: int) -> tuple[tuple[int, int, int, int], tuple[int]]:
    width = triton.next_power_of_2(n_actions)
    rows = max(1, LANES // width)
    return (n_rows, n_actions, rows, width), (triton.cdiv(n_rows, rows),)


@triton.jit
def _places(n_rows, n_actions: tl.constexpr, rows: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's rows `[rows, 1]` and actions `[1, width]`, and which are in range."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    column = tl.arange(0, width)[None, :]
    return row, column, (row < n_rows) & (column < n_actions)


@triton.jit
def _sample(  # type: ignore[no-untyped-def]
    outputs, noise, action, log_prob, low: tl.constexpr, high: tl.constexpr,
    n_rows, n_actions: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row, column, real = _places(n_rows, n_actions, rows, width)
    mean = tl.load(outputs + row * 2 * n_actions + column, mask=real, other=0.0)
    log_std = tl.load(outputs + row * 2 * n_actions + n_actions + column, mask=real, other=0.0)
    epsilon = tl.load(noise + row * n_actions + column, mask=real, other=0.0)
    log_std = tl.where(log_std < low, low, tl.where(log_std > high, high, log_std))  # NaN stays
    u = mean + tl.exp(log_std) * epsilon
    away = tl.exp(-2 * tl.abs(u))  # in (0, 1], so nothing below can overflow
    tanh = (1 - away) / (1 + away)
    tl.store(action + row * n_actions + column, tl.where(u < 0, -tanh, tanh), mask=real)
    softplus = tl.where(u < 0, -2 * u, 0.0) + tl.log(1 + away)
    # log 2π / 2 and 2 log 2
    log_normal = -0.5 * epsilon * epsilon - 0.9189385332046727 - log_std
    terms = log_normal - 1.3862943611198906 + 2 * u + 2 * softplus
    total = tl.sum(tl.where(real, terms, 0.0), 1)
    first = tl.program_id(0) * rows + tl.arange(0, rows)
    tl.store(log_prob + first, total, mask=first < n_rows)


@triton.jit
def _derivative(  # type: ignore[no-untyped-def]
    outputs, noise, action, at_action, at_log_prob, found, low: tl.constexpr, high: tl.constexpr,
    n_rows, n_actions: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row, column, real = _places(n_rows, n_actions, rows, width)
    log_std = tl.load(outputs + row * 2 * n_actions + n_actions + column, mask=real, other=0.0)
    epsilon = tl.load(noise + row * n_actions + column, mask=real, other=0.0)
    a = tl.load(action + row * n_actions + column, mask=real, other=0.0)
    by_action = tl.load(at_action + row * n_actions + column, mask=real, other=0.0)
    by_log_prob = tl.load(at_log_prob + row, mask=row < n_rows, other=0.0)
    at_u = by_action * (1 - a * a) + 2 * a * by_log_prob
    at_log_std = at_u * tl.exp(log_std) * epsilon - by_log_prob
    at_log_std = tl.where((log_std < low) | (log_std > high), 0.0, at_log_std)
    tl.store(found + row * 2 * n_actions + column, at_u, mask=real)
    tl.store(found + row * 2 * n_actions + n_actions + column, at_log_std, mask=real)
