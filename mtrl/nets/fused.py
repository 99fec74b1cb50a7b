"""A layer as one autograd function: product, bias, LayerNorm, ReLU and residual.

Forward and backward are written by hand, because a network of 192 units spends as much time
between its matrix products as in them: autograd would save, cast and add more often than needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrl.nets.precision import float32_products, float32_setting

EPSILON = 1e-5
"""Epsilon of LayerNorm, added to the variance."""


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
    """Compute X W + b with optional LayerNorm, ReLU or residual, for N networks of T tasks.

    Shapes select which gradients the backward computes; views from `expand` are free. A weight
    `[N, T, in, out]` that is such a view over tasks gets one gradient per task, at the cost of a
    single one: the backward sums over B rows at a time instead of T B. Likewise, a bias
    `[N, T, out]` gets one gradient per task, and a bias `[N, T, B, out]` the gradient of X W + b.

    Under autocast, the product is computed in autocast's type, forward and backward, and so is the
    result; float64 stays unchanged. LayerNorm's statistics are in float32 or wider.

    Deviation from LayerNorm (Ba et al. 2016): no factor or shift is learned.

    Args:
        inputs: X, `[N, T, B, in]`, or `[1, T, B, in]` if shared by all networks.
        weight: `[N, in, out]`, or an expanded view of it, `[N, T, in, out]`.
        bias: `[N, out]`, `[N, T, out]`, or an expanded view of either, `[N, T, B, out]`.
        norm: Whether to normalise each row.
        relu: Whether to apply ReLU; not allowed together with a residual.
        residual: Added to the result, `[N, T, B, out]`.
        exact: Multiply in the weight's type despite autocast; the backward still follows autocast.

    Returns:
        `[N, T, B, out]`.

    Raises:
        ValueError: If both ReLU and a residual are given.
    """
    if relu and residual is not None:
        raise ValueError("layer: expected ReLU or a residual, got both")
    backward = _product_type(inputs)
    how = _How(weight.dtype if exact else backward, backward, norm, relu)
    if not torch.is_grad_enabled():
        return _forward(inputs, weight, bias, residual, how)[0]
    result: Tensor = _Layer.apply(
        inputs.expand(weight.shape[0], -1, -1, -1), weight, bias, residual, how
    )
    return result


class _How(NamedTuple):
    """Options of a layer, and the types of its products."""

    product: torch.dtype
    backward: torch.dtype
    norm: bool
    relu: bool


def _product_type(inputs: Tensor) -> torch.dtype:
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return inputs.dtype


def _forward(
    inputs: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, how: _How
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the outputs and the tensors saved for the backward."""
    if weight.ndim == 4:
        weight = weight[:, 0]
    if bias.ndim == 3 and bias.stride(1) == 0:  # likewise one bias, so that a GPU fuses it
        bias = bias[:, 0]
    n_tasks, n_rows = inputs.shape[1:3]
    rows = inputs.flatten(1, 2).expand(weight.shape[0], -1, -1)
    x, w = _as(rows, how.product), _as(weight, how.product)
    outputs = _affine(x, w, _as(bias, how.product), (n_tasks, n_rows), how.relu and not how.norm)
    before = mean = rstd = None
    if how.norm:
        before = outputs
        outputs, mean, rstd = _layer_norm(before)
        if how.relu:
            outputs.relu_()
    if residual is not None:
        outputs.add_(residual)
    if how.backward != how.product:
        x, w = _as(rows, how.backward), _as(weight, how.backward)
    return outputs, (x, w, before, mean, rstd, outputs if how.relu else None)


