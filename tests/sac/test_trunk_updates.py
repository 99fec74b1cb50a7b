"""Every trunk in the learner: methods, engines, precisions, resuming, files and programs."""

import copy

import numpy as np
import pytest
import torch
from small_learner import ACTION, OBSERVATION, TASKS, filled_replay, make_batch, make_learner
from torch.utils._pytree import tree_leaves

from mtrl.config.agent import AgentConfig
from mtrl.errors import UsageError
from mtrl.nets.trunks import available_trunks
from mtrl.policy.descriptions import vectors
from mtrl.policy.export import export_policy
from mtrl.policy.policy import Policy
from mtrl.policy.unseen import in_tasks
from mtrl.sac.agent import MTSAC
from mtrl.sac.diagnose import diagnose
from mtrl.sac.problems import critic_problem
from mtrl.surgery import available

SPECS = {
    "mlp": "mlp",
    "residual": "residual",
    "film": "film(embedding=4)",
    "soft-modules": "soft-modules(layers=3, modules=2, width=7, size=6)",
    "moore": "moore(experts=3)",
    "care": "care(encoders=3, size=6, embedding=4)",
    "paco": "paco(sets=3)",
    "paco, limited": "paco(sets=3, loss_limit=100.0)",
    "soft-modules, weighed": "soft-modules(layers=2, width=7, size=6, loss_weights=True)",
    "film, one-hot": "film(task_input='one-hot')",
    "moore, embedding": "moore(experts=3, embedding=4)",
}
PLAIN = [name for name in SPECS if "," not in name]
each_trunk = pytest.mark.parametrize("trunk", SPECS)


def config(trunk: str, **settings) -> AgentConfig:
    return AgentConfig(trunk=SPECS[trunk], hidden_sizes=(12, 12), **settings)


RECIPE = {"layer_norm": True, "normalize_observations": True, "critic_bins": 9}


def test_all_trunks_are_here():
    found = {name.split(",")[0] for name in SPECS}
    assert found == set(available_trunks()) - {"two-layers"}  # of the docstring


@pytest.mark.parametrize("trunk", PLAIN)
@pytest.mark.parametrize("surgery", available())
def test_updates_with_every_method(trunk, surgery):
    """With the parts of the recipe, every parameter gets a finite gradient and changes."""
    learner = make_learner(surgery=surgery, agent=config(trunk, **RECIPE), learning_rate=1e-2)
    before = copy.deepcopy(learner.agent.state_dict())
    replay = filled_replay()
    for _ in range(3):
        metrics = learner.step(replay)
    assert all(value.isfinite().all() for value in metrics.values())
    for name, value in learner.agent.state_dict().items():
        assert value.isfinite().all(), name
        if name.startswith(("actor.shared", "actor.per_task", "critics")):
            assert not torch.equal(value, before[name]), name


@each_trunk
def test_engines_and_precisions_update_alike(trunk):
    """In float64, with factors instead of gradients, and in bf16, which rounds to 8 bits."""
    batch, noise = make_batch(len(TASKS))
    found = {}
    for key, dtype, settings in (
        ("exact", torch.float64, {}),
        ("factored", torch.float64, {"gradient_engine": "factored"}),
        ("float32", torch.float32, {}),
        ("bf16", torch.float32, {}),
    ):
        learner = make_learner(
            surgery="pcgrad", agent=config(trunk), dtype=dtype, max_grad_norm=0, **settings
        )
        if key == "bf16":
            learner.precision = "bf16"  # even if this CPU emulates it
        kind = {name: value.to(dtype) for name, value in vars(batch).items()}
        metrics = learner.update(type(batch)(**kind), noise.to(dtype))
        gradients = [p.grad.double() for p in learner.agent.critics.parameters()]
        found[key] = torch.cat([g.flatten() for g in gradients]), metrics["critic_loss"].double()
    exact, loss = found["exact"]
    for key, tolerance in (("factored", 1e-9), ("float32", 1e-3), ("bf16", 0.2)):
        gradient, other = found[key]
        assert (gradient - exact).norm() < tolerance * exact.norm(), key
        torch.testing.assert_close(other, loss, rtol=tolerance / 4, atol=0)


