"""Per-task gradients against one backward per task, and the Gramian against J Jᵀ, in float64."""

import pytest
import torch

from mtrl.networks import MultiTaskNetworks, head, multi_task_mlp, trunk
from mtrl.surgery import Network, combine, gramian

T, B, IN, OUT = 5, 9, 6, 3


@pytest.fixture(params=[True, False], ids=["multi-head", "single-head"])
def problem(request):
    generator = torch.Generator().manual_seed(0)
    networks = MultiTaskNetworks(1, T, IN, OUT, (8, 7), request.param, 1.0, generator).double()
    ((shared, per_task),) = networks.requires_grad_(False).members()
    x = torch.randn(T, B, IN, generator=generator, dtype=torch.float64)
    y = torch.randn(T, B, OUT, generator=generator, dtype=torch.float64)
    return shared, per_task, x, y


def task_loss(shared, per_task, features, y):
    error = head(shared, per_task, features) - y
    return error.square().mean(), {"error": error}


def loss(shared, per_task, x, y):
    return task_loss(shared, per_task, trunk(shared, per_task, x), y)


def network(shared, per_task, x, y):
    return Network(trunk, task_loss, shared, per_task, x, (y,))


def one_backward_per_task(shared, per_task, x, y):
    """The independent truth: autograd, task after task, on all parameters."""
    shared = {k: v.clone().requires_grad_() for k, v in shared.items()}
    per_task = {k: v.clone().requires_grad_() for k, v in per_task.items()}
    rows = []
    for t in range(T):
        value, _ = loss(shared, {k: v[t] for k, v in per_task.items()}, x[t], y[t])
        grads = torch.autograd.grad(value, [*shared.values(), *per_task.values()])
        rows.append(dict(zip([*shared, *per_task], grads, strict=True)))
    return rows


def test_equal_to_one_backward_per_task(problem):
    shared, per_task, x, y = problem
    found = network(*problem).task_gradients()
    for t, truth in enumerate(one_backward_per_task(*problem)):
        for name in shared:
            torch.testing.assert_close(found.shared[name][t], truth[name], atol=1e-12, rtol=1e-9)
        for name in per_task:
            torch.testing.assert_close(
                found.per_task[name][t], truth[name][t], atol=1e-12, rtol=1e-9
            )
            others = [s for s in range(T) if s != t]
            assert not truth[name][others].any()  # nothing of a task's own is missed above
        value, auxiliary = loss(shared, {k: v[t] for k, v in per_task.items()}, x[t], y[t])
        torch.testing.assert_close(found.losses[t], value)
        torch.testing.assert_close(found.auxiliary["error"][t], auxiliary["error"])


def test_mean_gradient_is_the_mean_of_them(problem):
    found, mean = network(*problem).task_gradients(), network(*problem).gradient()
    torch.testing.assert_close(mean.losses, found.losses)
    for name, gradient in mean.shared.items():
        torch.testing.assert_close(gradient, found.shared[name].mean(0), atol=1e-12, rtol=1e-9)
    for name, gradient in mean.per_task.items():
        torch.testing.assert_close(gradient, found.per_task[name] / T, atol=1e-12, rtol=1e-9)


def test_weighted_by_one_backward_as_by_the_task_gradients(problem):
    """Weights may depend on losses and feature gradients, and multiply what the trunk gets."""
    shared, per_task, x, y = problem
    seen = []

    def weigh(losses, features):
        seen.append((losses, features))
        return torch.linspace(-1, 2, T, dtype=torch.float64)

    found, rows = network(*problem).gradient(weigh), network(*problem).task_gradients()
    for name, gradient in found.shared.items():
        if name.startswith("head"):  # a single head lies above the features: the mean
            torch.testing.assert_close(gradient, rows.shared[name].mean(0))
        else:
            expected = combine(found.weights, {name: rows.shared[name]})[name]
            torch.testing.assert_close(gradient, expected)
    ((losses, features),) = seen
    torch.testing.assert_close(losses, rows.losses)
    for t in range(T):
        own = {k: v[t] for k, v in per_task.items()}
        z = trunk(shared, own, x[t]).requires_grad_()
        value, _ = task_loss(shared, own, z, y[t])
        (expected,) = torch.autograd.grad(value, z)
        torch.testing.assert_close(features.norms[t], expected.norm())
        torch.testing.assert_close(features.means[t], expected.mean(0))


def test_gramian_and_combination(problem):
    found = network(*problem).task_gradients().shared
    jacobian = torch.cat([gradient.flatten(1) for gradient in found.values()], 1)
    torch.testing.assert_close(gramian(found), jacobian @ jacobian.T)
    weights = torch.linspace(-1, 2, T, dtype=torch.float64)
    combined = combine(weights, found)
    flat = torch.cat([gradient.flatten() for gradient in combined.values()])
    torch.testing.assert_close(flat, weights @ jacobian)
    assert {k: v.shape for k, v in combined.items()} == {k: v.shape for k, v in problem[0].items()}


def test_single_head_shares_its_head(problem):
    shared, per_task, *_ = problem
    assert ("head_weight" in shared) != ("head_weight" in per_task)
    assert "bias0" in per_task  # how a single head tells tasks apart


def test_all_tasks_at_once_equal_one_task_at_a_time(problem):
    shared, per_task, x, _ = problem
    together = multi_task_mlp(shared, per_task, x)
    for t in range(T):
        alone = multi_task_mlp(shared, {k: v[t] for k, v in per_task.items()}, x[t])
        torch.testing.assert_close(together[t], alone)


def test_first_layer_bias_is_the_layer_on_a_one_hot(problem):
    """Concatenating a one-hot and multiplying gives what the per-task bias gives."""
    shared, per_task, x, _ = problem
    one_hot = torch.eye(T, dtype=torch.float64)[:, None].expand(T, B, T)
    weight = torch.cat([shared["weight0"], per_task["bias0"]])
    expected = torch.relu(torch.cat([x, one_hot], -1) @ weight)
    identity = {"weight0": shared["weight0"]}
    own = {
        "bias0": per_task["bias0"],
        "head_weight": torch.eye(8, dtype=torch.float64).expand(T, 8, 8),
        "head_bias": torch.zeros(T, 8, dtype=torch.float64),
    }
    torch.testing.assert_close(multi_task_mlp(identity, own, x), expected)
