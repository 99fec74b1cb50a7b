"""NaN and infinite values are detected and traced to their origin."""

import numpy as np
import pytest
import torch

from mtrl.config.agent import AgentConfig
from mtrl.config.learner import LearnerConfig
from mtrl.errors import RunError
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.replay import Batch
from mtrl.sac.watch import DIVERGING, LossWatch, diverging, expect_finite
from mtrl.surgery import available

TASKS, B, D, A = ("a", "b", "c"), 8, 5, 2


def make_learner(surgery: str = "none") -> Learner:
    config = LearnerConfig(surgery=surgery)
    return Learner(MTSAC(TASKS, AgentConfig(hidden_sizes=(8,)), D, A), config)


def update(learner: Learner, reward_of_b: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = torch.ones(len(TASKS), B)
    rewards[1, 3] = reward_of_b
    batch = Batch(
        torch.randn(len(TASKS), B, D, generator=draw),
        torch.rand(len(TASKS), B, A, generator=draw),
        rewards,
        torch.zeros(len(TASKS), B),
        torch.randn(len(TASKS), B, D, generator=draw),
    )
    learner.update(batch, torch.randn(2, len(TASKS), B, A, generator=draw))


@pytest.mark.parametrize("reward", [np.inf, np.nan, -np.inf, 1e30])
def test_the_loss_the_task_and_the_update_are_named(reward):
    learner = make_learner()
    for _ in range(4):
        update(learner)
    learner.watch.expect_finite(TASKS, 4)
    expect_finite(learner.agent.named_parameters())
    update(learner, reward)
    for _ in range(3):  # by now everything is NaN
        update(learner)
    with pytest.raises(RunError, match=r"critic_loss of task 'b' became .* in update 105"):
        learner.watch.expect_finite(TASKS, 108)  # in a run resumed after 100
    if abs(reward) != 1e30:  # whose gradient is clipped to zero
        with pytest.raises(RunError, match=r"weights .* are infinite or NaN"):
            expect_finite(learner.agent.named_parameters())


@pytest.mark.parametrize("surgery", available())
def test_methods_do_not_raise_on_nan(surgery):
    """No method raises on a gradient that is not finite, although a solver might."""
    learner = make_learner(surgery)
    for reward in (1.0, np.inf, 1.0):
        update(learner, reward)
    with pytest.raises(RunError, match=r"critic_loss of task 'b' became .* in update 2"):
        learner.watch.expect_finite(TASKS, 3)


def test_a_nan_weight_is_named():
    learner = make_learner()
    learner.agent.critics.shared["weight0"].data[1, 2, 3] = torch.nan
    with pytest.raises(RunError, match=r"weights critics\.shared\.weight0"):
        expect_finite(learner.agent.named_parameters())


def test_the_watch_reads_nothing_until_the_check():
    watch = LossWatch(("x",), 2, torch.device("meta"))  # reading a value there would raise
    for _ in range(3):
        watch.note(torch.zeros(2, device="meta"))


def test_diverging_losses_give_a_warning():
    assert diverging({"a": 1.0, "b": DIVERGING}) is None
    warning = diverging({"a": 1.0, "b": 3.2e7})
    assert warning is not None and "task 'b' is 3.2e+07, above 1e+06" in warning
