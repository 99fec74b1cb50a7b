"""SAC's losses (Haarnoja et al. 2018, arXiv 1812.05905), one value per task.

All networks and tasks at once: `[N, T, B, …]`. A `*_loss` function starts from the trunk's
features, so that surgery can see both their gradients and the parameters'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtrl.networks import Parameters, head, multi_task_mlp, squashed_gaussian
from mtrl.replay import Batch


def td_target(
    actor: tuple[Parameters, Parameters],
    target_critics: tuple[Parameters, Parameters],
    batch: Batch,
    noise: Tensor,
    alpha: Tensor,
    gamma: float,
    reward_scale: float = 1.0,
) -> Tensor:
    """Y = r + γ (1 − terminal) (min_i Q̄_i(s′, a′) − α_t log π(a′|s′)), a′ ~ π(·|s′): eqs. 2–3.

    Time limits are not terminal: they bootstrap from the true s′.

    Args:
        actor: Its parameters, shared and per task.
        target_critics: Likewise.
        noise: `[T, B, A]`.
        alpha: `[T]`.

    Returns:
        `[T, B]`.
    """
    observations = batch.next_observations[None]
    next_action, log_prob = squashed_gaussian(multi_task_mlp(*actor, observations), noise)
    inputs = torch.cat([observations, next_action], -1)
    value = multi_task_mlp(*target_critics, inputs).squeeze(-1).amin(0)
    next_value = value - alpha[:, None] * log_prob[0]
    return reward_scale * batch.rewards + gamma * (1 - batch.terminated) * next_value


def critic_loss(
    shared: Parameters, per_task: Parameters, features: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ (Q(s, a) − y)², averaged over a task's batch: eq. 5.

    Args:
        shared: The critics' shared parameters.
        per_task: The critics' parameters of each task.
        features: Of observation and action, `[N, T, B, d]`.
        target: `[T, B]`.

    Returns:
        The losses, `[N, T]`, and nothing beside them.
    """
    value = head(shared, per_task, features).squeeze(-1)
    return 0.5 * (value - target).square().mean(-1), {}


def actor_loss(
    shared: Parameters,
    per_task: Parameters,
    features: Tensor,
    critics: tuple[Parameters, Parameters],
    observations: Tensor,
    noise: Tensor,
    alpha: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """α log π(a|s) − min_i Q_i(s, a), a ~ π(·|s), averaged over a task's batch: eqs. 7 and 9.

    Args:
        shared: The actor's shared parameters.
        per_task: The actor's parameters of each task.
        features: Of the observations, `[1, T, B, d]`.
        critics: The critics' parameters, shared and per task.
        observations: `[T, B, observation]`.
        noise: `[T, B, A]`.
        alpha: The temperatures, `[T]`.

    Returns:
        The losses, `[1, T]`, and beside them the batch means of log π, which the temperature needs.
    """
    action, log_prob = squashed_gaussian(head(shared, per_task, features), noise)
    values = multi_task_mlp(*critics, torch.cat([observations[None], action], -1)).squeeze(-1)
    losses = alpha[:, None] * log_prob - values.amin(0)
    return losses.mean(-1), {"log_prob": log_prob.mean(-1)}


def temperature_gradient(log_prob: Tensor, target_entropy: float) -> Tensor:
    """∂/∂log α_t of −log α_t (log π + H̄): eq. 18 in log α, as the authors' code has it.

    Args:
        log_prob: Batch means, `[T]`.

    Returns:
        `[T]`, each task its own, not divided by T: a temperature has one task.
    """
    return -(log_prob + target_entropy)
