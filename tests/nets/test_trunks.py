"""Every trunk against its equations on plain matrices, and its per-task gradients, in float64."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

from mtrl.config.agent import AgentConfig
from mtrl.config.registry import TRUNKS as REGISTRY
from mtrl.errors import UsageError
from mtrl.nets.heads import head
from mtrl.nets.networks import MultiTaskNetworks, TrunkFunction
from mtrl.nets.params import Params
from mtrl.nets.trunks import (
    CARE,
    MLP,
    MOORE,
    FiLM,
    PaCo,
    Residual,
    SoftModules,
    available_trunks,
    get_trunk,
    trunk_of,
)
from mtrl.nets.trunks.moore import gram_schmidt
from mtrl.surgery import StackedProblem, combine, gramian

N, T, B, IN, OUT = 2, 4, 5, 6, 3
TRUNKS = {
    "mlp": MLP((8, 7)),
    "mlp, embedding": MLP((8, 7), embedding=4),
    "residual": Residual((8, 8)),
    "mlp, described": MLP((8, 7), task_input="description"),
    "film": FiLM((8, 7), embedding=4),
    "film, described": FiLM((8, 7), task_input="description"),
    "film, one-hot": FiLM((8, 7), task_input="one-hot"),
    "soft-modules": SoftModules((8, 7, 9), layers=3, modules=2, width=6, size=5),
    "soft-modules, described": SoftModules(
        (8, 7, 9), layers=2, modules=2, width=6, size=5, task_input="description"
    ),
    "moore": MOORE((9, 8), experts=3),
    "moore, embedding": MOORE((9, 8), experts=3, embedding=4),
    "moore, described": MOORE((9, 8), experts=3, task_input="description"),
    "care, described": CARE((8, 7), encoders=3, size=5),
    "care": CARE((8, 7), encoders=3, size=5, embedding=4),
    "paco": PaCo((8, 7), sets=3),
    "paco, described": PaCo((8, 7), sets=3, task_input="description"),
}
"""A small instance of each architecture, with different widths where possible."""

CASES = [*TRUNKS.values(), *(replace(trunk, layer_norm=True) for trunk in TRUNKS.values())]
NAMES = [*TRUNKS, *(f"{name}, layer norm" for name in TRUNKS)]
each_trunk = pytest.mark.parametrize("trunk", CASES, ids=NAMES)


def test_all_architectures_are_here():
    ours = set(available_trunks()) - {"two-layers"}  # which a docstring registers
    assert {name.split(",")[0] for name in TRUNKS} == ours == set(REGISTRY.options)
    for name in REGISTRY.options:
        assert set(REGISTRY.options[name]) == {field.name for field in fields(get_trunk(name))}


def make(trunk, n_tasks=T, multi_head=True) -> MultiTaskNetworks:
    generator = torch.Generator().manual_seed(0)
    networks = MultiTaskNetworks(
        N,
        n_tasks,
        IN,
        OUT,
        trunk,
        multi_head=multi_head,
        head_bound=1.0,
        generator=generator,
        descriptions=lambda: np.random.default_rng(0).normal(size=(n_tasks, 3)),
    ).double()
    networks.requires_grad_(False)
    for parameter in networks.parameters():  # no zero biases or tiny weights that could hide errors
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return networks


def make_problem(trunk, n_tasks=T, **settings) -> StackedProblem:
    networks = make(trunk, n_tasks)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, n_tasks, B, IN, generator=generator, dtype=torch.float64)
    y = torch.randn(n_tasks, B, OUT, generator=generator, dtype=torch.float64)
    shared, per_task = networks.named()
    fixed = networks.fixed_inputs()
    return StackedProblem(
        networks.trunk, task_loss, shared, per_task, x, (y,), fixed=fixed, **settings
    )


def task_loss(shared, per_task, features, y):
    error = head(shared, per_task, features) - y
    return error.square().mean((-2, -1)), {"error": error}


def plain(trunk, p, x):
    """Compute the features of one task and network by the paper's equations, `[B, d]`.

    Args:
        p: All parameters of that network and task, without the axes N and T.
        x: `[B, in]`.
    """

    def linear(name, z, k=None):
        weight, bias = p[f"{name}_weight"], p[f"{name}_bias"]
        return z @ weight + bias if k is None else z @ weight[k] + bias[k]

    def norm(z):
        return layer_norm(z, z.shape[-1:]) if trunk.layer_norm else z

    def relu(z):
        return z.clamp(min=0)

    def in_a_row(name, z, count, k=None, last=False):
        for number in range(count):
            z = linear(f"{name}{number}", z, k)
            z = relu(norm(z)) if number < count - 1 or last else z
        return z

    def vector(name):
        """A task's own row of a table, or a layer on what the task is told by."""
        return p[name] if trunk.told == "one-hot" else linear(name, told)

    told = None if isinstance(trunk, MLP) or trunk.told == "one-hot" else p[trunk.told]
    if isinstance(trunk, FiLM) and trunk.told == "one-hot":
        told = p["one_hot"]
    depth = len(trunk.widths)
    if isinstance(trunk, MLP):
        bias = p["bias0"]
        if trunk.told == "embedding":
            bias = bias + p["embedding"] / p["embedding"].norm() @ p["task_weight"]
        if trunk.told == "description":
            bias = bias + p["description"] @ p["task_weight"]
        z = relu(norm(x @ p["weight0"] + bias))
        for number in range(1, len(trunk.layer_widths())):
            y = norm(z @ p[f"weight{number}"] + p[f"bias{number}"])
            if not isinstance(trunk, Residual):
                z = relu(y)
            elif number % 2:
                inner = relu(y)
            if isinstance(trunk, Residual) and number % 2:
                y = norm(inner @ p[f"weight{number + 1}"] + p[f"bias{number + 1}"])
                z = z + y
        return z
    if isinstance(trunk, FiLM):
        film = linear("film1", relu(linear("film0", told)))
        of_layers = film.view(2, -1).split(trunk.widths, -1)
        z = x
        for number, (gamma, beta) in enumerate(of_layers):
            z = relu((1 + gamma) * norm(linear(f"layer{number}", z)) + beta)
        return z
    if isinstance(trunk, MOORE):
        rows = []
        vectors = [in_a_row("expert", x, depth, k) for k in range(trunk.experts)]
        for b in range(len(x)):  # for each sample by QR, with the signs of R's diagonal
            q, r = torch.linalg.qr(torch.stack([v[b] for v in vectors], -1))
            rows.append((q * r.diagonal().sign()) @ vector("mix"))
        return torch.tanh(torch.stack(rows))
    if isinstance(trunk, CARE):
        context = linear("context1", relu(norm(linear("context0", told))))
        encoded = torch.stack([in_a_row("encoder", x, 2, k) for k in range(trunk.encoders)])
        attention = (encoded @ context.detach()).softmax(0)
        attended = (attention[..., None] * encoded).sum(0)
        joined = torch.cat([context.expand(len(x), -1), attended], -1)
        return in_a_row("torso", joined, depth, last=True)
    if isinstance(trunk, PaCo):
        z, mix = x, vector("mix")
        for number in range(depth):
            theta = [
                sum(w * part for w, part in zip(mix, p[f"layer{number}_{kind}"], strict=True))
                for kind in ("weight", "bias")
            ]
            z = relu(norm(z @ theta[0] + theta[1]))
        return z
    assert isinstance(trunk, SoftModules)
    f = norm(in_a_row("observe", x, depth - 1))
    e = linear("join1", relu(linear("join0", relu(vector("task") * f))))
    given = [relu(f)] * trunk.modules
    routes = []
    for number in range(trunk.layers):
        known = e * linear(f"before{number}", torch.cat(routes, -1)) if routes else e
        logits = linear(f"route{number}", relu(known))
        out = [linear(f"module{number}", z, j) for j, z in enumerate(given)]
        targets = logits.split(trunk.modules, -1)  # for each target, over its sources
        shares = [each.softmax(-1) for each in targets]
        given = [relu(sum(s[:, j, None] * out[j] for j in range(len(out)))) for s in shares]
        routes += shares
    assert len(given) == 1
    return given[0]


