"""Evaluation protocol against Meta-World's own evaluation, goal by goal."""

import json
import math
import pickle
from dataclasses import replace
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metaworld import Task, _init_each_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.evaluation import evaluation
from metaworld.policies import ENV_POLICY_MAP

from mtrl.config.agent import AgentConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.errors import UsageError
from mtrl.evaluation.play import act
from mtrl.evaluation.protocol import _copies, evaluate, evaluate_in
from mtrl.evaluation.scores import Evaluation
from mtrl.evaluation.video import film
from mtrl.policy.policy import Policy
from mtrl.training.report import Outcome

TASKS = ("reach-v3", "drawer-close-v3", "push-v3")
SEED, EPISODES = 11, 8


class HalfExpert:
    """Meta-World's scripted experts, which do nothing if the goal is left of its median."""

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

    def act(self, observations: torch.Tensor, tasks: torch.Tensor, noise: None) -> torch.Tensor:
        assert tasks[:3].tolist() == [0, 1, 2]  # the rest is padding
        actions = torch.zeros(len(tasks), 4)
        actions[:3] = torch.from_numpy(self.eval_action(observations[:3].numpy()))
        return actions

    def reset(self, mask: np.ndarray) -> None:
        """Called by Meta-World for agents with memory."""


def their_tasks(task: str) -> list[Task]:
    """Our first goals of a task as Meta-World task objects."""
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
    assert 0 < ours.mean < 1  # a policy that always or never succeeds would prove nothing
    for t in range(len(TASKS)):
        for episode in (0, EPISODES - 1):
            assert_is_what_was_judged(ours, t, episode)


def assert_is_what_was_judged(result: Evaluation, t: int, episode: int) -> None:
    """Replay the recorded actions in a new environment."""
    env = MetaWorldTask(result.tasks[t], result.actions.shape[2], shuffle_goals=False)
    env.reset(seed=result.seed, options={"episode": episode})
    rewards, successes, ended = [], [], False
    for action in result.actions[t, episode]:
        assert not ended
        _, reward, _, ended, info = env.step(action)
        rewards.append(reward)
        successes.append(info["success"])
    # `sum` compensates rounding since Python 3.12.
    assert ended and np.cumsum(rewards)[-1] == result.returns[t, episode]
    expected = successes.index(True) + 1 if any(successes) else 0
    assert result.first_success[t, episode] == expected


def make_policy(tasks: tuple[str, ...], width: int = 400) -> Policy:
    """A policy whose actions differ in every task and state."""
    policy = Policy(tasks, AgentConfig(hidden_sizes=(width, width)), 39, 4, seed=2)
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.actor.parameters():  # heads start near zero
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def test_arguments_are_checked_before_anything_starts():
    one = get_benchmark("mt1:reach-v3")
    policy = Policy(one.tasks, AgentConfig(hidden_sizes=(8,)), 39, 4)
    with pytest.raises(UsageError, match=r"benchmark: expected an mtrl\.Benchmark, such as get_be"):
        evaluate(policy, "mt10", seed=0)
    with pytest.raises(UsageError, match=r"policy: expected an mtrl\.Policy, such as Policy\.load"):
        evaluate("policy_final.safetensors", one, seed=0)
    with pytest.raises(UsageError, match="episodes: expected at most 50, one per goal, got 60"):
        evaluate(policy, one, seed=0, episodes=60)
    for name, wrong in [("episodes", 0), ("seed", None), ("horizon", 0), ("workers", -1)]:
        given = {"seed": 0, "episodes": 1, name: wrong}
        with pytest.raises(UsageError, match=f"{name}: expected an integer of at least"):
            evaluate(policy, one, **given)
    for name, wrong in [("horizon", 2.5), ("workers", 0), ("envs_per_task", 0)]:
        with pytest.raises(UsageError, match=f"{name}: expected an integer of at least 1, got"):
            make_vector_env(one, **{name: wrong})


def test_films_show_meta_worlds_tasks(tmp_path):
    custom = Evaluation(("a",), 0, np.zeros((1, 1), int), np.zeros((1, 1)), np.zeros((1, 1, 2, 4)))
    with pytest.raises(UsageError, match="video: expected Meta-World tasks, got a"):
        film(custom, tmp_path / "films")
    assert not (tmp_path / "films").exists()


@pytest.mark.parametrize("stochastic", [False, True])
def test_results_do_not_depend_on_processes_or_other_tasks(stochastic):
    policy = make_policy(TASKS)
    how = {"seed": 7, "horizon": 20, "stochastic": stochastic}
    together = evaluate(policy, get_benchmark("", TASKS), episodes=6, workers=1, **how)
    assert together.actions.shape == (3, 6, 20, 4) and together.actions.std() > 0.1
    for task, workers, episodes in ((2, 4, 6), (1, 1, 4), (0, 3, 6)):  # 3, 1 and 3 copies
        benchmark = get_benchmark("", TASKS[task : task + 1])
        alone = evaluate(policy, benchmark, episodes=episodes, workers=workers, **how)
        for name in ("actions", "returns", "first_success"):
            here, there = getattr(alone, name)[0], getattr(together, name)[task, :episodes]
            assert np.array_equal(here, there), (task, name)
    assert_is_what_was_judged(together, 1, 5)


