"""Summation of the dot products of tasks."""

from itertools import permutations

import pytest
import torch

from mtrl.surgery.factored import FactoredGradients, OfLayer
from mtrl.surgery.gradients import Jacobian, along, combine, gramian, split_gramian


@pytest.mark.parametrize("sign", [1, -1])
def test_a_conflict_is_not_lost_among_large_parameters(sign):
    """Dot products 2³⁰, ±1 and −2³⁰ over parameters: float32 would lose the ±1."""
    large = 2.0**15
    pairs = {"a": (large, large), "b": (1, sign), "c": (large, -large)}
    for names in permutations(pairs):
        gradients = {name: torch.tensor(pairs[name]).float().view(1, 2, 1) for name in names}
        for how in (gramian, split_gramian):  # on the CPU, and on a GPU
            assert how(gradients)[0, 0, 1] == sign


def test_an_autocast_around_surgery_changes_nothing():
    """A user's autocast would round products to 8 bits: signs and weights would come of them."""
    draw = torch.Generator().manual_seed(0)
    gradients = {"w": torch.randn(2, 3, 40, 50, generator=draw)}
    x, d = torch.randn(2, 3, 7, 40, generator=draw), torch.randn(2, 3, 7, 50, generator=draw)
    losses, weights = torch.zeros(2, 3), torch.rand(2, 3, generator=draw)
    direction = {"w": torch.randn(2, 40, 50, generator=draw)}
    kinds = (
        Jacobian({}, losses, {}, gradients),
        FactoredGradients({}, losses, {}, {}, {"w": OfLayer(x, d)}),
    )

    def everything():
        for kind in kinds:
            yield kind.gramian()
            yield kind.combine(weights)["w"]
            yield kind.along(direction)
        yield gramian(gradients)
        yield combine(weights, gradients)["w"]
        yield along(gradients, direction)

    expected = list(everything())
    with torch.autocast("cpu", torch.bfloat16):
        found = list(everything())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