def of_one(problem, n, t):
    """Return the parameters of only one network and task, as leaves."""
    shared = {k: v[n].clone().requires_grad_() for k, v in problem.shared.items()}
    own = {k: v[n, t].clone().requires_grad_() for k, v in problem.per_task.items()}
    return shared, own, {k: v[n, t] for k, v in problem.fixed.items()}


def truth(problem):
    """Return gradients `[N, T, …]`, losses and features by one backward per network and task."""
    trunk, n_tasks = problem.trunk.trunk, problem.inputs.shape[1]
    rows, losses, features = [], [], []
    for n in range(N):
        for t in range(n_tasks):
            shared, own, fixed = of_one(problem, n, t)
            z = plain(trunk, shared | own | fixed, problem.inputs[0, t])
            outputs = z @ own["head_weight"] + own["head_bias"]
            loss = (outputs - problem.targets[0][t]).square().mean()
            loss.backward()
            rows.append({k: v.grad for k, v in (shared | own).items()})
            losses.append(loss.detach())
            features.append(z.detach())
    stacked = {k: torch.stack([row[k] for row in rows]).unflatten(0, (N, n_tasks)) for k in rows[0]}
    losses, features = (torch.stack(f).unflatten(0, (N, n_tasks)) for f in (losses, features))
    return stacked, losses, features


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-8)


