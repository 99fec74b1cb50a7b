"""What a run takes over from a policy, and what it leaves as it was there."""

import copy

import numpy as np
import pytest
import torch
from small_learner import ACTION, HIDDEN, OBSERVATION, filled_replay, make_learner

from mtrl.config.agent import AgentConfig
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.policy.export import export_policy
from mtrl.sac.agent import MTSAC
from mtrl.sac.diagnose import diagnose
from mtrl.sac.learner import Learner
from mtrl.sac.transfer import adopted, read_source, transfer

CONFIG = AgentConfig(hidden_sizes=HIDDEN, normalize_observations=True, initial_temperature=0.3)
BEFORE, NOW = ("a", "b", "c"), ("c", "new", "a", "other")


@pytest.fixture
def source() -> MTSAC:
    """Trained a little, so that targets and temperatures are their own."""
    learner = make_learner(BEFORE, agent=CONFIG)
    learner.agent.normalizer.observe(torch.randn(50, OBSERVATION) * 3 + 1)
    learner.step(filled_replay(3), 3)
    return learner.agent


def agent_of(tasks: tuple[str, ...] = NOW, config: AgentConfig = CONFIG) -> MTSAC:
    return MTSAC(tasks, config, OBSERVATION, ACTION, seed=5)


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_trunks_heads_by_name_and_normaliser_are_the_files(source, tmp_path):
    source.save(tmp_path / "p.safetensors")
    agent = agent_of()
    began = copy.deepcopy(agent.state_dict())
    assert transfer(agent, read_source(tmp_path / "p.safetensors")) == ("c", "a")
    theirs, ours = source.state_dict(), agent.state_dict()
    for name, value in ours.items():
        if ".per_task." in name:
            assert torch.equal(value[:, [0, 2]], theirs[name][:, [2, 0]]), name
            assert torch.equal(value[:, [1, 3]], began[name][:, [1, 3]]), name
        elif name == "log_alpha":
            assert value[[0, 2]].tolist() == theirs[name][[2, 0]].tolist()
            assert value[[1, 3]].tolist() == began[name][[1, 3]].tolist()
        else:  # trunks of actor, critics and targets, and the normaliser
            assert torch.equal(value, theirs[name]), name
    assert differing(began, theirs) >= {"target_critics.shared.weight0", "normalizer.mean"}


@pytest.mark.parametrize("surgery", ["none", "rotograd"])
def test_known_tasks_act_as_before_rotations_included(surgery, tmp_path):
    learner = make_learner(BEFORE, agent=CONFIG, surgery=surgery, rotation_lr=0.3)
    learner.step(filled_replay(3), 5)
    if surgery == "rotograd":
        assert not torch.equal(learner.agent.actor.rotation[0, 0], torch.eye(HIDDEN[-1]))
    learner.agent.save(tmp_path / "p.safetensors")
    other = Learner(agent_of(), make_learner(surgery="rotograd").config)
    transfer(other.agent, read_source(tmp_path / "p.safetensors"))
    observations = np.random.default_rng(0).normal(size=(6, OBSERVATION))
    for task in ("a", "c"):
        expected, _ = learner.agent.predict(observations, deterministic=True, task=task)
        found, _ = other.agent.predict(observations, deterministic=True, task=task)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_exported_policy_has_no_critics_to_take(source, tmp_path):
    source.save(tmp_path / "p.safetensors")
    export_policy(tmp_path / "p.safetensors", tmp_path / "e.safetensors")
    agent = agent_of()
    began = copy.deepcopy(agent.state_dict())
    transfer(agent, read_source(tmp_path / "e.safetensors"))
    assert not {name for name in differing(began, agent.state_dict()) if "critics" in name}
    assert torch.equal(agent.actor.shared["weight0"], source.actor.shared["weight0"])


def trained(parts: set[str], **settings) -> tuple[dict, dict, Learner]:
    learner = make_learner(agent=CONFIG, max_grad_norm=0, **settings)
    for target in learner.agent.target_critics.parameters():  # apart from the critics, as in a run
        target.add_(0.1)
    before = copy.deepcopy(learner.agent.state_dict())
    learner.freeze(frozenset(parts))
    learner.step(filled_replay(), 2)
    return before, learner.agent.state_dict(), learner


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ({"trunk"}, ("actor.shared", "critics.shared")),
        ({"actor-trunk"}, ("actor.shared",)),
        ({"critic-trunk"}, ("critics.shared",)),
        ({"actor"}, ("actor.", "log_alpha")),
        ({"critic"}, ("critics.", "target_critics.")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, set) else "",
)
@pytest.mark.parametrize("surgery", ["none", "pcgrad", "rotograd-scale"])
def test_what_is_frozen_stays_to_the_bit_and_all_else_learns(parts, kept, surgery):
    before, after, learner = trained(parts, surgery=surgery)
    networks = {name for name in before if not name.startswith("normalizer")}
    assert networks - differing(before, after) == {n for n in networks if n.startswith(kept)}
    learner.freeze(frozenset())
    learner.step(filled_replay(), 1)
    assert networks == differing(before, learner.agent.state_dict())


