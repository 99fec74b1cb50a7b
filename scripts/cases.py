"""mtrl's agent and learner at the sizes of a benchmark, with random data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from published import ACTION, BATCH, DEPTH, OBSERVATION, WIDTH
from torch import Tensor, nn

from mtrl.config.agent import AgentConfig
from mtrl.config.learner import LearnerConfig
from mtrl.config.train import TrainConfig
from mtrl.devices import keep_freed_memory
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.problems import critic_problem
from mtrl.sac.replay import Batch, ReplayBuffer
from mtrl.surgery.stacked import StackedProblem


class UserMLP(nn.Sequential):
    """The trunk `mlp` as a user's module, which does not receive the task."""

    def __init__(self, n_inputs: int, width: int = WIDTH) -> None:
        widths = [n_inputs, *[width] * DEPTH]
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        super().__init__(*(part for layer in layers for part in layer))


@dataclass(frozen=True)
class Case:
    """Sizes and settings of a benchmark; networks and batch of a configuration, if given."""

    n_tasks: int
    width: int = WIDTH
    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    config: TrainConfig | None = None
    trunk: str | None = None

    @property
    def rows(self) -> int:
        """Transitions per task in a batch."""
        return BATCH if self.config is None else self.config.learner.batch_size

    def agent(self) -> MTSAC:
        """Create an agent of these sizes."""
        config = AgentConfig(trunk=self.trunk or "mlp", hidden_sizes=(self.width,) * DEPTH)
        if self.config is not None:
            config = self.config.agent
        tasks = tuple(f"task-{t}" for t in range(self.n_tasks))
        draw = np.random.default_rng(0)  # vectors as long as the descriptions of Meta-World's
        told = {task: draw.normal(size=384) / 384**0.5 for task in tasks}
        agent = MTSAC(tasks, config, OBSERVATION, ACTION, descriptions=told)
        return agent.to(self.device)

    def learner(self, surgery: str, **settings: Any) -> Learner:
        """Create its learner."""
        if self.device == "cpu":
            keep_freed_memory()  # as in training
        how = {"precision": self.precision, "compile": self.compile, "surgery": surgery}
        config = LearnerConfig() if self.config is None else self.config.learner
        return Learner(self.agent(), LearnerConfig(**config.model_dump() | how | settings))

    def batch(self) -> tuple[Batch, Tensor]:
        """Create random data: the time of an update does not depend on values."""
        lead, device = (self.n_tasks, self.rows), self.device
        batch = Batch(
            torch.randn(*lead, OBSERVATION, device=device),
            torch.rand(*lead, ACTION, device=device) * 2 - 1,
            torch.rand(*lead, device=device),
            torch.zeros(*lead, device=device),
            torch.randn(*lead, OBSERVATION, device=device),
        )
        return batch, torch.randn(2, *lead, ACTION, device=device)

    def full_replay(self, capacity: int) -> ReplayBuffer:
        """Create a replay buffer full of noise."""
        replay = ReplayBuffer(capacity, self.n_tasks, OBSERVATION, ACTION, device=self.device)
        state = {
            "rows": torch.randn(capacity + 1, self.n_tasks, OBSERVATION + ACTION + 2),
            "starts": torch.arange(capacity),
            "next_row": torch.tensor(capacity),
            "generator": replay.generator.get_state(),
            "scale": replay.scale.state_dict(),
        }
        replay.load_state_dict(state)
        return replay

    @torch.no_grad()
    def critics(self, learner: Learner, batch: Batch, noise: Tensor) -> StackedProblem:
        """Build the problem of the learner's critics on this batch."""
        alpha = learner.agent.log_alpha.exp()
        how: Any = {"noise": noise[0], "alpha": alpha, "precision": learner.precision}
        return critic_problem(learner.agent, learner.config, batch, **how)
