"""Weights whose T gradients are not left to autograd, since all tasks share the layer's input.

A linear layer's weight gradient of task t is D_tᵀ X: X `[B, in]` is the layer's input, D_t
`[B, out]` the gradient at its output. T passes that stop at the layers' outputs give all D_t. Then
(as Goodfellow 2015, arXiv 1510.01799, has it for norms of single samples)

    ⟨g_s, g_t⟩ = Σ (X Xᵀ) ∘ (D_s D_tᵀ) = ⟨D_s, X Xᵀ D_t⟩,        Σ_t w_t g_t = (Σ_t w_t D_t)ᵀ X,

so no weight gradient is formed but the one that the optimiser gets. Where the T gradients are
smaller than these products, they are formed, beside each other in one matrix.

Layers are found in the autograd graph, not among modules: what a graph does not show to be the only
use of a weight, by a layer of a known kind, is left to autograd.
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
from mtrl.surgery.gradients import at_least_float32, combine, gramian
from mtrl.surgery.graph import Uses


class Layer(ABC):
    """A layer that is the only use of its parameters.

    Args:
        node: The layer's node of the graph, whose only output is the layer's.
        parameters: A weight, and perhaps a bias.
    """

    def __init__(self, node: Any, *parameters: Tensor) -> None:
        self.parameters = parameters
        self.output = GradientEdge(node, 0)
        self.seen = False

    def see(self, task: int, at_output: Tensor) -> None:
        """Take down the gradient at the output of one of the T tasks; it is 0 if none comes."""
        self._see(task, at_output)
        self.seen = True

    @abstractmethod
    def _see(self, task: int, at_output: Tensor) -> None:
        """As `see`."""

    @abstractmethod
    def gramian(self) -> Tensor:
        """⟨g_s, g_t⟩, `[T, T]`, in float32 or better."""

    @abstractmethod
    def combined(self, weights: Tensor) -> list[Tensor]:
        """Σ_t w_t g_t for each parameter; weights are `[T]`."""


class Embedding(Layer):
    """A table, of which a batch uses some rows: only their gradients are formed.

    Args:
        indices: Of the rows that were looked up.
        padding: The row that does not learn.
        n_tasks: T.
    """

    def __init__(
        self, node: Any, table: Tensor, indices: Tensor, padding: int, n_tasks: int
    ) -> None:
        super().__init__(node, table)
        self.used, self.places = indices.flatten().unique(return_inverse=True)
        self.learned = (self.used != padding).to(table.dtype)[:, None]
        self.gradients = table.new_zeros(n_tasks, len(self.used), table.shape[1])

    @override
    def _see(self, task: int, at_output: Tensor) -> None:
        found = self.gradients[task]
        found.index_add_(0, self.places, at_output.reshape(-1, found.shape[-1])).mul_(self.learned)

    @override
    def gramian(self) -> Tensor:
        return gramian({"": self.gradients[None]})[0]

    @override
    def combined(self, weights: Tensor) -> list[Tensor]:
        (table,) = self.parameters
        found = weighted_sum(weights, self.gradients)
        return [torch.zeros_like(table).index_copy_(0, self.used, found)]


class Factored(Layer):
    """A linear layer, or a convolution as one, whose weight is large beside its batch.

    Args:
        inputs: X, `[B, in]`.
        turned: Whether the weight is `[out, in]`, as `torch.nn.Linear` has it; or `[in, out]`.
        n_tasks: T.
    """

    def __init__(
        self, node: Any, parameters: Sequence[Tensor], inputs: Tensor, turned: bool, n_tasks: int
    ) -> None:
        super().__init__(node, *parameters)
        self.inputs, self.turned = inputs, turned
        n_outputs = parameters[0].numel() // inputs.shape[1]
        self.at_outputs = inputs.new_zeros(n_tasks, len(inputs), n_outputs)

    @override
    def _see(self, task: int, at_output: Tensor) -> None:
        if at_output.ndim > 2:  # [B, channels, height, width]
            at_output = at_output.flatten(2).transpose(1, 2)
        found = self.at_outputs[task]
        found.copy_(at_output.reshape(found.shape))

    @override
    def gramian(self) -> Tensor:
        x, d = at_least_float32(self.inputs), at_least_float32(self.at_outputs)
        with full_float32(x.device):
            products = x @ x.mT
            if len(self.parameters) > 1:
                products += 1  # the bias is the weight of an input that is always 1
            pairs = zip(_parts(d), _parts(products @ d), strict=True)
            found = torch.stack([(rows @ others.mT).double() for rows, others in pairs]).sum(0)
        return ((found + found.mT) / 2).to(d.dtype)

    @override
    def combined(self, weights: Tensor) -> list[Tensor]:
        weight, *bias = self.parameters
        x, d = (
            at_least_float32(self.inputs),
            weighted_sum(weights, at_least_float32(self.at_outputs)),
        )
        with full_float32(x.device):
            found = d.mT @ x if self.turned else x.mT @ d
        return [found.to(weight.dtype).view_as(weight), *[d.sum(0).to(b.dtype) for b in bias]]


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ_t w_t g_t of gradients `[T, …]`, in their dtype."""
    with full_float32(rows.device):
        if rows.dtype == at_least_float32(rows[:0]).dtype:
            return (weights.to(rows.dtype) @ rows.flatten(1)).view(rows.shape[1:])
        return combine(weights[None].float(), {"": rows[None]})[""][0].to(rows.dtype)


