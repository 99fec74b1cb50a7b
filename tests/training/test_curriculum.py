"""Runs whose tasks change by stages."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from own_tasks import REACHERS
from safetensors.torch import load_file
from small_runs import small_config

from mtrl import MTSAC, AgentConfig, Callback, Demonstrations, collect, resume, train
from mtrl.analysis.runs import read_run
from mtrl.cli.train import main
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.sac.replay import ReplayBuffer
from mtrl.sac.reward_scale import RewardScale
from mtrl.training.check import check
from mtrl.training.record import record_benchmark
from mtrl.training.trainer import Trainer

OLD, NEW = REACHERS.tasks
SIZES = (10, 2)  # of observations and actions
STAGES = {0: (OLD,), 120: (NEW, OLD)}


def config(run_dir: Path, **leaves) -> TrainConfig:
    """Return 120 steps of the first task, the first 30 random; then 60 vector steps of both."""
    settings = {"tasks": None, "curriculum": STAGES, "learning_starts": 60, "threads": 1}
    settings |= {"checkpoint_every": 1_000, "return_scale": 2.0, "normalize_observations": True}
    return small_config(run_dir, **settings | leaves)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("curriculum") / "a"
    train(config(run_dir), REACHERS)
    return run_dir


@pytest.mark.parametrize("stop", [90, 120, 150])
def test_a_run_stopped_around_a_new_stage_gives_the_same_result(finished, stop, tmp_path):
    """After 150 steps, the new task is still explored at random."""
    run_dir = tmp_path / "b"
    benchmark, device, resolved = check(config(run_dir), REACHERS)
    run_dir.mkdir()
    record_benchmark(run_dir, benchmark)
    (run_dir / "config.yaml").write_text(resolved.to_yaml())
    trainer = Trainer(resolved, benchmark, device, run_dir)
    while trainer.state.steps < stop:
        trainer.state = trainer.curriculum.following(trainer.state)
        trainer.step()
    trainer._checkpoint()
    trainer.close()
    resume(run_dir, benchmark=REACHERS)
    ours, theirs = (load_file(d / "policy_final.safetensors") for d in (finished, run_dir))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_logs_and_plots_have_all_tasks(finished):
    rows = [json.loads(line) for line in (finished / "progress.json").read_text().splitlines()]
    early = [row for row in rows if row["time/total_timesteps"] <= 120]
    assert any(f"train/alpha/{OLD}" in row for row in early)
    assert not any(key.endswith(NEW) for row in early for key in row)
    updates = {
        row["time/total_timesteps"]: row["time/updates"] for row in rows if "time/updates" in row
    }
    # 60 of 240 steps over two tasks are random, 30 each: 30 in the first stage, 60 in the second.
    assert updates[120] == 90 and updates[160] == 90 and updates[240] == 90 + 30
    assert read_run(finished).tasks == (OLD, NEW)
    assert [row["task"] for row in json.loads((finished / "eval.json").read_text())["tasks"]] == [
        NEW,
        OLD,
    ]


def test_a_new_stage_continues_from_the_previous_one(tmp_path):
    benchmark, device, resolved = check(config(tmp_path / "run"), REACHERS)
    (tmp_path / "run").mkdir()
    trainer = Trainer(resolved, benchmark, device, tmp_path / "run")
    for _ in range(120):
        trainer.step()
    before = trainer.state
    after = trainer.state = trainer.curriculum.following(before)
    theirs, ours = before.agent.state_dict(), after.agent.state_dict()
    for name, value in ours.items():
        same = value[:, 1:] if ".per_task." in name else value[1:] if name == "log_alpha" else value
        assert torch.equal(same, theirs[name]), name
    assert ours["log_alpha"][0] == 0 and ours["log_alpha"][1] != 0
    assert after.replay.scale.factors[1] == before.replay.scale.factors[0] != 1
    assert after.replay.scale.factors[0] == 1
    # The next episode of each task; unfinished episodes are abandoned.
    assert after.envs.state()["episodes"] == [13, 13] and after.known == (OLD,)
    trainer.step()
    assert after.replay._held.tolist() == [1, 121]
    trainer.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """Return a file with five episodes of the second stage's new task."""
    acts = dict.fromkeys(REACHERS.tasks, lambda seen: [9 * seen[0], 0])
    path = tmp_path_factory.mktemp("demonstrations") / "new.npz"
    collect(acts, REACHERS, 5, workers=1).select([NEW]).save(path)
    return path


def test_demonstrations_count_from_the_stage_of_their_task(shown, tmp_path):
    settings = config(tmp_path / "run", demonstrations=(str(shown),))
    benchmark, device, resolved = check(settings, REACHERS)
    (tmp_path / "run").mkdir()
    theirs = Demonstrations.load(shown)
    theirs.save(tmp_path / "run" / "demonstrations.npz")
    trainer = Trainer(resolved, benchmark, device, tmp_path / "run")
    assert trainer.state.replay.demonstrations is None
    for _ in range(120):
        trainer.step()
    assert trainer.state.agent.normalizer.count == 120
    after = trainer.state = trainer.curriculum.following(trainer.state)
    assert after.agent.normalizer.count == 120 + len(theirs)
    # Half of a batch, whose return sets the scale of the new task.
    assert after.replay.scale.factors[0] < 1
    while after.steps < 200:
        trainer.step()
    batch = after.replay.sample(400)
    known = torch.from_numpy(theirs.observations.astype(np.float32))
    found = (batch.observations[:, :, None] == known).all(-1).any(-1)
    assert found[0, :200].all() and not found[1].any()
    trainer.close()


