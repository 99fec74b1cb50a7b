"""`Policy`: the part of the agent that acts."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mtrl.config.agent import AgentConfig
from mtrl.errors import UsageError
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.trunks import Trunk, trunk_of
from mtrl.policy.descriptions import Descriptions, vectors
from mtrl.policy.distributions import squashed_gaussian
from mtrl.policy.file import PREFIX, PolicyHeader, open_policy
from mtrl.policy.inputs import ObservationNormalizer, by_task

ACTOR_HEAD_BOUND = 1e-3
"""Initial weights of the actor's heads are uniform in ± this, so that actions start near 0."""

AnyPolicy = TypeVar("AnyPolicy", bound="Policy")


class Policy(nn.Module):
    """One policy for many tasks: a shared trunk and parameters of each task.

    Args:
        tasks: Task names; the position of a task is its index.
        config: Architecture of the networks.
        observation_size: Length of an observation, without the task.
        action_size: Length of an action; every component lies in [-1, 1].
        seed: Of the initial weights and of stochastic `predict`.
        descriptions: Vector of each task, input of trunks with `task_input: description`; default:
            those of Meta-World's tasks.

    Raises:
        UsageError: If there is no task, or one is given twice.

    Example:
        >>> policy = Policy(("reach-v3", "push-v3"), AgentConfig(), 39, 4)
        >>> actions, _ = policy.predict(np.zeros((2, 39)), deterministic=True)
        >>> actions.shape
        (2, 4)
    """

    IGNORED: ClassVar[tuple[str, ...]] = ("critics.", "target_critics.", "log_alpha")
    """Prefixes of tensors that a file may hold and that acting does not need."""

    def __init__(
        self,
        tasks: tuple[str, ...],
        config: AgentConfig,
        observation_size: int,
        action_size: int,
        seed: int = 0,
        *,
        descriptions: Descriptions | None = None,
    ) -> None:
        super().__init__()
        if isinstance(tasks, str) or not 0 < len(tasks) == len(set(tasks)):
            raise UsageError(f"tasks: expected the names of different tasks, got {tasks!r}")
        self.tasks, self.config = tuple(tasks), config
        self._vectors = partial(vectors, self.tasks, descriptions)
        self.observation_size, self.action_size = observation_size, action_size
        self._generator = torch.Generator().manual_seed(seed)
        trunk = trunk_of(config, "actor")
        self.actor = self._make_networks(
            1, observation_size, 2 * action_size, trunk, bound=ACTOR_HEAD_BOUND
        )
        self.normalizer = None
        if config.normalize_observations:
            self.normalizer = ObservationNormalizer(observation_size)

    def _make_networks(
        self, count: int, inputs: int, outputs: int, trunk: Trunk, *, bound: float
    ) -> MultiTaskNetworks:
        return MultiTaskNetworks(
            count,
            len(self.tasks),
            inputs,
            outputs,
            trunk,
            multi_head=self.config.heads == "multi",
            head_bound=bound,
            generator=self._generator,
            descriptions=self._vectors,
        ).requires_grad_(False)  # surgery differentiates with respect to views of its own

    def networks(self) -> dict[str, MultiTaskNetworks]:
        """Return all networks that consist of a trunk and heads, by name."""
        return {"actor": self.actor}

    def snapshot(self, device: torch.device | str) -> Policy:
        """Return an independent copy of the current policy, without what only training needs."""
        sizes = self.observation_size, self.action_size
        copied = Policy(self.tasks, self.config, *sizes, descriptions=self.descriptions)
        copied.actor = copy.deepcopy(self.actor)
        copied.normalizer = copy.deepcopy(self.normalizer)
        return copied.to(device)

    @property
    def descriptions(self) -> dict[str, np.ndarray] | None:
        """Description of each task that the actor receives; None if it receives none."""
        fixed = self.actor.fixed_inputs().get("description")
        if fixed is None or fixed.is_meta:
            return None
        return dict(zip(self.tasks, fixed[0].cpu().numpy(), strict=True))

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.actor.parameters()).device

    def normalized(self, observations: Tensor) -> Tensor:
        """Normalise observations for the networks, if configured, `[…, observation]`."""
        return observations if self.normalizer is None else self.normalizer(observations)

    @torch.no_grad()
    def act(self, observations: Tensor, tasks: Tensor, noise: Tensor | None = None) -> Tensor:
        """Compute actions for rows of any tasks.

        Args:
            observations: `[n, observation]`.
            tasks: Task index of each row, `[n]`.
            noise: Standard normal `[n, A]`, or None for the mode tanh(μ).

        Returns:
            `[n, A]` in [-1, 1].
        """
        actor = self.actor.folded()
        own = {name: value[:, tasks] for name, value in actor.per_task.items()}
        inputs = self.normalized(observations)
        outputs = actor._replace(per_task=own)(inputs[None, :, None])[0, :, 0]
        if noise is None:
            return torch.tanh(outputs.chunk(2, -1)[0])
        return squashed_gaussian(outputs, noise)[0]

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        task: str | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Compute actions for observations, with Stable-Baselines3's signature.

        The task of a row is given in one of three ways: the observation ends with the task's
        one-hot, as from Meta-World's `OneHotWrapper`; `task` names the task of all rows; or there
        is one row per task, in the order of `self.tasks`.

        Args:
            observation: `[observation]` or `[n, observation]`; T longer with the one-hot.
            state: Returned unchanged: the policy has no memory.
            episode_start: Not used.
            deterministic: Return the mode instead of a sample.
            task: Name of the task of all rows.

        Returns:
            Actions in [-1, 1], `[A]` or `[n, A]`, and `state`.

        Raises:
            ValueError: If the task of a row is not given, or given in two ways that differ.
        """
        rows, index = by_task(observation, self.tasks, self.observation_size, task)
        if not len(rows):
            return np.empty((0, self.action_size), np.float32), state
        noise = None
        if not deterministic:
            noise = torch.randn(len(rows), self.action_size, generator=self._generator)
            noise = noise.to(self.device)
        observations = torch.from_numpy(rows).to(self.device)
        actions = self.act(observations, torch.from_numpy(index).to(self.device), noise)
        return actions.cpu().numpy().reshape(*np.shape(observation)[:-1], self.action_size), state

    def description(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return {
            "tasks": list(self.tasks),
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "agent": self.config.model_dump(mode="json"),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors under their names in a file."""
        return {f"{PREFIX}{name}": value for name, value in self.state_dict().items()}

    @classmethod
    def load(
        cls: type[AnyPolicy], path: Path | str, device: torch.device | str = "cpu"
    ) -> AnyPolicy:
        """Load a policy from a policy file, a training checkpoint or an exported file.

        Nothing in the file is executed, and at most twice the file's size is used as memory.

        Raises:
            UsageError: If the file is missing, damaged, or was not written by mtrl.
        """
        return cls.load_with_header(path, device)[0]

    @classmethod
    def load_with_header(
        cls: type[AnyPolicy], path: Path | str, device: torch.device | str = "cpu"
    ) -> tuple[AnyPolicy, PolicyHeader]:
        """Load a policy like `load`, together with the header of its file."""
        with open_policy(path) as (file, header):
            policy = cls._build(file, header, path)
        return policy.to(device), header

    @classmethod
    def _build(
        cls: type[AnyPolicy], file: Any, header: PolicyHeader, path: Path | str
    ) -> AnyPolicy:
        found = {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118, not a mapping
            if name.startswith(PREFIX)
        }
        # Allocate no memory until the file is known to hold the tensors its header implies.
        shape = found.get(f"{PREFIX}actor.fixed.description", ())
        sizes, descriptions = (header.observation_size, header.action_size), None
        if len(shape) == 3 and shape[1] == len(header.tasks):  # of any length: they are in the file
            descriptions = dict.fromkeys(header.tasks, np.zeros(shape[2], np.float32))
        with torch.device("meta"):
            policy = cls(header.tasks, header.agent, *sizes, descriptions=descriptions)
            for name, networks in policy.networks().items():
                if rotation := found.get(f"{PREFIX}{name}.rotation"):
                    networks.add_rotation(rotation[-1])
        wanted = policy.tensors()
        for name in wanted.keys() | found.keys():
            if name not in wanted and name.removeprefix(PREFIX).startswith(cls.IGNORED):
                continue
            expected = list(wanted[name].shape) if name in wanted else "none"
            if (got := found.get(name, "none")) != expected:
                raise UsageError(
                    f"policy: the tensors of {path} do not match its header: expected {expected} "
                    f"for {name!r}, got {got}"
                )
        tensors = {
            name.removeprefix(PREFIX): file.get_tensor(name).to(empty.dtype, copy=True)
            for name, empty in wanted.items()  # copy, because the file is memory-mapped
        }
        policy.load_state_dict(tensors, assign=True)
        return policy
