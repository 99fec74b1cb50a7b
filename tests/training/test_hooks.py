"""Callbacks, agents and loggers of users: when they are called, and that nothing is lost."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from own_tasks import REACHERS
from safetensors.torch import load_file
from small_runs import TOTAL, point_config
from stable_baselines3.common.logger import KVWriter, Logger
from toy_tasks import POINTS

from mtrl import (
    MTSAC,
    Callback,
    Collector,
    Learner,
    ReplayBuffer,
    TrainConfig,
    make_vector_env,
    resume,
    train,
)
from mtrl.cli.train import main as train_main
from mtrl.config.agent import AgentConfig
from mtrl.errors import RunError, UsageError
from mtrl.training.hooks import Hooks

TASKS, SIZES = POINTS.tasks, (3, 1)
CLOCK = ("time/fps", "time/updates_per_second", "time/elapsed", "time/share/")
HOOKS = ("on_step", "on_rollout_end", "on_log", "on_eval", "on_checkpoint")


class Notes(Callback):
    """Records each call, and may return a value or fail at one."""

    def __init__(self, hook: str = "", at: int = 0, answer: object = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.hook, self.at, self.answer, self.seen = hook, at, answer, {}
        self.steps = 0

    def note(self, hook: str, *values: object) -> object:
        self.calls.append((hook, self.num_timesteps))
        self.seen[hook] = values
        if hook == self.hook and self.num_timesteps >= self.at:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer
        return None

    def on_training_start(self):
        self.note("on_training_start")

    def on_step(self):
        self.steps += 1
        assert self.n_calls == self.steps == self.num_timesteps // 2
        return self.note("on_step")

    def on_rollout_end(self, episodes):
        return self.note("on_rollout_end", *episodes)

    def on_log(self, values):
        return self.note("on_log", dict(values))

    def on_eval(self, evaluation):
        self.logger.record("my/steps", self.steps)
        return self.note("on_eval", evaluation)

    def on_checkpoint(self, path):
        assert load_file(path) and int(path.stem.removeprefix("step_")) == self.num_timesteps
        return self.note("on_checkpoint", path)

    def on_training_end(self, outcome):
        self.note("on_training_end", outcome)

    def state_dict(self):
        return {"steps": self.steps, "nested": {"array": np.arange(self.steps)}}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        assert state["nested"]["array"].tolist() == list(range(self.steps))


def log(run_dir: Path) -> list[dict[str, str]]:
    """Return everything logged, except times."""
    with (run_dir / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def policy(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policy_final.safetensors")


def assert_same(a: Path, b: Path) -> None:
    torch.testing.assert_close(policy(a), policy(b), rtol=0, atol=0)
    assert log(a) == log(b)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Uninterrupted run, with its callback and outcome."""
    notes = Notes()
    run_dir = tmp_path_factory.mktemp("hooks") / "a"
    outcome = train(point_config(run_dir), callbacks=[notes])
    return run_dir, notes, outcome


def test_hooks_are_called_as_documented(watched):
    run_dir, notes, outcome = watched
    at = {hook: [steps for name, steps in notes.calls if name == hook] for hook in HOOKS}
    assert at["on_step"] == list(range(2, TOTAL + 1, 2))
    assert at["on_rollout_end"] == list(range(20, TOTAL + 1, 20))  # 10 steps of 2 tasks
    assert at["on_eval"] == [80, 160, TOTAL]
    assert at["on_checkpoint"] == [60, 120, 180, TOTAL]
    rows = [json.loads(line) for line in (run_dir / "progress.json").read_text().splitlines()]
    assert at["on_log"] == [row["time/total_timesteps"] for row in rows]
    assert notes.seen["on_log"][0] == pytest.approx(rows[-1])
    assert notes.calls[0] == ("on_training_start", 0)
    assert notes.calls[-1] == ("on_training_end", TOTAL)
    (ended,), (judged,) = notes.seen["on_training_end"], notes.seen["on_eval"]
    assert ended is outcome and judged is outcome.evaluation and outcome.stopped_by is None
    tasks = [episode.task for episode in notes.seen["on_rollout_end"]]
    assert tasks == list(TASKS)
    assert all(e.length == 10 and e.total_reward < 0 for e in notes.seen["on_rollout_end"])


