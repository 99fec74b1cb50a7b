"""What a trunk computes with: parameters of N networks and T tasks, by name."""

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
"""By name: shared ones `[N, …]`, per-task ones `[N, T, …]`."""


@dataclass
class Record:
    """What a forward pass writes down so that gradients by matrices need not be formed.

    All entries are by the layer's name. Of a layer with K experts, N stands for N K.

    Attributes:
        factored: Whether layers are written down, or only composed ones.
        inputs: X, `[N or 1, T, B, in]`.
        outputs: X W + b's place in the graph, `[N, T, B, out]`; the gradient by it is D.
        composed: A composed layer's matrix and bias for each task, `[N, T, …]`.
        mixes: w, `[N, T, K]`.
    """

    factored: bool
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    composed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mixes: dict[str, Tensor] = field(default_factory=dict)


class Params:
    """What a trunk computes with.

    Args:
        layers: As declared.
        shared: `[N, …]`, or views of these for each task, `[N, T, …]`.
        own: `[N, T, …]`.
        record: Given one, written into.
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
        """A table, or what is fixed, `[N, T, …]`."""
        return self._own[name]

    def shared(self, name: str, ndim: int) -> Tensor:
        """A shared parameter of so many axes, `[N, T or 1, …]`."""
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
        """X W + b, normalised, rectified or added to a residual; see `mtrl.nets.fused.layer`.

        Args:
            name: The layer's.
            inputs: `[N or 1, T, B, in]`; of K experts also `[N, K, T, B, in]`, each its own.
            mix: w `[N, T, K]` of a composed layer.
            offset: Added to the bias, `[N, T, out]`.
            norm: Whether each row is normalised.
            relu: Whether ReLU follows.
            residual: Added in the end, of the output's shape.

        Returns:
            `[N, T, B, out]`; of K experts `[N, K, T, B, out]`.
        """
        at = self._layers[name]
        weight, bias = self._shared[at.weight], self._bias(at)
        if mix is not None:
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
        """The bias as `[N, T, B, out]`, for `layer` to give the gradient by X W + b."""
        assert self._record is not None
        if not bias.requires_grad:
            bias = bias.detach().requires_grad_()
        place = bias[:, :, None].expand(-1, inputs.shape[1], inputs.shape[2], -1)
        self._record.inputs[name], self._record.outputs[name] = inputs.detach(), place
        return place

    def _composed(
        self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, **how: Any
    ) -> Tensor:
        """The layer with Σ_k w_tk φ_k as its parameters, a product for each network and task."""
        n_networks, n_tasks, n_experts = mix.shape
        if self._record is None and inputs.shape[2] == 1:
            # A row each, as in acting: it is less to mix K outputs than K matrices.
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
    """`[N, K, …]` of so many axes to `[N K, …]`, `[N, T, K, …]` to `[N K, T, …]`: views."""
    return (value if value.ndim == ndim else value.transpose(1, 2)).flatten(0, 1)


def _fold_inputs(inputs: Tensor, n_experts: int) -> Tensor:
    if inputs.ndim == 5:
        return inputs.flatten(0, 1)
    if len(inputs) == 1:  # for all networks, so for all experts
        return inputs
    return inputs[:, None].expand(-1, n_experts, -1, -1, -1).flatten(0, 1)
