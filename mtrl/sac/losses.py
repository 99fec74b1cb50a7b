"""SAC's losses (Haarnoja et al. 2018, arXiv 1812.05905), one value per task.

They are computed for all networks and tasks at once: `[N, T, B, …]`. A `*_loss` function starts
from the trunk's features, so that surgery has access to the gradients of features and parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtrl.nets.heads import head
from mtrl.nets.networks import Function
from mtrl.nets.params import Parameters
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
    """Compute y = r + γ (1 − terminal) (min_i Q̄_i(s′, a′) − α_t log π(a′|s′)), a′ ~ π(·|s′).

    These are eqs. 2–3. Time limits are not terminal: they bootstrap from the true s′.

    Args:
        value: Interpretation of the critics' outputs.
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
    """Average ½ (Q(s, a) − y)², or the histogram's cross-entropy, over a task's batch: eq. 5.

    Args:
        shared: Shared parameters of the critics.
        per_task: Parameters of the critics for each task.
        features: Features of observation and action, `[N, T, B, d]`.
        value: Interpretation of the critics' outputs.
        target: `[T, B]`.

    Returns:
        The losses, `[N, T]`, and an empty dictionary.
    """
    return value.loss(head(shared, per_task, features), target).mean(-1), {}


class ActorTargets(NamedTuple):
    """Inputs of the actor's loss besides its own features.

    Attributes:
        critics: All critics.
        value: Interpretation of the critics' outputs.
        observations: `[T, B, observation]`.
        noise: `[T, B, A]`.
        alpha: Temperatures, `[T]`.
    """

    critics: Function
    value: Value
    observations: Tensor
    noise: Tensor
    alpha: Tensor


def actor_loss(
    shared: Parameters, per_task: Parameters, features: Tensor, targets: ActorTargets
) -> tuple[Tensor, dict[str, Tensor]]:
    """Average α log π(a|s) − min_i Q_i(s, a), a ~ π(·|s), over a task's batch: eqs. 7 and 9.

    Args:
        shared: Shared parameters of the actor.
        per_task: Parameters of the actor for each task.
        features: Features of the observations, `[1, T, B, d]`.
        targets: Critics and their other inputs.

    Returns:
        The losses, `[1, T]`, and `log_prob`, the batch means of log π for the temperature.
    """
    action, log_prob = squashed_gaussian(head(shared, per_task, features), targets.noise)
    judged = torch.cat([targets.observations[None], action], -1)
    values = targets.value.mean(targets.critics(judged))
    log_prob = log_prob.mean(-1)
    least = values.min(0).values  # its backward takes half of amin's operations
    return targets.alpha * log_prob - least.mean(-1), {"log_prob": log_prob}


def temperature_gradient(log_prob: Tensor, target_entropy: float) -> Tensor:
    """Compute ∂/∂log α_t of −log α_t (log π + H̄): eq. 18 in log α, as in the authors' code.

    Args:
        log_prob: Batch means, `[T]`.

    Returns:
        `[T]`, not divided by T: each temperature belongs to one task.
    """
    return torch.rsub(log_prob, -target_entropy)
