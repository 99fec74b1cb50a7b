"""MLP: fully connected layers with ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from mtrl.nets.build import Build
from mtrl.nets.params import Params
from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.registry import register_trunk


@register_trunk("mlp")
@dataclass(frozen=True)
class MLP(Trunk):
    """Layers with ReLU; with a head per task, this is the multi-head network of Yu et al. 2020.

    The task enters as the bias of the first layer. This equals a layer on [inputs, one-hot] without
    the multiplications by zero: row t of the bias is column t of the one-hot's weights plus the
    layer's bias. With a learned embedding, it equals a layer on [inputs, embedding / norm]; with a
    description, a layer on [inputs, description].

    Weights are He-uniform with zero bias; the task vector counts among the inputs of the first
    layer.

    Deviation from LayerNorm (Ba et al. 2016): no factor or shift is learned, because the bias
    before it and the weights after it can take their roles.
    """

    @override
    def build(self, make: Build, n_inputs: int) -> None:
        n_told, first = self.n_told(make), self.layer_widths()[0]
        bound = math.sqrt(6 / (n_inputs + n_told))
        if self.told == "one-hot":
            make.linear("0", n_inputs, first, bias="task", bound=bound)
        else:
            make.linear("0", n_inputs, first, bound=bound)
            make.linear("task", n_told, first, bias=None, bound=bound)
            self.tell(make, unit=True)
        for number, (a, b) in enumerate(pairwise(self.layer_widths()), start=1):
            make.linear(str(number), a, b)

    def layer_widths(self) -> Sequence[int]:
        """Return the widths of all layers in order."""
        return self.widths

    def first(self, p: Params, inputs: Tensor, **how: Any) -> Tensor:
        """Apply the first layer, which takes inputs and task."""
        if self.told == "one-hot":
            return p.linear("0", inputs, **how)
        told = self.task(p)  # [N, T, 1, e]
        if self.told == "embedding":
            told = normalize(told, dim=-1)
        return p.linear("0", inputs, offset=p.linear("task", told).squeeze(2), **how)

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        z = self.first(p, inputs, norm=self.layer_norm, relu=True)
        for number in range(1, len(self.widths)):
            z = p.linear(str(number), z, norm=self.layer_norm, relu=True)
        return z
