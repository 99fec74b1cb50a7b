"""Gradient clipping per network."""

import torch

from mtrl.sac.optimizers import clip_by_network_


def test_only_a_gradient_above_the_norm_is_scaled():
    draw = torch.Generator().manual_seed(0)
    found = [torch.randn(3, 4, 5, generator=draw), torch.randn(3, 7, generator=draw)]
    for gradient in found:  # norms of about 5, 0.5 and 0
        gradient[1] /= 10
        gradient[2] = 0
    before = [gradient.clone() for gradient in found]
    clip_by_network_(found, max_norm=1.0)
    norm = torch.cat([gradient[0].flatten() for gradient in before]).norm()
    assert norm > 2
    for gradient, unclipped in zip(found, before, strict=True):
        torch.testing.assert_close(gradient[0], unclipped[0] / norm)
        assert torch.equal(gradient[1:], unclipped[1:])  # bitwise
