"""CARE: attention over encoders, by a description of the task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.nets.build import Build
from mtrl.nets.params import Params
from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.registry import register_trunk


@register_trunk("care")
@dataclass(frozen=True)
class CARE(Trunk):
    """Contextual attention-based representation (Sodhani et al. 2021, arXiv 2102.06177, section 4).

    The context c_t is computed from e_t, a fixed sentence embedding of the task's description. k
    encoders take the observation, and each sample attends to encoders whose output is similar to
    the context:

        c_t = C(e_t),    a = softmax_j ⟨E_j(s), stop(c_t)⟩,    z = torso([c_t, Σ_j a_j E_j(s)]).

    As in the paper, no gradient flows from the attention into the context: C is trained through
    the torso.

    Deviations: the descriptions are our own, and all-MiniLM-L6-v2 replaces RoBERTa.

    Args:
        widths: Widths of the torso.
        encoders: Number k of encoders; default: the paper's 6, and 10 for more than 10 tasks.
        size: Width of the two layers of C, and of those of each encoder.
        embedding: Length of an e_t that is learned and replaces the description, as in the paper's
            ablation.
    """

    encoders: int | None = None
    size: int = 50

    usual: ClassVar[str | None] = "description"

    @override
    def for_tasks(self, n_tasks: int) -> CARE:
        return self if self.encoders else replace(self, encoders=6 if n_tasks <= 10 else 10)

    @override
    def build(self, make: Build, n_inputs: int) -> None:
        size = self.size
        self.tell(make)
        make.layers_in_a_row("context", self.n_told(make), size, size)
        make.layers_in_a_row("encoder", n_inputs, size, size, experts=self.encoders)
        make.layers_in_a_row("torso", 2 * size, *self.widths)

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        norm = self.layer_norm
        context = p.linear("context0", self.task(p), norm=norm, relu=True)
        context = p.linear("context1", context)  # [N, T, 1, size]
        encoded = p.linear("encoder0", inputs, norm=norm, relu=True)
        encoded = p.linear("encoder1", encoded)  # [N, k, T, B, size]
        likeness = (encoded * context.detach()[:, None]).sum(-1, keepdim=True)
        attended = (encoded * likeness.softmax(1)).sum(1)
        z = torch.cat([context.expand_as(attended), attended], -1)
        for number in range(len(self.widths)):
            z = p.linear(f"torso{number}", z, norm=norm, relu=True)
        return z
