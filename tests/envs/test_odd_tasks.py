"""Unusual custom environments: errors are reported, and valid ones work."""

import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from odd_tasks import (
    BadReset,
    BadSeed,
    Counted,
    Forks,
    LateWrong,
    Long,
    NeverFinite,
    Plain,
    Program,
    Told,
    Unseeded,
    Wrong,
)

from mtrl import Benchmark
from mtrl.envs.custom import CustomTask
from mtrl.envs.examine import examined
from mtrl.envs.make import make_vector_env
from mtrl.envs.processes import WorkerError
from mtrl.errors import UsageError

NOTHING = np.zeros((1, 2), np.float32)


def vector(make, **settings):
    benchmark = Benchmark("odd", make if isinstance(make, dict) else {"a": make})
    return make_vector_env(benchmark, workers=1, **settings)


def refused(make) -> str:
    with pytest.raises(UsageError) as error:
        examined(Benchmark("odd", {"fine": Plain, "a": make}))
    text = str(error.value)
    assert text.startswith("benchmark: task 'a'") and "\n" not in text
    return text


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("number", [1, 3])
def test_resets_never_return_values_that_are_not_finite(number, value):
    """Neither the first reset of a process nor one at the end of an episode."""
    with closing(vector(partial(BadReset, number, value))) as envs, warned() as told:
        observations, _ = envs.reset(seed=0)
        assert np.array_equal(observations, np.zeros((1, 3)))
        for _ in range(20):
            observations, *_, infos = envs.step(NOTHING)
            assert np.isfinite(observations).all() and "restarted" not in infos
        assert np.array_equal(observations, np.zeros((1, 3))) and "final_info" in infos
        assert np.array_equal(infos["final_obs"], np.full((1, 3), 10))
    assert told == [
        "task 'a': a reset returned an observation that is not finite in float32; the episode was "
        "restarted from another seed"
    ]


@contextmanager
def warned():
    """Collect the warnings raised inside."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in caught]


@pytest.mark.parametrize("raises", [False, True])
def test_a_seed_that_always_fails_is_skipped(raises):
    """The same seed would fail again in a new process."""
    make = partial(BadSeed, raises)
    with warned() as told:
        with closing(vector(make, max_restarts=20)) as envs:
            envs.reset(seed=0)
            episodes = 0
            for _ in range(130):
                observations, *_, infos = envs.step(NOTHING)
                assert np.isfinite(observations).all()
                episodes += "final_info" in infos
            assert episodes > 5 and (envs.restarts > 0) == raises
            state = envs.state()
            now = [envs.step(NOTHING) for _ in range(5)]
        with closing(vector(make, max_restarts=20)) as other:
            other.restore(state, seed=0)
            for expected in now:
                assert np.array_equal(other.step(NOTHING)[0], expected[0])
    assert told and all("task 'a': " in text for text in told)


def test_an_environment_that_always_returns_nan_stops_with_an_error():
    broken = NeverFinite, 3  # from its third episode on
    with closing(vector(partial(*broken), max_restarts=1)) as envs, warned():
        envs.reset(seed=0)
        with pytest.raises(WorkerError, match=r"a reset's observation is not finite .* nan"):
            for _ in range(80):
                envs.step(NOTHING)
        assert envs.restarts == 1


def test_success_is_determined_per_task_by_its_steps():
    tasks = {
        "at the end": partial(Told, {10: True}),
        "never": Plain,
        "numbers": partial(Told, {3: np.float32(1), 4: np.int64(0), 5: np.bool_(False)}),
        "not yet": partial(Told, {9: False}),
        "none": partial(Told, {5: None}),
        "another key": partial(Told, {5: True}, "is_success"),
    }
    with closing(vector(tasks)) as envs:
        envs.reset(seed=0)
        assert not envs.tells_success.any()
        for _ in range(10):
            *_, infos = envs.step(np.zeros((6, 2)))
        assert infos["final_info"]["episode"]["s"].tolist() == [True, False, True, *[False] * 3]
        assert envs.tells_success.tolist() == [True, False, True, True, False, False]
        state = envs.state()
    with closing(vector(tasks)) as other:
        other.restore(state, seed=0)
        assert other.tells_success.tolist() == state["tells_success"]


def test_environments_registered_in_this_process_alone_are_found_by_workers():
    """As in a notebook, or in a module that only names the environment."""
    gym.register("OnlyHere-v0", lambda length: Long(length), kwargs={"length": 3})
    try:
        with closing(vector(partial(gym.make, "OnlyHere-v0"))) as envs:
            envs.reset(seed=0)
            assert [envs.step(NOTHING)[3].item() for _ in range(3)] == [False, False, True]
    finally:
        del gym.registry["OnlyHere-v0"]


def test_a_success_key_that_is_nearly_another_is_pointed_out():
    solved = {step: False for step in range(11)}
    with warned() as told:
        for key in ("success", "is_success", "speed"):
            examined(Benchmark("odd", {key: partial(Told, solved, key)}))
        examined(Benchmark("odd", {"a": partial(Told, solved, "is_success")}, "is_success"))
        examined(Benchmark("odd", {"a": partial(Told, solved, "is_success")}, None))
    assert len(set(told)) == 1 and "task 'is_success': its info has 'is_success'" in told[0]


@cache
def always_the_same():
    return Plain()


def normalized():
    return gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))


@pytest.mark.parametrize("make", [Unseeded, normalized])
def test_episodes_that_do_not_repeat_are_pointed_out(make):
    """A normalising wrapper has other statistics in each process, and so in evaluations."""
    with pytest.warns(UserWarning, match="'odd': an episode repeated with the same seed and act"):
        examined(Benchmark("odd", {"odd": make}))


@pytest.mark.parametrize("name", ["Pendulum-v1", "Hopper-v5", "Reacher-v5"])
def test_episodes_of_gymnasium_repeat(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examined(Benchmark("usual", {name: partial(gym.make, name)}, success_key=None))


def test_an_environment_may_change_the_working_directory(tmp_path, monkeypatch):
    """A relative run folder must not move with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()

    def make():
        os.chdir(tmp_path / "assets")
        return Plain()

    examined(Benchmark("moves", {"a": make}))
    assert Path.cwd() == tmp_path


