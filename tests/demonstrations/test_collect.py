"""Collected episodes match the simulator, and experts perform as in Meta-World."""

import pickle

import numpy as np
import pytest
from metaworld import Task
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from own_tasks import REACHERS

from mtrl import MTSAC, Demonstrations, collect, evaluate, experts, get_benchmark
from mtrl.cli.collect import main
from mtrl.config.agent import AgentConfig
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.errors import UsageError

TASKS = ("drawer-open-v3", "push-v3")


@pytest.fixture(scope="module")
def found() -> Demonstrations:
    benchmark = get_benchmark("", TASKS)
    return collect(experts(TASKS), benchmark, [2, 3], seed=4, horizon=120, workers=1)


@pytest.mark.filterwarnings("ignore:Constant")
def test_transitions_of_experts_match_the_simulator(found):
    """Compare with a single environment and a new policy of Meta-World."""
    for task, episodes in zip(TASKS, (2, 3), strict=True):
        env, policy = MetaWorldTask(task, horizon=120), ENV_POLICY_MAP[task]()
        mine = found.episodes(task)
        assert [rows.stop - rows.start for rows in mine] == [120] * episodes
        for number, rows in enumerate(mine):
            observation, _ = env.reset(seed=4, options={"episode": number})
            for row in range(rows.start, rows.stop):
                action = np.clip(policy.get_action(observation), -1, 1)
                np.testing.assert_array_equal(found.observations[row], observation)
                np.testing.assert_array_equal(found.actions[row], action)
                observation, reward, terminated, truncated, info = env.step(action)
                np.testing.assert_array_equal(found.next_observations[row], observation)
                assert found.rewards[row] == np.float32(reward)
                assert found.success[row] == info["success"]
                assert (found.terminated[row], found.truncated[row]) == (terminated, truncated)


def test_episodes_do_not_depend_on_processes_or_other_tasks(found):
    alone = collect(experts(TASKS), get_benchmark("mt1:push-v3"), 3, seed=4, horizon=120, workers=2)
    assert alone.digest() == found.select(["push-v3"]).digest()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Constant")
def test_experts_succeed_where_they_do_in_metaworlds_environments():
    """Compare with `ALL_V3_ENVIRONMENTS` on the same goals; only observations are rounded here."""
    tasks, episodes, horizon = ("drawer-open-v3", "push-v3", "peg-insert-side-v3"), 10, 300
    found = collect(experts(tasks), get_benchmark("", tasks), episodes, seed=2, horizon=horizon)
    for task in tasks:
        env, goals, policy = (
            ALL_V3_ENVIRONMENTS[task](),
            MetaWorldTask(task),
            ENV_POLICY_MAP[task](),
        )
        mine = [bool(found.success[rows].any()) for rows in found.episodes(task)]
        theirs = []
        for episode in range(episodes):
            goals.reset(seed=2, options={"episode": episode})
            vector = goals.simulator._last_rand_vec
            data = {"env_cls": type(env), "rand_vec": vector, "partially_observable": False}
            env.set_task(Task(task, pickle.dumps(data)))
            observation, info = env.reset()
            for _ in range(horizon):
                action = np.clip(policy.get_action(observation), -1, 1)
                observation, _, _, _, info = env.step(action)
                if info["success"]:
                    break
            theirs.append(bool(info["success"]))
        assert sum(mine) >= 7 and np.not_equal(mine, theirs).sum() <= 1, (task, mine, theirs)