def test_attributes_are_those_of_the_run(watched):
    run_dir, notes, _ = watched
    assert notes.model.tasks == notes.benchmark.tasks == TASKS and notes.run_dir == run_dir
    assert notes.learner.updates == (TOTAL - 40) // 2 and len(notes.replay_buffer) == TOTAL // 2
    observations, rewards, _, truncated, _ = notes.last_step
    assert observations.shape == (2, SIZES[0]) and rewards.shape == (2,) and truncated.all()
    assert notes.metrics["critic_loss"].shape == (2,) and notes.training_env.num_envs == 2
    assert notes.config.total_timesteps == TOTAL
    saved = policy(run_dir)
    for name, value in notes.model.tensors().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Notes: expected to be part of a run, got none yet"):
        Notes().num_timesteps  # noqa: B018


def test_a_passive_callback_changes_nothing(watched, tmp_path):
    train(point_config(tmp_path / "b"))
    torch.testing.assert_close(policy(tmp_path / "b"), policy(watched[0]), rtol=0, atol=0)
    rows = log(watched[0])
    mine = [row.pop("my/steps") for row in rows]
    assert rows == log(tmp_path / "b") and [steps for steps in mine if steps] == ["40.0", "80.0"]


OFTEN = {"log_every": 10, "eval_every": 72}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted run in which rows and evaluations coincide."""
    run_dir = tmp_path_factory.mktemp("hooks") / "whole"
    train(point_config(run_dir, **OFTEN), callbacks=[Notes()])
    return run_dir


@pytest.mark.parametrize(("hook", "answer"), [("on_step", False), ("on_eval", np.bool_(False))])
def test_false_stops_cleanly_and_the_run_can_be_resumed(hook, answer, whole, tmp_path, capsys):
    """Everything due at that step is done, then or by the resumed run: the logs are equal."""
    run_dir, notes = tmp_path / "b", Notes(hook, 72, answer)
    outcome = train(point_config(run_dir, **OFTEN), callbacks=[notes])
    assert outcome.stopped_by == f"Notes.{hook}" and outcome.evaluation is None
    assert notes.calls[-1][0] == "on_training_end" and notes.calls[-2][0] == "on_checkpoint"
    assert notes.calls[-1][1] == 72
    assert f"stopped by Notes.{hook}; to resume: mtrl-train --resume" in capsys.readouterr().out
    again = Notes()
    assert resume(run_dir, callbacks=[again]).stopped_by is None
    assert again.steps == TOTAL // 2
    assert_same(run_dir, whole)


def test_an_error_is_reported_with_its_hook_and_nothing_is_lost(watched, tmp_path):
    run_dir, notes = tmp_path / "b", Notes("on_log", 80, KeyError("my word"))
    with pytest.raises(RunError) as told:
        train(point_config(run_dir), callbacks=[Callback(), notes])
    text = str(told.value)
    assert f"callback Notes.on_log: KeyError: 'my word' ({__file__}, line " in text
    assert "step_000000000080.safetensors is intact; to resume: mtrl-train --resume" in text
    assert isinstance(told.value.__cause__, KeyError)
    assert notes.calls[-1] == ("on_log", 80)  # no other hook is called afterwards
    resume(run_dir, callbacks=[Callback(), Notes()])
    assert_same(run_dir, watched[0])


def test_errors_at_the_start_leave_nothing_behind(tmp_path):
    class Fails(Callback):
        def on_training_start(self):
            raise ValueError("no such server")

    with pytest.raises(RunError, match=r"Fails.on_training_start: ValueError: no such server"):
        train(point_config(tmp_path / "b"), callbacks=[Fails()])
    assert not (tmp_path / "b").exists()


def failure(callback: Callback, call: str) -> str:
    """Return the error of a run that makes a single call of the callback."""
    hooks = Hooks([callback], {})
    logger = SimpleNamespace(recorded=[])
    hooks.begin(SimpleNamespace(logger=logger))  # type: ignore[arg-type]
    hooks.state_dict() if call == "state_dict" else hooks.call(call)
    assert hooks.wanted
    with pytest.raises(RunError) as told:
        hooks.expect_none_failed()
    return str(told.value)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"a/b": 1}, "TypeError: expected strings without '/' as keys, got 'a/b'"),
        ({"a": {1: 2}}, "TypeError: expected strings without '/' as keys, got 1"),
        ({"a": {1, 2}}, "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_a_state_that_cannot_be_restored_is_reported(state, expected):
    class Odd(Callback):
        def state_dict(self):
            return state

    assert f"callback Odd.state_dict: {expected}" in failure(Odd(), "state_dict")


class Answers(Callback):
    def on_step(self):
        return "no"


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        (Callback(), "callbacks: expected a list of mtrl.Callback objects, got Callback"),
        (print, "callbacks: expected a list of mtrl.Callback objects, got builtin_function"),
        ([Callback], "callbacks: expected an mtrl.Callback object, got <class"),
        ([print], "callbacks: expected an mtrl.Callback object, got <built-in"),
        (
            [Notes(), Notes()],
            "a state_key without '/' for each that has a state, got 'Notes' twice",
        ),
    ],
)
def test_other_objects_are_rejected_before_anything_starts(callbacks, expected, tmp_path):
    with pytest.raises(UsageError) as told:
        train(point_config(tmp_path / "b"), callbacks=callbacks)
    assert expected in str(told.value) and not (tmp_path / "b").exists()


def test_an_invalid_return_value_is_reported():
    expected = "callback Answers.on_step: TypeError: expected True, False or None, got 'no'"
    assert failure(Answers(), "on_step") == expected


def test_a_state_without_its_callback_or_rejected_by_it(tmp_path, capsys):
    class Other(Notes):
        state_key = "Notes"

        def load_state_dict(self, state):
            raise KeyError("other")

    train(point_config(tmp_path / "b", total_timesteps=100), callbacks=[Notes()])
    with pytest.raises(UsageError, match=r"resume: callback Other.load_state_dict: KeyError"):
        resume(tmp_path / "b", total_timesteps=140, callbacks=[Other()])
    resume(tmp_path / "b", total_timesteps=140)
    assert "the checkpoint's state of Notes is discarded" in capsys.readouterr().out


MODULE = """
from mtrl import Callback

