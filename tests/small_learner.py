"""Small learners that update in milliseconds, and inputs for them."""

import numpy as np
import torch

from mtrl.config.agent import AgentConfig
from mtrl.config.learner import LearnerConfig
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.replay import Batch, ReplayBuffer

TASKS, OBSERVATION, ACTION, BATCH, STORED, HIDDEN = tuple("abcd"), 7, 3, 8, 16, (12, 11)


def make_learner(
    tasks: int | tuple[str, ...] = TASKS,
    *,
    agent: AgentConfig | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **settings,
) -> Learner:
    """Create a learner of `task-0`, … if `tasks` is a number, with settings of `LearnerConfig`."""
    names = tuple(f"task-{t}" for t in range(tasks)) if isinstance(tasks, int) else tasks
    agent = agent or AgentConfig(hidden_sizes=HIDDEN, initial_temperature=0.7)
    networks = MTSAC(names, agent, OBSERVATION, ACTION).to(device, dtype)
    return Learner(networks, LearnerConfig(**{"batch_size": BATCH} | settings), seed)


def make_batch(n_tasks: int, seed: int = 0, rows: int = 16) -> tuple[Batch, torch.Tensor]:
    """Create float64 transitions, 30% terminal, and the noise of an update `[2, T, B, A]`."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(n_tasks, rows, *shape, generator=g, dtype=torch.float64)

    terminated = (torch.rand(n_tasks, rows, generator=g) < 0.3).double()
    batch = Batch(
        normal(OBSERVATION), normal(ACTION).tanh(), normal(), terminated, normal(OBSERVATION)
    )
    return batch, torch.stack([normal(ACTION), normal(ACTION)])


def filled_replay(
    n_tasks: int = len(TASKS), steps: int = STORED, device: str = "cpu", ends: bool = False
) -> ReplayBuffer:
    """Create a replay buffer of `steps` vector steps, each the end of an episode if `ends`."""
    replay, draw = (
        ReplayBuffer(steps, n_tasks, OBSERVATION, ACTION, device=device),
        np.random.default_rng(0),
    )
    for _ in range(steps):
        observation, action = (draw.normal(size=(n_tasks, n)) for n in (OBSERVATION, ACTION))
        rewards, zeros, done = draw.normal(size=n_tasks), np.zeros(n_tasks), np.full(n_tasks, ends)
        replay.add(observation, np.tanh(action), rewards, zeros, observation, done=done)
    return replay
