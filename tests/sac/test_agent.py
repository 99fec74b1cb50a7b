"""Policy: its distribution, `predict` as called by Stable-Baselines3, and files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from metaworld.wrappers import OneHotWrapper
from safetensors.torch import save_file
from stable_baselines3.common.evaluation import evaluate_policy
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from mtrl.config.agent import AgentConfig
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.errors import UsageError
from mtrl.policy.distributions import squashed_gaussian
from mtrl.sac.agent import MTSAC

TASKS = ("reach-v3", "push-v3", "door-open-v3")


@pytest.fixture
def agent():
    agent = MTSAC(TASKS, AgentConfig(hidden_sizes=(16, 16)), 39, 4, seed=3)
    for parameter in agent.actor.parameters():  # heads start near zero: make tasks differ
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=agent._generator))
    return agent


def test_log_probability_against_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    outputs = 0.5 * torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    mean, log_std = outputs.chunk(2, -1)
    action, log_prob = squashed_gaussian(outputs, noise)
    truth = Independent(
        TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1)), 1
    )
    u = mean + log_std.exp() * noise
    transform = truth.base_dist.transforms[0]
    torch.testing.assert_close(action, transform(u))
    torch.testing.assert_close(log_prob, truth.log_prob(transform(u)), atol=1e-9, rtol=1e-9)


def test_its_gradients_equal_finite_differences():
    """Where log σ is clamped, its gradient is zero; shapes with and without a batch."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    outputs[0, 0, 4:6] = torch.tensor([-30.0, 3.0])
    noise = torch.randn(5, 4, generator=generator, dtype=torch.float64)  # for both
    outputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: squashed_gaussian(given, noise), (outputs,))
    action, log_prob = squashed_gaussian(outputs, noise)
    (gradient,) = torch.autograd.grad(action.sum() + log_prob.sum(), outputs)
    assert not gradient[0, 0, 4:6].any() and gradient[0, 0, 6:].all()
    with torch.no_grad():
        for found, expected in zip(
            squashed_gaussian(outputs, noise), (action, log_prob), strict=True
        ):
            assert torch.equal(found, expected)


KERNELS = """
import torch
from mtrl.policy import distributions

for n_actions in (1, 3, 4, 39):
    generator = torch.Generator().manual_seed(n_actions)

    def normal(*shape):
        return torch.randn(2, 70, *shape, generator=generator).to(DEVICE)

    outputs, noise = normal(2 * n_actions).mul_(3), normal(n_actions)
    outputs[0, 0] = torch.tensor([3.0, -30.0]).repeat(n_actions)  # clamped, or far out
    at_results, found = (normal(n_actions), normal()), []
    for fused in (False, True):
        distributions._is_fused = lambda outputs: fused
        given = outputs.clone().requires_grad_()
        results = distributions.squashed_gaussian(given, noise)
        found.append((*results, *torch.autograd.grad(results, given, at_results)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
"""


