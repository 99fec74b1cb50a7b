"""Fixtures of several tests."""

import os
from pathlib import Path

import pytest

# Tests run in parallel, and their threads would compete for cores. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


from mtrl.config.agent import AgentConfig
from mtrl.sac.agent import MTSAC


@pytest.fixture
def policy(tmp_path) -> Path:
    """A policy file of two tasks, with episodes of 20 steps."""
    path = tmp_path / "policy.safetensors"
    agent = MTSAC(("reach-v3", "push-v3"), AgentConfig(hidden_sizes=(8,)), 39, 4)
    agent.save(path, {"horizon": 20, "seed": 1})
    return path
