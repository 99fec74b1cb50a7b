"""Summation of the dot products of tasks."""

from itertools import permutations

import pytest
import torch

from mtrl.surgery.gradients import gramian


@pytest.mark.parametrize("sign", [1, -1])
def test_a_conflict_is_not_lost_among_large_parameters(sign):
    """Dot products 2³⁰, ±1 and −2³⁰ over parameters: float32 would lose the ±1."""
    large = 2.0**15
    pairs = {"a": (large, large), "b": (1, sign), "c": (large, -large)}
    for names in permutations(pairs):
        gradients = {name: torch.tensor(pairs[name]).float().view(1, 2, 1) for name in names}
        assert gramian(gradients)[0, 0, 1] == sign
