"""Diagnosis of conflicts between task gradients, without any effect on the run."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mtrl.sac.learner import Learner
from mtrl.sac.problems import actor_problem, critic_problem, normalized
from mtrl.sac.replay import Batch, ReplayBuffer
from mtrl.surgery.diagnostics import Diagnosis, Step
from mtrl.surgery.stacked import StackedProblem


@torch.no_grad()
def diagnose(learner: Learner, replay: ReplayBuffer) -> dict[str, Diagnosis]:
    """Compute gradients on two extra batches and an optimiser step on the first, in float64.

    Random numbers come from the learner's `diagnosis_generator`, and the step is made on a copy. A
    run therefore does not depend on how often it is diagnosed.

    Returns:
        Diagnoses by network, `actor`, `critic1` and `critic2`, of those whose trunk is trained.
    """
    twin = _twin(learner)
    first, second = (_problems(twin, replay) for _ in range(2))
    steps = {name: _step(twin, name, problem) for name, problem in first.items()}
    rate = learner.config.learning_rate
    found = {}
    for name, networks, n in (
        ("critic1", "critics", 0),
        ("critic2", "critics", 1),
        ("actor", "actor", 0),
    ):
        if networks not in steps:
            continue
        problem, again = first[networks].only(n), second[networks].only(n)
        found[name] = Diagnosis.of(problem, again, steps[networks].only(n), rate)
    return found


def _twin(learner: Learner) -> Learner:
    """Return a float64 copy that draws only from the generator for diagnoses."""
    twin = copy.copy(learner)
    parts = learner.agent, learner.optimizers, learner.surgeries
    twin.agent, twin.optimizers, twin.surgeries = copy.deepcopy(parts)
    twin.agent.double()
    for optimizer in twin.optimizers.values():
        optimizer.load_state_dict(optimizer.state_dict())  # casts moments to the parameters' type
    twin.generator = twin.surgery_generator = learner.diagnosis_generator
    return twin


def _problems(twin: Learner, replay: ReplayBuffer) -> dict[str, StackedProblem]:
    """Build the problems of critics and actor on a new batch, without stepping either.

    Networks with a frozen trunk are left out: they have no gradients that could conflict.
    """
    batch = replay.sample(twin.config.batch_size, twin.generator)
    noise = twin.noise(batch).double()
    batch = Batch(**{name: value.double() for name, value in vars(batch).items()})
    batch, alpha = normalized(twin.agent, batch), twin.agent.log_alpha.exp()
    problems = {
        "critics": critic_problem(twin.agent, twin.config, batch, noise=noise[0], alpha=alpha),
        "actor": actor_problem(twin.agent, twin.config, batch, noise=noise[1], alpha=alpha),
    }
    return {name: found for name, found in problems.items() if not twin.frozen.trunk(name)}


def _step(twin: Learner, name: str, problem: StackedProblem) -> Step:
    """Make an optimiser step on this batch, and undo it."""
    networks = twin.agent.networks()[name]
    before = copy.deepcopy(networks.state_dict())
    gradients = twin.descend(name, problem)
    shared = networks.shared.items()
    moved: dict[str, Tensor] = {key: before[f"shared.{key}"] - value for key, value in shared}
    networks.load_state_dict(before)
    return Step(gradients.shared, moved)
