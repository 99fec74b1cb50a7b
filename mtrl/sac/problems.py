"""Losses of an SAC update as problems for surgery: the critics' and the actor's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtrl.config.learner import LearnerConfig
from mtrl.nets.networks import Function, MultiTaskNetworks
from mtrl.nets.precision import trunks_in
from mtrl.nets.trunks.base import Trunk
from mtrl.sac.agent import MTSAC
from mtrl.sac.descend import Frozen, split_shared
from mtrl.sac.losses import ActorTargets, actor_loss, critic_loss, td_target
from mtrl.sac.replay import Batch
from mtrl.surgery.stacked import StackedProblem, TaskLoss

Compiled = Callable[[Any], Any]
"""Maps a function to its torch.compiled version, or to itself."""


def as_it_is(function: Any) -> Any:
    """Return the function without compiling it."""
    return function


def normalized(agent: MTSAC, batch: Batch) -> Batch:
    """Return the batch with observations as the networks see them."""
    return replace(
        batch,
        observations=agent.normalized(batch.observations),
        next_observations=agent.normalized(batch.next_observations),
    )


def critic_problem(
    agent: MTSAC,
    config: LearnerConfig,
    batch: Batch,
    *,
    noise: Tensor,
    alpha: Tensor,
    precision: str = "fp32",
    compiled: Compiled = as_it_is,
    frozen: Frozen = Frozen(),  # noqa: B008, it is immutable
) -> StackedProblem:
    """Build the critics' problem; `noise` is for the next actions, `[T, B, A]`."""
    with trunks_in(precision, agent.device):
        target = compiled(td_target)(
            agent.actor.folded(),
            agent.target_critics.folded(),
            agent.value,
            batch,
            noise=noise,
            alpha=alpha,
            gamma=config.gamma,
        )
    return _problem(
        agent.critics,
        compiled(critic_loss),
        inputs=torch.cat([batch.observations, batch.actions], -1),
        alpha=alpha,
        targets=(agent.value, target),
        engine=config.gradient_engine,
        precision=precision,
        compiled=compiled,
        frozen=frozen.trunk("critics"),
    )


def actor_problem(
    agent: MTSAC,
    config: LearnerConfig,
    batch: Batch,
    *,
    noise: Tensor,
    alpha: Tensor,
    precision: str = "fp32",
    compiled: Compiled = as_it_is,
    frozen: Frozen = Frozen(),  # noqa: B008, it is immutable
    critics: Function | None = None,
) -> StackedProblem:
    """Build the actor's problem; `noise` is for the current actions, `[T, B, A]`.

    Args:
        critics: The agent's critics, if they are already folded.
    """
    critics = critics or agent.critics.folded()
    targets = ActorTargets(critics, agent.value, batch.observations, noise=noise, alpha=alpha)
    return _problem(
        agent.actor,
        compiled(actor_loss),
        inputs=batch.observations,
        alpha=alpha,
        targets=(targets,),
        engine=config.gradient_engine,
        precision=precision,
        compiled=compiled,
        frozen=frozen.trunk("actor"),
    )


def _weighed(loss: TaskLoss, trunk: Trunk, alpha: Tensor, *given: Any) -> Any:
    """Losses whose values are as they are, and whose gradients have the architecture's factors."""
    losses, auxiliary = loss(*given)
    values = losses.detach()
    factors = trunk.loss_factors(values, alpha)
    if factors is None:
        return losses, auxiliary
    # Not by 0 · ∞ where a loss is none any more.
    return torch.where(factors > 0, values + factors * (losses - values), values), auxiliary


def _problem(
    networks: MultiTaskNetworks,
    loss: TaskLoss,
    *,
    alpha: Tensor,
    inputs: Tensor,
    targets: tuple[Any, ...],
    engine: str,
    precision: str,
    compiled: Compiled,
    frozen: bool,
) -> StackedProblem:
    shared, constants = split_shared(networks, frozen)
    _, per_task = networks.named()
    return StackedProblem(
        trunk=networks.trunk,
        loss=partial(_weighed, loss, networks.trunk.trunk, alpha),
        shared=shared,
        per_task=per_task,
        inputs=inputs[None],
        targets=targets,
        rotation=networks.rotation,
        fixed=networks.fixed_inputs(),
        engine=engine,
        precision=precision,
        compiled=compiled,
        frozen=constants,
    )
