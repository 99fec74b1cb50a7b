"""Parameters of N networks and T tasks, by name, and the layers trunks compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from mtrl.nets.build import Layer
from mtrl.nets.fused import EPSILON, layer

Parameters = Mapping[str, Tensor]
"""Parameters by name: shared ones `[N, …]`, per-task ones `[N, T, …]`."""


@dataclass
class Record:
    """Values recorded in a forward pass so that gradients of weight matrices need not be formed.

    All entries are keyed by the name of the layer. For a layer with K experts, N means N K.

    Attributes:
        factored: Whether all layers are recorded, or only composed ones.
        inputs: X, `[N or 1, T, B, in]`.
        outputs: Node of X W + b in the graph, `[N, T, B, out]`; its gradient is D.
        composed: Matrix and bias of a composed layer for each task, `[N, T, …]`.
        mixes: w, `[N, T, K]`.
    """

    factored: bool
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    composed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mixes: dict[str, Tensor] = field(default_factory=dict)


class Params:
    """Parameters and layers of a trunk.

    Args:
        layers: Layers as declared in `Build`.
        shared: Shared parameters, `[N, …]`, or views of them for each task, `[N, T, …]`.
        own: Per-task parameters, `[N, T, …]`.
        record: Record to fill in the forward pass, if any.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        shared: Parameters,
        own: Parameters,
        record: Record | None = None,
    ) -> None:
        self._layers, self._shared, self._own, self._record = layers, shared, own, record

    def __getitem__(self, name: str) -> Tensor:
        """Return a table or a fixed input by name, `[N, T, …]`."""
        return self._own[name]

    def shared(self, name: str, ndim: int) -> Tensor:
        """Return a shared parameter with `ndim` axes of its own, `[N, T or 1, …]`."""
        value = self._shared[name]
        return value if value.ndim == ndim + 2 else value[:, None]

    def linear(
        self,
        name: str,
        inputs: Tensor,
        *,
        mix: Tensor | None = None,
        offset: Tensor | None = None,
        norm: bool = False,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Compute X W + b with optional LayerNorm, ReLU or residual; see `mtrl.nets.fused.layer`.

        Args:
            name: Name of the layer.
            inputs: `[N or 1, T, B, in]`; for K experts also `[N, K, T, B, in]`, one per expert.
            mix: Weights w of a composed layer, `[N, T, K]`.
            offset: Added to the bias, `[N, T, out]`.
            norm: Whether to normalise each row.
            relu: Whether to apply ReLU.
            residual: Added to the result, with its shape.

        Returns:
            `[N, T, B, out]`; for K experts `[N, K, T, B, out]`.

        Raises:
            ValueError: If a composed layer is given an offset or residual.
        """
        at = self._layers[name]
        weight, bias = self._shared[at.weight], self._bias(at)
        if mix is not None:
            if offset is not None or residual is not None:
                raise ValueError("linear: expected no offset or residual beside mix")
            assert bias is not None
            return self._composed(name, inputs, weight, bias, mix, norm=norm, relu=relu)
        n_experts, lead = at.experts, weight.shape[0]
        if n_experts is not None:
            weight, inputs = _fold(weight, 4), _fold_inputs(inputs, n_experts)
            bias = None if bias is None else _fold(bias, 3)
        if bias is None:
            bias = weight.new_zeros(len(weight), inputs.shape[1], weight.shape[-1])
        if offset is not None:
            bias = (bias[:, None] if bias.ndim == 2 else bias) + offset
        if self._record is not None and self._record.factored:
            bias = self._written(name, inputs, bias)
        outputs = layer(inputs, weight, bias, norm=norm, relu=relu, residual=residual)
        return outputs if n_experts is None else outputs.unflatten(0, (lead, n_experts))

    def _bias(self, at: Layer) -> Tensor | None:
        if at.bias is None:
            return None
        return self._own[at.bias] if at.bias in self._own else self._shared[at.bias]

    def _written(self, name: str, inputs: Tensor, bias: Tensor) -> Tensor:
        """Record the layer; return the bias as `[N, T, B, out]`, whose gradient is X W + b's."""
        assert self._record is not None
        if not bias.requires_grad:
            bias = bias.detach().requires_grad_()
        place = bias[:, :, None].expand(-1, inputs.shape[1], inputs.shape[2], -1)
        self._record.inputs[name], self._record.outputs[name] = inputs.detach(), place
        return place

    def _composed(
        self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, **how: Any
    ) -> Tensor:
        """Compute the layer with parameters Σ_k w_tk φ_k, one product per network and task."""
        n_networks, n_tasks, n_experts = mix.shape
        if self._record is None and inputs.shape[2] == 1:
            # One row per task, as in acting: mixing K outputs is cheaper than mixing K matrices.
            zeros = weight.new_zeros(n_networks * n_experts, weight.shape[-1])
            rows = layer(_fold_inputs(inputs, n_experts), weight.flatten(0, 1), zeros)
            outputs = torch.einsum("nktbo,ntk->ntbo", rows.unflatten(0, (-1, n_experts)), mix)
            outputs = outputs + (mix @ bias)[:, :, None]
            if how["norm"]:
                outputs = layer_norm(outputs, outputs.shape[-1:], eps=EPSILON)
            return outputs.relu() if how["relu"] else outputs
        weights = (mix @ weight.flatten(2)).unflatten(2, weight.shape[2:])
        biases = mix @ bias
        if self._record is not None:
            self._record.composed[name] = weights, biases
            self._record.mixes[name] = mix.detach()
        inputs = inputs.expand(n_networks, -1, -1, -1)
        rows = inputs.reshape(n_networks * n_tasks, 1, *inputs.shape[2:])
        outputs = layer(rows, weights.flatten(0, 1), biases.flatten(0, 1), **how)
        return outputs.view(n_networks, n_tasks, *outputs.shape[2:])


def _fold(value: Tensor, ndim: int) -> Tensor:
    """Fold experts into networks: `[N, K, …]` of `ndim` axes, or `[N, T, K, …]`, to `[N K, …]`."""
    return (value if value.ndim == ndim else value.transpose(1, 2)).flatten(0, 1)


def _fold_inputs(inputs: Tensor, n_experts: int) -> Tensor:
    if inputs.ndim == 5:
        return inputs.flatten(0, 1)
    if len(inputs) == 1:  # shared by all networks, hence by all experts
        return inputs
    return inputs[:, None].expand(-1, n_experts, -1, -1, -1).flatten(0, 1)
