"""Task gradients against one backward per task, and the Gramian against J Jᵀ, in float64."""

from dataclasses import replace

import pytest
import torch

from mtrl.nets.heads import head
from mtrl.nets.networks import Function, MultiTaskNetworks, TrunkFunction
from mtrl.nets.trunks import MLP, Residual
from mtrl.surgery import Jacobian, StackedProblem, combine, gramian
from mtrl.surgery.factored import FactoredGradients
from mtrl.surgery.gradients import equal_parts, split_gramian

N, T, B, IN, OUT = 2, 5, 9, 6, 3


TRUNKS = {
    "mlp": MLP(),
    "layer-norm": MLP(layer_norm=True),
    "residual": Residual(),
    "residual-layer-norm": Residual(layer_norm=True),
    "embedding": MLP(embedding=4),
}


def make_problem(hidden=(8, 7), multi_head=True, rows=B, trunk="mlp", **settings):
    generator = torch.Generator().manual_seed(0)
    trunk = TRUNKS[trunk]
    if isinstance(trunk, Residual):
        hidden = (max(hidden),) * len(hidden)
    networks = MultiTaskNetworks(
        N,
        T,
        IN,
        OUT,
        replace(trunk, widths=hidden),
        multi_head=multi_head,
        head_bound=1.0,
        generator=generator,
    ).double()
    if trunk.embedding:  # a length that must have no effect
        networks.per_task["embedding"].data *= 3
    trunk, shared, per_task = networks.requires_grad_(False).folded()
    x = torch.randn(1, T, rows, IN, generator=generator, dtype=torch.float64)
    y = torch.randn(T, rows, OUT, generator=generator, dtype=torch.float64)
    return StackedProblem(trunk, task_loss, shared, per_task, x, (y,), **settings)


@pytest.fixture(
    params=[(trunk, True) for trunk in TRUNKS] + [("mlp", False)],
    ids=[*TRUNKS, "single-head"],
)
def problem(request):
    trunk, multi_head = request.param
    return make_problem(trunk=trunk, multi_head=multi_head)


def task_loss(shared, per_task, features, y):
    error = head(shared, per_task, features) - y
    return error.square().mean((-2, -1)), {"error": error}


def plain(trunk, shared, per_task, x):
    """Independent forward pass of one task in one network, on plain matrices."""
    parameters = {**shared, **per_task}
    if "embedding" in parameters:
        e = parameters["embedding"]
        x = torch.cat([x, (e / e.norm()).expand(len(x), -1)], -1)
        parameters["weight0"] = torch.cat([parameters["weight0"], parameters["task_weight"]])

    def layer(number, x):
        x = x @ parameters[f"weight{number}"] + parameters[f"bias{number}"]
        if trunk.layer_norm:
            x = (x - x.mean(-1, keepdim=True)) / (
                x.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
        return x

    x = torch.relu(layer(0, x))
    inner = torch.relu(layer(1, x))
    x = x + layer(2, inner) if isinstance(trunk, Residual) else inner
    return x, x @ parameters["head_weight"] + parameters["head_bias"]


def one_backward_per_task(problem, n, t):
    """Reference: autograd on the parameters of one network and task."""
    shared = {k: v[n].clone().requires_grad_() for k, v in problem.shared.items()}
    per_task = {k: v[n, t].clone().requires_grad_() for k, v in problem.per_task.items()}
    features, outputs = plain(problem.trunk.trunk, shared, per_task, problem.inputs[0, t])
    features.retain_grad()
    error = outputs - problem.targets[0][t]
    loss = error.square().mean()
    loss.backward()
    own = {name: leaf.grad for name, leaf in per_task.items()}
    return {k: v.grad for k, v in shared.items()}, own, loss.detach(), error, features.grad


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-9)


def test_equal_to_one_backward_per_task(problem):
    found = problem.task_gradients()
    assert found.losses.shape == (N, T)
    for n in range(N):
        for t in range(T):
            shared, own, loss, error, _ = one_backward_per_task(problem, n, t)
            for name, expected in shared.items():
                close(found.shared[name][n, t], expected)
            for name, expected in own.items():
                close(found.per_task[name][n, t], expected)
            close(found.losses[n, t], loss)
            close(found.auxiliary["error"][n, t], error)


def test_mean_gradient_equals_the_mean_of_task_gradients(problem):
    found, mean = problem.task_gradients(), problem.features().mean()
    close(mean.losses, found.losses)
    close(problem.losses(), found.losses)
    for name, gradient in mean.shared.items():
        close(gradient, found.shared[name].mean(1))
    for name, gradient in mean.per_task.items():
        close(gradient, found.per_task[name] / T)


