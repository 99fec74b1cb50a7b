"""Linear layers of N networks and T tasks, of all tasks together or of each for itself."""

from __future__ import annotations

from torch import Tensor

from mtrl.nets.fused import layer


def shared_linear(inputs: Tensor, weight: Tensor, bias: Tensor, exact: bool = False) -> Tensor:
    """A layer all tasks share: X W + b, one product per network whatever T is; see `layer`."""
    return layer(inputs, weight, bias, exact=exact)


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