def test_an_environment_shared_by_tasks_is_rejected():
    """Each task's steps would change the others' episodes."""
    for settings in (
        {"make": {"a": Plain, "b": always_the_same, "c": always_the_same}},
        {"make": {"a": Plain, "c": always_the_same}, "envs_per_task": 2},
    ):
        with pytest.raises(WorkerError, match="task 'c': expected a function that creates a new"):
            vector(**settings)


def test_tasks_may_be_declared_to_report_success():
    benchmark = Benchmark("odd", {"a": Plain, "b": Plain}, tells_success=("b",))
    with closing(make_vector_env(benchmark, workers=1)) as envs:
        assert envs.tells_success.tolist() == [False, True]
    with pytest.raises(UsageError, match="tells_success: unknown 'c'"):
        Benchmark("odd", {"a": Plain}, tells_success=("c",))


def test_without_a_key_success_is_ignored():
    env = CustomTask("a", partial(Told, {1: "False"}), success_key=None)
    env.reset(seed=0)
    assert env.step(NOTHING[0])[4] == {}


def test_the_environment_determines_the_episode_length(monkeypatch):
    with closing(vector(partial(Long, 1_000))) as envs:
        envs.reset(seed=0)
        for step in range(1, 1_001):
            truncated = envs.step(NOTHING)[3]
            assert truncated.item() == (step == 1_000)
    with closing(vector(partial(Long, 1_000), horizon=700)) as envs:
        envs.reset(seed=0)
        assert [s for s in range(1, 1_001) if envs.step(NOTHING)[3].item()] == [700]
    with pytest.raises(UsageError, match=r"horizon: expected at most Meta-World's 500 .* got 501"):
        make_vector_env(Benchmark("m", {"reach-v3": None}), horizon=501)


def test_an_endless_episode_is_truncated_with_a_warning():
    with closing(vector(partial(Long, None))) as envs:
        envs.reset(seed=0)
        for _ in range(9_999):
            assert not envs.step(NOTHING)[3].any()
        with pytest.warns(UserWarning, match="'a': an episode had not ended after 10,000 steps"):
            assert envs.step(NOTHING)[3].all()


def test_actions_reach_the_ends_of_any_range():
    """Empty ranges, ranges whose width overflows float64, and ranges of other types."""
    low, high = np.array([0, 2.5, -1e308]), np.array([1, 2.5, 1e308])
    env = CustomTask("a", partial(Plain, action_space=Box(low, high, dtype=np.float64)))
    given = []
    env.env.step = lambda action: (given.append(action), Plain.step(env.env, action))[1]
    env.reset(seed=0)
    for action, expected in ((-1, low), (1, high), (0, [0.5, 2.5, 0])):
        env.step(np.full(3, action, np.float32))
        np.testing.assert_allclose(given[-1], expected, rtol=1e-12)
        assert given[-1].dtype == np.float64
    half = CustomTask("a", partial(Plain, action_space=Box(-1, 0.1, (2,), np.float16)))
    half.reset(seed=0)
    half.step(np.ones(2, np.float32))  # 0.1 in float16 is less than 0.1