def test_weighted_by_one_backward_as_by_the_task_gradients(problem):
    """Weights may depend on losses and feature gradients, and multiply the trunk's gradient."""
    features, rows = problem.features(), problem.task_gradients()
    found = features.weighted(torch.linspace(-1, 2, N * T, dtype=torch.float64).view(N, T))
    for name, gradient in found.shared.items():
        if name.startswith("head"):  # a single head is above the features: the mean
            close(gradient, rows.shared[name].mean(1))
        else:
            close(gradient, combine(found.weights, {name: rows.shared[name]})[name])
    close(features.losses, rows.losses)
    for n in range(N):
        for t in range(T):
            *_, expected = one_backward_per_task(problem, n, t)
            close(features.norms[n, t], expected.norm())
            close(features.means[n, t], expected.mean(0))


def test_gramian_and_combination(problem):
    found = problem.task_gradients()
    jacobian = torch.cat([gradient.flatten(2) for gradient in found.shared.values()], 2)
    close(gramian(found.shared), jacobian @ jacobian.mT)
    weights = torch.linspace(-1, 2, N * T, dtype=torch.float64).view(N, T)
    combined = found.combine(weights)
    flat = torch.cat([gradient.flatten(1) for gradient in combined.values()], 1)
    close(flat, (weights[:, None] @ jacobian)[:, 0])
    assert {k: v.shape for k, v in combined.items()} == {
        k: v.shape for k, v in problem.shared.items()
    }


@pytest.mark.parametrize("engine", ["jacobian", "factored"])
def test_products_with_a_direction_equal_one_backward_per_task(problem, engine):
    generator = torch.Generator().manual_seed(3)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in problem.shared.items()
    }
    found = replace(problem, engine=engine).task_gradients().along(direction)
    for n in range(N):
        for t in range(T):
            gradient, *_ = one_backward_per_task(problem, n, t)
            close(found[n, t], sum((gradient[k] * direction[k][n]).sum() for k in gradient))


@pytest.mark.parametrize("engine", ["jacobian", "factored"])
def test_products_with_another_batch_equal_one_backward_per_task(problem, engine):
    problem = replace(problem, engine=engine)
    other = replace(problem, inputs=problem.inputs.flip(2).sin(), targets=(-problem.targets[0],))
    found = problem.task_gradients().products(other.task_gradients())
    for n in range(N):
        for t in range(T):
            (one, *_), (two, *_) = (one_backward_per_task(p, n, t) for p in (problem, other))
            close(found[n, t], sum((one[k] * two[k]).sum() for k in one))


def test_one_network_of_several_gives_its_part(problem):
    together = problem.task_gradients()
    for n in range(N):
        alone = problem.only(n).task_gradients()
        close(alone.gramian(), together.gramian()[n : n + 1])
        close(alone.losses, together.losses[n : n + 1])


@pytest.mark.parametrize(("trunk", "multi_head"), [*((t, True) for t in TRUNKS), ("mlp", False)])
@pytest.mark.parametrize("hidden", [(8, 7), (60, 50, 40)], ids=["formed", "as-factors"])
def test_both_engines_agree(hidden, trunk, multi_head):
    """Narrow layers, whose gradients are formed, and layers wider than their batch."""
    problem = make_problem(hidden, multi_head, rows=4, trunk=trunk, engine="jacobian")
    formed, factored = (
        problem.task_gradients(),
        replace(problem, engine="factored").task_gradients(),
    )
    assert isinstance(factored, FactoredGradients)
    close(factored.gramian(), formed.gramian())
    close(factored.losses, formed.losses)
    weights = torch.linspace(-1, 2, N * T, dtype=torch.float64).view(N, T)
    found, expected = factored.weighted(weights), formed.weighted(weights)
    assert found.shared.keys() == expected.shared.keys()
    assert found.per_task.keys() == expected.per_task.keys()
    for name, gradient in {**expected.shared, **expected.per_task}.items():
        close({**found.shared, **found.per_task}[name], gradient)


def test_wide_trunks_are_left_as_factors():
    def of(width, **settings):
        matrix = torch.empty(1, 1, 1).expand(N, width, width)  # shapes are enough
        weights = {"weight0": matrix, "weight1": matrix}
        return replace(make_problem(rows=128, **settings), shared=weights)

    assert not of(400)._is_wide()
    assert of(6000)._is_wide()
    assert not of(6000, precision="bf16")._is_wide()
    narrow = make_problem()
    assert isinstance(narrow.task_gradients(), Jacobian)
    assert isinstance(replace(narrow, engine="factored").task_gradients(), FactoredGradients)


