"""Linear layers of N networks and T tasks, with shared or per-task weights."""

from __future__ import annotations

from torch import Tensor

from mtrl.nets.fused import layer


def shared_linear(inputs: Tensor, weight: Tensor, bias: Tensor, exact: bool = False) -> Tensor:
    """Apply a layer shared by all tasks: X W + b, one product per network for any T."""
    return layer(inputs, weight, bias, exact=exact)


def own_linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a layer with weights per task: X_t W_t + b_t, in the weight's type.

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
    """Compute `[…, B, in] @ […, in, out]` with the same float32 setting forward and backward."""
    rows = inputs.reshape(-1, 1, *inputs.shape[-2:])
    weights = weight.reshape(-1, *weight.shape[-2:])
    outputs = layer(rows, weights, weights.new_zeros(len(weights), weight.shape[-1]), exact=True)
    return outputs.view(*inputs.shape[:-1], weight.shape[-1])
