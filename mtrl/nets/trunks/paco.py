"""PaCo: parameters of a task composed of shared parameter sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.errors import UsageError
from mtrl.nets.build import Build
from mtrl.nets.params import Params
from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.registry import register_trunk


@register_trunk("paco")
@dataclass(frozen=True)
class PaCo(Trunk):
    """Parameter-compositional multi-task RL (Sun et al. 2022, arXiv 2210.11653, section 3).

    Tasks share K sets of parameters, and each task has K weights of its own: the weights and biases
    of every layer are θ_t = Σ_k w_tk φ_k. The task does not enter the inputs. The gradient of task
    t w.r.t. set k is w_tk ∂L_t/∂θ_t, so surgery needs only ∂L_t/∂θ_t and w_t:

        ⟨g_s, g_t⟩ = ⟨w_s, w_t⟩ ⟨∂L_s/∂θ_s, ∂L_t/∂θ_t⟩.

    Deviations: heads are not composed: each task has its own or, with `heads: single`, all share
    one. w_t has the optimiser and learning rate of all parameters. It starts as a random unit
    vector, so that composed weights have the initial scale of a plain layer. With an embedding or a
    description, w_t is a linear layer on it.

    With `loss_limit`, a task whose loss in a network exceeds the limit does not contribute to this
    update of the network, and its w_t becomes a random convex combination of those of the other
    tasks (section 3.3, with a limit of 3e3). Deviations: critics and actor use their own losses;
    coefficients are uniform on the simplex of the tasks within the limit; the optimiser's moments
    of w_t are kept. A w_t that is the output of a layer is not redrawn.

    Args:
        sets: Number K of parameter sets; default: the paper's 5, and 20 for more than 10 tasks.
        loss_limit: Maximum loss of a task that contributes; default: no limit.
    """

    sets: int | None = None
    loss_limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.loss_limit
        if limit is not None and not (type(limit) in (int, float) and 0 < limit < math.inf):
            raise UsageError(f"trunk: expected loss_limit above 0, got {limit!r}")

    @override
    def for_tasks(self, n_tasks: int) -> PaCo:
        return self if self.sets else replace(self, sets=5 if n_tasks <= 10 else 20)

    @override
    def build(self, make: Build, n_inputs: int) -> None:
        assert self.sets is not None
        self.declare_vector(make, "mix", self.sets, unit=True)
        widths = n_inputs, *self.widths
        make.layers_in_a_row("layer", *widths, experts=self.sets, composed=True)

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        z, mix = inputs, self.vector(p, "mix")
        for number in range(len(self.widths)):
            z = p.linear(f"layer{number}", z, mix=mix, norm=self.layer_norm, relu=True)
        return z

    @override
    def loss_factors(self, losses: Tensor, alpha: Tensor) -> Tensor | None:
        return None if self.loss_limit is None else (losses <= self.loss_limit).to(losses.dtype)

    @override
    def after_step(
        self, own: Mapping[str, Tensor], losses: Tensor, generator: torch.Generator
    ) -> None:
        if self.loss_limit is None or "mix" not in own:
            return
        within, mix = losses <= self.loss_limit, own["mix"]
        n_networks, n_tasks = losses.shape
        drawn = mix.new_empty(n_networks, n_tasks, n_tasks).exponential_(generator=generator)
        shares = drawn * within[:, None]
        shares = shares / shares.sum(-1, keepdim=True)
        mixed = (shares[..., None] * mix[:, None]).sum(2)
        anew = ~within & within.any(-1, keepdim=True)
        mix.copy_(torch.where(anew[..., None], mixed, mix))