def test_a_curriculum_with_demonstrations_resumes_bitwise_equal(shown, tmp_path):
    runs = [tmp_path / name for name in ("straight", "stopped")]
    for run_dir, steps in zip(runs, (240, 200), strict=True):
        train(config(run_dir, demonstrations=(str(shown),), total_timesteps=steps), REACHERS)
    resume(runs[1], total_timesteps=240, benchmark=REACHERS)
    ours, theirs = (load_file(run_dir / "policy_final.safetensors") for run_dir in runs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class Mine(MTSAC):
    """Agent of an own class."""


class Odd(MTSAC):
    """Agent whose class takes other arguments."""

    def __init__(self, networks: AgentConfig) -> None:
        super().__init__((OLD,), networks, *SIZES)


def test_every_stage_has_an_agent_of_the_given_class(finished, tmp_path, capsys):
    """With the initial weights of the run, the results are equal."""
    networks = TrainConfig.from_yaml(finished / "config.yaml").agent
    seed = int(np.random.SeedSequence(0).spawn(1)[0].generate_state(1)[0])
    agent, seen = Mine((OLD,), networks, *SIZES, seed=seed), []

    class Watch(Callback):
        def on_eval(self, evaluation):
            seen.append(self.model)

    run_dir = tmp_path / "run"
    train(config(run_dir, total_timesteps=160), REACHERS, agent=agent, callbacks=[Watch()])
    assert [type(each) for each in seen] == [Mine] * len(seen) and seen[0] is agent
    assert seen[-1].tasks == (NEW, OLD) and agent.tasks == (OLD,)
    assert "the given agent is not trained any further" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"an agent of the run's type .*Mine \(agent="):
        resume(run_dir, total_timesteps=240, benchmark=REACHERS)
    resume(run_dir, total_timesteps=240, benchmark=REACHERS, agent=agent)
    ours, theirs = (load_file(d / "policy_final.safetensors") for d in (finished, run_dir))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_an_agent_that_later_stages_cannot_create_is_rejected(tmp_path):
    networks = AgentConfig(hidden_sizes=(8,))
    both = MTSAC((NEW, OLD), networks, *SIZES)
    for agent, told in (
        (both, f"tasks in this order: {OLD}, got {NEW} {OLD}"),
        (Odd(networks), "a class that takes the arguments of mtrl.MTSAC, because a curriculum"),
    ):
        with pytest.raises(UsageError, match=told):
            train(config(tmp_path / "run"), REACHERS, agent=agent)
        assert not (tmp_path / "run").exists()


def test_only_own_transitions_of_a_new_task_are_sampled():
    """Encode the task and the time of storage in each reward."""

    def add(replay: ReplayBuffer, tasks: list[int], when: int) -> None:
        rewards = np.array([100.0 * t + when for t in tasks]).repeat(2)
        n = len(rewards)
        done = np.full(n, when % 4 == 3)
        rows = np.full((n, 3), float(when)), np.zeros((n, 1)), rewards, np.zeros(n)
        replay.add(*rows, rows[0] + 1, done=done)

    first = ReplayBuffer(20, 2, 3, 1, envs_per_task=2, scale=RewardScale(2, 2))
    for when in range(7):
        add(first, [1, 2], when)
    second = ReplayBuffer(20, 3, 3, 1, envs_per_task=2, scale=RewardScale(3, 2), seed=4)
    second.take_over(first, [(0, 1), (2, 0)])
    for when in range(7, 40):
        add(second, [2, 3, 1], when)
        batch = second.sample(400)
        expected = [range(when - 9, when + 1), range(max(7, when - 9), when + 1)]
        for row, (task, times) in enumerate(zip([2, 3, 1], [*expected, expected[0]], strict=True)):
            found = set(batch.rewards[row].tolist())
            # The ring may drop its oldest rows slightly early; see the docstring of the class.
            wanted = {100.0 * task + t for t in times if t >= 0}
            assert found <= wanted and len(found) >= len(wanted) - 3, (when, task)
        assert torch.equal(batch.next_observations, batch.observations + 1)
        copy = ReplayBuffer(20, 3, 3, 1, envs_per_task=2, scale=RewardScale(3, 2))
        copy.load_state_dict(second.state_dict())
        assert torch.equal(copy.sample(50).rewards, second.sample(50).rewards)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("5: [reach-v3]", "curriculum: expected steps that start at 0 and increase"),
        ("0: [reach-v3]\n0: [push-v3]", "curriculum: cannot read .* 0 is given twice"),
        ("0: [reach-v3]\n9: []", "curriculum: expected tasks for the stage at 9"),
        ("0: [reach-v3, reach-v3]", "curriculum: expected every task once in the stage at 0"),
        ("0: [reech-v3]", "curriculum: unknown 'reech-v3'; did you mean 'reach-v3'"),
        ("0: [reach-v3]\n1.5: [push-v3]", "curriculum.* integer"),
        ("0: [reach-v3]\n99_999_999: [push-v3]", "curriculum: expected stages that start before "),
        ("", "curriculum: "),
    ],
)
def test_an_invalid_file_is_reported(text, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tasks.yaml").write_text(text)
    monkeypatch.setattr("mtrl.training.run.train", pytest.fail)
    flags = ["--config", "plain", "--curriculum", "tasks.yaml", "--device", "cpu"]
    assert main([*flags, "--run-dir", "run"]) == 2
    assert re.search(told, error := capsys.readouterr().err), error
    assert not Path("run").exists()


def test_tasks_together_with_a_curriculum_are_rejected(tmp_path):
    with pytest.raises(UsageError, match="curriculum: expected no tasks with it"):
        check(config(tmp_path / "run", tasks=("reach-v3",), curriculum={0: ("push-v3",)}))