@each_trunk
def test_a_resumed_run_equals_an_uninterrupted_one(trunk):
    replay = filled_replay()
    straight = make_learner(surgery="rotograd", agent=config(trunk, **RECIPE))
    stopped = make_learner(surgery="rotograd", agent=config(trunk, **RECIPE))
    state = replay.generator.get_state()
    for _ in range(5):
        expected = straight.step(replay)
    replay.generator.set_state(state)
    for _ in range(2):
        stopped.step(replay)
    resumed = make_learner(surgery="rotograd", agent=config(trunk, **RECIPE), seed=9)
    resumed.agent.load_state_dict(stopped.agent.state_dict())
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for _ in range(3):
        found = resumed.step(replay)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    for name, value in straight.agent.state_dict().items():
        assert torch.equal(value, resumed.agent.state_dict()[name]), name


@each_trunk
def test_a_single_task(trunk):
    """Without conflicts, PCGrad gives the plain gradient."""
    batch, noise = make_batch(1)
    updated = []
    for surgery in ("none", "pcgrad"):
        learner = make_learner(1, surgery=surgery, agent=config(trunk), dtype=torch.float64)
        learner.update(batch, noise)
        updated.append(learner.agent.state_dict())
    for name, value in updated[0].items():
        torch.testing.assert_close(value, updated[1][name], atol=1e-12, rtol=1e-9)


@each_trunk
def test_updates_in_bf16_with_rotations_and_the_recipe(trunk):
    """Parameters stay in float32, finite, and are not far from those of float32 products."""
    found = {}
    for precision in ("fp32", "bf16"):
        learner = make_learner(surgery="rotograd", agent=config(trunk, **RECIPE))
        learner.precision = precision  # even if this CPU emulates bf16
        replay = filled_replay()
        before = torch.cat([p.flatten() for p in learner.agent.parameters()])
        for _ in range(3):
            learner.step(replay)
        assert {p.dtype for p in learner.agent.parameters()} == {torch.float32}
        after = torch.cat([p.flatten() for p in learner.agent.parameters()])
        found[precision] = after - before
    exact, rounded = found["fp32"], found["bf16"]
    assert rounded.isfinite().all() and not torch.equal(exact, rounded)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.9


@each_trunk
@pytest.mark.parametrize("settings", [{}, RECIPE], ids=["plain", "recipe"])
@pytest.mark.parametrize("surgery", ["pcgrad", "rotograd"])
def test_is_diagnosed(trunk, settings, surgery):
    learner = make_learner(surgery=surgery, agent=config(trunk, **settings))
    replay = filled_replay()
    for diagnosis in diagnose(learner, replay).values():
        measures = tree_leaves(diagnosis.measures)
        assert all(value.isfinite() for value in measures)
        torch.testing.assert_close(
            diagnosis.cosines.diagonal(), torch.ones(len(TASKS), dtype=torch.float64)
        )


def actions(policy, rows: np.ndarray) -> np.ndarray:
    return policy.predict(rows, deterministic=True)[0]


@each_trunk
@pytest.mark.parametrize("heads", ["multi", "single"])
def test_files_hold_the_policy(trunk, heads, tmp_path):
    """Loaded and exported policies, with rotations folded in, act like the trained one."""
    surgery = "rotograd" if heads == "multi" else "pcgrad"
    agent = config(trunk, **RECIPE, heads=heads)
    learner = make_learner(surgery=surgery, agent=agent, learning_rate=1e-2)
    learner.step(filled_replay(), 3)
    saved, exported = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    learner.agent.save(saved)
    export_policy(saved, exported)
    draw = np.random.default_rng(0)
    index = draw.integers(len(TASKS), size=9)
    rows = np.concatenate([draw.normal(size=(9, OBSERVATION)), np.eye(len(TASKS))[index]], 1)
    expected = actions(learner.agent, rows)
    assert expected.shape == (9, ACTION) and np.abs(expected).max() > 1e-3
    assert np.array_equal(actions(MTSAC.load(saved), rows), expected)
    np.testing.assert_allclose(actions(Policy.load(exported), rows), expected, atol=1e-6)
    if heads == "multi" and torch.__version__ >= "2.7":
        program = tmp_path / "c.pt2"
        export_policy(saved, program)
        run = torch.export.load(program).module()
        for part in (rows, rows[:1]):
            given = torch.from_numpy(part.astype(np.float32))
            found = run(given).detach().numpy()
            np.testing.assert_allclose(found, expected[: len(part)], atol=1e-5)


