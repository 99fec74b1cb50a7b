"""Stable-Baselines3's SAC with our sizes for one task, as an alternative to compare with.

It uses the options that its users can set, such as fused Adam.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from published import ACTION, BATCH, DEPTH, OBSERVATION, WIDTH
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger

from mtrl.config.learner import LearnerConfig


class Spaces(gym.Env):
    """Environment with only spaces, because SB3 needs one to create a model."""

    observation_space = Box(-1, 1, (OBSERVATION,), np.float32)
    action_space = Box(-1, 1, (ACTION,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """See `gym.Env`."""
        return np.zeros(OBSERVATION, np.float32), {}


class StableBaselines:
    """Stable-Baselines3's SAC with a replay buffer full of noise, in float32."""

    def __init__(self, device: str, width: int = WIDTH, capacity: int = 100_000) -> None:
        ours = LearnerConfig()
        adam = {"eps": ours.adam_epsilon, "fused": True}
        self.sac = SAC(
            "MlpPolicy",
            Spaces(),
            learning_rate=ours.learning_rate,
            buffer_size=capacity,
            tau=ours.tau,
            gamma=ours.gamma,
            policy_kwargs={"net_arch": [width] * DEPTH, "optimizer_kwargs": adam},
            device=device,
        )
        self.sac.set_logger(Logger(None, []))
        replay, draw = self.sac.replay_buffer, np.random.default_rng(0)
        assert replay is not None
        for array in (replay.observations, replay.next_observations, replay.rewards):
            array[:] = draw.normal(size=array.shape)
        replay.actions[:] = draw.uniform(-1, 1, replay.actions.shape)
        replay.full = True

    def update(self) -> None:
        """Make one update, including sampling its batch."""
        self.sac.train(gradient_steps=1, batch_size=BATCH)
