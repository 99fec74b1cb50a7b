"""Initialisation of a new run from an existing policy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mtrl.config.train import TrainConfig, shown
from mtrl.errors import UsageError
from mtrl.folder import find_policy
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.trunks import import_trunks, load_trunk, with_sizes
from mtrl.policy.file import PREFIX, PolicyHeader, open_policy
from mtrl.policy.policy import Policy
from mtrl.sac.agent import MTSAC

OF_THE_RUN = ("initial_temperature",)
"""Fields of the networks' section that come from the new run."""


def adopted(
    config: TrainConfig, insisted: Collection[str] = ()
) -> tuple[TrainConfig, PolicyHeader, list[str]]:
    """Return `config` with the network architecture of the policy in `init_from`.

    Args:
        config: Configuration with `init_from`.
        insisted: Fields that must not be replaced, such as those given as flags.

    Returns:
        The configuration, the header of the policy file, and a line for each replaced field.

    Raises:
        UsageError: If there is no such policy, or it contradicts a field in `insisted`.
    """
    path = config.transfer.init_from
    assert path is not None
    import_trunks(config.imports)  # a file only names its trunk
    for spec in config.agent.trunks:
        load_trunk(spec)
    with _named(), open_policy(find_policy(path)) as (_, header):
        update = {name: getattr(config.agent, name) for name in OF_THE_RUN}
        networks = with_sizes(header.agent, len(header.tasks)).model_copy(update=update)
    lines = []
    for name, theirs in networks:
        ours = getattr(config.agent, name)
        if ours != theirs and name in insisted:
            raise UsageError(
                f"{name}: expected {shown(theirs)}, as in {path} (init_from), got {shown(ours)}"
            )
        if ours != theirs:
            lines.append(f"--init-from replaces the configuration's {name}: {shown(ours)}")
    return config.model_copy(update={"agent": networks}), header, lines


def expect_sizes(source: PolicyHeader | Policy, observation_size: int, action_size: int) -> None:
    """Check that a policy is for these observations and actions.

    Raises:
        UsageError: If it is not.
    """
    sizes = {"observation": observation_size, "action": action_size}
    for what, ours in sizes.items():
        theirs = getattr(source, f"{what}_size")
        if theirs != ours:
            raise UsageError(
                f"init_from: expected a policy for {what}s of length {ours}, as in these tasks, "
                f"got one for {theirs}"
            )


def read_source(path: Path) -> Policy:
    """Load the policy to start from, as an `MTSAC` if the file has critics.

    Args:
        path: Run folder, checkpoint or policy file.

    Raises:
        UsageError: If there is no policy or it cannot be read.
    """
    with _named():
        file = find_policy(path)
        with open_policy(file) as (tensors, _):
            has_critics = any(name.startswith(f"{PREFIX}critics.") for name in tensors.keys())  # noqa: SIM118
        return (MTSAC if has_critics else Policy).load(file)


@torch.no_grad()
def transfer(agent: MTSAC, source: Policy) -> tuple[str, ...]:
    """Copy compatible parameters from `source` to `agent`, in place.

    Trunks, a single head, and the statistics of observations are copied completely. Heads,
    temperatures and other per-task parameters are copied for tasks with the same name; those of
    other tasks keep their initial values. Rotations of the source are folded into its heads, so
    that known tasks act as before; rotations of the agent are unchanged (initially the identity).

    Returns:
        The tasks that both have.

    Raises:
        UsageError: If observations, actions or networks differ in size.
    """
    expect_sizes(source, agent.observation_size, agent.action_size)
    known = tuple(task for task in agent.tasks if task in source.tasks)
    rows = [agent.tasks.index(task) for task in known], [source.tasks.index(t) for t in known]
    _copy(agent.actor, source.actor, rows)
    if agent.normalizer is not None and source.normalizer is not None:
        agent.normalizer.load_state_dict(source.normalizer.state_dict())
    if isinstance(source, MTSAC):
        _copy(agent.critics, source.critics, rows)
        _copy(agent.target_critics, source.target_critics, rows)
        agent.log_alpha[rows[0]] = source.log_alpha[rows[1]].to(agent.log_alpha)
    return known


def _copy(
    mine: MultiTaskNetworks, theirs: MultiTaskNetworks, rows: tuple[list[int], list[int]]
) -> None:
    shared, per_task = mine.named()
    folded = theirs.folded()
    known = {name: value for name, value in folded.per_task.items() if name in theirs.per_task}
    if _sizes(shared, 1) | _sizes(per_task, 2) != _sizes(folded.shared, 1) | _sizes(known, 2):
        raise UsageError("init_from: expected networks of equal sizes, got others")
    for name, value in shared.items():
        value.copy_(folded.shared[name])
    for name, value in per_task.items():
        value[:, rows[0]] = known[name][:, rows[1]].to(value)


def _sizes(parameters: Mapping[str, Tensor], skip: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[skip:]) for name, value in parameters.items()}


@contextmanager
def _named() -> Iterator[None]:
    """Return a context in which errors about the file name the field."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"init_from: {str(error).removeprefix('policy: ')}") from None