def test_episodes_of_a_policy_equal_those_of_an_evaluation():
    """Only the order of the goals differs, because training shuffles them."""
    agent = MTSAC(TASKS, AgentConfig(hidden_sizes=(8,)), 39, 4, seed=3)
    benchmark = get_benchmark("", TASKS)
    played = collect(agent, benchmark, 2, seed=1, horizon=15, workers=1)
    for task in TASKS:
        for number, rows in enumerate(played.episodes(task)):
            env = MetaWorldTask(task, horizon=15)
            observation, _ = env.reset(seed=1, options={"episode": number})
            np.testing.assert_array_equal(played.observations[rows][0], observation)
            for row in range(rows.start, rows.stop):
                wanted, _ = agent.predict(played.observations[row], deterministic=True, task=task)
                np.testing.assert_allclose(played.actions[row], wanted, atol=1e-6)
    sampled = [
        collect(agent, benchmark, 1, seed=1, horizon=15, workers=n, stochastic=True) for n in (1, 2)
    ]
    assert sampled[0].digest() == sampled[1].digest()
    assert np.abs(sampled[0].actions).max() > 0.5 > np.abs(played.actions).max()


def test_functions_act_in_custom_tasks_too():
    found = collect(
        dict.fromkeys(REACHERS.tasks, lambda seen: [9 * seen[0], 0]), REACHERS, 2, workers=1
    )
    assert found.tasks == REACHERS.tasks and len(found) == 2 * 2 * 50
    np.testing.assert_array_equal(found.actions[:, 0], (9 * found.observations[:, 0]).clip(-1, 1))


def test_an_invalid_actor_is_reported():
    benchmark = get_benchmark("", TASKS)
    with pytest.raises(UsageError, match=r"'drawer-open-v3'.*tasks of the policy"):
        collect(experts(["push-v3"]), benchmark, 1)
    with pytest.raises(UsageError, match="at most 50 for drawer-open-v3, one per goal, got 51"):
        collect(experts(TASKS), benchmark, 51)
    with pytest.raises(UsageError, match="at least 1 for push-v3, got 0"):
        collect(experts(TASKS), benchmark, [1, 0])
    wrong = dict.fromkeys(TASKS, lambda observation: [0.0])
    with pytest.raises(UsageError, match="expected 4 finite numbers as an action in drawer-open"):
        collect(wrong, benchmark, 1, workers=1)
    failing = dict.fromkeys(TASKS, lambda observation: 1 / 0)
    with pytest.raises(
        UsageError, match="the function of drawer-open-v3 failed: ZeroDivisionError"
    ):
        collect(failing, benchmark, 1, workers=1)


def test_the_command_writes_a_file_of_an_expert_or_a_policy(policy, tmp_path, capsys):
    path = tmp_path / "a.npz"
    ask = f"expert --tasks reach-v3 --episodes 1 --horizon 100 --workers 1 -o {path}"
    assert main(ask.split()) == 0
    assert "reach-v3 1 episode, 1 solved\n" in capsys.readouterr().out
    assert len(Demonstrations.load(path)) == 100
    assert main(f"{policy} --episodes 1 --workers 1 -o {path}".split()) == 0
    found = Demonstrations.load(path)
    assert (
        found.tasks == ("reach-v3", "push-v3") and len(found) == 2 * 20
    )  # the horizon of the policy
    result = evaluate(MTSAC.load(policy), get_benchmark("", found.tasks), 1, 1, 20, workers=1)
    assert result.actions.shape == (2, 1, 20, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "expert -o {}/a.npz",
            "tasks: expected --tasks or --benchmark with the expert, got neither",
        ),
        (
            "expert --tasks push-v3 -o {}/no/a.npz",
            "output: expected a file in a folder that exists",
        ),
        ("expert --tasks push -o {}/a.npz", "tasks: unknown 'push'; did you mean 'push-v3'?"),
        ("expert --tasks push-v3", "the following arguments are required: -o/--output"),
        (
            "expert --benchmark own_tasks:REACHERS -o {}/a.npz",
            "benchmark: expected Meta-World tasks",
        ),
        (
            "expert --tasks push-v3 --stochastic -o {}/a.npz",
            "stochastic: expected a policy with it",
        ),
        ("{}/none -o {}/a.npz", "none"),
    ],
)
def test_invalid_commands_are_rejected(arguments, expected, tmp_path, capsys):
    assert main(arguments.replace("{}", str(tmp_path)).split()) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
