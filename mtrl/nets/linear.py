"""Matrix products of N networks and T tasks: the one place where an update's time goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrl.nets.precision import float32_products, float32_setting


def shared_linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer all tasks share: X W + b, one product per network whatever T is.

    What is wanted of the backward is told by shapes, for a view that `expand` gives costs nothing:
    from a weight `[N, T, in, out]` that is such a view over the tasks the backward makes one
    gradient per task, at the price of the single one, for the product is the same: it only sums
    over B rows at a time instead of T B. Likewise a bias `[N, T, B, out]` receives the gradient by
    the layer's output itself.

    Under autocast the product is one of autocast's type, and so is the result.

    Args:
        inputs: `[N, T, B, in]`, or `[1, T, B, in]` for all networks.
        weight: `[N, in, out]`, or an expanded view of it, `[N, T, in, out]`.
        bias: `[N, out]`, `[N, T, out]`, or an expanded view of either, `[N, T, B, out]`.

    Returns:
        `[N, T, B, out]`.
    """
    n_networks = len(weight)
    inputs = _cast(inputs).expand(n_networks, -1, -1, -1)
    products = _Product.apply(inputs, weight, inputs.dtype)
    if bias.ndim < 4:
        bias = bias.view(n_networks, -1, 1, bias.shape[-1])
    return products.add_(bias.to(products.dtype))


def own_linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer each task has for itself: X_t W_t + b_t, in the weight's type.

    The backward is in the type of the inputs, as that of the layers before it will be.

    Args:
        inputs: `[N, T, B, in]`.
        weight: `[N, T, in, out]`.
        bias: `[N, T, out]`.

    Returns:
        `[N, T, B, out]`.
    """
    return own_product(inputs, weight) + bias[:, :, None]


def own_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """`[N, T, B, in] @ [N, T, in, out]`, forward and backward in one precision of float32."""
    rows = inputs.reshape(-1, 1, *inputs.shape[2:])
    products = _Product.apply(rows, weight.flatten(0, 1), weight.dtype)
    return products.view(*inputs.shape[:-1], -1)


def _cast(inputs: Tensor) -> Tensor:
    """To autocast's type inside autocast, which leaves float64 as it is."""
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
        return inputs.to(torch.get_autocast_dtype(kind))
    return inputs


class _Product(torch.autograd.Function):
    """`[N, T, B, in] @ [N, in, out]` in a given type; see `shared_linear` for the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.by_task, ctx.weight_dtype = weight.ndim == 4, weight.dtype
        # A trunk's products may be of TF32, a head's are not, and one backward goes through both.
        ctx.setting = float32_setting()
        weight = weight[:, 0] if ctx.by_task else weight
        kept = weight.to(inputs.dtype)
        ctx.save_for_backward(inputs, kept)
        used = kept if kept.dtype == dtype else weight.to(dtype)  # cast once
        rows = torch.bmm(inputs.flatten(1, 2).to(dtype), used)
        # Not as a view, as far as autograd knows: the caller adds and clips in place.
        products = torch.ops.aten._unsafe_view(rows, [*inputs.shape[:-1], weight.shape[-1]])
        return products

    @staticmethod
    @once_differentiable  # the weight is saved as it was used, and no longer known as the argument
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.setting == float32_setting():
            return _Product._backward(ctx, gradients[0])
        with float32_products(ctx.setting):
            return _Product._backward(ctx, gradients[0])

    @staticmethod
    def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        at_output = gradient.to(inputs.dtype)
        by_inputs, by_weight, _ = ctx.needs_input_grad
        at_inputs = at_weight = None
        if by_inputs:
            thin = weight.shape[-1] == 1  # an outer product, which bmm is slow at on the CPU
            multiply = torch.mul if thin else torch.bmm
            at_inputs = multiply(at_output.flatten(1, 2), weight.mT).view(inputs.shape)
        if by_weight and ctx.by_task:  # a sum for each task over its own rows
            at_weight = torch.bmm(inputs.flatten(0, 1).mT, at_output.flatten(0, 1))
            at_weight = at_weight.unflatten(0, inputs.shape[:2]).to(ctx.weight_dtype)
        elif by_weight:
            at_weight = _transposed_product(inputs.flatten(1, 2), at_output.flatten(1, 2))
            at_weight = at_weight.to(ctx.weight_dtype)
        return at_inputs, at_weight, None


def _transposed_product(rows: Tensor, at_output: Tensor) -> Tensor:
    """Xᵀ D; for a thin D as (Dᵀ X)ᵀ, which the CPU's library does six times as fast."""
    if at_output.shape[-1] <= 8:
        return torch.bmm(at_output.mT, rows).mT
    return torch.bmm(rows.mT, at_output)
