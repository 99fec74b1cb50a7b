"""Parts of the recipe against their formulas: value histograms, normalisation and decay."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import norm

from mtrl.config.agent import AgentConfig
from mtrl.config.learner import LearnerConfig
from mtrl.config.registry import TRUNKS
from mtrl.policy.inputs import CLIP, ObservationNormalizer
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.optimizers import make_optimizer
from mtrl.sac.reward_scale import RewardScale
from mtrl.sac.values import CategoricalValue, ScalarValue

K, LIMIT = 101, 10.0


def test_histogram_holds_the_normal_distributions_mass_in_each_bin():
    value = CategoricalValue(K, LIMIT)
    centres = np.linspace(-LIMIT, LIMIT, K)
    width = centres[1] - centres[0]
    edges = np.concatenate([[-np.inf], centres[:-1] + width / 2, [np.inf]])
    targets = torch.tensor([-3.0, 0.0, 0.05, 7.77, 9.9, -10.0], dtype=torch.float64)
    for target, found in zip(targets.tolist(), value.histogram(targets), strict=True):
        expected = np.diff(norm.cdf(edges, target, 0.75 * width))
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_histogram_and_mean_are_inverse():
    """To a thousandth of a bin, away from the ends, where the distribution is truncated."""
    value = CategoricalValue(K, LIMIT)
    targets = torch.linspace(-9, 9, 500, dtype=torch.float64)
    probabilities = value.histogram(targets)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(targets))
    found = value.mean(probabilities.clamp(min=1e-300).log())
    assert (found - targets).abs().max() < 1e-3 * value.width
    beyond = value.histogram(torch.tensor([LIMIT, LIMIT + 5, 1e6], dtype=torch.float64))
    assert torch.equal(beyond[0], beyond[1]) and torch.equal(beyond[0], beyond[2])


def test_cross_entropy_is_minimal_at_the_target():
    value = CategoricalValue(K, LIMIT)
    target = torch.tensor([[1.3, -4.0]], dtype=torch.float64)  # [T, B]
    outputs = torch.randn(2, 1, 2, K, dtype=torch.float64, requires_grad=True)  # [N, T, B, K]
    losses = value.loss(outputs, target)
    probabilities = value.histogram(target)
    expected = -(probabilities * outputs.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    torch.testing.assert_close(gradient, outputs.softmax(-1) - probabilities)


def test_scalar_value_is_the_squared_error():
    outputs, target = torch.tensor([[[[3.0]]]]), torch.tensor([[1.0]])
    assert ScalarValue().mean(outputs) == 3.0 and ScalarValue().loss(outputs, target) == 2.0


def test_reward_scale_by_the_largest_discounted_return():
    """Against sums over complete histories, with episodes that end at different times."""
    tasks, copies, gamma, steps = 3, 2, 0.9, 60
    draw = np.random.default_rng(0)
    rewards = draw.normal(size=(steps, tasks * copies)) * np.repeat([1, 10, 0], copies)
    done = draw.random((steps, tasks * copies)) < 0.1
    scale = RewardScale(tasks, copies, gamma=gamma, magnitude=5.0, constant=2.0)
    largest = np.zeros(tasks)
    for step in range(steps):
        scale.observe(rewards[step], done[step])
        for row in range(tasks * copies):
            ends = np.flatnonzero(done[:step, row])
            first = ends[-1] + 1 if len(ends) else 0
            episode = rewards[first : step + 1, row]
            total = (gamma ** np.arange(len(episode))[::-1] * episode).sum()
            largest[row // copies] = max(largest[row // copies], abs(total))
        expected = np.where(largest > 0, 10.0 / np.maximum(largest, 1e-300), 2.0)
        np.testing.assert_allclose(scale.factors, expected, rtol=1e-6)


def test_reward_scale_by_the_mean_of_the_last_episodes():
    """A single successful episode is forgotten, and a saved state continues."""
    tasks, copies, gamma, steps, memory = 2, 3, 0.8, 80, 4
    draw = np.random.default_rng(1)
    rewards = draw.random((steps, tasks * copies))
    rewards[20:22, 1] = 1000.0
    done = draw.random((steps, tasks * copies)) < 0.15
    scale = RewardScale(tasks, copies, gamma=gamma, magnitude=5.0, memory=memory)
    starts = np.zeros(tasks * copies, int)
    ended = [[] for _ in range(tasks)]
    seen = np.zeros(tasks)

    def peak(row: int, end: int) -> float:
        episode = rewards[starts[row] : end, row]
        totals = [
            (gamma ** np.arange(n)[::-1] * episode[:n]).sum() for n in range(1, len(episode) + 1)
        ]
        return max(totals)

    for step in range(steps):
        if step == 40:
            saved, scale = (
                scale.state_dict(),
                RewardScale(tasks, copies, gamma=gamma, magnitude=5.0, memory=memory),
            )
            scale.load_state_dict(saved)
        scale.observe(rewards[step], done[step])
        for row in range(tasks * copies):
            found = peak(row, step + 1)
            seen[row // copies] = max(seen[row // copies], found)
            if done[step, row]:
                ended[row // copies].append(found)
                starts[row] = step + 1
        means = [np.mean(past[-memory:]) if past else seen[t] for t, past in enumerate(ended)]
        np.testing.assert_allclose(scale.factors, 5.0 / np.array(means), rtol=1e-6)
    assert seen[0] > 1000 > 10 * means[0]


def test_without_a_magnitude_the_factor_is_constant():
    scale = RewardScale(2, constant=0.1)
    scale.observe(np.array([100.0, 1.0]), np.array([False, False]))
    assert torch.equal(scale.factors, torch.full((2,), 0.1))


@pytest.mark.parametrize("sizes", [(50,), (1, 9, 40), (25, 25)])
def test_observations_are_normalised_by_all_observations_so_far(sizes):
    draw = np.random.default_rng(1)
    seen = draw.normal(3.0, [0.1, 2.0, 0.0], size=(50, 3))
    normalizer = ObservationNormalizer(3)
    for part in np.split(seen, np.cumsum(sizes)[:-1]):
        normalizer.observe(torch.from_numpy(part))
    found = normalizer(torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(
        found, (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8), atol=1e-9
    )
    assert normalizer(torch.full((3,), 1e9, dtype=torch.float64)).tolist() == [CLIP] * 3


def test_an_object_that_flies_away_hardly_changes_the_normalisation():
    draw, normalizer = np.random.default_rng(1), ObservationNormalizer(2)
    seen = draw.normal(0.6, [0.1, 5.0], size=(200_000, 2))
    for part in np.split(seen, 2000):
        normalizer.observe(torch.from_numpy(part))
    np.testing.assert_allclose(normalizer.variance, seen.var(0), rtol=1e-9)  # so far, nothing else
    flight = draw.normal(0.6, [0.1, 5.0], size=(400, 4, 2))
    flight[:, 0, 0] += np.linspace(0, 300, 400)  # metres, in one of four environments
    for part in flight:
        normalizer.observe(torch.from_numpy(part))
    plain = np.concatenate([seen, flight.reshape(-1, 2)]).std(0)
    assert plain[0] > 70 * 0.1  # what it does to ordinary statistics
    np.testing.assert_allclose(normalizer.variance.sqrt(), [0.1, 5.0], rtol=0.25)


def test_a_component_that_begins_to_vary_late_is_learned():
    draw, normalizer = np.random.default_rng(1), ObservationNormalizer(1)
    for _ in range(4000):
        normalizer.observe(torch.zeros(100, 1))
    late = draw.normal(3.0, 1.0, size=(40_000, 1))
    for part in np.split(late, 400):
        normalizer.observe(torch.from_numpy(part))
    plain = np.concatenate([np.zeros((400_000, 1)), late])
    assert 0.7 < normalizer.variance.sqrt().item() / plain.std() < 1
    assert normalizer(torch.from_numpy(late)).max() < CLIP  # no value is lost


class Normalized(torch.nn.Module):
    """A custom trunk with a matrix whose name says nothing, and a vector called `weight`."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(n_inputs, 4))
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, observations):
        return self.norm(observations @ self.kernel)


