"""Residual trunk: a layer followed by residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from mtrl.errors import UsageError
from mtrl.nets.params import Params
from mtrl.nets.trunks.mlp import MLP
from mtrl.nets.trunks.registry import register_trunk


@register_trunk("residual")
@dataclass(frozen=True)
class Residual(MLP):
    """A layer, then blocks z + W₂ relu(W₁ z): BroNet (Nauman et al. 2024, arXiv 2405.16158).

    With LayerNorm, each W z is normalised. There is one width for the first layer and one for each
    block, and all must be equal. Everything else is as in `MLP`.

    Raises:
        UsageError: If widths differ.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.widths)) > 1:
            raise UsageError(
                f"trunk: expected equal widths for a residual trunk, got {self.widths}"
            )

    def layer_widths(self) -> Sequence[int]:
        """Return the widths of all layers, two per block."""
        return [self.widths[0], *(width for width in self.widths[1:] for _ in range(2))]

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        norm = self.layer_norm
        z = self.first(p, inputs, norm=norm, relu=True)
        for number in range(1, 2 * len(self.widths) - 1, 2):
            inner = p.linear(str(number), z, norm=norm, relu=True)
            z = p.linear(str(number + 1), inner, norm=norm, residual=z)
        return z
