"""Vector environment on the real simulator."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from multiprocessing import forkserver

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT25_V3
from metaworld.policies import ENV_POLICY_MAP
from toy_tasks import POINTS

from mtrl.envs.benchmarks import N_GOALS, get_benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.envs.processes import WorkerError, WorkerProcesses
from mtrl.envs.vector import TaskVectorEnv
from mtrl.errors import UsageError

TASKS = ("reach-v3", "push-v3", "door-open-v3", "window-close-v3")
BENCHMARK = get_benchmark("", TASKS)


def actions(steps: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.uniform(-1, 1, (steps, len(TASKS), 4)).astype(np.float32)


def play(envs: TaskVectorEnv, steps: int, seed: int | None = 3) -> dict[str, np.ndarray]:
    trace = {"observations": [envs.reset(seed=seed)[0]], "rewards": [], "success": [], "final": []}
    for action in actions(steps):
        observations, rewards, _, _, infos = envs.step(action)
        trace["observations"].append(observations)
        trace["rewards"].append(rewards)
        trace["success"].append(infos["success"])
        if "final_obs" in infos:
            trace["final"].append(infos["final_obs"])
    return {key: np.array(value) for key, value in trace.items()}


def test_results_do_not_depend_on_the_number_of_workers():
    traces = []
    for workers in (1, 3):
        envs = make_vector_env(BENCHMARK, horizon=40, workers=workers)
        assert len(envs._parts[0]._processes) == workers
        traces.append(play(envs, 100))
        envs.close()
    for key, value in traces[0].items():
        assert np.array_equal(value, traces[1][key]), key
    assert len(traces[0]["final"]) == 2


def test_copies_share_their_tasks_episodes():
    """Row t E + e is copy e of task t, and plays the single environment's episodes e, e + E, …"""
    benchmark, copies, horizon = get_benchmark("", TASKS[:2]), 3, 20
    envs = make_vector_env(benchmark, horizon, workers=2, envs_per_task=copies)
    assert (envs.n_tasks, envs.envs_per_task, envs.num_envs) == (2, copies, 6)
    assert envs.names == TASKS[:2] and envs.observation_space.shape == (6, 39)
    moves = np.random.default_rng(0).uniform(-1, 1, (2 * horizon, 6, 4)).astype(np.float32)
    first, _ = envs.reset(seed=4)
    trace = [envs.step(move) for move in moves]
    state = envs.state()
    assert state["episodes"] == [6, 7, 8, 6, 7, 8]
    for row, (task, copy) in enumerate((task, copy) for task in TASKS[:2] for copy in range(3)):
        alone = MetaWorldTask(task, horizon)
        assert np.array_equal(first[row], alone.reset(seed=4, options={"episode": copy})[0])
        for step, (observations, rewards, _, truncated, infos) in enumerate(trace):
            expected, reward, *_ = alone.step(moves[step, row])
            assert rewards[row] == reward
            if truncated[row]:
                assert np.array_equal(infos["final_obs"][row], expected)
                following = copy + copies * ((step + 1) // horizon)
                expected, _ = alone.reset(options={"episode": following})
            assert np.array_equal(observations[row], expected)
    envs.close()


def test_step_async_and_step_wait_equal_step():
    halves, whole = (make_vector_env(BENCHMARK, horizon=10, workers=1) for _ in range(2))
    for envs in (halves, whole):
        envs.reset(seed=0)
    for action in actions(12):
        halves.step_async(action)
        with pytest.raises(gym.error.AlreadyPendingCallError, match="step_async"):
            halves.step_async(action)
        with pytest.raises(gym.error.AlreadyPendingCallError, match="state"):
            halves.state()
        found, expected = halves.step_wait(), whole.step(action)
        for a, b in zip(found[:4], expected[:4], strict=True):
            assert np.array_equal(a, b)
    with pytest.raises(gym.error.NoAsyncCallError):
        halves.step_wait()
    halves.step_async(action)
    for envs in (halves, whole):
        envs.close()  # also during a step


@pytest.mark.parametrize("task", ["door-open-v3", "push-v3", "pick-place-v3"])
@pytest.mark.filterwarnings("ignore:Constant")
def test_an_episode_equals_the_reference_simulator(task):
    """The same goal set by hand in Meta-World gives bitwise equal numbers.

    The expert ensures that objects are grasped, because we detect contacts with our own code.
    """
    ours, expert = MetaWorldTask(task, horizon=90), ENV_POLICY_MAP[task]()
    observation, info = ours.reset(seed=5)
    reference = ALL_V3_ENVIRONMENTS[task]()
    reference._partially_observable = False
    del reference.sawyer_observation_space
    reference._set_task_called, reference._freeze_rand_vec = True, True
    reference._last_rand_vec = ours._random_vectors[info["goal"]].copy()
    expected, _ = reference.reset()
    assert np.array_equal(observation, expected.astype(np.float32))
    assert observation[-3:].any()  # the goal is observable
    touched = set()
    for _ in range(90):
        action = np.clip(expert.get_action(expected), -1, 1).astype(np.float32)
        observation, reward, terminated, truncated, info = ours.step(action)
        expected, expected_reward, _, _, expected_info = reference.step(action)
        assert np.array_equal(observation, expected.astype(np.float32))
        assert reward == expected_reward
        assert info["success"] == bool(expected_info["success"])
        assert not terminated
        if task != "door-open-v3":
            geom = reference._get_id_main_object()
            touched.add(bool(reference.touching_object(geom)))
            assert ours.simulator.touching_object(geom) == reference.touching_object(geom)
    assert truncated and touched in (set(), {False, True})


def test_final_observations_are_true_last_observations():
    envs = make_vector_env(BENCHMARK, horizon=30)
    envs.reset(seed=1)
    alone = MetaWorldTask(TASKS[1], horizon=30)
    alone.reset(seed=1)
    total = 0.0
    for action in actions(30):
        observations, _, terminated, truncated, infos = envs.step(action)
        last, reward, *_ = alone.step(action[1])
        total += reward
    assert truncated.all() and not terminated.any()
    assert np.array_equal(infos["final_obs"][1], last)
    assert not np.array_equal(observations[1], last)
    assert np.array_equal(observations[1], alone.reset()[0])
    assert infos["final_info"]["episode"]["r"][1] == pytest.approx(total)
    assert (infos["final_info"]["episode"]["l"] == 30).all()
    assert infos["_final_obs"].all()
    envs.close()


@pytest.mark.parametrize("task", ["reach-v3", "peg-insert-side-v3"])
def test_each_goal_comes_once_per_cycle_in_a_seeded_order(task):
    env, again, ordered = MetaWorldTask(task), MetaWorldTask(task), MetaWorldTask(task)
    ordered.shuffle_goals = False
    goals = [env.reset(seed=2 if e == 0 else None)[1]["goal"] for e in range(N_GOALS + 5)]
    assert sorted(goals[:N_GOALS]) == list(range(N_GOALS))
    assert goals[:5] != goals[N_GOALS:]
    assert goals[0] != ordered.reset(seed=2)[1]["goal"] or goals[0] == 0
    assert [ordered.reset()[1]["goal"] for _ in range(4)] == [1, 2, 3, 4]
    assert again.reset(seed=2, options={"episode": 7})[1]["goal"] == goals[7]
    vectors = np.array([env._random_vectors[g] for g in range(N_GOALS)])
    assert len(np.unique(vectors, axis=0)) == N_GOALS
    _, info = again.reset(seed=3)
    other = again._random_vectors[info["goal"]]
    assert not (vectors == other).all(1).any()


@pytest.mark.parametrize(
    "tasks",
    [
        pytest.param(tuple(MT10_V3), id="mt10"),
        pytest.param(tuple(ALL_V3_ENVIRONMENTS), id="mt50", marks=pytest.mark.slow),
    ],
)
def test_an_episode_does_not_depend_on_what_came_before(tasks):
    for task in tasks:
        moves = np.random.default_rng(1).uniform(-1, 1, (40, 4)).astype(np.float32)
        traces = []
        for history in ((), (0, 1)):
            env = MetaWorldTask(task, horizon=500)
            env.reset(seed=0)
            for episode in history:
                env.reset(options={"episode": episode})
                for move in moves[::-1]:
                    env.step(move)
            first, _ = env.reset(options={"episode": 5})
            traces.append([first, *(env.step(move)[0] for move in moves)])
            env.close()
        assert np.array_equal(*map(np.array, traces)), task


def test_restore_is_exact():
    envs = make_vector_env(BENCHMARK, horizon=40, workers=2)
    envs.reset(seed=9)
    moves = actions(110)
    for action in moves[:55]:
        envs.step(action)
    state = envs.state()
    expected = [envs.step(action) for action in moves[55:]]
    other = make_vector_env(BENCHMARK, horizon=40, workers=1)
    observations = other.restore(state, seed=9)
    assert observations.shape == (len(TASKS), 39)
    for action, truth in zip(moves[55:], expected, strict=True):
        found = other.step(action)
        for a, b in zip(truth[:4], found[:4], strict=True):
            assert np.array_equal(a, b)
        if "final_info" in truth[4]:
            for key in "rls":
                a, b = (x[4]["final_info"]["episode"][key] for x in (truth, found))
                assert np.array_equal(a, b)
    envs.close()
    other.close()


@pytest.mark.parametrize("when", ["while it waits", "while it works"])
def test_a_dead_worker_is_noticed_and_its_task_named(when):
    envs = make_vector_env(BENCHMARK, workers=2)
    envs.reset(seed=0)
    os.kill(envs._parts[0]._processes[1].pid, signal.SIGKILL)
    if when == "while it waits":
        envs._parts[0]._processes[1].join()  # so that the next message has no receiver
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"task '(push|window-close)-v3'.*died.*-9"):
        for action in actions(5):
            envs.step(action)
    assert time.monotonic() - begin < 5  # [s]; documented behaviour, not a benchmark
    envs.close()


