"""A policy in tasks that it was not trained on (zero-shot)."""

from __future__ import annotations

import numpy as np

from mtrl.errors import UsageError, unknown
from mtrl.policy.descriptions import Descriptions, vectors
from mtrl.policy.policy import Policy


def in_tasks(
    policy: Policy, tasks: tuple[str, ...], descriptions: Descriptions | None = None
) -> Policy:
    """Return the policy, or one that receives descriptions if it does not know all the tasks.

    Args:
        policy: Policy whose trunk has `task_input: description` and whose tasks share one head.
        tasks: Task names. Tasks of the policy keep the descriptions of its training.
        descriptions: Vector of each other task; default: those of Meta-World's tasks.

    Example:
        >>> from mtrl import AgentConfig
        >>> config = AgentConfig(task_input="description", heads="single", hidden_sizes=(8,))
        >>> policy = Policy(("reach-v3", "push-v3"), config, 39, 4)
        >>> in_tasks(policy, ("pick-place-v3",)).predict(np.zeros(39))[0].shape
        (4,)

    Raises:
        UsageError: If the policy cannot act in other tasks, or the vectors have another length than
            those of its training.
    """
    mine, new = policy.descriptions, [task for task in tasks if task not in policy.tasks]
    if not new:
        return policy
    if mine is None or policy.actor.per_task:
        raise UsageError(
            f"{unknown('tasks', new[0], policy.tasks)} (what the policy was trained "
            "for; others take one trained with task_input 'description' and heads 'single')"
        )
    length = len(mine[policy.tasks[0]])
    given = vectors(new, descriptions)
    if given is None:
        raise UsageError(f"descriptions: expected a vector for each of {', '.join(new)}")
    if given.shape[-1] != length:
        raise UsageError(
            f"descriptions: expected vectors of length {length}, which the policy was trained "
            f"with, got {given.shape[-1]}"
        )
    mine |= dict(zip(new, given, strict=True))
    copied = policy.snapshot(policy.device)
    copied.tasks = tuple(tasks)
    copied.actor = policy.actor.for_tasks(np.stack([mine[task] for task in tasks]))
    return copied