def test_descriptions_are_inputs_and_not_trained(tmp_path):
    """For two Meta-World tasks: equal vectors before and after, in files and in the program."""
    tasks = ("push-v3", "reach-v3")
    agent = AgentConfig(trunk="care(encoders=3, size=6)", hidden_sizes=(12, 12), **RECIPE)
    learner = make_learner(tasks, agent=agent, surgery="pcgrad", weight_decay=0.1)
    expected = torch.from_numpy(vectors(tasks))
    learner.step(filled_replay(2), 3)
    for networks in (*learner.agent.networks().values(), learner.agent.target_critics):
        for told in networks.fixed.description:
            assert torch.equal(told, expected)
    diagnose(learner, filled_replay(2))
    saved, program = tmp_path / "a.safetensors", tmp_path / "a.pt2"
    learner.agent.save(saved)
    loaded = Policy.load(saved)
    assert torch.equal(loaded.actor.fixed.description[0], expected)
    rows = np.random.default_rng(0).normal(size=(2, OBSERVATION))
    assert np.array_equal(actions(loaded, rows), actions(learner.agent, rows))
    if torch.__version__ >= "2.7":
        export_policy(saved, program)
        given = np.concatenate([rows, np.eye(2)], 1).astype(np.float32)
        found = torch.export.load(program).module()(torch.from_numpy(given)).detach().numpy()
        np.testing.assert_allclose(found, actions(loaded, rows), atol=1e-5)


def updated(trunk: str, surgery: str = "none", n_tasks: int = 3, seed: int = 0, **settings):
    """A learner after one update in float64, and what it was fed."""
    agent = AgentConfig(trunk=trunk, hidden_sizes=(12, 12))
    learner = make_learner(
        n_tasks, surgery=surgery, agent=agent, dtype=torch.float64, max_grad_norm=0, **settings
    )
    return learner, make_batch(n_tasks)


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
@pytest.mark.parametrize("engine", ["jacobian", "factored"])
def test_pacos_masked_tasks_count_for_nothing(surgery, engine):
    """Section 3.3: the others' update is as if its gradient were zero; w_t is drawn anew."""
    learner, (batch, noise) = updated("paco(sets=3)", surgery, gradient_engine=engine)
    problem = critic_problem(
        learner.agent, learner.config, batch, noise=noise[0], alpha=learner.agent.log_alpha.exp()
    )
    losses = problem.losses()
    limit = float(losses.max(1).values.min()) * 0.999  # the largest of each critic is beyond it
    masked = losses > limit
    assert 0 < masked.sum() < masked.numel()
    limited, _ = updated(f"paco(sets=3, loss_limit={limit!r})", surgery, gradient_engine=engine)
    other = critic_problem(
        limited.agent, limited.config, batch, noise=noise[0], alpha=limited.agent.log_alpha.exp()
    )
    close = torch.testing.assert_close
    close(other.losses(), losses)  # told as they are
    found, plain = other.task_gradients(), problem.task_gradients()
    kept = (~masked).double()
    close(found.gramian(), plain.gramian() * kept[:, :, None] * kept[:, None])
    weights = torch.rand(losses.shape, dtype=torch.float64)
    expected = plain.combine(weights * kept)
    for name, value in found.combine(weights).items():
        close(value, expected[name])
    before = limited.agent.critics.per_task["mix"].clone()
    learner.update(batch, noise)
    limited.update(batch, noise)
    after, untouched = (x.agent.critics.per_task["mix"] for x in (limited, learner))
    for n, t in masked.nonzero().tolist():
        others = after[n][~masked[n]]
        shares = torch.linalg.lstsq(others.T, after[n, t]).solution
        if len(others) < after.shape[-1]:
            close(others.T @ shares, after[n, t])
            close(shares.sum(), torch.ones((), dtype=torch.float64))
            assert (shares > 0).all()
        assert not torch.equal(after[n, t], before[n, t])
    assert not torch.equal(after, untouched)


