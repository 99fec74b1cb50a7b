"""PCGrad in the Gramian against the paper's Algorithm 1 on vectors, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl.errors import UsageError
from mtrl.surgery import GramianSurgery, available, get_surgery, register
from mtrl.surgery.methods.pcgrad import PCGrad, random_orders


def algorithm_1(gradients: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """The paper's algorithm, line by line, on vectors `[T, P]`, with a mean instead of a sum."""
    projected = gradients.clone()
    for i, g in enumerate(projected):
        for j in orders[i].tolist():
            other = gradients[j]
            dot = torch.dot(g, other)
            if dot < 0:
                g -= dot / other.square().sum() * other
    return projected.mean(0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pcgrad(gradients: torch.Tensor, seed: int) -> torch.Tensor:
    """The package's result for `[N, T, P]`."""
    weights = PCGrad().weights(gradients @ gradients.mT, generator(seed))
    return (weights[..., None] * gradients).sum(-2)


@settings(max_examples=150, deadline=None)
@given(
    n_tasks=st.integers(2, 50),
    n_networks=st.integers(1, 3),
    size=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    zeros=st.booleans(),
    parallel=st.booleans(),
    log_scale=st.integers(-4, 4),
)
def test_equals_algorithm_1(n_tasks, n_networks, size, seed, zeros, parallel, log_scale):
    draw = generator(seed + 1)
    gradients = torch.randn(n_networks, n_tasks, size, generator=draw, dtype=torch.float64)
    if zeros:
        gradients[:, 0] = 0
    if parallel:
        gradients[:, -1] = -2 * gradients[:, n_tasks // 2]
    gradients *= 10.0**log_scale
    orders = random_orders(n_networks, n_tasks, generator(seed))
    expected = torch.stack([algorithm_1(g, o) for g, o in zip(gradients, orders, strict=True)])
    error = (pcgrad(gradients, seed) - expected).norm() / gradients.norm()
    assert error < 1e-9


def test_orders_are_permutations_of_the_others():
    n_tasks = 7
    orders = random_orders(3, n_tasks, generator(0))
    for network in orders:
        for i, order in enumerate(network.tolist()):
            assert sorted(order) == [j for j in range(n_tasks) if j != i]
    # Drawn uniformly for each i: with T = 3, task 1 comes first in about half of them.
    first = random_orders(4000, 3, generator(1))[:, 0, 0]
    share = (first == 1).double().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 4000)
    both = random_orders(4000, 3, generator(2))
    agree = ((both[:, 0, 0] == 1) == (both[:, 1, 0] == 0)).double().mean().item()
    assert abs(agree - 0.5) < 4 * math.sqrt(0.25 / 4000)


def test_two_tasks_in_closed_form():
    """There is only one order: each loses its projection onto the other if they conflict."""
    a, b = torch.tensor([2.0, 1.0]).double(), torch.tensor([-1.0, 3.0]).double()
    b_conflicting = torch.tensor([-3.0, 1.0]).double()
    assert torch.allclose(pcgrad(torch.stack([a, b])[None], 0)[0], (a + b) / 2)
    dot = a @ b_conflicting
    expected = (
        a
        - dot / b_conflicting.square().sum() * b_conflicting
        + b_conflicting
        - dot / a.square().sum() * a
    ) / 2
    found = pcgrad(torch.stack([a, b_conflicting])[None], 0)[0]
    torch.testing.assert_close(found, expected)


def test_a_single_task_keeps_its_gradient():
    g = torch.randn(2, 1, 5).double()
    torch.testing.assert_close(pcgrad(g, 0), g[:, 0])


@given(seed=st.integers(0, 2**31), n_tasks=st.integers(2, 8), scale=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_scaling_all_gradients_scales_the_result(seed, n_tasks, scale):
    g = torch.randn(1, n_tasks, 10, generator=generator(seed), dtype=torch.float64)
    torch.testing.assert_close(pcgrad(scale * g, 3), scale * pcgrad(g, 3))


def test_without_conflicts_it_is_the_mean():
    g = torch.rand(2, 6, 10).double()  # positive entries, hence positive dot products
    torch.testing.assert_close(pcgrad(g, 0), g.mean(1))


def test_the_generator_determines_the_order():
    g = torch.randn(1, 6, 4, generator=generator(5), dtype=torch.float64)
    assert torch.equal(pcgrad(g, 0), pcgrad(g, 0))
    assert not torch.allclose(pcgrad(g, 0), pcgrad(g, 1))


@pytest.mark.parametrize("angle", [0.3, 2.0, 3.0])
def test_theorem_1_on_two_convex_quadratics(angle):
    """With steps ≤ 1/L, PCGrad reaches the optimum of the sum or a point with cos φ = −1."""
    a = torch.diag(torch.tensor([1.0, 4.0])).double()
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    ).double()
    b = turn @ torch.diag(torch.tensor([3.0, 0.5]).double()) @ turn.T
    centre = torch.tensor([2.0, -1.0]).double()
    optimum = torch.linalg.solve(a + b, b @ centre)
    step = 1 / torch.linalg.eigvalsh(a + b).max()
    x = torch.tensor([-3.0, 2.5]).double()
    for _ in range(4_000):
        g = torch.stack([a @ x, b @ (x - centre)])
        x = x - step * 2 * pcgrad(g[None], 0)[0]  # the theorem uses the sum, not the mean
    g = torch.stack([a @ x, b @ (x - centre)])
    cosine = g[0] @ g[1] / (g[0].norm() * g[1].norm())
    assert (x - optimum).norm() < 1e-6 or cosine < -1 + 1e-6


def test_a_custom_method_is_one_class():
    @register("test-first-task")
    class FirstTask(GramianSurgery):
        def weights(self, gramian, generator):
            return torch.eye(gramian.shape[-1])[0].expand(gramian.shape[:2])

    assert "test-first-task" in available()
    assert isinstance(get_surgery("test-first-task"), FirstTask)
    with pytest.raises(ValueError, match="again"):
        register("test-first-task")(PCGrad)


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'pcgrad'"):
        get_surgery("pc-grad")