def test_a_lost_process_is_replaced_and_its_episodes_restart():
    """The rows of the other worker are not affected."""
    played = actions(12)
    with closing(make_vector_env(BENCHMARK, workers=2)) as truth:
        first, _ = truth.reset(seed=3)
        expected = [truth.step(action) for action in played]
    with closing(make_vector_env(BENCHMARK, workers=2, max_restarts=1)) as envs:
        assert np.array_equal(envs.reset(seed=3)[0], first)
        lost = envs._parts[0]._rows[1]
        kept = [row for row in range(len(TASKS)) if row not in lost]
        for step, action in enumerate(played):
            if step == 5:
                os.kill(envs._parts[0]._processes[1].pid, signal.SIGKILL)
            observations, rewards, _, _, infos = envs.step(action)
            assert np.array_equal(observations[kept], expected[step][0][kept])
            assert np.array_equal(rewards[kept], expected[step][1][kept])
            if step == 5:
                assert np.flatnonzero(infos["restarted"]).tolist() == sorted(lost)
                assert np.array_equal(observations[lost], first[lost])
            else:
                assert "restarted" not in infos
        assert envs.restarts == 1
        lengths = [len(envs.state()["actions"][str(row)]) for row in range(len(TASKS))]
        assert lengths == [6 if row in lost else 12 for row in range(len(TASKS))]
        before = envs.state()
        os.kill(envs._parts[0]._processes[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="died"):
            envs.step(played[0])
        after = envs.state()  # the state before the failed step
        assert before["episodes"] == after["episodes"]
        assert all(np.array_equal(a, after["actions"][k]) for k, a in before["actions"].items())


@pytest.mark.parametrize("bad", ["observation", "reward", "hangs"])
def test_nan_and_hanging_environments_are_replaced(bad, monkeypatch):
    monkeypatch.setattr("mtrl.envs.processes.STEP_TIMEOUT", 0.5)
    part = WorkerProcesses([0], [partial(Sick, bad)], ["fragile"])
    spaces = Broken.observation_space, Broken.action_space
    envs = TaskVectorEnv(["fragile"], ["own"], [part], *spaces, max_restarts=2)
    with closing(envs):
        envs.reset(seed=0)
        seen = [envs.step(np.zeros((1, 1)))[4].get("restarted", False) for _ in range(6)]
        assert seen == [False, False, True] * 2 and envs.restarts == 2
        envs.step(np.zeros((1, 1)))
        envs.step(np.zeros((1, 1)))
        with pytest.raises(WorkerError, match="task 'fragile'"):
            envs.step(np.zeros((1, 1)))


class Broken(gym.Env):
    """Raises at its third step."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 3:
            raise ArithmeticError("no such thing")
        return np.zeros(2, np.float32), 0.0, False, False, {}


class Sick(Broken):
    """Returns NaN, or hangs, at its third step."""

    def __init__(self, bad):
        self.bad = bad

    def step(self, action):
        self.steps += 1
        if self.steps == 3 and self.bad == "hangs":
            time.sleep(60)
        observation = np.full(2, np.nan if self.steps == 3 and self.bad == "observation" else 0.0)
        reward = np.inf if self.steps == 3 and self.bad == "reward" else 0.0
        return observation, reward, False, False, {}


def test_an_error_in_a_worker_is_raised_with_its_task_and_reason():
    part = WorkerProcesses([0], [Broken], ["fragile"])
    envs = TaskVectorEnv(
        ["fragile"], ["broken"], [part], Broken.observation_space, Broken.action_space
    )
    envs.reset(seed=0)
    with pytest.raises(WorkerError, match=r"(?s)'fragile'.*no such thing"):
        for _ in range(3):
            envs.step(np.zeros((1, 1)))
    envs.close()


def test_no_process_is_left_behind():
    envs = make_vector_env(BENCHMARK, workers=2)
    processes = envs._parts[0]._processes
    envs.close()
    assert not any(process.is_alive() for process in processes.values())
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("mtrl-worker")]


INTERRUPTED = """
import os, signal
from multiprocessing import util

spawn = util.spawnv_passfds

def spawn_and_interrupt(*arguments):
    process = spawn(*arguments)
    os.kill(process, signal.SIGINT)
    return process

util.spawnv_passfds = spawn_and_interrupt
from mtrl.envs.benchmarks import get_benchmark
from mtrl.envs.make import make_vector_env

if __name__ == "__main__":
    envs = make_vector_env(get_benchmark("mt1:reach-v3"))
    print(envs.reset(seed=0)[0].shape)
    envs.close()
"""


def test_an_interrupt_does_not_reach_the_server_that_imports_the_simulator(tmp_path):
    (tmp_path / "main.py").write_text(INTERRUPTED)
    command = [sys.executable, tmp_path / "main.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(1, 39)\n", "")


def test_a_worker_is_replaced_although_the_server_that_starts_it_ends(monkeypatch):
    """As by a scheduler's SIGTERM to all processes, just when a worker is replaced."""
    envs = make_vector_env(POINTS, workers=1, max_restarts=1)
    read, ended = forkserver.read_signed, []

    def end_first(descriptor):
        if not ended:
            ended.append(forkserver._forkserver._forkserver_pid)
            os.kill(ended[0], signal.SIGTERM)
            os.waitid(os.P_PID, ended[0], os.WEXITED | os.WNOWAIT)
            raise EOFError
        return read(descriptor)

    try:
        envs.reset(seed=0)
        envs._parts[0]._processes[0].kill()
        with monkeypatch.context() as patch:
            patch.setattr(forkserver, "read_signed", end_first)
            with pytest.warns(RuntimeWarning, match=r"its process is replaced \(restart 1 of"):
                envs.step(np.zeros((2, 1)))
        envs.step(np.zeros((2, 1)))
        assert ended
    finally:
        envs.close()


@pytest.mark.filterwarnings("ignore:.*Box observation space.*infinity")
def test_gymnasium_accepts_a_task():
    check_env(MetaWorldTask("reach-v3"), skip_render_check=True, skip_close_check=True)


def test_spaces_follow_gymnasiums_vector_contract():
    envs = make_vector_env(BENCHMARK, workers=1)
    observations, infos = envs.reset(seed=0)
    assert observations in envs.observation_space and infos == {}
    assert envs.action_space.shape == (4, 4)
    assert envs.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
    observations, *_ = envs.step(envs.action_space.sample())
    assert observations.dtype == np.float32 and observations in envs.observation_space
    envs.close()


def test_benchmarks_equal_metaworlds():
    assert get_benchmark("mt10").tasks == tuple(MT10_V3)
    assert get_benchmark("mt25").tasks == tuple(MT25_V3)
    assert get_benchmark("mt50").tasks == tuple(ALL_V3_ENVIRONMENTS)
    assert get_benchmark("mt1:push-v3").tasks == ("push-v3",)
    assert get_benchmark("mt10", ("push-v3", "reach-v3")).tasks == ("push-v3", "reach-v3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mt11",), "did you mean 'mt10'"),
        (("mt1:reech-v3",), "did you mean 'mt1:reach-v3'"),
        (("mt10", ("reach-v2",)), "did you mean 'reach-v3'"),
        (("mt10", ("reach-v3", "reach-v3")), "'reach-v3' more than once"),
    ],
)
def test_unknown_names_suggest_the_nearest(arguments, message):
    with pytest.raises(UsageError, match=message):
        get_benchmark(*arguments)
