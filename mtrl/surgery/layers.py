"""Factored gradients of layers whose input all tasks share.

The weight gradient of a linear layer for task t is D_tᵀ X, where X `[B, in]` is the layer's input
and D_t `[B, out]` the gradient w.r.t. its output. T passes that stop at the layers' outputs give
all D_t. Then (as in Goodfellow 2015, arXiv 1510.01799, for norms of single samples)

    ⟨g_s, g_t⟩ = Σ (X Xᵀ) ∘ (D_s D_tᵀ) = ⟨D_s, X Xᵀ D_t⟩,        Σ_t w_t g_t = (Σ_t w_t D_t)ᵀ X,

so the only weight gradient that is formed is the one for the optimiser. If the T gradients cost
less than these products, they are left to autograd.

Layers are found in the autograd graph, not among modules: unless the graph shows that a layer of a
known kind is the only use of its weight, the weight is left to autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.functional import unfold
from typing_extensions import override

from mtrl.nets.precision import full_float32
from mtrl.surgery.engine import Uses
from mtrl.surgery.gradients import at_least_float32, combine, gramian

BLOCKS = 4
"""Number of row blocks of X Xᵀ; products skip the blocks below the diagonal, which are 3/8."""

WORTH = 2**23
"""Number of multiplications that a factored layer must save to make up for its overhead."""


class Layer(ABC):
    """A layer that is the only use of its parameters.

    Args:
        node: Node of the layer in the graph, with the layer's output as its only output.
        weight: Weight of the layer.

    Attributes:
        parameters: The weight, and the bias if there is one.
    """

    def __init__(self, node: Any, weight: Tensor) -> None:
        self.parameters: tuple[Tensor, ...] = (weight,)
        self.output = GradientEdge(node, 0)

    @abstractmethod
    def see(self, at_outputs: Tensor) -> None:
        """Record the gradients of all T tasks w.r.t. the output, `[T, …]`."""

    @abstractmethod
    def gramian(self) -> Tensor:
        """Compute ⟨g_s, g_t⟩, `[T, T]`, in float32 or wider."""

    @abstractmethod
    def combined(self, weights: Tensor) -> list[Tensor]:
        """Compute Σ_t w_t g_t for each parameter; weights are `[T]`."""


class Embedding(Layer):
    """An embedding table: only gradients of the rows that the batch uses are formed.

    Args:
        indices: Indices of the rows that were looked up.
        padding: Index of the row that is not trained.
    """

    def __init__(self, node: Any, table: Tensor, indices: Tensor, padding: int) -> None:
        super().__init__(node, table)
        self.used, self.places = indices.flatten().unique(return_inverse=True)
        self.learned = (self.used != padding).to(table.dtype)[:, None]

    @override
    def see(self, at_outputs: Tensor) -> None:
        rows = at_outputs.reshape(len(at_outputs), -1, at_outputs.shape[-1])
        found = rows.new_zeros(len(rows), len(self.used), rows.shape[-1])
        self.gradients = found.index_add_(1, self.places, rows).mul_(self.learned)

    @override
    def gramian(self) -> Tensor:
        return gramian({"": self.gradients[None]})[0]

    @override
    def combined(self, weights: Tensor) -> list[Tensor]:
        (table,) = self.parameters
        found = weighted_sum(weights, self.gradients)
        return [torch.zeros_like(table).index_copy_(0, self.used, found)]


class Factored(Layer):
    """A linear layer, or a convolution as one, whose weight is large compared with its batch.

    Args:
        inputs: X, `[B, in]`.
        turned: Whether the weight is `[out, in]`, as in `torch.nn.Linear`, instead of `[in, out]`.
    """

    def __init__(self, node: Any, weight: Tensor, inputs: Tensor, turned: bool) -> None:
        super().__init__(node, weight)
        self.inputs, self.turned = inputs, turned

    @override
    def see(self, at_outputs: Tensor) -> None:
        if at_outputs.ndim > 3:  # [T, B, channels, height, width]
            at_outputs = at_outputs.flatten(3).transpose(2, 3)
        self.at_outputs = at_outputs.reshape(len(at_outputs), len(self.inputs), -1)

    @override
    def gramian(self) -> Tensor:
        """Sum over half of the symmetric X Xᵀ, and add the transpose."""
        x, d = at_least_float32(self.inputs), at_least_float32(self.at_outputs)
        n_tasks, n_rows, _ = d.shape
        with full_float32(x.device):
            products = x @ x.mT
            if len(self.parameters) > 1:
                products += 1  # the bias is the weight of a constant input 1
            products.triu_().diagonal().div_(2)
            half = torch.zeros(n_tasks, n_tasks, dtype=torch.float64, device=x.device)
            step = -(-n_rows // BLOCKS)
            for i in range(0, n_rows, step):
                here = products[i : i + step, i:].expand(n_tasks, -1, -1)
                others = torch.bmm(here, d[:, i:])  # `@` would copy d
                half += d[:, i : i + step].flatten(1) @ others.flatten(1).mT
        return (half + half.mT).to(d.dtype)

    @override
    def combined(self, weights: Tensor) -> list[Tensor]:
        weight, *bias = self.parameters
        x, d = at_least_float32(self.inputs), at_least_float32(self.at_outputs)
        with full_float32(x.device):
            d = weighted_sum(weights, d)
            found = d.mT @ x if self.turned else x.mT @ d
        return [found.to(weight.dtype).view_as(weight), *[d.sum(0).to(b.dtype) for b in bias]]


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Compute Σ_t w_t g_t of gradients `[T, …]`, in their dtype."""
    with full_float32(rows.device):
        if rows.dtype == at_least_float32(rows[:0]).dtype:
            return (weights[None].to(rows.dtype) @ rows.flatten(1)).view(rows.shape[1:])
        return combine(weights[None].float(), {"": rows[None]})[""][0].to(rows.dtype)


