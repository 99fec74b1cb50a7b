"""MOORE: a mixture of orthogonal experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from mtrl.nets.build import Build
from mtrl.nets.params import Params
from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.registry import register_trunk

SHORTEST = 1e-4
"""Vectors shorter than this are not scaled to length 1, so gradients grow by at most 1 / this."""


@register_trunk("moore")
@dataclass(frozen=True)
class MOORE(Trunk):
    """Mixture of orthogonal experts (Hendawy et al. 2024, arXiv 2311.11385, section 4).

    K networks on the observation give K vectors per sample, which Gram–Schmidt makes orthonormal.
    Each task has weights for them, without a softmax, and tanh follows, as in the authors' code for
    Meta-World:

        v_k = expert_k(s),    û = GramSchmidt(v_1 … v_K),    z = tanh(Σ_k w_tk û_k).

    Deviations: Gram–Schmidt is used in its modified form, with a minimum length, and in float32
    whatever the precision of products (in bf16, nearly parallel experts end up far from
    orthogonal); w_t is initialised from a normal distribution. With an embedding or a description,
    w_t is a linear layer on it.

    Args:
        experts: Number K of experts; default: the paper's 4, and 6 for more than 10 tasks.
    """

    experts: int | None = None

    @override
    def for_tasks(self, n_tasks: int) -> MOORE:
        return self if self.experts else replace(self, experts=4 if n_tasks <= 10 else 6)

    @override
    def build(self, make: Build, n_inputs: int) -> None:
        assert self.experts is not None
        self.declare_vector(make, "mix", self.experts)
        make.layers_in_a_row("expert", n_inputs, *self.widths, experts=self.experts)

    @override
    def __call__(self, p: Params, inputs: Tensor) -> Tensor:
        z, last = inputs, len(self.widths) - 1
        for number in range(last):
            z = p.linear(f"expert{number}", z, norm=self.layer_norm, relu=True)
        vectors = p.linear(f"expert{last}", z)  # [N, K, T, B, d]
        weights = self.vector(p, "mix")[..., None, None].unbind(2)  # K times [N, T, 1, 1]
        basis = gram_schmidt(vectors)
        mixed = weights[0] * basis[0]
        for weight, vector in zip(weights[1:], basis[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, vector)
        return mixed.tanh()


def gram_schmidt(vectors: Tensor) -> list[Tensor]:
    """Return orthonormal vectors with the same span, for each sample.

    Args:
        vectors: `[N, K, …, d]`.

    Returns:
        K tensors `[N, …, d]`, in at least float32.
    """
    basis: list[Tensor] = []
    for vector in vectors.to(torch.promote_types(vectors.dtype, torch.float32)).unbind(1):
        for unit in basis:
            vector = vector - (vector * unit).sum(-1, keepdim=True) * unit
        basis.append(normalize(vector, dim=-1, eps=SHORTEST))
    return basis