def test_samples_follow_the_policy_and_differ_in_every_step():
    policy = make_policy(TASKS[:1])
    benchmark = get_benchmark("", TASKS[:1])
    how = {"benchmark": benchmark, "episodes": 2, "horizon": 10, "workers": 1}
    first, again, other = (
        evaluate(policy, seed=seed, stochastic=True, **how) for seed in (3, 3, 4)
    )
    assert np.array_equal(first.actions, again.actions)
    assert not np.isclose(first.actions, other.actions).any()
    modes = evaluate(policy, seed=3, **how)
    same_state = first.actions[:, :, 0] - modes.actions[:, :, 0]  # before they diverge
    assert (same_state != 0).all() and not np.isclose(*same_state[0]).any()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(24)), st.integers(1, 24))
def test_a_rows_action_does_not_depend_on_the_other_rows(order, n):
    policy = make_policy(TASKS)
    rows = np.random.default_rng(0).normal(size=(24, 39)).astype(np.float32)
    tasks, noise = np.arange(24) % 3, rows[:, :4]
    chosen = np.array(order[:n])
    everyone = act(policy, rows, tasks, noise)
    some = act(policy, rows[chosen], tasks[chosen], noise[chosen])
    assert np.array_equal(some, everyone[chosen])


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 128))
def test_copies_end_together_and_are_few(tasks, episodes, workers):
    copies = _copies(tasks, [episodes, 50], workers)
    assert episodes % copies == 0 and 50 % copies == 0
    assert copies == 1 or math.ceil(tasks * copies / workers) < 40
    if episodes == 50 and tasks < workers:
        assert copies > 1  # all cores are used


def make_evaluation() -> Evaluation:
    first_success = np.zeros((10, 50), int)
    for t in range(10):
        first_success[t, : 5 * t] = np.arange(5 * t) + 1
    names = tuple(f"task-{t}" for t in range(10))
    return Evaluation(names, 0, first_success, np.ones((10, 50)), np.zeros((10, 50, 500, 4)))


def test_summary_in_closed_form():
    result = make_evaluation()
    assert result.mean == pytest.approx(0.45)
    assert result.worst == pytest.approx(0.05)  # tasks at 0.0 and 0.1
    low, high = result.intervals()[5]  # Wilson, 25 of 50
    z, n, p = 1.959963985, 50, 0.5
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def test_a_notebook_shows_a_table(tmp_path):
    """Well-formed HTML with a row per task and a dash for missing values."""
    result = replace(make_evaluation(), tells_success=np.arange(10) != 3)
    outcome = Outcome(tmp_path / "a<b", result)
    page = ElementTree.fromstring(f"<div>{outcome._repr_html_()}</div>")
    assert page.findtext("code") == str(tmp_path / "a<b")
    table = page.find("table")
    assert table is not None
    header, *rows = [[cell.text for cell in row] for row in table]
    assert header == list(result.rows()[0])
    assert [row[0] for row in rows] == list(result.tasks)
    rate, steps = header.index("success_rate"), header.index("steps_to_success_mean")
    assert [row[rate] for row in rows[:5]] == ["0.00", "0.10", "0.20", "–", "0.40"]
    assert [row[steps] for row in rows[:4]] == ["–", "3.00", "5.50", "–"]
    assert str(outcome).splitlines()[-1] == str(tmp_path / "a<b")
    interrupted = Outcome(tmp_path / "x&y", None, 15)
    assert interrupted._repr_html_() == f"<code>{tmp_path}/x&amp;y</code>"
    assert str(interrupted) == str(tmp_path / "x&y")
    odd = replace(result, tasks=("<script>", *result.tasks[1:]))
    assert "<td>&lt;script&gt;</td>" in odd._repr_html_()


def test_files_agree_with_each_other():
    result = make_evaluation()
    parsed = json.loads(result.to_json(seed=3))
    assert parsed["seed"] == 3 and parsed["mean_success_rate"] == pytest.approx(0.45)
    lines = result.to_csv().splitlines()
    assert len(lines) == 11 and lines[0].startswith("task,episodes,successes,success_rate")
    assert [row["successes"] for row in parsed["tasks"]] == [5 * t for t in range(10)]
    steps = [row["steps_to_success_mean"] for row in parsed["tasks"]]
    assert steps == [None] + [(5 * t + 1) / 2 for t in range(1, 10)]
    table = result.table().splitlines()
    assert lines[1].endswith(",") and table[1].endswith("–")  # task-0 was never solved
    assert lines[4].endswith(",8.0") and table[4].endswith(" 8")
    assert "task-9      " in result.table() and "mean" in result.table()
