"""SAC's losses (Haarnoja et al. 2018, arXiv 1812.05905), one value per task.

A `*_loss` function is that of one task and one network, `[B, …]`, from the trunk's features on, so
that `vmap` maps it over tasks and surgery can see both the features' and the parameters' gradients.
The others take all tasks, `[T, B, …]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtrl.networks import MultiTaskNetworks, Parameters, head, multi_task_mlp, squashed_gaussian
from mtrl.replay import Batch


def td_target(
    actor: MultiTaskNetworks,
    target_critics: MultiTaskNetworks,
    batch: Batch,
    noise: Tensor,
    alpha: Tensor,
    gamma: float,
    reward_scale: float = 1.0,
) -> Tensor:
    """Y = r + γ (1 − terminal) (min_i Q̄_i(s′, a′) − α_t log π(a′|s′)), a′ ~ π(·|s′): eqs. 2–3.

    Time limits are not terminal: they bootstrap from the true s′.

    Args:
        noise: `[T, B, A]`.
        alpha: `[T]`.

    Returns:
        `[T, B]`.
    """
    next_action, log_prob = squashed_gaussian(actor(batch.next_observations)[0], noise)
    inputs = torch.cat([batch.next_observations, next_action], -1)
    next_value = target_critics(inputs).squeeze(-1).amin(0) - alpha[:, None] * log_prob
    return reward_scale * batch.rewards + gamma * (1 - batch.terminated) * next_value


def critic_loss(
    shared: Parameters, per_task: Parameters, features: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ (Q(s, a) − y)², averaged over one task's batch: eq. 5.

    Args:
        features: Of observation and action, `[B, d]`.
        target: `[B]`.
    """
    value = head(shared, per_task, features).squeeze(-1)
    return 0.5 * (value - target).square().mean(), {}


def actor_loss(
    critic_trunks: Sequence[Parameters],
    shared: Parameters,
    per_task: Parameters,
    features: Tensor,
    critic_heads: Sequence[Parameters],
    observations: Tensor,
    noise: Tensor,
    alpha: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """α log π(a|s) − min_i Q_i(s, a), a ~ π(·|s), averaged over one task's batch: eqs. 7 and 9.

    Args:
        critic_trunks: Each critic's shared parameters.
        shared: The actor's shared parameters.
        per_task: The actor's parameters of this task.
        features: Of the observations, `[B, d]`.
        critic_heads: Each critic's parameters of this task.
        observations: `[B, observation]`.
        noise: `[B, A]`.
        alpha: This task's temperature, a scalar.

    Returns:
        The loss, and beside it the batch mean of log π, which the temperature needs.
    """
    action, log_prob = squashed_gaussian(head(shared, per_task, features), noise)
    inputs = torch.cat([observations, action], -1)
    critics = zip(critic_trunks, critic_heads, strict=True)
    values = torch.stack([multi_task_mlp(*critic, inputs).squeeze(-1) for critic in critics])
    return (alpha * log_prob - values.amin(0)).mean(), {"log_prob": log_prob.mean()}


def temperature_gradient(log_prob: Tensor, target_entropy: float) -> Tensor:
    """∂/∂log α_t of −log α_t (log π + H̄): eq. 18 in log α, as the authors' code has it.

    Args:
        log_prob: Batch means, `[T]`.

    Returns:
        `[T]`, each task its own, not divided by T: a temperature has one task.
    """
    return -(log_prob + target_entropy)
