"""RotoGrad against explicit rotations, matrix exponentials and autograd."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import small_learner
import torch
from small_learner import make_batch

from mtrl.config.learner import LearnerConfig
from mtrl.errors import UsageError
from mtrl.nets.heads import fold, head
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.trunks import MLP
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.replay import Batch
from mtrl.surgery import RotoGrad, RotoRotate, RotoScale, StackedProblem, get_surgery
from mtrl.surgery.diagnostics import cosines
from mtrl.surgery.methods.rotation import MatrixExponential, orthonormalise_, turn_along_geodesic_

N, T, B, IN, OUT, D = 2, 4, 9, 6, 3, 8
ROTOGRADS = ["rotograd", "rotograd-scale", "rotograd-rotate"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return tensor / tensor.norm(dim=-1, keepdim=True)


def random_rotations(*shape: int, size: int, seed: int = 0) -> torch.Tensor:
    skew = normal(*shape, size, size, seed=seed)
    return torch.matrix_exp(skew - skew.mT)


def networks(size: int | None = None, rotate: bool = True) -> MultiTaskNetworks:
    generator = torch.Generator().manual_seed(0)
    made = MultiTaskNetworks(
        N, T, IN, OUT, MLP((7, D)), multi_head=True, head_bound=1.0, generator=generator
    ).double()
    made.requires_grad_(False)
    if rotate:
        made.add_rotation(size)
    return made


def squared_error(shared, per_task, features, y):
    return (head(shared, per_task, features) - y).square().mean((-2, -1)), {}


def posed(of: MultiTaskNetworks, y: torch.Tensor | None = None) -> StackedProblem:
    x, y = normal(1, T, B, IN, seed=1), normal(T, B, OUT, seed=2) if y is None else y
    return StackedProblem(
        of.trunk, squared_error, dict(of.shared), dict(of.per_task), x, (y,), of.rotation
    )


def plain_features(parameters, x: torch.Tensor) -> torch.Tensor:
    """Independent forward pass on plain matrices: z, `[N, T, B, d]`."""
    z = torch.relu(x @ parameters["weight0"][:, None] + parameters["bias0"][:, :, None])
    return torch.relu(z @ parameters["weight1"][:, None] + parameters["bias1"][:, None, None])


def plain_head(parameters, z: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Apply the head to r = R z, row by row."""
    if rotation is not None:
        m = rotation.shape[-1]
        z = torch.cat([z[..., :m] @ rotation.mT, z[..., m:]], -1)
    return z @ parameters["head_weight"] + parameters["head_bias"][:, :, None]


def update(method: RotoGrad, on: StackedProblem):
    return method(on, torch.Generator())


# ---------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("parallel", [0.0, 1.0, 1e-9, -1.0])
def test_geodesic_step_is_the_matrix_exponential_of_its_skew_matrix(parallel):
    rotation, step = random_rotations(N, T, size=D), 0.3
    u, v = unit(normal(N, T, D)), normal(N, D, seed=3)
    if parallel:  # the plane of rotation degenerates
        u[:, 0] = unit(v + (abs(parallel) < 1) * parallel * u[:, 0]) * (1 if parallel > 0 else -1)
    outer = u[..., :, None] * v[:, None, None, :]
    expected = rotation @ torch.matrix_exp(step * (outer - outer.mT))
    turn_along_geodesic_(rotation, u, v, step)
    torch.testing.assert_close(rotation, expected, atol=1e-12, rtol=0)


def test_a_task_without_a_direction_is_not_rotated():
    rotation, u = random_rotations(T, size=D), unit(normal(T, D))
    u[1] = 0
    before = rotation.clone()
    turn_along_geodesic_(rotation, u, normal(D, seed=3), 0.3)
    assert torch.equal(rotation[1], before[1])
    assert not torch.allclose(rotation[0], before[0])


