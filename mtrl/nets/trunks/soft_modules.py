"""Soft modularization: layers of modules with a route through them for each sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from mtrl.nets.build import Build
from mtrl.nets.params import Params
from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.registry import register_trunk

ROUTE_BOUND = 1e-3
"""Initial weights of routing layers are uniform in ± this, so that all routes start alike."""


@register_trunk("soft-modules")
@dataclass(frozen=True)
class SoftModules(Trunk):
    """Soft modularization (Yang et al. 2020, arXiv 2003.13661, section 4).

    f is the output of layers on the observation (the last one linear), z_t a vector of the task,
    and e = V₂ relu(V₁ relu(z_t ∘ f)) the input of the routing network. There are L layers of n
    modules; the first takes relu(f). Routes are probabilities over the *sources* j of each target
    i:

        p¹ = softmax_j W¹ relu(e),        p^{l+1} = softmax_j W^{l+1} relu(e ∘ U^{l+1} [p¹ … p^l]).

    Module i of layer l + 1 takes relu(Σ_j p^l_ij m_j), and z = relu(Σ_j p^L_j m_j).

    With an embedding or a description, z_t is a linear layer on it. With `loss_weights`, the
    gradient of task t is multiplied by T softmax_t(−log α_t), as in both public implementations:
    tasks whose policy has nearly converged have a small temperature and count more.

    Deviations: z_t is a table with normal initial values, not a layer on the one-hot; each task has
    its own head, where the paper has one for all (`heads: single`). LayerNorm, if enabled, is
    applied before the ReLU of the layers on the observation.

    Args:
        widths: Widths of the layers on the observation, and of a last layer that the modules
            replace.
        layers: Number L of layers of modules; default: the paper's 2, and 4 for more than 10
            tasks.
        modules: Number n of modules per layer; default: likewise 2 and 4.
        width: Width of a module's output; default: likewise 256 and 128.
        size: Length of e.
        loss_weights: Whether temperatures weight the task gradients, before surgery.
    """

    layers: int | None = None
    modules: int | None = None
    width: int | None = None
    size: int = 256
    loss_weights: bool = False

    @override
    def for_tasks(self, n_tasks: int) -> SoftModules:
        layers, modules, width = (2, 2, 256) if n_tasks <= 10 else (4, 4, 128)
        return replace(
            self,
            layers=self.layers or layers,
            modules=self.modules or modules,
            width=self.width or width,
        )

    @override
    @property
    def n_features(self) -> int:
        assert self.width is not None
        return self.width

    @override
    def build(self, make: Build, n_inputs: int) -> None:
        assert self.layers
        assert self.modules
        assert self.width
        n, n_known, observed = self.modules, self.size, self._observed[-1]
        self.declare_vector(make, "task", observed)
        make.layers_in_a_row("observe", n_inputs, *self._observed)
        make.layers_in_a_row("join", observed, n_known, n_known)
        for number in range(self.layers):
            n_targets = 1 if number == self.layers - 1 else n
            make.linear(f"route{number}", n_known, n * n_targets, bound=ROUTE_BOUND)
            if number:
                make.linear(f"before{number}", number * n * n, n_known)
            make.linear(
                f"module{number}", self.width if number else observed, self.width, experts=n
            )

    @property
    def _observed(self) -> tuple[int, ...]:
        return self.widths[:-1] or self.widths

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        assert self.layers
        assert self.modules
        f, last = inputs, len(self._observed) - 1
        for number in range(last):
            f = p.linear(f"observe{number}", f, norm=self.layer_norm, relu=True)
        f = p.linear(f"observe{last}", f, norm=self.layer_norm)
        known = p.linear("join0", (self.vector(p, "task")[:, :, None] * f).relu(), relu=True)
        known = p.linear("join1", known)
        z = f.relu()
        routes: list[Tensor] = []
        for number in range(self.layers):
            about = known * p.linear(f"before{number}", torch.cat(routes, -1)) if routes else known
            logits = p.linear(f"route{number}", about.relu())
            shares = logits.unflatten(-1, (-1, self.modules)).softmax(-1)  # [N, T, B, i, j]
            outputs = p.linear(f"module{number}", z)  # [N, j, T, B, width]
            z = torch.einsum("njtbd,ntbij->nitbd", outputs, shares).relu()
            routes.append(shares.flatten(-2))
        return z.squeeze(1)

    @override
    def loss_factors(self, losses: Tensor, alpha: Tensor) -> Tensor | None:
        return len(alpha) * (-alpha.log()).softmax(0) if self.loss_weights else None
