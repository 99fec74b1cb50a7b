"""A learner that updates in milliseconds, in float32, and a replay for it."""

import numpy as np

from mtrl.config.sections import AgentConfig, LearnerConfig
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.replay import ReplayBuffer

TASKS, OBSERVATION, ACTION, BATCH, STORED = tuple("abcd"), 7, 3, 8, 16


def make_small_learner(surgery: str, tasks: tuple[str, ...] = TASKS, **settings) -> Learner:
    agent = MTSAC(tasks, AgentConfig(hidden_sizes=(12, 11)), OBSERVATION, ACTION)
    return Learner(agent, LearnerConfig(surgery=surgery, batch_size=BATCH, **settings))


def filled_replay(n_tasks: int = len(TASKS)) -> ReplayBuffer:
    replay = ReplayBuffer(STORED, n_tasks, OBSERVATION, ACTION)
    draw = np.random.default_rng(0)
    for _ in range(STORED):
        observation, action = (draw.normal(size=(n_tasks, n)) for n in (OBSERVATION, ACTION))
        rewards, ends = draw.normal(size=n_tasks), np.zeros(n_tasks, bool)
        replay.add(observation, action, rewards, np.zeros(n_tasks), observation, done=ends)
    return replay