@pytest.mark.parametrize("order", [[2, 0, 1], [2, 0]])
def test_a_task_changes_its_own_rotation_for_any_order_of_tasks(order):
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(1, len(order), 4, generator=draw, dtype=torch.float64)
    turned, expected = (torch.eye(4).double().repeat(1, 3, 1, 1) for _ in range(2))
    RotoGrad(rotation_lr=0.1)._turn(SimpleNamespace(tasks=order, rotation=turned), means)
    in_order = expected[:, order]
    RotoGrad(rotation_lr=0.1)._turn(SimpleNamespace(tasks=slice(None), rotation=in_order), means)
    expected[:, order] = in_order
    torch.testing.assert_close(turned, expected)
    assert (turned - torch.eye(4)).flatten(2).norm(dim=-1)[0, order].min() > 1e-3


def test_geodesic_step_ascends_at_the_rate_of_its_gradient():
    """d/dη of Σ⟨Rᵀ g̃, v⟩ along the step is half the squared norm of the skew gradient."""
    rotation, u, v = random_rotations(T, size=D), unit(normal(T, D)), normal(D, seed=3)
    pull, eta = (rotation @ u[..., None]).squeeze(-1), 1e-6
    turn_along_geodesic_(rotation, u, v, eta)
    slope = ((rotation.mT @ pull[..., None]).squeeze(-1) @ v - u @ v) / eta
    skew = u[:, :, None] * v - v[:, None] * u[:, None]
    torch.testing.assert_close(slope, skew.square().sum((1, 2)) / 2, rtol=1e-4, atol=0)


def test_first_step_of_both_parametrisations_agrees():
    """At R = I, both follow the same gradient; further on, their metrics differ."""
    geodesic = torch.eye(D).double().repeat(T, 1, 1)
    exponential, paper = geodesic.clone(), MatrixExponential(geodesic)
    u, v = unit(normal(T, D)), normal(D, seed=3)
    turn_along_geodesic_(geodesic, u, v, 0.2)
    paper.turn_(exponential, u, v, 0.2)
    torch.testing.assert_close(exponential, geodesic, atol=1e-12, rtol=0)
    torch.testing.assert_close(paper.weight, exponential)  # the module agrees with its output


@pytest.mark.parametrize(
    ("size", "steps"),
    [
        (32, 20_000),
        pytest.param(32, 100_000, marks=pytest.mark.slow),
        pytest.param(400, 100_000, marks=pytest.mark.slow),
    ],
)
def test_rotations_stay_rotations(size, steps):
    rotation = torch.eye(size).repeat(3, 1, 1)
    directions = unit(normal(1000, 3, size, dtype=torch.float32))
    for i in range(steps):
        u = directions[i % 1000]
        turn_along_geodesic_(rotation, u, directions[(i * 7 + 1) % 1000].mean(0), 0.1)
    eye = torch.eye(size)
    exact = rotation.double()
    assert (exact.mT @ exact - eye).abs().max() < 1e-5
    torch.testing.assert_close(torch.linalg.det(exact), torch.ones(3).double(), atol=1e-3, rtol=0)
    assert (rotation - eye).abs().max() > 0.1  # it has changed


def test_orthonormalising_removes_an_error():
    of, rotation = networks(), random_rotations(N, T, size=D)
    drifted = rotation + 1e-4 * normal(N, T, D, D, seed=5)
    of.rotation = drifted.clone()
    orthonormalise_(drifted)
    assert (drifted.mT @ drifted - torch.eye(D).double()).abs().max() < 1e-6
    assert (drifted - rotation).abs().max() < 1e-3
    RotoGrad().maintain(of)
    torch.testing.assert_close(of.rotation, drifted)


# ----------------------------------------------------------------- rotations in networks


@pytest.mark.parametrize("size", [None, 5])
def test_a_folded_head_equals_the_head_on_rotated_features(size):
    of = networks(size)
    of.rotation = random_rotations(N, T, size=size or D)
    x, parameters = normal(T, B, IN), {**of.shared, **of.per_task}
    expected = plain_head(parameters, plain_features(parameters, x), of.rotation)
    torch.testing.assert_close(of.folded()(x[None]), expected)