@pytest.mark.parametrize(
    ("trunk", "decaying"),
    [
        ("mlp", {"weight0", "weight1"}),
        ("residual", {"weight0", "weight1", "weight2"}),
        ("paco", {"layer0_weight", "layer1_weight"}),
        (Normalized, {"module:kernel"}),
    ],
)
def test_only_matrices_of_layers_decay(trunk, decaying, monkeypatch):
    """AdamW with zero gradient gives w (1 − lr λ)."""
    monkeypatch.setattr(TRUNKS, "classes", dict(TRUNKS.classes))
    agent = MTSAC(("a", "b"), AgentConfig(hidden_sizes=(4, 4), trunk=trunk), 3, 2, 0)
    learner = Learner(agent, LearnerConfig(weight_decay=0.1, learning_rate=0.01))
    before = {name: value.detach().clone() for name, value in agent.critics.named_parameters()}
    for parameter in agent.critics.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizers["critics"].step()
    expected = {f"shared.{name}" for name in decaying} | {"per_task.head_weight"}
    assert expected < set(before)
    for name, value in agent.critics.named_parameters():
        factor = 1 - 0.01 * 0.1 if name in expected else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor)


def test_learning_rates_decay_linearly():
    """With a constant gradient, each step of Adam equals the learning rate."""
    agent = MTSAC(("a", "b"), AgentConfig(hidden_sizes=(4,)), 3, 2, 0)
    config = LearnerConfig(learning_rate=0.01, final_learning_rate=0.002, adam_epsilon=1e-12)
    learner = Learner(agent, config)
    for progress, expected in ((0.0, 0.01), (0.25, 0.008), (1.0, 0.002)):
        learner.anneal(progress)
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        for parameter in agent.parameters():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in learner.optimizers.values():
            optimizer.step()
        moved = [
            (before[n] - p).detach().flatten()
            for n, p in agent.named_parameters()
            if "target" not in n
        ]
        torch.testing.assert_close(torch.cat(moved), torch.full_like(torch.cat(moved), expected))


def test_our_step_of_adamw_equals_torchs():
    """With decay on some, a gradient missing at first, and a state that torch can load."""
    config = LearnerConfig(weight_decay=0.1, learning_rate=0.01)

    def parameters() -> dict[str, torch.nn.Parameter]:
        draw = torch.Generator().manual_seed(0)
        return {n: torch.nn.Parameter(torch.randn(3, 2, generator=draw)) for n in ("weight", "b")}

    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer([ours["weight"]], [ours["b"]], config)
    groups = [
        {"params": [theirs["weight"]], "weight_decay": 0.1},
        {"params": [theirs["b"]], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=0.01, eps=config.adam_epsilon)
    draw = torch.Generator().manual_seed(1)
    for step in range(4):
        for name in ("weight", "b")[: 1 + (step > 0)]:
            gradient = torch.randn(3, 2, generator=draw)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
        if step == 1:
            optimizer.load_state_dict(
                copy.deepcopy(other.state_dict())
                | {"param_groups": optimizer.state_dict()["param_groups"]}
            )
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name])
