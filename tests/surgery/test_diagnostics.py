"""Measures of conflict against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl.nets.fused import layer
from mtrl.nets.heads import head
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.trunks import MLP
from mtrl.surgery import StackedProblem
from mtrl.surgery.diagnostics import (
    Diagnosis,
    Step,
    conflict_after,
    conflict_repeats,
    cosines,
    diagnose,
    effective_rank,
    magnitude_similarities,
    multi_task_curvature,
    scale_spread,
)
from mtrl.surgery.gradients import Jacobian


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_three_gradients_in_closed_form():
    gradients = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]]).double()
    gramian = gradients @ gradients.T
    measures = diagnose(gramian)
    assert measures["conflict_fraction"].item() == pytest.approx(1 / 3)  # only the first pair
    assert measures["cosine_mean"].item() == pytest.approx(-1 / 3)
    expected = (2 * 2 * 1 / (4 + 1) + 2 * 2 * 3 / (4 + 9) + 2 * 1 * 3 / (1 + 9)) / 3
    assert measures["magnitude_similarity"].item() == pytest.approx(expected)
    assert measures["scale_spread"].item() == pytest.approx(9)
    # Eigenvalues 4 + 1 along the first axis, 9 along the second, 0.
    entropy = -(5 / 14 * math.log(5 / 14) + 9 / 14 * math.log(9 / 14))
    assert measures["effective_rank"].item() == pytest.approx(math.exp(entropy))
    torch.testing.assert_close(cosines(gramian).diagonal(), torch.ones(3).double())


def test_magnitude_similarity_lies_between_0_and_1_and_is_1_for_equal_norms():
    gradients = normal(4, 6, 20)
    values = magnitude_similarities(gradients @ gradients.mT)
    assert (values > 0).all() and (values <= 1 + 1e-12).all()
    unit = gradients / gradients.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(magnitude_similarities(unit @ unit.mT), torch.ones(4, 6, 6).double())


def test_a_zero_gradient_has_no_conflicts_and_all_measures_are_finite():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    measures = diagnose(gradients @ gradients.T)
    assert measures["conflict_fraction"] == 0 and measures["cosine_mean"] == 0
    assert measures["scale_spread"] == 4  # of the two nonzero gradients
    nothing = diagnose(torch.zeros(3, 3))
    assert nothing["scale_spread"] == 1 and nothing["effective_rank"] == 1
    assert all(value.isfinite() for value in nothing.values())
    assert effective_rank(torch.full((3, 3), torch.nan)).isnan()  # and does not raise
    assert diagnose(torch.ones(1, 1)) == {}  # a single task has no conflicts


def test_norms_may_differ_beyond_float32():
    measures = diagnose(torch.tensor([1e-30, 1e30]).diag())
    assert measures["scale_spread"].item() == pytest.approx(1e60, rel=1e-6)
    assert all(value.dtype == torch.float64 and value.shape == () for value in measures.values())


@settings(max_examples=100, deadline=None)
@given(
    n_tasks=st.integers(2, 50),
    rank=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    log_scale=st.integers(-6, 6),
)
def test_effective_rank_and_spread_ignore_scale_and_order(n_tasks, rank, seed, log_scale):
    gradients = normal(n_tasks, rank, seed=seed) * normal(n_tasks, 1, seed=seed + 1).exp()
    gramian = gradients @ gradients.T
    found = effective_rank(gramian).item()
    assert 1 - 1e-9 <= found <= min(n_tasks, rank) * (1 + 1e-9)
    squares = gradients.square().sum(1)
    assert scale_spread(gramian).item() == pytest.approx((squares.max() / squares.min()).item())
    other = 10.0**log_scale * gramian.flip(0, 1)
    assert effective_rank(other).item() == pytest.approx(found)
    assert scale_spread(other).item() == pytest.approx(scale_spread(gramian).item())


def test_effective_rank_at_its_limits():
    assert effective_rank(3 * torch.eye(7)).item() == pytest.approx(7)
    assert effective_rank(torch.ones(7, 7)).item() == pytest.approx(1)
    dwarfed = torch.tensor([1e12, 1.0, 1.0]).diag()
    assert effective_rank(dwarfed).item() == pytest.approx(1, abs=1e-9)


def symmetric(pairs: dict[tuple[int, int], float], n_tasks: int) -> torch.Tensor:
    matrix = torch.eye(n_tasks).double()
    for (i, j), value in pairs.items():
        matrix[i, j] = matrix[j, i] = value
    return matrix


def test_repeated_conflicts_in_closed_form():
    first = symmetric({(0, 1): -0.5, (0, 2): -0.1, (1, 2): 0.3, (2, 3): -1e-9}, 4)
    second = symmetric({(0, 1): -0.2, (0, 2): 0.1, (1, 3): -0.3}, 4)
    found = conflict_repeats(first, second)
    assert found["conflict_repeats"].item() == pytest.approx(2 * 1 / (3 + 2))
    assert found["conflict_repeats_by_chance"].item() == pytest.approx(2 * 3 * 2 / (6 * (3 + 2)))
    assert found == conflict_repeats(second, first)  # symmetric in the batches
    assert conflict_repeats(first, first)["conflict_repeats"] == 1
    opposite = conflict_repeats(symmetric({(0, 1): -0.5}, 4), symmetric({(2, 3): -0.5}, 4))
    assert opposite["conflict_repeats"] == 0
    assert conflict_repeats(torch.eye(4), torch.eye(4)) == {}  # no conflicts to repeat
    assert conflict_repeats(torch.ones(1, 1), torch.ones(1, 1)) == {}


@pytest.mark.parametrize("conflicts", [(1, 1), (2, 4), (6, 3), (0, 2)])
def test_the_chance_level_is_the_mean_over_all_placements_of_conflicts(conflicts):
    pairs = list(itertools.combinations(range(4), 2))
    a, b = conflicts
    first = symmetric({pair: -0.1 for pair in pairs[:a]}, 4)
    found = [
        conflict_repeats(first, symmetric({pair: -0.1 for pair in strewn}, 4))
        for strewn in itertools.combinations(pairs, b)
    ]
    mean = np.mean([each["conflict_repeats"].item() for each in found])
    assert found[0]["conflict_repeats_by_chance"].item() == pytest.approx(mean)


def test_noise_repeats_at_chance_level_and_real_conflicts_more_often():
    """Gradients of 10 tasks in 40 dimensions, 60 pairs of batches each."""
    own, found = normal(10, 40), {}
    for name, signal in {"noise": 0.0, "tasks": 3.0}.items():
        draws = signal * own + normal(60, 2, 10, 40, seed=1)
        measured = [conflict_repeats(*cosines(g @ g.mT)) for g in draws]
        found[name] = [
            np.mean([m[f"conflict_repeats{which}"].item() for m in measured])
            for which in ("", "_by_chance")
        ]
    assert found["noise"][0] == pytest.approx(found["noise"][1], abs=0.03)
    assert found["tasks"][0] > found["tasks"][1] + 0.2


def test_an_optimiser_can_oppose_a_task_that_surgery_does_not():
    """Adam's step opposes a task although the mean gradient opposes none.

    Adam's first step has equal length in both parameters, whatever the gradients.
    """
    gradients = torch.tensor([[4.0, -5.0], [0.1, 8.0]]).double()
    mean = gradients.mean(0)
    weight = torch.nn.Parameter(torch.zeros(2).double())
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.grad = mean.clone()
    optimizer.step()
    taken = -weight.detach()
    problem = Jacobian({}, torch.zeros(1, 2), {}, {"w": gradients[None]})
    found = conflict_after(problem, Step({"w": mean[None]}, {"w": taken[None]}))
    products = gradients @ torch.stack([mean, taken], 1)
    assert (products[:, 0] > 0).all() and (products[:, 1] < 0).tolist() == [True, False]
    assert found == {"conflict_after_surgery": 0, "conflict_after_step": 0.5}
    alone = Jacobian({}, torch.zeros(1, 1), {}, {"w": gradients[None, :1]})
    assert conflict_after(alone, Step({"w": mean[None]}, {"w": taken[None]})) == {}


def test_curvature_of_a_quadratic_is_the_same_along_any_step():
    factor, b, x = normal(5, 5), normal(5, seed=1), normal(5, seed=2)
    a = factor + factor.T  # indefinite: the curvature may be negative
    g = a @ x + b
    for step in (1e-4, 0.1, 3.0):
        found = multi_task_curvature(lambda p: {"x": a @ p["x"] + b}, {"x": x}, step)
        torch.testing.assert_close(found, g @ a @ g)


@pytest.mark.parametrize("relu", [False, True])
def test_curvature_of_a_multi_task_network_by_its_explicit_hessian(relu):
    """Gauss–Legendre quadrature of the definition; with ReLU, curvature changes along the step."""
    generator = torch.Generator().manual_seed(0)
    networks = MultiTaskNetworks(
        2, 3, 4, 2, MLP((5, 4)), multi_head=True, head_bound=1.0, generator=generator
    ).double()
    x, y = normal(1, 3, 8, 4, seed=4), normal(3, 8, 2, seed=5)
    activate = torch.relu if relu else torch.tanh

    def smooth(shared, per_task, inputs, record=None):
        hidden = torch.tanh(layer(inputs, shared["weight0"], per_task["bias0"]))
        return torch.tanh(layer(hidden, shared["weight1"], shared["bias1"]))

    smooth.layers = networks.trunk.layers

    def task_loss(shared, per_task, features, y):
        return (head(shared, per_task, features) - y).square().mean((-2, -1)), {}

    trunk, *parameters = networks.requires_grad_(False).folded()
    both = StackedProblem(trunk if relu else smooth, task_loss, *parameters, x, (y,))
    step = 0.3
    for n in range(2):
        problem = both.only(n)
        shared, own = problem.shared, {name: value[0] for name, value in problem.per_task.items()}
        theta = torch.cat([value.flatten() for value in shared.values()])

        def loss(vector, shared=shared, own=own):
            """Independent forward pass of one network, on plain matrices."""
            parts = vector.split([value.numel() for value in shared.values()])
            moved = {k: p.view(shared[k].shape[1:]) for k, p in zip(shared, parts, strict=True)}
            z = activate(x[0] @ moved["weight0"] + own["bias0"][:, None])
            z = activate(z @ moved["weight1"] + moved["bias1"])
            return (z @ own["head_weight"] + own["head_bias"][:, None] - y).square().mean()

        g = torch.autograd.functional.jacobian(loss, theta)
        expected = torch.zeros(()).double()
        for node, weight in zip(*np.polynomial.legendre.leggauss(12), strict=True):
            at = theta - (1 + node) / 2 * step * g
            expected += weight / 2 * (g @ torch.autograd.functional.hessian(loss, at) @ g)
        still = Step(shared, shared)  # does not affect the curvature
        found = Diagnosis.of(problem, problem, still, step).measures["curvature"]
        if relu:
            assert found.isfinite() and not torch.allclose(found, expected)
            g_there = torch.autograd.functional.jacobian(loss, theta - step * g)
            torch.testing.assert_close(found, g @ (g - g_there) / step)
        else:
            torch.testing.assert_close(found, expected)