def weights_of(n_tasks):
    return torch.linspace(-1, 2, N * n_tasks, dtype=torch.float64).view(N, n_tasks)


@each_trunk
@pytest.mark.parametrize("n_tasks", [T, 1])
def test_features_and_gradients_are_those_of_the_equations_task_by_task(trunk, n_tasks):
    """The row of a task depends only on its own parameters and samples."""
    problem = make_problem(trunk, n_tasks)
    expected, losses, features = truth(problem)
    close(
        problem.trunk(problem.shared, {**problem.per_task, **problem.fixed}, problem.inputs),
        features,
    )
    close(problem.losses(), losses)
    shared = {k: v for k, v in expected.items() if k in problem.shared}
    own = {k: v for k, v in expected.items() if k in problem.per_task}
    weights = weights_of(n_tasks)
    for engine in ("jacobian", "factored"):
        found = replace(problem, engine=engine).task_gradients()
        close(found.losses, losses)
        close(found.gramian(), gramian(shared))
        gradients = found.weighted(weights)
        assert gradients.shared.keys() == problem.shared.keys()
        assert gradients.per_task.keys() == problem.per_task.keys()
        for name, value in combine(weights, shared).items():
            close(gradients.shared[name], value)
        for name, value in own.items():
            close(gradients.per_task[name], value / n_tasks)
    paused = problem.features().weighted(weights)
    for name, value in combine(weights, shared).items():
        close(paused.shared[name], value)


@each_trunk
@pytest.mark.parametrize("engine", ["jacobian", "factored"])
def test_products_of_the_gradients(trunk, engine):
    problem = make_problem(trunk, engine=engine)
    other = replace(problem, inputs=problem.inputs.flip(2).sin(), targets=(-problem.targets[0],))
    (one, *_), (two, *_) = truth(problem), truth(other)
    generator = torch.Generator().manual_seed(3)
    direction = {
        k: torch.randn(v.shape, generator=generator, dtype=torch.float64)
        for k, v in problem.shared.items()
    }
    found = problem.task_gradients()
    along = sum((one[k] * direction[k][:, None]).flatten(2).sum(-1) for k in direction)
    close(found.along(direction), along)
    products = sum((one[k] * two[k]).flatten(2).sum(-1) for k in direction)
    close(found.products(other.task_gradients()), products)


@each_trunk
@pytest.mark.parametrize("multi_head", [True, False])
def test_acting_row_by_row_equals_the_batch(trunk, multi_head):
    """Rows of any tasks in any order, each as a task of one sample, as in `Policy.act`."""
    networks = make(trunk, multi_head=multi_head)
    x = torch.randn(N, T, B, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    function = networks.folded()
    expected = function(x)
    order = torch.randperm(T * B, generator=torch.Generator().manual_seed(3))
    tasks = torch.arange(T).repeat_interleave(B)[order]
    own = {name: value[:, tasks] for name, value in function.per_task.items()}
    found = function._replace(per_task=own)(x.flatten(1, 2)[:, order, None])
    close(found[:, :, 0], expected.flatten(1, 2)[:, order])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("moore", ({"experts": 4}, {"experts": 6})),
        ("paco", ({"sets": 5}, {"sets": 20})),
        ("care", ({"encoders": 6, "size": 50}, {"encoders": 10, "size": 50})),
        (
            "soft-modules",
            (
                {"layers": 2, "modules": 2, "width": 256},
                {"layers": 4, "modules": 4, "width": 128},
            ),
        ),
    ],
)
def test_a_name_without_options_has_the_papers_sizes(name, sizes):
    for n_tasks, expected in zip((10, 50), sizes, strict=True):
        trunk = trunk_of(AgentConfig(trunk=name), "actor").for_tasks(n_tasks)
        assert {key: getattr(trunk, key) for key in expected} == expected
        assert trunk.widths == (400, 400, 400)