def test_kernels_equal_torch_operations():
    """Compiled on a GPU; elsewhere in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    script = KERNELS.replace("DEVICE", repr(device))
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_log_probability_stays_finite_far_out():
    outputs = torch.tensor([[60.0, -60.0, 2.0, 2.0]], requires_grad=True)
    _, log_prob = squashed_gaussian(outputs, torch.zeros(1, 2))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and outputs.grad.isfinite().all()


def test_predict_takes_the_task_in_three_ways(agent):
    observations = np.random.default_rng(0).normal(size=(3, 39))
    together, state = agent.predict(observations, deterministic=True)
    assert together.shape == (3, 4) and state is None and (np.abs(together) <= 1).all()
    for t, task in enumerate(TASKS):
        one_hot = np.concatenate([observations[t], np.eye(3)[t]])
        by_one_hot, _ = agent.predict(one_hot, deterministic=True)
        by_name, _ = agent.predict(observations[t], deterministic=True, task=task)
        assert by_one_hot.shape == by_name.shape == (4,)
        np.testing.assert_allclose(by_one_hot, together[t], atol=1e-6)
        np.testing.assert_allclose(by_name, together[t], atol=1e-6)
    other, _ = agent.predict(observations[0], deterministic=True, task=TASKS[1])
    assert not np.allclose(other, together[0], atol=1e-4)


def test_predict_samples_around_its_mode(agent):
    rows = np.tile(np.random.default_rng(1).normal(size=39), (4000, 1))
    samples, _ = agent.predict(rows, task="push-v3")
    (mode, *_), _ = agent.predict(rows[:1], deterministic=True, task="push-v3")
    assert samples.std(0).min() > 0.05
    np.testing.assert_allclose(np.median(samples, 0), mode, atol=0.08)


@pytest.mark.parametrize(
    ("shape", "task", "message"),
    [
        ((2, 39), None, "one row for each of the 3 tasks"),
        ((40,), None, "expected length 39, or 42"),
        ((2, 3, 39), None, "expected length 39, or 42"),
        ((39,), "reach", "did you mean 'reach-v3'"),
    ],
)
def test_predict_rejects_ambiguous_tasks_and_wrong_shapes(agent, shape, task, message):
    with pytest.raises(ValueError, match=message):
        agent.predict(np.zeros(shape), task=task)


@pytest.mark.parametrize(
    ("tail", "task", "message"),
    [
        ((0, 0, 0), None, "last 3 of 42 numbers to be the task's one-hot, got others, such as"),
        ((1, 1, 0), None, "to be the task's one-hot"),
        ((0, -0.3, 3.2), None, "to be the task's one-hot"),  # normalised by a wrapper
        ((0, 1, 0), TASKS[0], f"expected that of the observation's one-hot, got '{TASKS[0]}'"),
        ((0, 1, 0), "reach", "did you mean 'reach-v3'"),
        ((0, 1, 0), 1, "task: unknown '1'"),
    ],
)
def test_predict_does_not_guess_a_task(agent, tail, task, message):
    with pytest.raises(ValueError, match=message):
        agent.predict(np.concatenate([np.zeros(39), tail]), task=task)


@pytest.mark.parametrize("tasks", [(), ("a", "a"), "reach-v3"])
def test_an_agent_has_different_tasks(tasks):
    with pytest.raises(UsageError, match="tasks: expected the names of different tasks, got"):
        MTSAC(tasks, AgentConfig(hidden_sizes=(8,)), 39, 4)


def test_stable_baselines3_evaluates_it(agent):
    env = OneHotWrapper(TimeLimit(MetaWorldTask("push-v3"), 20), 1, len(TASKS))
    env.observation_space = env._observation_space
    env.reset(seed=0)
    returns, lengths = evaluate_policy(
        agent, env, n_eval_episodes=2, return_episode_rewards=True, warn=False
    )
    assert lengths == [20, 20]
    assert all(np.isfinite(returns))


def test_save_and_load(agent, tmp_path):
    path = tmp_path / "policy.safetensors"
    agent.save(path, {"seed": 7})
    loaded, header = MTSAC.load_with_header(path)
    assert header.seed == 7 and loaded.tasks == TASKS
    assert loaded.config == agent.config
    for (name, a), (_, b) in zip(
        agent.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    observations = np.random.default_rng(0).normal(size=(3, 39))
    a, b = (x.predict(observations, deterministic=True)[0] for x in (agent, loaded))
    assert np.array_equal(a, b)


def test_the_file_is_readable_and_holds_no_pickle(agent, tmp_path):
    path = tmp_path / "policy.safetensors"
    agent.save(path)
    assert b"hidden_sizes" in path.read_bytes()[:4000]
    assert b"reach-v3" in path.read_bytes()[:4000]


def truncated(path, agent):
    path.write_bytes(path.read_bytes()[:-100])


def text(path, agent):
    path.write_text("not a policy")


def foreign(path, agent):
    save_file({"weight": torch.zeros(3)}, path)


def other_shape(path, agent):
    agent.config = AgentConfig(hidden_sizes=(17, 16))
    agent.save(path)


def unexpected(path, agent):
    agent.register_buffer("number", torch.zeros(()))
    agent.save(path)


def no_task(path, agent):
    save_file(agent.tensors(), path, {"format": "mtrl-policy-1", "config": "agent: {}"})


def odd_size(path, agent):
    header = "{tasks: [a], agent: {}, action_size: 4, observation_size: many}"
    save_file(agent.tensors(), path, {"format": "mtrl-policy-1", "config": header})


def odd_agent(path, agent):
    header = "{tasks: [a], agent: {heads: none}, action_size: 4, observation_size: 39}"
    save_file(agent.tensors(), path, {"format": "mtrl-policy-1", "config": header})


def missing(path, agent):
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [truncated, text, foreign, other_shape, unexpected, no_task, odd_size, odd_agent, missing],
)
def test_damaged_and_foreign_files_give_a_one_line_error(agent, tmp_path, damage):
    path = tmp_path / "policy.safetensors"
    agent.save(path)
    damage(path, agent)
    with pytest.raises(UsageError, match=r"policy\.safetensors") as error:
        MTSAC.load(path)
    assert "\n" not in str(error.value)
    if damage is unexpected:
        assert str(error.value).endswith("expected none for 'agent/number', got []")
