"""Closed forms of conflict and magnitude similarity."""

import pytest
import torch

from mtrl.surgery.diagnostics import cosines, diagnose, magnitude_similarities


def test_three_gradients_in_closed_form():
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]]).double()
    gramian = (gradients @ gradients.T)[None]
    measures = diagnose(gramian)
    assert measures["conflict_fraction"].item() == pytest.approx(1 / 3)  # only the first pair
    assert measures["cosine_mean"].item() == pytest.approx(-1 / 3)
    expected = (2 * 2 * 1 / (4 + 1) + 2 * 2 * 3 / (4 + 9) + 2 * 1 * 3 / (1 + 9)) / 3
    assert measures["magnitude_similarity"].item() == pytest.approx(expected)
    torch.testing.assert_close(cosines(gramian)[0].diagonal(), torch.ones(3).double())


def test_magnitude_similarity_lies_between_0_and_1_and_is_1_for_equal_norms():
    gradients = torch.randn(4, 6, 20).double()
    values = magnitude_similarities(gradients @ gradients.mT)
    assert (values > 0).all() and (values <= 1 + 1e-12).all()
    unit = gradients / gradients.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(magnitude_similarities(unit @ unit.mT), torch.ones(4, 6, 6).double())


def test_a_zero_gradient_conflicts_with_none():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    measures = diagnose((gradients @ gradients.T)[None])
    assert measures["conflict_fraction"] == 0 and measures["cosine_mean"] == 0
    assert diagnose(torch.ones(2, 1, 1)) == {}  # one task has nobody to disagree with