def in_float32(problem):
    def convert(tree):
        return {name: value.float() for name, value in tree.items()}

    return replace(
        problem,
        shared=convert(problem.shared),
        per_task=convert(problem.per_task),
        inputs=problem.inputs.float(),
        targets=(problem.targets[0].float(),),
    )


@pytest.mark.parametrize("engine", ["jacobian", "factored"])
@pytest.mark.parametrize("trunk", ["mlp", "residual-layer-norm", "embedding"])
def test_bf16_rounds_products_and_nothing_else(trunk, engine):
    """Gradients are in float32, with an error as from 8 bits of mantissa."""
    exact = make_problem((60, 50), rows=64, trunk=trunk, engine=engine)
    rounded = replace(in_float32(exact), precision="bf16")
    truth, found = exact.task_gradients(), rounded.task_gradients()
    distance = (found.gramian() - truth.gramian()).norm() / truth.gramian().norm()
    assert found.gramian().dtype == torch.float32
    assert 1e-5 < distance < 2e-2
    weights = torch.full((N, T), 1 / T)
    for gradients in (found.weighted(weights), rounded.features().mean()):
        expected = exact.features().mean()
        for name, value in {**expected.shared, **expected.per_task}.items():
            got = {**gradients.shared, **gradients.per_task}[name]
            assert got.dtype == torch.float32, name
            assert (got - value).norm() < 6e-2 * value.norm(), name
    assert (rounded.losses() - exact.losses()).abs().max() < 2e-2 * exact.losses().max()


def test_precision_leaves_float64_alone():
    problem = make_problem()
    for name, value in replace(problem, precision="bf16").task_gradients().shared.items():
        assert torch.equal(value, problem.task_gradients().shared[name])


def test_the_gramian_of_many_parameters_is_exact_to_float32():
    """Sums over hundreds of thousands of products of gradients that nearly cancel."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(1, 3, 600, 500, generator=generator)
    exact = gradients.double().flatten(2) @ gradients.double().flatten(2).mT
    found = gramian({"weight": gradients}).double()
    norms = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (found - exact).abs() / (norms[..., :, None] * norms[..., None, :])
    assert error.max() < 1e-6


def test_single_head_shares_its_head():
    problem = make_problem(multi_head=False)
    assert "head_weight" in problem.shared and "head_weight" not in problem.per_task
    assert "bias0" in problem.per_task  # how a single head distinguishes tasks


def test_first_layer_bias_equals_a_layer_on_a_one_hot():
    """Concatenating a one-hot and multiplying equals the per-task bias."""
    problem = make_problem()
    shared, per_task = problem.shared, problem.per_task
    one_hot = torch.eye(T, dtype=torch.float64)[:, None].expand(1, T, B, T)
    weight = torch.cat([shared["weight0"], per_task["bias0"]], 1)
    expected = torch.relu(torch.cat([problem.inputs, one_hot], -1) @ weight[:, None])
    own = {
        "bias0": per_task["bias0"],
        "head_weight": torch.eye(8, dtype=torch.float64).expand(N, T, 8, 8),
        "head_bias": torch.zeros(N, T, 8, dtype=torch.float64),
    }
    trunk = TrunkFunction(MLP((8,)), problem.trunk.layers)
    layer = Function(trunk, {"weight0": shared["weight0"]}, own)
    close(layer(problem.inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gramian_on_a_gpu_is_summed_in_parts(dtype):
    """Against float64, for lengths that can be split evenly and a prime that cannot."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (160, 400), "b": (39, 400), "c": (4099,), "d": (7,)}
    gradients = {
        name: (torch.randn(2, 10, *shape, generator=generator) + 1).to(dtype)
        for name, shape in shapes.items()
    }
    found = split_gramian(gradients)
    rows = torch.cat([value.flatten(2).double() for value in gradients.values()], -1)
    exact = rows @ rows.mT
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=tolerance)
    assert not (found - found.mT).abs().max() > tolerance * exact.max()


@pytest.mark.parametrize(
    ("length", "parts"), [(7, 1), (2048, 1), (4096, 2), (160_000, 64), (4099, 1), (2**20, 512)]
)
def test_parts_are_equal_and_long_enough(length, parts):
    assert equal_parts(length) == parts
