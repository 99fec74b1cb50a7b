"""A layer as one function: product, bias, LayerNorm, ReLU and residual, one pass each way.

Written out by hand, for a network of 192 units spends as much time between its products as in them:
autograd would save more, cast more and add more often than a layer needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrl.nets.precision import float32_products, float32_setting

EPSILON = 1e-5
"""Added to a variance by LayerNorm."""


def layer(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: bool = False,
    relu: bool = False,
    residual: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """X W + b, normalised, rectified or added to a residual, for N networks of T tasks.

    Shapes tell which gradients the backward makes; a view from `expand` costs nothing. From a
    weight `[N, T, in, out]` that is such a view over the tasks it makes one gradient per task, at
    the price of a single one: it sums over B rows at a time instead of T B. A bias `[N, T, out]`
    gets a gradient per task likewise, and a bias `[N, T, B, out]` the gradient by X W + b itself.

    Inside autocast the product is in autocast's type, forward and backward, and so is the result;
    float64 stays what it is. LayerNorm's statistics are in float32 at least.

    Deviation from LayerNorm (Ba et al. 2016): there is no factor and no shift after it.

    Args:
        inputs: X, `[N, T, B, in]`, or `[1, T, B, in]` for all networks.
        weight: `[N, in, out]`, or an expanded view of it, `[N, T, in, out]`.
        bias: `[N, out]`, `[N, T, out]`, or an expanded view of either, `[N, T, B, out]`.
        norm: Whether each row is normalised.
        relu: Whether ReLU follows; not together with a residual.
        residual: Added in the end, `[N, T, B, out]`.
        exact: Multiply in the weight's type, whatever autocast says; the backward still heeds it.

    Returns:
        `[N, T, B, out]`.
    """
    product = backward = _product_type(inputs)
    if exact:
        product = weight.dtype
    inputs = inputs.expand(weight.shape[0], -1, -1, -1)
    arguments = inputs, weight, bias, residual, product, backward, norm, relu
    if not torch.is_grad_enabled():
        return _forward(*arguments)[0]
    result: Tensor = _Layer.apply(*arguments)
    return result


def _product_type(inputs: Tensor) -> torch.dtype:
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return inputs.dtype


def _forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    product: torch.dtype,
    backward: torch.dtype,
    norm: bool,
    relu: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The layer's outputs, and what the backward needs."""
    if weight.ndim == 4:
        weight = weight[:, 0]
    x, w = inputs.to(product), weight.to(product)
    outputs = _affine(x, w, bias, relu and not norm)
    before = mean = rstd = None
    if norm:
        before = outputs
        outputs, mean, rstd = _layer_norm(before)
        if relu:
            outputs.relu_()
    if residual is not None:
        outputs.add_(residual)
    if backward != product:
        x, w = inputs.to(backward), weight.to(backward)
    return outputs, (x, w, before, mean, rstd, outputs if relu else None)


class _Layer(torch.autograd.Function):
    """See `layer`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        outputs, saved = _forward(*arguments)
        _, weight, bias, *_ = arguments
        ctx.save_for_backward(*saved)
        ctx.by_task, ctx.bias_shape = weight.ndim == 4, bias.shape
        # A trunk's products may be of TF32, a head's are not, and one backward goes through both.
        ctx.setting = float32_setting()
        return outputs

    @staticmethod
    @once_differentiable  # the weight is saved as it was used, and no longer known as the argument
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with float32_products(ctx.setting):
            return _Layer._backward(ctx, gradients[0])

    @staticmethod
    def _backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, w, before, mean, rstd, outputs = ctx.saved_tensors
        by_inputs, by_weight, by_bias, by_residual, *_ = ctx.needs_input_grad
        at_residual = d if by_residual else None
        if outputs is not None:
            d = torch.ops.aten.threshold_backward(d, outputs, 0)
        if before is not None:
            d = _layer_norm_backward(d, before, mean, rstd)
        at_bias = _bias_gradient(d, ctx.bias_shape) if by_bias else None
        d = d.to(x.dtype)
        at_inputs = at_weight = None
        if by_inputs:
            thin = w.shape[-1] == 1  # an outer product, which bmm is slow at on the CPU
            multiply = torch.mul if thin else torch.bmm
            at_inputs = multiply(d.flatten(1, 2), w.mT).view(x.shape)
        if by_weight and ctx.by_task:  # a sum for each task over its own rows
            at_weight = torch.bmm(x.flatten(0, 1).mT, d.flatten(0, 1)).unflatten(0, x.shape[:2])
        elif by_weight:
            at_weight = _transposed_product(x.flatten(1, 2), d.flatten(1, 2))
        return at_inputs, at_weight, at_bias, at_residual, None, None, None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """X W + b, with ReLU if so asked: the product begins from the bias."""
    n_networks, n_tasks, n_rows, _ = x.shape
    rows, width = x.flatten(1, 2), weight.shape[-1]
    bias = bias.to(x.dtype)
    outputs = x.new_empty(n_networks, n_tasks, n_rows, width)
    flat = outputs.view(n_networks, -1, width)
    if relu and bias.ndim == 2 and x.is_cuda:  # one launch for all three
        for n in range(n_networks):
            torch.ops.aten._addmm_activation(bias[n], rows[n], weight[n], out=flat[n])
        return outputs
    outputs.copy_(bias if bias.ndim == 4 else bias.view(n_networks, -1, 1, width))
    flat.baddbmm_(rows, weight)
    return outputs.relu_() if relu else outputs


def _layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: normalised, and its mean and reciprocal deviation in at least float32."""
    factor = shift = None
    if not x.is_cuda:  # without them, torch's kernel is not vectorised, and rounds the statistics
        like = torch.promote_types(x.dtype, torch.float32)
        factor, shift = x.new_ones(x.shape[-1], dtype=like), x.new_zeros(x.shape[-1], dtype=like)
    return torch.native_layer_norm(x, x.shape[-1:], factor, shift, EPSILON)


def _layer_norm_backward(d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    factor = None  # of one; asked for by a CPU whose statistics are in another type
    if x.dtype != rstd.dtype and not x.is_cuda:
        factor = rstd.new_ones(x.shape[-1])
    wanted = [True, False, False]
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        d.to(x.dtype), x, x.shape[-1:], mean, rstd, factor, factor, wanted
    )[0]
    return found


def _bias_gradient(d: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 4:
        return d
    rows = d if len(shape) == 3 else d.flatten(1, 2)
    return rows.sum(-2)


def _transposed_product(rows: Tensor, at_output: Tensor) -> Tensor:
    """Xᵀ D; for a thin D as (Dᵀ X)ᵀ, which the CPU's library does six times as fast."""
    if at_output.shape[-1] <= 8:
        return torch.bmm(at_output.mT, rows).mT
    return torch.bmm(rows.mT, at_output)