@pytest.mark.parametrize("size", [None, 5])
def test_losses_train_the_head_and_never_the_rotation(size):
    of = networks(size)
    of.rotation = random_rotations(N, T, size=size or D)
    before, problem = of.rotation.clone(), posed(of)
    found, rows = problem.features().mean(), problem.task_gradients()
    assert torch.equal(of.rotation, before)
    shared = {k: v.clone().requires_grad_() for k, v in problem.shared.items()}
    own = {k: v.clone().requires_grad_() for k, v in problem.per_task.items()}
    outputs = plain_head(own, plain_features(shared | own, problem.inputs), before)
    (outputs - problem.targets[0]).square().mean((1, 2, 3)).sum().backward()
    for name, leaf in {**shared, **own}.items():
        torch.testing.assert_close({**found.shared, **found.per_task}[name], leaf.grad)
    for name, leaf in own.items():
        torch.testing.assert_close(rows.per_task[name] / T, leaf.grad)


def test_the_initial_identity_changes_nothing():
    plain, rotated = networks(rotate=False), networks()
    x = normal(T, B, IN)
    assert torch.equal(plain.folded()(x[None]), rotated.folded()(x[None]))


def test_invalid_sizes_of_rotations_are_rejected():
    with pytest.raises(UsageError, match="rotation_size: expected at most 8"):
        networks(size=9)
    single = MultiTaskNetworks(
        1, T, IN, OUT, MLP((7, D)), multi_head=False, head_bound=1.0, generator=torch.Generator()
    )
    with pytest.raises(UsageError, match="heads: expected 'multi'"):
        single.add_rotation()


# ------------------------------------------------------------------------------ RotoScale


def feature_gradients(of: MultiTaskNetworks) -> torch.Tensor:
    """`[N, T, B, d]`, by plain autograd."""
    problem = posed(of)
    z = plain_features({**of.shared, **of.per_task}, problem.inputs).requires_grad_()
    losses = (plain_head(of.per_task, z, of.rotation) - problem.targets[0]).square().mean((2, 3))
    return torch.autograd.grad(losses.sum(), z)[0]


def test_scaled_gradients_have_one_norm_and_follow_the_papers_formula():
    of = networks(rotate=False)
    method = RotoScale()
    method.prepare(of)
    of.per_task["head_weight"][:, 0] *= 5  # very different magnitudes
    norms = feature_gradients(of).norm(dim=(2, 3))
    scaled = T * update(method, posed(of)).weights * norms
    mean = norms.mean(1, keepdim=True)  # α_k = 1/T when all n_k are n_k⁰
    torch.testing.assert_close(scaled, mean.expand(N, T))

    initial = norms
    of.per_task["head_weight"][:, 1] *= 0.1  # task 1 has made progress, so it counts less
    norms = feature_gradients(of).norm(dim=(2, 3))
    alpha = (norms / initial) / (norms / initial).sum(1, keepdim=True)
    found = update(method, posed(of))
    torch.testing.assert_close(found.weights, (alpha * norms).sum(1, keepdim=True) / norms / T)
    rows = posed(of).task_gradients()
    for name, gradient in found.shared.items():
        expected = torch.einsum("nt,nt...->n...", found.weights, rows.shared[name])
        torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(found.per_task["head_weight"], rows.per_task["head_weight"] / T)


def test_initial_norms_are_bounded_and_measured_again():
    of = networks(rotate=False)
    method = RotoScale(reset_every=3)
    method.prepare(of)
    full = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]).double()
    tiny = torch.tensor([[1.0] * T, [10.0] * T]).double()
    tiny[0, 2] = tiny[1, 3] = 1e-12
    method.weights(slice(None), tiny)
    method.updates.fill_(1)
    weights = method.weights(slice(None), full)
    # Without the floor such a task would have ρ ≥ 10¹² and all of α; with it ρ ≤ 400.
    rho = full / torch.where(tiny < 1, 0.01 * tiny.mean(1, keepdim=True), tiny)
    alpha = rho / rho.sum(1, keepdim=True)
    torch.testing.assert_close(weights * T, (alpha * full).sum(1, keepdim=True) / full)
    torch.testing.assert_close(method.initial_norms, tiny)
    method.updates.fill_(3)
    method.weights(slice(None), full)
    torch.testing.assert_close(method.initial_norms, full)


def test_tasks_without_a_gradient_have_weight_zero():
    method = RotoScale()
    method.prepare(networks(rotate=False))
    norms = torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 1.0, 0.0, 2.0]]).double()
    weights = method.weights(slice(None), norms)
    assert not weights[norms == 0].any() and (weights[norms > 0] > 0).all()
    assert weights.isfinite().all()
    nothing = torch.zeros(N, T).double()
    assert torch.equal(method.weights(slice(None), nothing), nothing)