class _Layer(torch.autograd.Function):
    """A layer with its derivatives by inputs, weight, bias and residual."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        outputs, saved = _forward(*arguments)
        _, weight, bias, *_ = arguments
        ctx.save_for_backward(*saved)
        ctx.by_task, ctx.bias_ndim = weight.ndim == 4, bias.ndim
        # One backward goes through trunks, which may use TF32, and heads, which do not.
        ctx.setting = float32_setting()
        return outputs

    @staticmethod
    @once_differentiable  # the saved weight is a cast, not the argument
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.setting == float32_setting():
            return _backward(ctx, gradients[0])
        with float32_products(ctx.setting):
            return _backward(ctx, gradients[0])


def _backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    x, w, before, mean, rstd, outputs = ctx.saved_tensors
    by_inputs, by_weight, by_bias, by_residual, _ = ctx.needs_input_grad
    n_networks, n_tasks, n_rows, width = d.shape
    at_residual = d if by_residual else None
    if outputs is not None:
        d = torch.ops.aten.threshold_backward.default(d, outputs, 0)
    if before is not None:
        d = _layer_norm_backward(_as(d, before.dtype), before, mean, rstd)
    at_bias = _bias_gradient(d, ctx.bias_ndim) if by_bias else None
    rows = _as(d, x.dtype).reshape(n_networks, -1, width)
    at_inputs = at_weight = None
    if by_inputs:
        thin = width == 1  # an outer product, for which bmm is slow on the CPU
        multiply = torch.mul if thin else torch.bmm
        at_inputs = multiply(rows, w.mT).view(n_networks, n_tasks, n_rows, -1)
    if by_weight and ctx.by_task:  # sum over the rows of each task
        each = (n_networks * n_tasks, n_rows, -1)
        at_weight = torch.bmm(x.reshape(each).mT, rows.reshape(each)).view(
            n_networks, n_tasks, -1, width
        )
    elif by_weight:
        at_weight = _transposed_product(x, rows)
    return at_inputs, at_weight, at_bias, at_residual, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, int], relu: bool) -> Tensor:
    """Compute X W + b with optional ReLU; the product accumulates into the bias."""
    n_networks, _, width = weight.shape
    outputs = x.new_empty(n_networks, *shape, width)
    flat = outputs.view(n_networks, -1, width)
    if relu and bias.ndim == 2 and x.is_cuda:  # a single kernel for all three
        for n in range(n_networks):
            torch.ops.aten._addmm_activation(bias[n], x[n], weight[n], out=flat[n])
        return outputs
    outputs.copy_(bias if bias.ndim == 4 else bias.view(n_networks, -1, 1, width))
    flat.baddbmm_(x, weight)
    return outputs.relu_() if relu else outputs


def _layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised rows, their mean and reciprocal deviation, in float32 or wider."""
    factor = shift = None
    # On the CPU, torch's kernel needs them: else it is not vectorised and rounds the statistics.
    if x.device.type == "cpu":
        factor, shift = _ones_and_zeros(x)
    return torch.native_layer_norm(x, x.shape[-1:], factor, shift, EPSILON)


def _layer_norm_backward(d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    factor = shift = None  # needed on the CPU if the statistics have another type
    if x.dtype != rstd.dtype and x.device.type == "cpu":
        factor, shift = _ones_and_zeros(x)
    wanted = [True, False, False]
    found: Tensor = torch.ops.aten.native_layer_norm_backward.default(
        d, x, x.shape[-1:], mean, rstd, factor, shift, wanted
    )[0]
    return found


_constants: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}


def _ones_and_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a factor of ones and a shift of zeros for LayerNorm, in float32 or wider."""
    key = x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    if type(x) is not Tensor or torch.compiler.is_compiling():  # do not cache traced tensors
        return x.new_ones(key[0], dtype=key[1]), x.new_zeros(key[0], dtype=key[1])
    if key not in _constants:
        _constants[key] = torch.ones(key[0], dtype=key[1]), torch.zeros(key[0], dtype=key[1])
    return _constants[key]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast if needed; takes half the time of `to` if not."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _bias_gradient(d: Tensor, ndim: int) -> Tensor:
    return d if ndim == 4 else d.sum(2) if ndim == 3 else d.sum((1, 2))


def _transposed_product(rows: Tensor, at_output: Tensor) -> Tensor:
    """Compute Xᵀ D; for a thin D as (Dᵀ X)ᵀ, which is six times as fast on the CPU."""
    if at_output.shape[-1] <= 8 and not rows.is_cuda:
        return torch.bmm(at_output.mT, rows).mT
    return torch.bmm(rows.mT, at_output)