def test_observations_of_any_numeric_type_are_accepted():
    for space in (Box(0, 255, (4,), np.uint8), Box(-9, 9, (4,), np.int64), Box(-1, 1, (4,))):
        with closing(vector(partial(Plain, space))) as envs:
            envs.reset(seed=0)
            observations = envs.step(NOTHING)[0]
            assert observations.dtype == np.float32 and (observations == 1).all()


SPACES = {
    "integers": (partial(Plain, None, Box(0, 9, (2,), np.int64)), "floating-point actions"),
    "bytes": (partial(Plain, None, Box(0, 255, (2,), np.uint8)), "floating-point actions"),
    "discrete": (partial(Plain, None, Discrete(3)), "actions in a Box of one dimension"),
    "no action": (partial(Plain, None, Box(-1, 1, (0,))), "actions in a Box of one dimension"),
    "unbounded": (partial(Plain, None, Box(-np.inf, 1, (2,))), "expected bounded actions"),
    "a choice": (partial(Plain, Discrete(3)), "FlattenObservation"),
    "dict": (partial(Plain, Dict(x=Box(0, 1, (2,)))), "FlattenObservation"),
    "picture": (partial(Plain, Box(0, 255, (8, 8, 3), np.uint8)), "FlattenObservation"),
    "other shape": (partial(Plain, Box(0, 1, (4,))), r"equal shape, got \(3,\) for task 'fine'"),
}


@pytest.mark.parametrize("case", SPACES)
def test_unsupported_spaces_are_rejected(case):
    make, message = SPACES[case]
    with pytest.raises(UsageError, match=message):
        examined(Benchmark("odd", {"fine": Plain, "a": make}))


WRONG = {
    "reset alone": "expected reset to return (observation, info), got an array of shape (3,)",
    "reset shape": "expected reset to return an observation of shape (3,)",
    "reset none": "expected reset to return an observation of shape (3,)",
    "reset words": "expected reset to return an observation of shape (3,)",
    "observation shape": "expected step to return an observation of shape (3,)",
    "observation scalar": "expected step to return an observation of shape (3,)",
    "reward array": "expected reward to be a number, got an array of shape (1,)",
    "reward none": "expected reward to be a number, got NoneType None",
    "reward text": "expected reward to be a number, got str '1.0'",
    "terminated none": "expected terminated to be True, False, 0 or 1, got NoneType",
    "truncated array": "expected truncated to be True, False, 0 or 1, got an array",
    "info none": "expected step to return info as a dict, got NoneType None",
    "success text": "expected info['success'] to be True, False, 0 or 1, got str 'False'",
    "success nan": "expected info['success'] to be True, False, 0 or 1, got float nan",
    "success array": "expected info['success'] to be True, False, 0 or 1, got an array",
    "success half": "expected info['success'] to be True, False, 0 or 1, got float 0.5",
    "four values": "(observation, reward, terminated, truncated, info), got 4 values",
    "raises": "failed at step: KeyError: 'wheel' (",
}


@pytest.mark.parametrize("how", WRONG)
def test_violations_of_the_contract_are_reported_at_once(how):
    assert WRONG[how] in refused(partial(Wrong, how))


