"""The recipe on tasks other than those of Meta-World."""

import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file

from mtrl import Benchmark, preset, train

EXAMPLES = Path(__file__).parents[2] / "examples"

SHORT = {
    "total_timesteps": "120/task",
    "learning_starts": "60/task",
    "eval_every": "1_000/task",
    "checkpoint_every": "1_000/task",
    "diagnose_every": 0,
    "log_every": "40/task",
    "batch_size": 16,
    "envs_per_task": 2,
    "hidden_sizes": (16, 16),
    "horizon": 15,
    "workers": 1,
    "threads": 1,
    "device": "cpu",
}


def scaled(factor: float) -> gym.Env:
    env = gym.make("Pendulum-v1")
    return gym.wrappers.TransformReward(env, lambda reward: reward * factor)


def policy_of(run_dir: Path, factors: dict[str, float]) -> dict[str, torch.Tensor]:
    made = {task: partial(scaled, factor) for task, factor in factors.items()}
    config = preset("recipe_cpu", run_dir=run_dir, **SHORT)
    outcome = train(config, Benchmark("scaled", made, success_key=None))
    assert outcome.evaluation.table()
    return load_file(run_dir / "policy_final.safetensors")


def test_rewards_of_any_magnitude_give_the_same_policy(tmp_path):
    """Bitwise equal for powers of two; the factor of one task does not affect the other."""
    ours = policy_of(tmp_path / "a", {"a": 1.0, "b": 1.0})
    theirs = policy_of(tmp_path / "b", {"a": 2.0**20, "b": 2.0**-12})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("pendulums", None)


def test_the_example_of_the_docs_runs(example, tmp_path):
    from mtrl.cli.train import main

    flags = [f"--{name.replace('_', '-')}" for name in SHORT if name != "hidden_sizes"]
    values = [str(value) for name, value in SHORT.items() if name != "hidden_sizes"]
    arguments = [word for pair in zip(flags, values, strict=True) for word in pair]
    run_dir = tmp_path / "run"
    assert main(["--config", "pendulums.yaml", *arguments, "--run-dir", str(run_dir)]) == 0
    header = (run_dir / "eval.json").read_text()
    assert all(f'"{task}"' in header for task in ("moon", "mars", "earth", "heavy"))
