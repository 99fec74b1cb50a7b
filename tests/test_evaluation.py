"""The evaluation protocol against Meta-World's own evaluation, goal for goal."""

import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from metaworld import Task, _init_each_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.evaluation import evaluation
from metaworld.policies import ENV_POLICY_MAP

from mtrl.benchmarks import get_benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.evaluation import Evaluation, evaluate_in

TASKS = ("reach-v3", "drawer-close-v3", "push-v3")
SEED, EPISODES = 11, 8


class HalfExpert:
    """Meta-World's scripted experts, which do nothing where the goal lies left of its median."""

    tasks = TASKS
    device = torch.device("cpu")

    def __init__(self):
        self.policies = [ENV_POLICY_MAP[task]() for task in TASKS]

    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        observations = observations.astype(np.float32).astype(np.float64)
        return np.stack(
            [
                np.clip(policy.get_action(row), -1, 1) * (row[-3] > 0.0)
                for policy, row in zip(self.policies, observations, strict=True)
            ]
        ).astype(np.float32)

    def act(self, observations: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        assert tasks.tolist() == [0, 1, 2]
        return torch.from_numpy(self.eval_action(observations.numpy()))

    def reset(self, mask: np.ndarray) -> None:
        """Meta-World tells agents with a memory."""


def their_tasks(task: str) -> list[Task]:
    """Our first goals of a task as Meta-World's own task objects."""
    env = MetaWorldTask(task, shuffle_goals=False)
    made = []
    for episode in range(EPISODES):
        _, info = env.reset(seed=SEED if episode == 0 else None)
        data = {
            "rand_vec": env._random_vectors[info["goal"]],
            "env_cls": ALL_V3_ENVIRONMENTS[task],
            "partially_observable": False,
        }
        made.append(Task(task, pickle.dumps(data)))
    return made


def test_agrees_with_metaworlds_evaluation():
    agent = HalfExpert()
    envs = make_vector_env(get_benchmark("", TASKS), shuffle_goals=False)
    ours = evaluate_in(agent, envs, SEED, EPISODES)
    envs.close()

    def make(task: str) -> gym.Env:
        env = _init_each_env(
            ALL_V3_ENVIRONMENTS[task], their_tasks(task), seed=0, task_select="pseudorandom"
        )
        env.get_wrapper_attr("toggle_sample_tasks_on_reset")(True)
        return env

    theirs = gym.vector.SyncVectorEnv(
        [lambda task=task: make(task) for task in TASKS],
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    mean, _, rates, _ = evaluation(agent, theirs, num_episodes=EPISODES)
    assert dict(zip(ours.tasks, ours.success_rates, strict=True)) == rates
    assert ours.mean == pytest.approx(mean)
    assert 0 < ours.mean < 1  # a policy that always or never succeeds would show nothing


def make_evaluation() -> Evaluation:
    success = np.zeros((10, 50), bool)
    for t in range(10):
        success[t, : 5 * t] = True
    return Evaluation(tuple(f"task-{t}" for t in range(10)), success, np.ones((10, 50)))


def test_summary_in_closed_form():
    result = make_evaluation()
    assert result.mean == pytest.approx(0.45)
    assert result.worst == pytest.approx(0.05)  # tasks at 0.0 and 0.1
    low, high = result.intervals()[5]  # Wilson, 25 of 50
    z, n, p = 1.959963985, 50, 0.5
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def test_files_agree_with_each_other():
    result = make_evaluation()
    parsed = json.loads(result.to_json(seed=3))
    assert parsed["seed"] == 3 and parsed["mean_success_rate"] == pytest.approx(0.45)
    lines = result.to_csv().splitlines()
    assert len(lines) == 11 and lines[0].startswith("task,episodes,successes,success_rate")
    assert [row["successes"] for row in parsed["tasks"]] == [5 * t for t in range(10)]
    assert "task-9      " in result.table() and "mean" in result.table()
