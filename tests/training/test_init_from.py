"""Runs that start from a policy."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import small_config

from mtrl import resume, train
from mtrl.cli.train import main
from mtrl.config.agent import AgentConfig
from mtrl.errors import UsageError
from mtrl.sac.agent import MTSAC
from mtrl.training.check import check
from mtrl.training.trainer import Trainer

AGENT = AgentConfig(hidden_sizes=(12, 11), normalize_observations=True)
TASKS = ("push-v3", "reach-v3", "drawer-close-v3")


@pytest.fixture
def policy(tmp_path) -> Path:
    agent = MTSAC(("reach-v3", "door-close-v3"), AGENT, 39, 4, seed=9)
    agent.normalizer.observe(torch.randn(50, 39))
    agent.save(tmp_path / "policy.safetensors")
    return tmp_path / "policy.safetensors"


def config(run_dir: Path, policy: Path, **leaves):
    settings = {"tasks": TASKS, "init_from": policy, "learning_starts": 60, "eval_every": 1_000}
    return small_config(run_dir, **settings | {"checkpoint_every": 1_000} | leaves)


def test_a_run_starts_from_a_policy_and_repeats_bitwise_without_it(policy, tmp_path, capsys):
    settings = {"freeze": ("trunk", "normalizer"), "freeze_until": 150, "threads": 1}
    outcome = train(config(tmp_path / "a", policy, **settings))
    assert "--init-from replaces the configuration's hidden_sizes: 8" in capsys.readouterr().out
    train(config(tmp_path / "b", policy, **settings, total_timesteps=120))
    theirs, early = (load_file(p) for p in (policy, tmp_path / "b" / "policy_final.safetensors"))
    for name, value in theirs.items():  # 120 steps end before 150
        if ".shared." in name or "normalizer" in name:
            assert torch.equal(early[name], value), name
    policy.unlink()
    resume(tmp_path / "b", total_timesteps=240)
    final, resumed = (load_file(tmp_path / d / "policy_final.safetensors") for d in "ab")
    torch.testing.assert_close(final, resumed, rtol=0, atol=0)
    changed = {name for name in theirs if not torch.equal(theirs[name], final[name])}
    assert {"agent/actor.shared.weight0", "agent/normalizer.mean"} <= changed
    assert outcome.evaluation.tasks == TASKS


def test_the_policy_acts_from_the_start_in_tasks_it_knows(policy, tmp_path):
    benchmark, device, resolved = check(config(tmp_path / "run", policy))
    resolved = resolved.model_copy(update={"agent": AGENT})
    (tmp_path / "run").mkdir()
    trainer = Trainer(resolved, benchmark, device, tmp_path / "run")
    assert trainer.state.known == ("reach-v3",)
    mean = trainer.state.agent.actor.per_task["head_bias"]
    mean[0, 1, :4] = 3.0  # reach-v3's actions: nearly 1
    mean[0, 1, 4:] = -9.0  # without noise
    trainer.step()
    actions = trainer.state.envs._shared.actions
    trainer.close()
    assert (actions[1] > 0.9).all() and (abs(actions[[0, 2]]) < 0.9).any(1).all()


def test_invalid_requests_are_reported_before_the_run(policy, tmp_path, capsys):
    where = ["--init-from", str(policy), "--run-dir", str(tmp_path / "run")]
    for flags, told in (
        (["--hidden-sizes", "7"], "hidden_sizes: expected 12 11, as "),
        (["--freeze", "trnk"], "input should be 'trunk', 'actor-trunk', "),
        (["--freeze-until", "9"], "freeze_until: expected freeze with it"),
    ):
        assert main(["--tasks", "push-v3", *where, *flags]) == 2
        assert told in capsys.readouterr().err
    policy.write_bytes(b"nothing")
    assert main(["--tasks", "push-v3", *where]) == 2
    assert "error: init_from: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_observations_of_another_size_are_reported_before_the_run(policy, tmp_path):
    import own_tasks

    wanted = config(tmp_path / "run", policy).model_copy(update={"tasks": None})
    with pytest.raises(
        UsageError, match="init_from: expected a policy for observations of length 10"
    ):
        train(wanted, own_tasks.REACHERS)
    assert not (tmp_path / "run").exists()