@pytest.mark.parametrize("surgery", ["pcgrad", "rotograd", "famo"])
def test_nothing_is_spent_on_a_frozen_trunk(surgery, monkeypatch):
    """No moments, no surgery, no diagnosis."""
    learner = make_learner(agent=CONFIG, surgery=surgery)
    for method in learner.surgeries.values():
        monkeypatch.setattr(method, "forward", pytest.fail)
    learner.freeze(frozenset({"trunk"}))
    learner.step(filled_replay(), 2)
    for name, networks in learner.agent.networks().items():
        with_moments = set(map(id, learner.optimizers[name].state))
        assert with_moments == set(map(id, networks.per_task.parameters()))
    assert diagnose(learner, filled_replay()) == {}


def test_diagnoses_are_of_the_trunks_that_are_trained():
    learner = make_learner(surgery="pcgrad")
    learner.freeze(frozenset({"actor-trunk"}))
    assert set(diagnose(learner, filled_replay())) == {"critic1", "critic2"}


@pytest.mark.parametrize("engine", ["jacobian", "factored"])
@pytest.mark.parametrize("heads", ["multi", "single"])
def test_heads_on_a_frozen_trunk_get_the_gradients_they_always_get(heads, engine):
    """Those of an update that trains the trunk as well, before it has changed."""
    config = CONFIG.model_copy(update={"heads": heads})
    settings = {"max_grad_norm": 0, "gradient_engine": engine}
    both = []
    for parts in ((), ("critic-trunk",)):
        learner = make_learner(agent=config, **settings)
        learner.freeze(frozenset(parts))
        learner.step(filled_replay(), 1)
        both.append(learner.agent.critics.state_dict())
    for name in both[0]:
        if "head" in name or ".per_task." in name:
            torch.testing.assert_close(both[0][name], both[1][name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "trunk", ["residual", "film", "soft-modules", "moore", "care(embedding=4)", "paco"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_trunk_can_be_frozen(trunk, precision):
    config = AgentConfig(trunk=trunk, hidden_sizes=(12, 12))
    learner = make_learner(agent=config, surgery="pcgrad", precision=precision)
    before = copy.deepcopy(learner.agent.state_dict())
    learner.freeze(frozenset({"trunk"}))
    learner.step(filled_replay(), 1)
    same = before.keys() - differing(before, learner.agent.state_dict())
    shared = {name for name in before if ".shared." in name}
    assert shared <= same and "actor.per_task.head_weight" not in same


def configured(path, **settings) -> TrainConfig:
    return TrainConfig(init_from=path, **settings)


def test_experts_are_as_many_as_the_file_has(tmp_path):
    """Twelve tasks have six experts where ten have four, and a run with two tasks takes the six."""
    config = AgentConfig(trunk="moore", critic_trunk="mlp", hidden_sizes=(8,))
    tasks = tuple(f"task{t}" for t in range(12))
    agent = MTSAC(tasks, config, OBSERVATION, ACTION)
    agent.save(tmp_path / "p.safetensors")
    found, _, lines = adopted(configured(tmp_path / "p.safetensors", trunk="moore"))
    assert found.agent.actor_trunk == "moore(experts=6)" and found.agent.critic_trunk == "mlp"
    assert "--init-from replaces the configuration's hidden_sizes: 400 400 400" in lines
    two = agent_of(("task3", "x"), found.agent)
    assert transfer(two, read_source(tmp_path / "p.safetensors")) == ("task3",)
    assert torch.equal(two.actor.per_task["mix"][:, 0], agent.actor.per_task["mix"][:, 3])


def test_what_was_typed_is_not_replaced(source, tmp_path):
    source.save(tmp_path / "p.safetensors")
    config = configured(tmp_path / "p.safetensors", hidden_sizes=(9, 9), initial_temperature=0.5)
    with pytest.raises(UsageError, match=r"hidden_sizes: expected 12 11, as in .*p.safetensors"):
        adopted(config, insisted=["hidden_sizes"])
    found, header, _ = adopted(config)
    assert found.agent.hidden_sizes == HIDDEN and found.agent.initial_temperature == 0.5
    assert header.tasks == BEFORE


def test_other_sizes_are_refused(source):
    other = MTSAC(NOW, CONFIG, OBSERVATION + 1, ACTION)
    with pytest.raises(
        UsageError, match="init_from: expected a policy for observations of length 8"
    ):
        transfer(other, source)
    wide = agent_of(config=CONFIG.model_copy(update={"hidden_sizes": (12, 13)}))
    film = CONFIG.model_copy(update={"trunk": "film"})  # with a learned vector of 50 numbers
    told = film.model_copy(update={"task_input": "description"})
    described = MTSAC(NOW, told, OBSERVATION, ACTION, descriptions=dict.fromkeys(NOW, np.ones(50)))
    for agent, other in ((wide, source), (described, agent_of(BEFORE, film))):
        with pytest.raises(UsageError, match="init_from: expected networks of equal sizes"):
            transfer(agent, other)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"freeze": ("trunk",)}, "freeze: expected init_from with it"),
        ({"init_from": "x", "freeze_until": 5}, "freeze_until: expected freeze with it"),
        (
            {"init_from": "x", "freeze": ("actor", "critic")},
            "freeze: expected actor or critic, or both with freeze_until",
        ),
    ],
)
def test_settings_that_do_not_fit_together(settings, told):
    with pytest.raises(ValueError, match=told):
        TrainConfig(**settings)


def test_frozen_until_a_step_count():
    config = configured("x", freeze=("actor",), freeze_until=100).transfer
    assert config.frozen_at(99) == {"actor"} and config.frozen_at(100) == frozenset()
