"""What several tests start from."""

from pathlib import Path

import pytest

from mtrl.agent import MTSAC
from mtrl.config import AgentConfig


@pytest.fixture
def policy(tmp_path) -> Path:
    """A policy file of two tasks, with episodes of 20 steps."""
    path = tmp_path / "policy.safetensors"
    agent = MTSAC(("reach-v3", "push-v3"), AgentConfig(hidden_sizes=(8,)), 39, 4)
    agent.save(path, {"horizon": 20, "seed": 1})
    return path
