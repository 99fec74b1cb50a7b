"""Every trunk in the learner: methods, engines, precisions, resuming, files and programs."""

import copy

import numpy as np
import pytest
import torch
from small_learner import ACTION, OBSERVATION, TASKS, filled_replay, make_batch, make_learner
from torch.utils._pytree import tree_leaves

from mtrl.config.sections import AgentConfig
from mtrl.nets.trunks import available_trunks
from mtrl.policy.descriptions import vectors
from mtrl.policy.export import export_policy
from mtrl.policy.policy import Policy
from mtrl.sac.agent import MTSAC
from mtrl.sac.diagnose import diagnose
from mtrl.surgery import available

SPECS = {
    "mlp": "mlp",
    "residual": "residual",
    "film": "film(embedding=4)",
    "soft-modules": "soft-modules(layers=3, modules=2, width=7, size=6)",
    "moore": "moore(experts=3)",
    "care": "care(encoders=3, size=6, embedding=4)",
    "paco": "paco(sets=3)",
}
each_trunk = pytest.mark.parametrize("trunk", SPECS)


def config(trunk: str, **settings) -> AgentConfig:
    return AgentConfig(trunk=SPECS[trunk], hidden_sizes=(12, 12), **settings)


RECIPE = {"layer_norm": True, "normalize_observations": True, "critic_bins": 9}


def test_all_trunks_are_here():
    assert set(SPECS) == set(available_trunks()) - {"two-layers"}  # of the docstring


@each_trunk
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
def test_is_diagnosed(trunk):
    learner, replay = make_learner(surgery="pcgrad", agent=config(trunk)), filled_replay()
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