def test_environments_that_cannot_be_created_are_reported_at_once():
    assert "expected a gymnasium.Env, got builtins.int" in refused(lambda: 3)
    assert "failed at creating it: ZeroDivisionError" in refused(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert "expected finite observations" in refused(lambda: _nan())
    with pytest.raises(UsageError, match=r"environments: expected a dict .* got list"):
        Benchmark("odd", ["a"])  # type: ignore[arg-type]
    lock = __import__("threading").Lock()
    assert "failed at sending it to another process" in refused(lambda: (lock, Plain())[1])
    with pytest.raises(UsageError, match="expected a function that creates task 'a', got <"):
        Benchmark("odd", {"a": Plain()})  # type: ignore[dict-item]


class Hangs(Plain):
    """One of its methods never returns, and catches all exceptions."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.wait("init")

    def wait(self, where):
        while self.how == where:
            with suppress(Exception):
                time.sleep(60)

    def reset(self, *, seed=None, options=None):
        self.wait("reset")
        return super().reset(seed=seed)

    def step(self, action):
        self.wait("step")
        return super().step(action)

    def close(self):
        self.wait("close")


@pytest.mark.parametrize(
    ("how", "doing"),
    [("init", "creating it"), ("reset", "reset"), ("step", "step"), ("close", "close")],
)
def test_a_hanging_environment_is_reported_before_a_run(how, doing, monkeypatch):
    monkeypatch.setattr("mtrl.envs.examine.START_TIMEOUT", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    message = refused(partial(Hangs, how))
    assert f"task 'a' failed at {doing}: no answer for 0 s (" in message
    assert "test_odd_tasks.py, line " in message
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_environment_that_exits_or_fails_to_close_is_reported():
    """`sys.exit` would silently end the command; the first error counts, not that of close()."""

    class Exits(Plain):
        def step(self, action):
            sys.exit(0)

        def close(self):
            raise RuntimeError("there is nothing to close")

    assert "task 'a' failed at step: SystemExit: 0 (" in refused(Exits)


def _nan() -> gym.Env:
    env = Plain()
    env.observation = lambda: np.full(3, np.nan)  # type: ignore[method-assign]
    return env


def test_later_violations_of_the_contract_are_not_retried():
    with closing(vector(LateWrong, max_restarts=10)) as envs:
        envs.reset(seed=0)
        for _ in range(30):
            envs.step(NOTHING)
        with pytest.raises(WorkerError, match=r"task 'a': expected step to return an observation"):
            envs.step(NOTHING)
        assert envs.restarts == 0


@pytest.mark.parametrize("fails", [False, True])
def test_every_environment_is_closed(fails, tmp_path):
    benchmark = Benchmark("odd", dict.fromkeys("ab", partial(Counted, tmp_path, fails)))
    with closing(make_vector_env(benchmark, workers=1, envs_per_task=2, max_restarts=1)) as envs:
        envs.reset(seed=0)
        for _ in range(5):
            envs.step(np.zeros((4, 2)))
        if fails:
            with pytest.warns(RuntimeWarning, match="simulator lost"):
                envs.step(np.zeros((4, 2)))
    opened, closed = (
        sorted(path.stem for path in tmp_path.glob(f"*.{what}")) for what in ("opened", "closed")
    )
    assert opened == closed and len(opened) == (2 + 4 + 4 * fails)


@pytest.mark.parametrize("hangs", [False, True])
def test_child_processes_of_an_environment_end_with_it(hangs, monkeypatch):
    """By its close(), or when its hanging process is killed."""
    monkeypatch.setattr("mtrl.envs.make.START_TIMEOUT", 1.0)
    with closing(vector(partial(Program, hangs))) as envs:
        envs.reset(seed=0)
        observations = envs.step(NOTHING)[0]
        programs = [p for p in _running() if p % 100_000 == observations[0, 0]]
        assert programs
        if hangs:
            for _ in range(4):
                envs.step(NOTHING)
            with pytest.raises(WorkerError, match="task 'a': no answer for 1 s"):
                envs.step(NOTHING)
    deadline = time.monotonic() + 5
    while set(programs) & set(_running()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_environment_may_start_processes():
    with closing(vector(Forks)) as envs:
        envs.reset(seed=0)
        seen = [envs.step(NOTHING)[0][0, 0] for _ in range(4)]
        assert seen == [0, 2, 4, 6]
        start = time.monotonic()
    assert time.monotonic() - start < 4  # no process had to be killed


def _running() -> list[int]:
    """Processes that are not zombies."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                alive = stat.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        found += [int(name)] if alive else []
    return found


@pytest.mark.parametrize(
    "name", [1, None, "", " a", "a\nb", "a|b", "a,b", 'a"b', "mean", "worst", "x" * 201, "\x1b[2J"]
)
def test_names_unsuitable_for_files_are_rejected(name):
    with pytest.raises(UsageError, match="tasks: expected "):
        Benchmark("odd", {name: Plain})
    if name not in ("mean", "worst"):
        with pytest.raises(UsageError, match="name: expected a name"):
            Benchmark(name, {"a": Plain})
    with pytest.raises(
        UsageError, match="name: expected a name Meta-World does not use, got 'mt10'"
    ):
        Benchmark("mt10", {"a": Plain})


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from odd_tasks import Plain
from mtrl.envs.benchmarks import Benchmark
from mtrl.envs.make import make_vector_env
print("imported", flush=True)
if {condition}:
    make_vector_env(Benchmark("odd", {{"a": Plain}}), workers=1).close()
"""


@pytest.mark.parametrize(("condition", "code"), [("True", 1), ('__name__ == "__main__"', 0)])
def test_a_script_without_a_main_guard_gets_a_hint(condition, code, tmp_path):
    """Its worker imports it, and exits without a traceback."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(condition=condition))
    command = [sys.executable, str(script), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (code, "imported\n" * 2), done.stderr
    assert ('under `if __name__ == "__main__":`' in done.stderr) == bool(code)
    assert done.stderr.count("Traceback") == code