def test_actor_and_critics_may_differ():
    config = AgentConfig(
        actor_trunk="film(embedding=7)", critic_hidden_sizes=(5, 6), layer_norm=True
    )
    assert trunk_of(config, "actor") == FiLM(layer_norm=True, embedding=7)
    assert trunk_of(config, "critic") == MLP((5, 6), layer_norm=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("more", "trunk: unknown 'more'; did you mean 'moore'?"),
        ("moore(expert=4)", "trunk: option of moore: unknown 'expert'; did you mean 'experts'?"),
        ("moore(4)", "trunk: expected NAME or NAME(option=value, …), got 'moore(4)'"),
        ("moore(experts=0)", "trunk: expected experts from 1 to 256, got 0"),
        ("moore(experts=1.5)", "trunk: expected experts from 1 to 256, got 1.5"),
        ("moore(experts=None, widths=())", "trunk: expected widths of 1 to 256 layers, got ()"),
        ("paco(loss_limit=0)", "trunk: expected loss_limit above 0, got 0"),
        ("mlp(task_input='words')", "trunk: expected task_input one-hot, embedding, description"),
        ("mlp(widths=(3, 0))", "trunk: expected widths from 1 to 65536, got 0"),
        ("mlp(layer_norm=1)", "trunk: expected layer_norm True or False, got 1"),
        ("residual(widths=(3, 4))", "trunk: expected equal widths for a residual trunk"),
    ],
)
def test_invalid_descriptions_are_rejected(spec, message):
    with pytest.raises(UsageError) as refused:
        get_trunk(spec)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_how_the_task_is_told():
    """By the configuration, unless the trunk's own text says so."""
    assert [get_trunk(name).told for name in ("moore", "film", "care")] == [
        "one-hot",
        "embedding",
        "description",
    ]
    assert get_trunk("care", embedding=9).told == "embedding"
    assert get_trunk("moore", task_input="description").told == "description"
    found = get_trunk("moore(task_input='one-hot')", task_input="embedding", embedding=9)
    assert found.told == "one-hot" and found.embedding is None
    config = AgentConfig(trunk="paco", task_input="embedding", critic_trunk="mlp(embedding=3)")
    assert trunk_of(config, "actor").told == trunk_of(config, "critic").told == "embedding"
    with pytest.raises(UsageError, match="expected task_input 'embedding' beside embedding=3"):
        get_trunk("mlp(task_input='description', embedding=3)")
    with pytest.raises(ValueError, match="task_embedding: expected task_input 'embedding'"):
        AgentConfig(task_input="one-hot", task_embedding=3)


def test_names_are_checked_without_the_registry():
    for name in REGISTRY.options:
        REGISTRY.check(name)
    with pytest.raises(UsageError, match="option of care: unknown 'expert'"):
        REGISTRY.check("care(expert=4)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_are_made_orthonormal(dtype):
    """For each sample, in float32 or wider, including nearly parallel experts."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(N, 1, T, B, 40, generator=generator)
    vectors = (common + 0.05 * torch.randn(N, 4, T, B, 40, generator=generator)).to(dtype)
    basis = torch.stack(gram_schmidt(vectors), -2)
    products = basis @ basis.mT
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert (products - torch.eye(4, dtype=basis.dtype)).abs().max() < (
        1e-12 if dtype == torch.float64 else 1e-4
    )


def test_no_gradient_goes_from_the_attention_into_the_context():
    trunk = TRUNKS["care"]
    networks = make(trunk)
    shared, own = networks.named()
    deaf = dict(shared)
    deaf["torso0_weight"] = shared["torso0_weight"].clone()
    deaf["torso0_weight"][:, : trunk.size] = 0  # the torso ignores the context
    own = own | {"embedding": own["embedding"].clone().requires_grad_()}
    x = torch.randn(1, T, B, IN, dtype=torch.float64)
    z = trunk(Params(networks.trunk.layers, deaf, own), x)
    (gradient,) = torch.autograd.grad(z.square().sum(), own["embedding"])
    assert not gradient.any()
    attended = TrunkFunction(trunk, networks.trunk.layers)(
        deaf, own | {"embedding": own["embedding"] + 1}, x
    )
    assert not torch.allclose(attended, z)  # but the attention depends on it


def test_tasks_without_descriptions_are_rejected():
    with pytest.raises(UsageError, match="trunk: expected tasks with descriptions"):
        MultiTaskNetworks(
            N,
            T,
            IN,
            OUT,
            get_trunk("care"),
            multi_head=True,
            head_bound=1.0,
            generator=torch.Generator(),
        )


def test_initial_routes_are_alike():
    generator = torch.Generator().manual_seed(0)
    networks = MultiTaskNetworks(
        1, 10, 39, 8, get_trunk("soft-modules"), multi_head=True, head_bound=1, generator=generator
    )
    assert networks.n_features == 256
    for number, outputs in ((0, 4), (1, 2)):
        weight = networks.shared[f"route{number}_weight"]
        assert weight.shape == (1, 256, outputs) and weight.abs().max() <= 1e-3
    bound = math.sqrt(6 / 400)
    assert 0.9 * bound < networks.shared["module0_weight"].abs().max() <= bound
