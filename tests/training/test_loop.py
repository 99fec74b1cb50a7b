"""Training loop with several environments per task: storage, learning and their order."""

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import small_config

from mtrl import resume, train
from mtrl.config.agent import AgentConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.envs.make import make_vector_env
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.sac.agent import MTSAC
from mtrl.sac.replay import ReplayBuffer
from mtrl.training.check import check
from mtrl.training.pace import Pace
from mtrl.training.rollout import Collector
from mtrl.training.trainer import Trainer

TASKS, COPIES, HORIZON = ("drawer-close-v3", "reach-v3"), 2, 7


config = partial(
    small_config,  # 96 vector steps of 4 environments, the first 24 of them random
    tasks=TASKS,
    total_timesteps=384,
    learning_starts=96,
    eval_every=160,
    log_every=32,
    checkpoint_every=100,
    diagnose_every=128,
    seed=3,
    hidden_sizes=(8, 8),
    batch_size=16,
    buffer_size=101,
    surgery="pcgrad",
    horizon=HORIZON,
    envs_per_task=COPIES,
    workers=None,
)


def log(run_dir: Path) -> list[dict[str, str]]:
    """Return all logged values except times."""
    with (run_dir / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    clock = ("time/fps", "time/updates_per_second", "time/elapsed", "time/share/")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("loop") / "a"
    train(config(run_dir))
    return run_dir


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = (load_file(run_dir / "policy_final.safetensors") for run_dir in (a, b))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert log(a) == log(b)
    assert (a / "eval.csv").read_text() == (b / "eval.csv").read_text()


def test_equal_seeds_give_equal_runs_for_any_number_of_workers(finished, tmp_path):
    train(config(tmp_path / "b", workers=1))
    assert_same_run(finished, tmp_path / "b")
    updates = [float(row["time/updates"]) for row in log(finished) if row["time/updates"]]
    assert updates[-1] == (384 - 96) / 4  # one per vector step after learning_starts


def test_a_run_stopped_within_an_episode_resumes_exactly(finished, tmp_path):
    stopped = tmp_path / "stopped"
    train(config(stopped, total_timesteps=200))  # 50 vector steps: one step of the 8th episodes
    resume(stopped, total_timesteps=384)
    ours, theirs = (load_file(d / "policy_final.safetensors") for d in (finished, stopped))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (stopped / "eval.csv").read_text() == (finished / "eval.csv").read_text()


def test_the_learner_uses_earlier_transitions_while_simulators_step(tmp_path, monkeypatch):
    benchmark, device, resolved = check(config(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    trainer = Trainer(resolved, benchmark, device, tmp_path / "run")
    order = []
    for owner, name in ((trainer.state.envs, "step_async"), (trainer.state.envs, "step_wait")):
        method = getattr(owner, name)

        def noted(*arguments, method=method, name=name):
            order.append((name, len(trainer.state.replay)))
            return method(*arguments)

        monkeypatch.setattr(owner, name, noted)
    monkeypatch.setattr(
        trainer.state.learner,
        "step",
        lambda replay, updates: order.append(("learn", len(replay))) or {},
    )
    for _ in range(26):
        trainer.step()
    trainer.close()
    before = [COPIES * step for step in range(26)]
    assert trainer.state.steps == 26 * 4
    expected = [(name, n) for n in before[:24] for name in ("step_async", "step_wait")]
    expected += [(name, n) for n in before[24:] for name in ("step_async", "learn", "step_wait")]
    assert order == expected


def test_a_run_sets_its_threads_and_decays_its_learning_rates(tmp_path, monkeypatch):
    falling = {"learning_rate": 0.01, "final_learning_rate": 0.0}
    settings = config(tmp_path / "run", threads=1, **falling)
    benchmark, device, resolved = check(settings)
    (tmp_path / "run").mkdir()
    trainer = Trainer(resolved, benchmark, device, tmp_path / "run")
    seen = []

    def some_steps():
        seen.append(torch.get_num_threads())
        while trainer.state.steps < 192:
            trainer.step()

    monkeypatch.setattr(trainer, "_run", some_steps)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trainer.run()
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    # The last vector step started after 188 of 384 environment steps.
    rates = [
        group["lr"] for o in trainer.state.learner.optimizers.values() for group in o.param_groups
    ]
    assert rates == pytest.approx([0.01 * (1 - 188 / 384)] * len(rates))


def test_stored_transitions_equal_those_of_each_copy():
    """Against single environments: no reset within transitions and no wrong successor."""
    envs = make_vector_env(get_benchmark("", TASKS), HORIZON, workers=2, envs_per_task=COPIES)
    agent = MTSAC(TASKS, AgentConfig(hidden_sizes=(8,)), envs.observation_size, envs.action_size)
    collector, steps = Collector(envs, agent, seed=0), 4 * HORIZON + 3
    replay = ReplayBuffer(
        2 * COPIES * steps, 2, envs.observation_size, envs.action_size, envs_per_task=COPIES
    )
    collector.reset(seed=5)
    actions = []
    for step in range(steps):
        collector.act(uniform=step < 10)
        actions.append(collector._actions)
        collector.store(collector.wait(), replay)
    envs.close()
    assert len(replay) == COPIES * steps
    batch = replay.sample(4_000)
    columns = (batch.observations, batch.actions, batch.rewards[..., None], batch.next_observations)
    rows = torch.cat(columns, -1).numpy()
    for t, task in enumerate(TASKS):
        lived = set()
        for copy in range(COPIES):
            alone = MetaWorldTask(task, HORIZON, stride=COPIES)
            observation, _ = alone.reset(seed=5, options={"episode": copy})
            for moves in actions:
                action = moves[t * COPIES + copy]
                following, reward, _, truncated, _ = alone.step(action)
                lived.add(np.hstack([observation, action, reward, following]).astype("f").tobytes())
                observation = alone.reset()[0] if truncated else following
        assert {row.tobytes() for row in rows[t]} == lived


def test_pace_reports_rates_and_shares(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 7.0, 100.0, 101.0, 200.0, 202.0])
    monkeypatch.setattr("mtrl.training.pace.time.perf_counter", lambda: next(clock))
    pace = Pace(steps=40, updates=3)
    for stage in ("act", "learn", "act"):
        with pace.stage(stage):
            pass
    found = pace.lap(steps=48, updates=5)
    assert found == {
        "time/fps": 2.0,
        "time/updates_per_second": 0.5,
        "time/share/act": 0.5,
        "time/share/learn": 0.5,
        "time/share/wait": 0.0,
        "time/share/store": 0.0,
    }
    with pace.stage("wait"):
        pass
    assert pace.lap(steps=50, updates=5)["time/fps"] == 1.0
