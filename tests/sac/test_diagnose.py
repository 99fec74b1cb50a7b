"""Diagnoses against autograd and Adam's formula, and without any effect on the run."""

import copy

import pytest
import torch
from small_learner import BATCH, TASKS, filled_replay, make_learner

from mtrl.sac.diagnose import diagnose
from mtrl.sac.losses import ActorTargets, actor_loss, critic_loss, td_target
from mtrl.surgery import available


@pytest.mark.parametrize("surgery", available())
def test_a_diagnosis_changes_nothing_and_covers_every_network(surgery):
    """With or without it, parameters, moments, random streams and buffers are equal."""
    learner, unseen = make_learner(surgery=surgery), make_learner(surgery=surgery)
    replay, other = filled_replay(), filled_replay()
    learner.step(replay)
    unseen.step(other)
    found = diagnose(learner, replay)
    assert set(found) == {"actor", "critic1", "critic2"}
    for diagnosis in found.values():
        assert all(value.isfinite() for value in diagnosis.measures.values())
        assert diagnosis.measures.keys() >= {"conflict_after_surgery", "conflict_after_step"}
        torch.testing.assert_close(diagnosis.cosines.diagonal(), torch.ones(4).double())
    assert not torch.equal(found["critic1"].cosines, found["critic2"].cosines)
    for _ in range(2):
        learner.step(replay)
        unseen.step(other)
    states = [(each.agent.state_dict(), each.state_dict()) for each in (learner, unseen)]
    for _, state in states:
        del state["diagnosis_generator"]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_diagnosis_is_reproducible_and_the_next_one_uses_other_batches():
    learner, replay = make_learner(surgery="pcgrad"), filled_replay()
    learner.step(replay)
    start = learner.diagnosis_generator.get_state()
    first, second = diagnose(learner, replay), diagnose(learner, replay)
    learner.diagnosis_generator.set_state(start)
    again = diagnose(learner, replay)
    for name in first:
        assert first[name].measures == again[name].measures
        assert not torch.equal(first[name].cosines, second[name].cosines)


def test_a_single_task_has_no_conflicts():
    learner, replay = make_learner(("alone",), surgery="pcgrad"), filled_replay(1)
    assert {name: set(found.measures) for name, found in diagnose(learner, replay).items()} == {
        name: {"curvature", "self_cosine"} for name in ("actor", "critic1", "critic2")
    }


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_conflicts_after_the_step_by_one_backward_per_task_and_adams_formula(max_grad_norm):
    """Sample the first batch again; one gradient per task; AdamW's formula without an optimiser."""
    settings = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1, "learning_rate": 1e-3}
    learner, replay = make_learner(surgery="none", **settings), filled_replay()
    for _ in range(5):
        learner.step(replay)
    learner.anneal(0.5)
    generator = torch.Generator()
    generator.set_state(learner.diagnosis_generator.get_state())
    found = diagnose(learner, replay)

    batch = replay.sample(BATCH, generator)
    noise = torch.randn(2, *batch.actions.shape, generator=generator).double()
    batch = type(batch)(**{name: value.double() for name, value in vars(batch).items()})
    agent = copy.deepcopy(learner.agent).double()
    alpha = agent.log_alpha.exp()
    functions = agent.actor.folded(), agent.target_critics.folded()
    how = {"noise": noise[0], "alpha": alpha, "gamma": learner.config.gamma}
    target = td_target(*functions, agent.value, batch, **how)
    critics = agent.critics.folded()
    both = torch.cat([batch.observations, batch.actions], -1)
    problems = {
        "critics": (agent.critics, both, critic_loss, (agent.value, target)),
        "actor": (
            agent.actor,
            batch.observations,
            actor_loss,
            (ActorTargets(critics, agent.value, batch.observations, noise[1], alpha),),
        ),
    }
    for which, (networks, inputs, loss, targets) in problems.items():
        networks.requires_grad_()
        shared, own = dict(networks.shared), dict(networks.per_task)
        losses, _ = loss(shared, own, networks.trunk(shared, own, inputs[None]), *targets)
        everything = {**shared, **own}
        rows = [
            dict(
                zip(
                    everything,
                    torch.autograd.grad(losses[:, t].sum(), everything.values(), retain_graph=True),
                    strict=True,
                )
            )
            for t in range(len(TASKS))
        ]
        names = {id(p): name for name, p in learner.agent.networks()[which].named_parameters()}
        moments = {
            names[id(p)].split(".")[1]: state
            for p, state in learner.optimizers[which].state.items()
        }
        for n in range(networks.n_networks):
            mean = {k: sum(row[k][n] for row in rows) / len(TASKS) for k in everything}
            norm = torch.cat([g.flatten() for g in mean.values()]).norm()
            scale = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
            taken = {}
            for k in shared:
                count = moments[k]["step"].item() + 1
                m = 0.9 * moments[k]["exp_avg"][n].double() + 0.1 * scale * mean[k]
                v = 0.999 * moments[k]["exp_avg_sq"][n].double() + 0.001 * (scale * mean[k]) ** 2
                root = (v / (1 - 0.999**count)).sqrt() + learner.config.adam_epsilon
                decay = 0.1 * shared[k][n].detach() if "weight" in k else 0.0
                taken[k] = 1e-3 * (m / (1 - 0.9**count) / root + decay)
            measures = found["actor" if which == "actor" else f"critic{n + 1}"].measures
            for measure, step in (("surgery", mean), ("step", taken)):
                products = [sum((row[k][n] * step[k]).sum() for k in shared) for row in rows]
                opposed = sum(product.item() < 0 for product in products) / len(TASKS)
                assert measures[f"conflict_after_{measure}"].item() == opposed