# ----------------------------------------------------------------------------- RotoRotate


def opposed(method: RotoGrad) -> tuple[MultiTaskNetworks, StackedProblem]:
    """Tasks with nearly opposite feature gradients, each with its own inputs."""
    of = networks(rotate=False)
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0]).double()[:, None, None]
    weight = signs * normal(N, 1, D, OUT, seed=7) + 0.1 * normal(N, T, D, OUT, seed=15)
    of.per_task["head_weight"].copy_(weight)
    method.prepare(of)
    return of, posed(of, torch.full((T, B, OUT), 10.0).double())


def mean_cosines(problem: StackedProblem) -> torch.Tensor:
    """Return the agreement of each network's tasks, `[N]`."""
    means = problem.features().means
    first, second = torch.triu_indices(T, T, 1)
    return cosines(means @ means.mT)[:, first, second].mean(1)


def most(change: torch.Tensor) -> torch.Tensor:
    """Return the largest entry of each network, `[N]`."""
    return change.abs().amax((1, 2, 3))


@pytest.mark.parametrize("step", ["geodesic", "matrix_exp"])
def test_opposed_tasks_with_separate_inputs_come_to_agree(step):
    method = RotoRotate(rotation_lr=0.05, rotation_step=step)
    of, on = opposed(method)
    weights = {k: v.clone() for k, v in of.named_parameters()}
    before = mean_cosines(on)
    for _ in range(300):
        update(method, on)
    assert (before < -0.2).all()
    assert (mean_cosines(on) > 0.9).all()
    assert all(torch.equal(weights[k], v) for k, v in of.named_parameters())


def test_the_published_row_wise_objective_does_not_move_them():
    """It compares every task with zeros, sample by sample: the reason for our objective."""
    method = RotoRotate(rotation_lr=0.05)
    of, on = opposed(method)
    skew = torch.zeros(N, T, D, D).double().requires_grad_()
    rotation = torch.matrix_exp(skew - skew.mT)
    constant = rotation.detach()
    seen = plain_features({**of.shared, **of.per_task}, on.inputs) @ constant.mT
    outputs = plain_head(of.per_task, seen.requires_grad_(), None)
    losses = (outputs - on.targets[0]).square().mean((2, 3))
    (pulls,) = torch.autograd.grad(losses.sum(), seen)
    rows = torch.zeros(N, T, T, B, D).double()  # G_k over all rows of the joint batch
    rows[:, range(T), range(T)] = pulls @ constant
    direction = torch.nn.functional.normalize(rows, dim=-1).mean(1)  # v, row by row
    aligned = torch.cosine_similarity(pulls @ rotation, direction, dim=-1).sum()
    (published,) = torch.autograd.grad(aligned, skew)
    assert published.abs().max() < 1e-12
    update(method, on)
    assert (most(of.rotation - torch.eye(D)) > 1e-3).all()  # ours, at the same point


@pytest.mark.parametrize(
    ("rate", "decay", "turns"),
    [(0.0, 1.0, (False, False)), (0.05, 1.0, (True, True)), (0.05, 1e-15, (True, False))],
)
def test_rate_and_decay(rate, decay, turns):
    method = RotoRotate(rotation_lr=rate, rotation_decay=decay)
    of, on = opposed(method)
    for turned in turns:
        before = of.rotation.clone()
        update(method, on)
        assert ((most(of.rotation - before) > 1e-4) == turned).all()


# ------------------------------------------------------------------------------ in MTSAC


make_learner = partial(small_learner.make_learner, dtype=torch.float64, rotation_lr=0.1)