def test_no_task_within_the_limit_leaves_paco_as_it_is():
    learner, (batch, noise) = updated("paco(sets=3, loss_limit=1e-9)")
    before = copy.deepcopy(learner.agent.state_dict())
    learner.update(batch, noise)
    for name, value in learner.agent.state_dict().items():
        if name.startswith("critics."):
            assert torch.equal(value, before[name]), name


def test_soft_modules_weigh_losses_by_the_temperatures():
    """T softmax(−log α): tasks whose α is half as large as another's count twice as much."""
    text = "soft-modules(layers=2, modules=2, width=7, size=6{})"
    alpha = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    found = []
    for more in ("", ", loss_weights=True"):
        learner, (batch, noise) = updated(text.format(more))
        problem = critic_problem(
            learner.agent, learner.config, batch, noise=noise[0], alpha=alpha, precision="fp32"
        )
        found.append(problem.task_gradients())
    factors = 3 * torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64) / 7
    torch.testing.assert_close(found[1].losses, found[0].losses)
    expected = found[0].gramian() * factors[:, None] * factors
    torch.testing.assert_close(found[1].gramian(), expected)


DESCRIBED = ("mlp", "film", "soft-modules", "moore", "care", "paco", f"{__name__}:narrow")


def narrow(n_inputs: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(n_inputs, 5), torch.nn.Tanh())


@pytest.mark.parametrize("trunk", DESCRIBED)
def test_a_policy_told_descriptions_acts_in_a_task_it_never_saw(trunk, tmp_path):
    """As the one that has the new description in an old task's place, from a file as well."""
    draw = np.random.default_rng(0)
    told = {name: draw.normal(size=4).tolist() for name in ("a", "b", "new")}
    config = AgentConfig(
        trunk=trunk, task_input="description", heads="single", hidden_sizes=(12, 12)
    )
    mine = {name: told[name] for name in ("a", "b")}
    agent = MTSAC(("a", "b"), config, OBSERVATION, ACTION, descriptions=mine)
    for parameter in agent.actor.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    agent.save(tmp_path / "a.safetensors")
    rows = draw.normal(size=(6, OBSERVATION))
    found = in_tasks(Policy.load(tmp_path / "a.safetensors"), ("new", "b"), {"new": told["new"]})
    assert found.tasks == ("new", "b")
    agent.actor.fixed.description[0, 0] = torch.tensor(told["new"])
    for task, same in (("new", "a"), ("b", "b")):
        expected = agent.predict(rows, task=same, deterministic=True)[0]
        np.testing.assert_allclose(
            found.predict(rows, task=task, deterministic=True)[0], expected, atol=1e-6
        )
    for wrong, message in (
        ({"new": told["new"][:2]}, "expected vectors of length 4, .* got 2"),
        ({}, "expected a vector for each task, got none for 'new'"),
        (None, "expected a vector for each of new"),
        ({"new": [1.0, float("nan"), 0.0, 0.0]}, "finite numbers for 'new'"),
    ):
        with pytest.raises(UsageError, match=message):
            in_tasks(agent, ("new",), wrong)


@pytest.mark.parametrize(
    "config", [AgentConfig(), AgentConfig(task_input="description"), AgentConfig(heads="single")]
)
def test_other_policies_act_where_they_were_trained_alone(config):
    policy = Policy(("reach-v3", "push-v3"), config, OBSERVATION, ACTION)
    with pytest.raises(UsageError, match=r"unknown 'pick-place-v3'.*task_input 'description'"):
        in_tasks(policy, ("reach-v3", "pick-place-v3"))
