"""What unusual custom environments put into the replay buffer, against a hand-written loop."""

import warnings
import zlib
from contextlib import closing
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box
from odd_tasks import Drift, Unseeded

from mtrl import AgentConfig, Benchmark
from mtrl.envs.make import make_vector_env
from mtrl.sac.agent import MTSAC
from mtrl.sac.replay import ReplayBuffer
from mtrl.training.rollout import Collector

HORIZON, STEPS, COPIES, SEED = 12, 150, 2, 5
WHOLE = Box(-9_999, 9_999, (3,), np.int64)
TASKS = {
    "float64": Drift,  # ends by itself, or at HORIZON
    "whole": partial(Drift, WHOLE, scale=100.0),
    "limited": lambda: gym.wrappers.TimeLimit(Drift(limit=99.0), 5),
    "both": partial(Drift, limit=0.5, length=1),  # terminated and truncated in the same step
}


def lived(task: str, copy: int, actions: np.ndarray) -> tuple[list[bytes], set[str]]:
    """Play the episodes of a copy in the bare environment; its transitions and how they ended."""
    env, episode, transitions, ends = TASKS[task](), copy, [], set()
    low, high = env.action_space.low, env.action_space.high

    def start() -> np.ndarray:
        key = [SEED, zlib.crc32(task.encode()), 1, episode]
        return env.reset(seed=int(np.random.SeedSequence(key).generate_state(1)[0]))[0]

    observation, length = start(), 0
    for action in actions:
        given = low + (action.astype(np.float64) + 1) / 2 * (high - low)
        following, reward, terminated, truncated, _ = env.step(given)
        length += 1
        row = np.hstack([observation, action, reward, float(terminated), following])
        transitions.append(row.astype(np.float32))
        observation = following
        if terminated or truncated or length == HORIZON:
            ends.add("terminated" if terminated else "truncated" if truncated else "horizon")
            episode += COPIES
            observation, length = start(), 0
    return transitions, ends


def test_transitions_equal_those_of_a_hand_written_loop():
    """True successors at the end of episodes, and `terminated` only where the task itself ended."""
    envs = make_vector_env(Benchmark("drift", TASKS), HORIZON, workers=1, envs_per_task=COPIES)
    agent = MTSAC(tuple(TASKS), AgentConfig(hidden_sizes=(8,)), 3, 2)
    collector, actions = Collector(envs, agent, seed=0), []
    replay = ReplayBuffer(2 * COPIES * STEPS, len(TASKS), 3, 2, envs_per_task=COPIES)
    collector.reset(seed=SEED)
    for step in range(STEPS):
        collector.act(uniform=step < STEPS // 2)
        actions.append(collector._actions)
        collector.store(collector.wait(), replay)
    envs.close()
    batch = replay.sample(6_000)
    for t, task in enumerate(TASKS):
        mine = [lived(task, c, np.array(actions)[:, t * COPIES + c]) for c in range(COPIES)]
        expected = np.unique(np.array([row for rows, _ in mine for row in rows]), axis=0)
        columns = (
            batch.observations[t],
            batch.actions[t],
            batch.rewards[t][:, None],
            batch.terminated[t][:, None],
            batch.next_observations[t],
        )
        found = np.unique(np.hstack([column.numpy() for column in columns]), axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=task)
        kinds = {"limited": {"truncated"}, "both": {"terminated", "truncated"}}
        ends = set.union(*(ends for _, ends in mine))
        assert ends == kinds.get(task, {"terminated", "horizon"}), task


def test_an_environment_that_does_not_repeat_its_episode_is_pointed_out_on_resuming():
    tasks = {"drift": Drift, "unseeded": Unseeded}
    for chosen in (("drift",), ("drift", "unseeded")):
        benchmark = Benchmark("two", {task: tasks[task] for task in chosen})
        agent = MTSAC(chosen, AgentConfig(hidden_sizes=(8,)), 3, 2)
        replay = ReplayBuffer(40, len(chosen), 3, 2)
        with closing(make_vector_env(benchmark, workers=1)) as envs:
            collector = Collector(envs, agent, seed=0)
            collector.reset(seed=SEED)
            for _ in range(3):
                collector.act(uniform=True)
                collector.store(collector.wait(), replay)
            state = collector.state_dict()
        with closing(make_vector_env(benchmark, workers=1)) as envs:
            resumed = Collector(envs, agent, seed=0)
            if "unseeded" in chosen:
                with pytest.warns(UserWarning, match="task 'unseeded': the same seed and actions"):
                    resumed.load_state_dict(state, SEED)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    resumed.load_state_dict(state, SEED)
