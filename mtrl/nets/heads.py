"""Heads: a linear layer from the features to a network's outputs, one per task or one for all."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrl.nets.fused import layer
from mtrl.nets.params import Parameters
from mtrl.nets.precision import float32_products, full_float32

HEAD = ("head_weight", "head_bias")
"""Names of the heads' parameters; all others are the trunk's."""


def head(shared: Parameters, per_task: Parameters, features: Tensor) -> Tensor:
    """Apply the linear head to features, rotated if `per_task` holds a `rotation`.

    Results have the type of the parameters, whatever the type of the features: rounding a value to
    8 bits would swamp the differences that make up a target. Shapes are those of `TrunkFunction`.
    """
    with float32_products("highest"):
        if "head_weight" in shared:
            return layer(features, shared["head_weight"], shared["head_bias"], exact=True)
        weight, bias = per_task["head_weight"], per_task["head_bias"]
        if "rotation" in per_task:
            rotation = per_task["rotation"]
            if features.shape[2] < weight.shape[-1]:  # cheaper with fewer samples than outputs
                features = rotate(rotation, features)
            else:
                weight = fold(rotation, weight)
        return own_linear(features, weight, bias)


def fold(rotation: Tensor, weight: Tensor) -> Tensor:
    """Fold a rotation into a head: return Rᵀ W, `[…, d, out]`, with Wᵀ(R z) = (Rᵀ W)ᵀ z.

    This takes O(d² out), whereas rotating the features of every sample takes O(B d²). A rotation
    `[…, m, m]` acts on the first m features and leaves the others unchanged.
    """
    size = rotation.shape[-1]
    with full_float32(weight.device):
        # RᵀW, in the memory order that is fast
        turned = own_linear(weight[..., :size, :].mT, rotation).mT
    return torch.cat([turned, weight[..., size:, :]], -2) if size < weight.shape[-2] else turned


def rotate(rotation: Tensor, features: Tensor) -> Tensor:
    """Compute R z for every sample, `[…, B, d]`, in the rotation's type: O(B d²)."""
    size = rotation.shape[-1]
    turned = own_linear(features[..., :size], rotation.mT)
    rest = features[..., size:].to(turned.dtype)
    return torch.cat([turned, rest], -1) if size < features.shape[-1] else turned


def own_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a layer with weights per task: X_t W_t + b_t, in the weight's type.

    Forward and backward have the same float32 setting.

    Args:
        inputs: `[…, B, in]`.
        weight: `[…, in, out]`.
        bias: `[…, out]`; default: none.

    Returns:
        `[…, B, out]`.
    """
    if bias is None:
        bias = weight.new_zeros(*weight.shape[:-2], weight.shape[-1])
    rows, weights = inputs.flatten(0, -3)[:, None], weight.flatten(0, -3)
    outputs = layer(rows, weights, bias.flatten(0, -2), exact=True)
    return outputs.view(*inputs.shape[:-1], weight.shape[-1])