class Stop(Callback):
    def __init__(self, at=1):
        self.at = at

    def on_step(self):
        return self.num_timesteps != self.at

def number():
    return 3
"""


def test_callbacks_on_the_command_line_are_restored_on_resume(tmp_path, monkeypatch, capsys):
    (tmp_path / "stopping.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    config = point_config(tmp_path / "b", total_timesteps=120, eval_every=200)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    ask = ["--config", "c.yaml", "--callbacks", "stopping:Stop(at=50)"]
    assert train_main(ask) == 0
    assert "stopped by Stop.on_step" in capsys.readouterr().out
    held = TrainConfig.from_yaml(tmp_path / "b" / "config.yaml")
    assert held.callbacks == ("stopping:Stop(at=50)",)
    assert train_main(["--resume", "b"]) == 0
    assert (tmp_path / "b" / "eval.json").exists()
    for spec, expected in (
        ("stopping", "callbacks: expected package.module:Name, got 'stopping'"),
        ("stopping:Go", "callbacks: cannot import 'stopping:Go'"),
        ("stopping:Stop(to=3)", "callbacks: stopping:Stop(to=3) failed: TypeError"),
        ("stopping:number", "callbacks: expected an mtrl.Callback object, got 3"),
        ("stopping:Stop(3)", "callbacks: expected NAME or NAME(option=value, …)"),
    ):
        assert train_main(["--config", "c.yaml", "--run-dir", "d", "--callbacks", spec]) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "d").exists()


def seeds(seed: int) -> list[int]:
    """Return the seeds of weights, learner, replay and exploration, as a run derives them."""
    return [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(4)]


def test_a_custom_agent_is_trained_in_place(watched, tmp_path):
    """With the initial weights of the run, the results are equal."""

    class Mine(MTSAC):
        pass

    agent = Mine(TASKS, AgentConfig(hidden_sizes=(8,)), *SIZES, seed=seeds(0)[0])
    config = point_config(tmp_path / "b", hidden_sizes=(400,), total_timesteps=130)
    train(config, agent=agent)
    held = TrainConfig.from_yaml(tmp_path / "b" / "config.yaml")
    assert held.agent.hidden_sizes == (8,)
    with pytest.raises(UsageError, match=r"an agent of the run's type .*Mine \(agent="):
        resume(tmp_path / "b", total_timesteps=TOTAL)
    other = Mine(TASKS, AgentConfig(hidden_sizes=(9,)), *SIZES)
    with pytest.raises(UsageError, match="the run's networks: hidden_sizes 8, got 9"):
        resume(tmp_path / "b", total_timesteps=TOTAL, agent=other)
    agent = Mine(TASKS, AgentConfig(hidden_sizes=(8,)), *SIZES)
    resume(tmp_path / "b", total_timesteps=TOTAL, agent=agent)
    torch.testing.assert_close(policy(tmp_path / "b"), policy(watched[0]), rtol=0, atol=0)
    torch.testing.assert_close(dict(agent.tensors()), policy(tmp_path / "b"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (torch.nn.Linear(2, 2), "agent: expected an mtrl.MTSAC, got Linear"),
        (
            MTSAC(TASKS[::-1], AgentConfig(hidden_sizes=(8,)), *SIZES),
            "tasks in this order: left right, got right left",
        ),
        (
            MTSAC(TASKS, AgentConfig(hidden_sizes=(8,)), 2, 1),
            r"observations and actions of length \(3, 1\), got \(2, 1\)",
        ),
    ],
)
def test_an_agent_of_another_shape_is_rejected(agent, expected, tmp_path):
    with pytest.raises(UsageError, match=expected):
        train(point_config(tmp_path / "b"), agent=agent)
    assert not (tmp_path / "b").exists()


class Rows(KVWriter):
    def __init__(self, fails: bool = False) -> None:
        self.rows, self.fails = [], fails

    def write(self, key_values, key_excluded, step=0):
        if self.fails:
            raise ConnectionError("the server is gone")
        self.rows.append((step, dict(key_values)))

    def close(self):
        raise AssertionError("it is the caller's")


def test_a_logger_receives_the_rows_of_the_files(tmp_path):
    rows, run_dir = Rows(), tmp_path / "b"
    small = {"total_timesteps": 100, "eval_every": 60}
    train(point_config(run_dir, **small), logger=Logger(None, [rows]))
    written = [json.loads(line) for line in (run_dir / "progress.json").read_text().splitlines()]
    assert [step for step, _ in rows.rows] == [row["time/total_timesteps"] for row in written]
    assert [values for _, values in rows.rows] == [pytest.approx(row) for row in written]
    with pytest.raises(RunError, match=r"GivenLogger.on_log: ConnectionError: the server is gone"):
        train(point_config(tmp_path / "c", **small), logger=Logger(None, [Rows(fails=True)]))
    with pytest.raises(UsageError, match=r"stable_baselines3.common.logger.Logger, got Rows"):
        train(point_config(tmp_path / "d"), logger=rows)


def test_callbacks_work_with_custom_tasks(tmp_path):
    notes = Notes()
    small = {"tasks": None, "horizon": None, "total_timesteps": 220, "eval_every": 300}
    train(point_config(tmp_path / "a", **small), REACHERS, callbacks=[notes])
    assert {e.task for e in notes.seen["on_rollout_end"]} == set(REACHERS.tasks)
    assert all(e.length == 50 and e.total_reward < 0 for e in notes.seen["on_rollout_end"])


def test_the_explicit_loop_equals_the_run(watched):
    """Use only public parts, in the order of docs/hooks.md, with the run's seeds."""
    config = point_config(Path())
    weights, learning, drawing, exploring = seeds(0)
    envs = make_vector_env(POINTS, config.environment.horizon, workers=1)
    sizes = envs.observation_size, envs.action_size
    agent = MTSAC(TASKS, config.agent, *sizes, seed=weights)
    learner = Learner(agent, config.learner, seed=learning)
    replay = ReplayBuffer(config.learner.buffer_size, 2, *sizes, seed=drawing)
    collector = Collector(envs, agent, seed=exploring)
    collector.reset(seed=config.seed)
    for step in range(TOTAL // 2):
        collector.act(uniform=step < 20)
        if step >= 20:
            learner.step(replay)
        collector.store(collector.wait(), replay)
    envs.close()
    torch.testing.assert_close(dict(agent.tensors()), policy(watched[0]), rtol=0, atol=0)
