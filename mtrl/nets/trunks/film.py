"""FiLM: layers whose units are scaled and shifted by the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.nets.build import Build
from mtrl.nets.params import Params
from mtrl.nets.trunks.base import EMBEDDING, Trunk
from mtrl.nets.trunks.registry import register_trunk

MODULATION_BOUND = 1e-2
"""Initial weights of the last layer of γ and β are uniform in ± this, so that layers start almost
unmodulated."""


@register_trunk("film")
@dataclass(frozen=True)
class FiLM(Trunk):
    """Feature-wise linear modulation (Perez et al. 2018, arXiv 1709.07871, eqs. 1–2).

    With e_t a learned embedding of task t or, as in the paper, that of a text,

        [γ, β] = W₂ relu(W₁ e_t + b₁) + b₂,        z_l = relu((1 + γ_l) ∘ (W z_{l−1} + b) + β_l):

    a factor and a shift for every unit of every layer, before its ReLU.

    Deviations: a single network computes γ and β for all layers. Fully connected layers replace
    convolutions, and LayerNorm (if enabled) replaces batch normalisation. Public RL code with one
    scalar per layer implements a different, weaker method.

    The layer on e_t has the width of a learned e_t, by default 50 as in CARE's experiments with
    FiLM.
    """

    usual: ClassVar[str | None] = "embedding"

    @override
    def build(self, make: Build, n_inputs: int) -> None:
        size = self.embedding or EMBEDDING
        self.tell(make)
        make.linear("film0", self.n_told(make), size)
        make.linear("film1", size, 2 * sum(self.widths), bound=MODULATION_BOUND)
        make.layers_in_a_row("layer", n_inputs, *self.widths)

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        hidden = p.linear("film0", self.task(p), relu=True)  # [N, T, 1, e]
        factors, shifts = p.linear("film1", hidden).chunk(2, -1)
        widths = list(self.widths)
        z = inputs
        for number, (factor, shift) in enumerate(
            zip(factors.split(widths, -1), shifts.split(widths, -1), strict=True)
        ):
            z = p.linear(f"layer{number}", z, norm=self.layer_norm)
            z = torch.addcmul(shift, 1 + factor, z).relu()
        return z