@pytest.mark.parametrize("method", ROTOGRADS)
def test_a_single_task_is_plain_sac(method):
    batch, noise = make_batch(1)
    plain, other = make_learner(1, surgery="none"), make_learner(1, surgery=method)
    for _ in range(3):
        plain.update(batch, noise)
        other.update(batch, noise)
    for (name, a), (_, b) in zip(
        plain.agent.named_parameters(), other.agent.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("step", ["geodesic", "matrix_exp"])
def test_rotations_of_actor_and_critics_are_independent(step):
    learner = make_learner(5, surgery="rotograd", rotation_step=step, rotation_size=6)
    for seed in range(3):
        learner.update(*make_batch(5, seed))
    actor, critics = learner.agent.actor.rotation, learner.agent.critics.rotation
    assert actor.shape == (1, 5, 6, 6) and critics.shape == (2, 5, 6, 6)
    for rotation in (actor[0], critics[0], critics[1]):
        assert (rotation - torch.eye(6)).abs().amax((1, 2)).min() > 1e-3
        torch.testing.assert_close(rotation.mT @ rotation, torch.eye(6).double().expand(5, 6, 6))
    assert not torch.allclose(critics[0], critics[1])
    assert learner.agent.target_critics.rotation is None


def test_target_critics_follow_heads_with_rotations_folded_in():
    learner = make_learner(5, surgery="rotograd", tau=0.25)
    learner.update(*make_batch(5))
    before = copy.deepcopy(learner.agent.target_critics)
    learner.update(*make_batch(5, 1))
    of = learner.agent.critics
    expected = before.per_task["head_weight"] * 0.75 + 0.25 * (
        of.rotation.mT @ of.per_task["head_weight"]
    )
    found = learner.agent.target_critics.per_task["head_weight"]
    torch.testing.assert_close(found, expected)
    learner.config.__dict__["tau"] = 1.0  # targets equal the critics
    learner.update(*make_batch(5, 2))
    x = normal(5, 4, 10)
    torch.testing.assert_close(learner.agent.target_critics.folded()(x[None]), of.folded()(x[None]))


@pytest.mark.parametrize("step", ["geodesic", "matrix_exp"])
def test_saved_policies_act_with_their_rotations(step, tmp_path):
    learner = make_learner(3, surgery="rotograd", rotation_step=step)
    learner.agent.float()
    learner = Learner(learner.agent, learner.config)
    for seed in range(3):
        batch, noise = make_batch(3, seed)
        learner.update(Batch(**{k: v.float() for k, v in vars(batch).items()}), noise.float())
    agent, path = learner.agent, tmp_path / "policy.safetensors"
    agent.save(path)
    loaded = MTSAC.load(path)
    torch.testing.assert_close(loaded.actor.rotation, agent.actor.rotation)
    observation = normal(3, 7, dtype=torch.float32).numpy()
    actions, _ = agent.predict(observation, deterministic=True)
    again, _ = loaded.predict(observation, deterministic=True)
    assert (actions == again).all()
    agent.actor.rotation = agent.actor.rotation.roll(1, -1)
    assert (agent.predict(observation, deterministic=True)[0] != actions).any()


@pytest.mark.parametrize("step", ["geodesic", "matrix_exp"])
@pytest.mark.parametrize("method", ROTOGRADS)
def test_a_restored_state_continues_exactly(method, step):
    def fresh() -> Learner:
        return make_learner(3, surgery=method, rotation_step=step, rotation_decay=0.5)

    through, first, second = fresh(), fresh(), fresh()
    for seed in range(4):
        through.update(*make_batch(3, seed))
    for seed in range(2):
        first.update(*make_batch(3, seed))
    second.agent.load_state_dict(first.agent.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(2, 4):
        second.update(*make_batch(3, seed))
    for name, value in through.agent.state_dict().items():
        assert torch.equal(value, second.agent.state_dict()[name]), name


def test_options_in_parentheses_override_the_configuration():
    config = LearnerConfig(rotation_lr=0.5, rotation_size=4)
    method = get_surgery("rotograd(rotation_lr=0.25, reset_every=7)", config)
    assert isinstance(method, RotoGrad)
    assert (method.rotation_lr, method.rotation_size, method.reset_every) == (0.25, 4, 7)
    with pytest.raises(UsageError, match="did you mean 'reset_every'"):
        get_surgery("rotograd(reset_evry=7)", config)


def test_fold_accepts_non_contiguous_weights():
    rotation, weight = random_rotations(T, size=D), normal(T, OUT, D).mT
    torch.testing.assert_close(fold(rotation, weight), rotation.mT @ weight)
