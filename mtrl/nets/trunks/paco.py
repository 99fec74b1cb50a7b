"""PaCo: parameters of a task composed of shared parameter sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

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

    Deviations: heads are not composed; there is one per task, or a single one with `heads: single`.
    w_t uses the optimiser and learning rate of all parameters. It is initialised as a random unit
    vector, so that composed weights start with the scale of a plain layer. Tasks with extreme
    losses are not masked and their w_t is not re-initialised; this is left to surgery.

    Args:
        sets: Number K of sets; default: the paper's 5, and 20 for more than 10 tasks.
    """

    sets: int | None = None

    def for_tasks(self, n_tasks: int) -> PaCo:
        """See `Trunk`."""
        return self if self.sets else replace(self, sets=5 if n_tasks <= 10 else 20)

    def build(self, make: Build, n_inputs: int) -> None:
        """See `Trunk`."""
        assert self.sets is not None
        make.table("mix", self.sets, unit=True)
        widths = n_inputs, *self.widths
        make.layers_in_a_row("layer", *widths, experts=self.sets, composed=True)

    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        """See `Trunk`."""
        z, mix = inputs, p["mix"]
        for number in range(len(self.widths)):
            z = p.linear(f"layer{number}", z, mix=mix, norm=self.layer_norm, relu=True)
        return z