def stacked(gradients: Tensor | Sequence[Tensor | None]) -> Tensor | None:
    """Stack the gradients of T tasks, `[T, …]`; missing ones are 0. None if all are missing."""
    if isinstance(gradients, Tensor):
        return gradients
    like = next((g for g in gradients if g is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if g is None else g for g in gradients])


def layers_of(uses: Uses, shared: Iterable[Tensor], n_tasks: int) -> list[Layer]:
    """Find the layers of known kinds in a graph that are the only use of a shared weight.

    Args:
        uses: The graph, see `Crossing.uses`.
        shared: Parameters to consider.
        n_tasks: Number T of tasks.
    """
    here = {id(parameter) for parameter in shared}
    found = []
    for node, places in uses.items():
        if _name(node) != "AccumulateGrad" or len(places) != 1:
            continue
        weight = node.variable
        if id(weight) not in here or not weight.is_floating_point():
            continue
        turned = _name(places[0][0]) == "TBackward0"
        if turned:
            places = uses[places[0][0]]
        if len(places) == 1:
            layer = _layer(*places[0], weight, turned, n_tasks)
            if layer is not None and isinstance(layer, Factored):
                layer.parameters += _bias(layer.output.node, uses, here)
            found += [] if layer is None else [layer]
    return found


def _name(node: Any) -> str:
    return type(node).__name__


def _bias(node: Any, uses: Uses, here: set[int]) -> tuple[Tensor, ...]:
    """Return the bias of a linear layer, if the graph shows no other use of it."""
    if _name(node) != "AddmmBackward0" or node._saved_beta != 1:
        return ()
    parent = node.next_functions[0][0]
    if parent is None or _name(parent) != "AccumulateGrad" or len(uses[parent]) != 1:
        return ()
    bias = parent.variable
    return (bias,) if id(bias) in here and bias.ndim == 1 else ()


def _layer(node: Any, place: int, weight: Tensor, turned: bool, n_tasks: int) -> Layer | None:
    kind = _name(node), place
    if kind == ("AddmmBackward0", 2) and node._saved_alpha == 1:
        return _linear(node, weight, node._saved_mat1.detach(), turned, n_tasks)
    if kind == ("MmBackward0", 1):
        return _linear(node, weight, node._saved_self.detach(), turned, n_tasks)
    if kind == ("ConvolutionBackward0", 1) and not turned:
        return _convolution(node, weight, n_tasks)
    if kind == ("EmbeddingBackward0", 0) and not turned:
        indices = node._saved_indices
        if (
            node._saved_sparse
            or node._saved_scale_grad_by_freq
            or len(weight) <= 2 * indices.numel()
        ):
            return None
        padding = min(node._saved_padding_idx, len(weight))  # 2⁶⁴ − 1 means none
        return Embedding(node, weight, indices, padding)
    return None


def _linear(node: Any, weight: Tensor, inputs: Tensor, turned: bool, n_tasks: int) -> Layer | None:
    if not _factors_are_cheaper(len(inputs), inputs.shape[1], weight.numel(), n_tasks):
        return None
    return Factored(node, weight, inputs, turned)


def _convolution(node: Any, weight: Tensor, n_tasks: int) -> Layer | None:
    """Treat a convolution as a linear layer on patches."""
    if weight.ndim != 4 or node._saved_transposed or node._saved_groups != 1:
        return None
    inputs = at_least_float32(node._saved_input.detach())  # `unfold` lacks half types on a CPU
    kernel, stride = weight.shape[2:], node._saved_stride
    padding, dilation = (2 * node._saved_padding)[:2], node._saved_dilation  # "valid" has one
    sizes = zip(inputs.shape[2:], kernel, stride, padding, dilation, strict=True)
    n_rows = len(inputs)
    for size, width, step, pad, spread in sizes:
        n_rows *= (size + 2 * pad - spread * (width - 1) - 1) // step + 1
    if not _factors_are_cheaper(n_rows, weight[0].numel(), weight.numel(), n_tasks):
        return None
    patches = unfold(inputs, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    return Factored(node, weight, patches, True)


def _factors_are_cheaper(n_rows: int, n_inputs: int, n_weights: int, n_tasks: int) -> bool:
    """Return whether X Xᵀ, its products and one weight gradient cost less than T gradients."""
    products = n_rows * (n_inputs + n_tasks * n_weights / n_inputs * (BLOCKS + 1) / (2 * BLOCKS))
    return n_rows * ((n_tasks - 1) * n_weights - products) > WORTH