def _parts(rows: Tensor) -> Sequence[Tensor]:
    """`[T, …]` as matrices `[T, at most so many]`."""
    return rows.flatten(1).split(2**15 if rows.device.type == "cpu" else 2**22, 1)


def layers_of(uses: Uses, shared: Iterable[Tensor], n_tasks: int) -> list[Layer]:
    """The layers of known kinds in a graph, each the only use of a shared weight.

    Args:
        uses: The graph, see `Crossing.uses`.
        shared: The parameters that count.
        n_tasks: T.
    """
    here = {id(parameter) for parameter in shared}
    found = []
    for node, places in uses.items():
        if _name(node) != "AccumulateGrad" or id(node.variable) not in here or len(places) != 1:
            continue
        turned = _name(places[0][0]) == "TBackward0"
        if turned:
            places = uses[places[0][0]]
        if len(places) == 1:
            user, place = places[0]
            bias = _bias(user, uses, here)
            layer = _layer(user, place, [node.variable, *bias], turned, n_tasks)
            found += [] if layer is None else [layer]
    return found


def _name(node: Any) -> str:
    return type(node).__name__


def _bias(node: Any, uses: Uses, here: set[int]) -> list[Tensor]:
    """A linear layer's, if the graph shows no other use of it."""
    if _name(node) != "AddmmBackward0" or node._saved_beta != 1:
        return []
    parent = node.next_functions[0][0]
    if parent is None or _name(parent) != "AccumulateGrad" or len(uses[parent]) != 1:
        return []
    bias = parent.variable
    return [bias] if id(bias) in here and bias.ndim == 1 else []


def _layer(
    node: Any, place: int, parameters: list[Tensor], turned: bool, n_tasks: int
) -> Layer | None:
    kind, weight = (_name(node), place), parameters[0]
    if not weight.is_floating_point():
        return None
    if kind == ("AddmmBackward0", 2) and node._saved_alpha == 1:
        return _linear(node, parameters, node._saved_mat1.detach(), turned, n_tasks)
    if kind == ("MmBackward0", 1):
        return _linear(node, parameters, node._saved_self.detach(), turned, n_tasks)
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
        padding = min(node._saved_padding_idx, len(weight))  # none is given as 2⁶⁴ − 1
        return Embedding(node, weight, indices, padding, n_tasks)
    return None


def _linear(
    node: Any, parameters: list[Tensor], inputs: Tensor, turned: bool, n_tasks: int
) -> Layer | None:
    if not _factors_are_cheaper(len(inputs), inputs.shape[1], parameters[0].numel(), n_tasks):
        return None
    return Factored(node, parameters, inputs, turned, n_tasks)


def _convolution(node: Any, weight: Tensor, n_tasks: int) -> Layer | None:
    """As a linear layer on patches."""
    if weight.ndim != 4 or node._saved_transposed or node._saved_groups != 1:
        return None
    inputs = node._saved_input.detach()
    kernel, stride = weight.shape[2:], node._saved_stride
    padding, dilation = node._saved_padding, node._saved_dilation
    sizes = zip(inputs.shape[2:], kernel, stride, padding, dilation, strict=True)
    n_rows = len(inputs)
    for size, width, step, pad, spread in sizes:
        n_rows *= (size + 2 * pad - spread * (width - 1) - 1) // step + 1
    if not _factors_are_cheaper(n_rows, weight[0].numel(), weight.numel(), n_tasks):
        return None
    patches = unfold(inputs, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    return Factored(node, [weight], patches, True, n_tasks)


def _factors_are_cheaper(n_rows: int, n_inputs: int, n_weights: int, n_tasks: int) -> bool:
    """Whether X Xᵀ, its products with all D_t and one weight gradient cost less than T of these."""
    n_outputs = n_weights // n_inputs
    return n_rows * (n_inputs + n_tasks * n_outputs) < (n_tasks - 1) * n_weights
