"""SAC's losses (Haarnoja et al. 2018, arXiv 1812.05905), one value per task.

All networks and tasks at once: `[N, T, B, …]`. A `*_loss` function starts from the trunk's
features, so that surgery can see both their gradients and the parameters'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtrl.nets.networks import Function, Parameters, head
from mtrl.policy.distributions import squashed_gaussian
from mtrl.sac.replay import Batch
from mtrl.sac.values import Value


def td_target(
    actor: Function,
    target_critics: Function,
    value: Value,
    batch: Batch,
    *,
    noise: Tensor,
    alpha: Tensor,
    gamma: float,
) -> Tensor:
    """Y = r + γ (1 − terminal) (min_i Q̄_i(s′, a′) − α_t log π(a′|s′)), a′ ~ π(·|s′): eqs. 2–3.

    Time limits are not terminal: they bootstrap from the true s′.

    Args:
        value: What the critics' outputs mean.
        noise: `[T, B, A]`.
        alpha: `[T]`.

    Returns:
        `[T, B]`.
    """
    observations = batch.next_observations[None]
    next_action, log_prob = squashed_gaussian(actor(observations), noise)
    outputs = target_critics(torch.cat([observations, next_action], -1))
    least = value.mean(outputs).amin(0)
    next_value = torch.addcmul(least, alpha[:, None], log_prob[0], value=-1)
    discount = torch.rsub(batch.terminated, gamma, alpha=gamma)
    return torch.addcmul(batch.rewards, discount, next_value)


def critic_loss(
    shared: Parameters, per_task: Parameters, features: Tensor, value: Value, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ (Q(s, a) − y)² or the histogram's cross-entropy, averaged over a task's batch: eq. 5.

    Args:
        shared: The critics' shared parameters.
        per_task: The critics' parameters of each task.
        features: Of observation and action, `[N, T, B, d]`.
        value: What the critics' outputs mean.
        target: `[T, B]`.

    Returns:
        The losses, `[N, T]`, and nothing beside them.
    """
    return value.loss(head(shared, per_task, features), target).mean(-1), {}


class ActorTargets(NamedTuple):
    """What an actor is judged by.

    Attributes:
        critics: All of them.
        value: What their outputs mean.
        observations: `[T, B, observation]`.
        noise: `[T, B, A]`.
        alpha: The temperatures, `[T]`.
    """

    critics: Function
    value: Value
    observations: Tensor
    noise: Tensor
    alpha: Tensor


def actor_loss(
    shared: Parameters, per_task: Parameters, features: Tensor, targets: ActorTargets
) -> tuple[Tensor, dict[str, Tensor]]:
    """α log π(a|s) − min_i Q_i(s, a), a ~ π(·|s), averaged over a task's batch: eqs. 7 and 9.

    Args:
        shared: The actor's shared parameters.
        per_task: The actor's parameters of each task.
        features: Of the observations, `[1, T, B, d]`.
        targets: What judges the actions.

    Returns:
        The losses, `[1, T]`, and beside them the batch means of log π, which the temperature needs.
    """
    action, log_prob = squashed_gaussian(head(shared, per_task, features), targets.noise)
    judged = torch.cat([targets.observations[None], action], -1)
    values = targets.value.mean(targets.critics(judged))
    log_prob = log_prob.mean(-1)
    least = values.min(0).values  # whose backward takes half of amin's operations
    return targets.alpha * log_prob - least.mean(-1), {"log_prob": log_prob}


def temperature_gradient(log_prob: Tensor, target_entropy: float) -> Tensor:
    """∂/∂log α_t of −log α_t (log π + H̄): eq. 18 in log α, as the authors' code has it.

    Args:
        log_prob: Batch means, `[T]`.

    Returns:
        `[T]`, each task its own, not divided by T: a temperature has one task.
    """
    return torch.rsub(log_prob, -target_entropy)
