"""MTSAC: the networks and temperatures of a multi-task soft actor-critic; act, save, load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mtrl.config import AgentConfig
from mtrl.distributions import CategoricalValue, ScalarValue, Value, squashed_gaussian
from mtrl.networks import MultiTaskNetworks, Trunk
from mtrl.normalization import ObservationNormalizer
from mtrl.validation import UsageError, one_line, unknown, validate

FORMAT = "mtrl-policy-1"
"""What a policy file says it is."""

PREFIX = "agent/"
"""In front of the agent's tensors in a file, a policy or a checkpoint."""


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device; `auto` is cuda where there is one.

    Raises:
        UsageError: if cuda is asked for and missing.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: expected a machine with CUDA for 'cuda', found none")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class MTSAC(nn.Module):
    """One policy for many tasks (Yu et al. 2020, Meta-World; multi-task multi-head SAC).

    Args:
        tasks: Task names; a task's position is its index.
        config: Shape of the networks.
        observation_size: Length of an observation, without the task.
        action_size: Length of an action; every component lies in [-1, 1].
        seed: Of the initial weights and of stochastic `predict`.

    Example:
        >>> agent = MTSAC(("reach-v3", "push-v3"), AgentConfig(), 39, 4)
        >>> actions, _ = agent.predict(np.zeros((2, 39)), deterministic=True)
        >>> actions.shape
        (2, 4)
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        config: AgentConfig,
        observation_size: int,
        action_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks, self.config = tuple(tasks), config
        self.observation_size, self.action_size = observation_size, action_size
        generator = torch.Generator().manual_seed(seed)
        trunk = Trunk(config.layer_norm, config.trunk == "residual")

        def networks(
            count: int, inputs: int, outputs: int, sizes: tuple[int, ...] | None, bound: float
        ) -> MultiTaskNetworks:
            made = MultiTaskNetworks(
                count,
                len(tasks),
                inputs,
                outputs,
                sizes or config.hidden_sizes,
                config.heads == "multi",
                bound,
                generator,
                trunk,
                config.task_embedding,
            )
            # Surgery differentiates with respect to views of its own.
            return made.requires_grad_(False)

        self.value: Value = ScalarValue()
        if config.critic_bins is not None:
            self.value = CategoricalValue(config.critic_bins, config.value_limit)
        size, both = observation_size, observation_size + action_size
        self.actor = networks(1, size, 2 * action_size, config.actor_hidden_sizes, 1e-3)
        self.critics = networks(2, both, self.value.n_outputs, config.critic_hidden_sizes, 3e-3)
        self.normalizer = ObservationNormalizer(size) if config.normalize_observations else None
        self.target_critics = copy.deepcopy(self.critics)
        initial = torch.full((len(tasks),), config.initial_temperature).log()
        self.log_alpha = nn.Parameter(initial, requires_grad=False)
        self._generator = generator

    def networks(self) -> dict[str, MultiTaskNetworks]:
        """What surgery is done on."""
        return {"actor": self.actor, "critics": self.critics}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.log_alpha.device

    def normalized(self, observations: Tensor) -> Tensor:
        """As the networks are to see them, `[…, observation]`."""
        return observations if self.normalizer is None else self.normalizer(observations)

    @torch.no_grad()
    def act(self, observations: Tensor, tasks: Tensor, noise: Tensor | None = None) -> Tensor:
        """Actions for rows of any tasks.

        Args:
            observations: `[n, observation]`.
            tasks: Each row's task index, `[n]`.
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
        """Actions for observations, with Stable-Baselines3's signature.

        Which task a row belongs to is told in one of three ways: the observation ends with the
        task's one-hot, as Meta-World's `OneHotWrapper` makes it; or `task` names one for all; or
        there is one row per task, in the order of `self.tasks`.

        Args:
            observation: `[observation]`, `[n, observation]`, or with `+ T` for the one-hot.
            state: Not used: the policy has no memory.
            episode_start: Not used.
            deterministic: The mode instead of a sample.
            task: Name of the rows' task.

        Returns:
            Actions `[A]` or `[n, A]`, and `state`.

        Raises:
            ValueError: if the task of a row cannot be told.
        """
        rows = np.atleast_2d(np.asarray(observation, np.float32))
        n_tasks, size = len(self.tasks), self.observation_size
        if rows.ndim != 2 or rows.shape[-1] not in (size, size + n_tasks):
            raise ValueError(
                f"observation: expected length {size}, or {size + n_tasks} with the task's "
                f"one-hot, got shape {np.shape(observation)}"
            )
        if rows.shape[-1] == size + n_tasks:
            index = rows[:, size:].argmax(-1)
            rows = rows[:, :size]
        elif task is not None:
            if task not in self.tasks:
                raise ValueError(unknown("task", task, self.tasks))
            index = np.full(len(rows), self.tasks.index(task))
        elif n_tasks == 1 or len(rows) == n_tasks:
            index = np.arange(len(rows)) % n_tasks
        else:
            raise ValueError(
                f"observation: expected one row for each of the {n_tasks} tasks, rows that end "
                f"with the task's one-hot, or `task=...`, got {len(rows)} rows"
            )
        noise = None
        if not deterministic:
            noise = torch.randn(len(rows), self.action_size, generator=self._generator)
            noise = noise.to(self.device)
        observations = torch.from_numpy(rows).to(self.device)
        actions = self.act(observations, torch.from_numpy(index).to(self.device), noise)
        return actions.cpu().numpy().reshape(*np.shape(observation)[:-1], -1), state

    def description(self) -> dict[str, Any]:
        """What the constructor needs, as plain values."""
        return {
            "tasks": list(self.tasks),
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "agent": self.config.model_dump(mode="json"),
        }

    def tensors(self) -> dict[str, Tensor]:
        """All parameters under the names they have in a file."""
        return {f"{PREFIX}{name}": value for name, value in self.state_dict().items()}

    def save(self, path: Path | str, extra: dict[str, Any] | None = None) -> None:
        """Write one safetensors file: all tensors, and in its header the configuration as YAML.

        Args:
            extra: Further plain values for the header, e.g. the training run's seed.
        """
        config = yaml.safe_dump(self.description() | (extra or {}), sort_keys=False)
        save_file(self.tensors(), path, {"format": FORMAT, "config": config})

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> MTSAC:
        """Read what `save`, or a training checkpoint, wrote. Nothing in the file is executed.

        Raises:
            UsageError: if the file is missing, damaged, or not of ours.
        """
        return cls.load_with_header(path, device)[0]

    @classmethod
    def load_with_header(
        cls, path: Path | str, device: torch.device | str = "cpu"
    ) -> tuple[MTSAC, dict[str, Any]]:
        """As `load`, with the header's configuration, `extra` included."""
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if not metadata.get("format", "").startswith("mtrl-"):
                    raise UsageError(f"policy: expected a file that mtrl wrote, got {path}")
                tensors = {
                    name.removeprefix(PREFIX): file.get_tensor(name)
                    for name in file.keys()  # noqa: SIM118, it is no mapping
                    if name.startswith(PREFIX)
                }
            header = yaml.safe_load(metadata["config"])
            agent = cls(
                tuple(str(task) for task in header["tasks"]),
                validate(AgentConfig, header["agent"], source=f"policy: {path}: "),
                int(header["observation_size"]),
                int(header["action_size"]),
            )
            for name, networks in agent.networks().items():
                if f"{name}.rotation" in tensors:
                    networks.add_rotation(tensors[f"{name}.rotation"].shape[-1])
            agent.load_state_dict(tensors)
        except UsageError:
            raise
        except (OSError, SafetensorError, yaml.YAMLError) as error:
            raise UsageError(f"policy: cannot read {path}: {one_line(error)}") from None
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"{path} does not hold what its header says: {one_line(error)}"
            raise UsageError(f"policy: {reason}") from None
        return agent.to(device), header
