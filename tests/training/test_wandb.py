"""Weights & Biases as in docs/training.md, offline, if wandb is installed."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("wandb", reason="not of the tests' extra: pip install wandb")
pytestmark = pytest.mark.slow

SCRIPT = """
import wandb
from mtrl import TrainConfig, train

if __name__ == "__main__":
    config = TrainConfig(
        tasks=("reach-v3",), total_timesteps=160, learning_starts=80, log_every=40, eval_every=80,
        eval_episodes=1, horizon=10, batch_size=8, hidden_sizes=(8,), diagnose_every=0,
        simulator="metaworld", workers=1, device="cpu", run_dir="run",
    )
    run = wandb.init(project="mtrl", sync_tensorboard=True, config=config.flat())
    print("CONFIG", run.config["batch_size"])
    train(config)
    wandb.finish()
"""


def test_two_lines_mirror_tensorboard(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "CONFIG 8" in done.stdout
    # wandb's own table of the run, whose step is environment steps.
    assert re.search(r"global_step\s+160\b", done.stderr)
    for tag in ("eval/success_rate/reach-v3", "rollout/ep_rew_mean/reach-v3", "time/fps"):
        assert tag in done.stderr
