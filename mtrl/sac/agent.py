"""`MTSAC`: a policy with the critics and temperatures of soft actor-critic."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mtrl.config import yaml12
from mtrl.config.agent import AgentConfig
from mtrl.folder import POLICY_FORMAT
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.trunks import trunk_of
from mtrl.policy.descriptions import Descriptions
from mtrl.policy.policy import Policy
from mtrl.sac.values import CategoricalValue, ScalarValue, Value

CRITIC_HEAD_BOUND = 3e-3
"""Initial weights of the critics' heads are uniform in ± this, so that values start near 0."""


class MTSAC(Policy):
    """Multi-task multi-head SAC (Yu et al. 2020, Meta-World); takes the arguments of `Policy`."""

    IGNORED = ()

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
        super().__init__(
            tasks, config, observation_size, action_size, seed, descriptions=descriptions
        )
        self.value: Value = ScalarValue()
        if config.critic_bins is not None:
            self.value = CategoricalValue(config.critic_bins, config.value_limit)
        inputs = observation_size + action_size
        trunk = trunk_of(config, "critic")
        self.critics = self._make_networks(
            2, inputs, self.value.n_outputs, trunk, bound=CRITIC_HEAD_BOUND
        )
        self.target_critics = copy.deepcopy(self.critics)
        initial = torch.full((len(tasks),), math.log(config.initial_temperature))
        self.log_alpha = nn.Parameter(initial, requires_grad=False)

    def networks(self) -> dict[str, MultiTaskNetworks]:
        """Return the networks that surgery is applied to, by name."""
        return {"actor": self.actor, "critics": self.critics}

    def save(self, path: Path | str, extra: dict[str, Any] | None = None) -> None:
        """Save all tensors to a safetensors file, with the configuration as YAML in its header.

        Args:
            extra: Additional plain values for the header, e.g. the training run's seed.
        """
        config = yaml12.dump(self.description() | (extra or {}))
        save_file(self.tensors(), path, {"format": POLICY_FORMAT, "config": config})
