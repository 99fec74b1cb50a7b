"""GradNorm and FAMO against their papers' formulas, written out with autograd and torch's Adam."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mtrl.surgery import FAMO, GradNorm, MultiTaskModel

N, T = 2, 4
MIXED = torch.tensor([[0.0, 1.0, -1.0, 2.0], [1.0, -1.0, -2.0, 0.0]]).double()
"""Positive, negative and zero losses."""


class Shape(nn.Linear):
    """The properties of networks that a method may use."""

    n_networks, n_tasks = N, T


def prepared(method):
    method.prepare(Shape(1, 1).double())
    return method


def features(losses: torch.Tensor, norms: torch.Tensor) -> SimpleNamespace:
    """Return the inputs of the methods."""
    return SimpleNamespace(losses=losses.double(), norms=norms.double())


def test_gradnorm_descends_its_objective():
    method = prepared(GradNorm(alpha=1.5, lr=0.1))
    norms = torch.tensor([[1.0, 4.0, 0.5, 2.0], [30.0, 0.1, 1.0, 2.0]]).double()
    first = torch.tensor([[2.0, 1.0, 3.0, 1.0], [1.0, 5.0, 0.2, 1.0]]).double()
    second = first * torch.tensor([[0.5, 0.9, 1.0, 2.0], [0.015, 0.01, 0.003, 0.006]])
    log_weights = torch.zeros(N, T).double()
    for losses in (first, second):
        leaf = log_weights.clone().requires_grad_()
        weighted = leaf.exp() * norms
        rate = losses / first
        rate = rate / rate.mean(1, keepdim=True)
        target = weighted.mean(1, keepdim=True) * rate**1.5
        (weighted - target.detach()).abs().sum().backward()
        log_weights = log_weights - 0.1 * leaf.grad.sign()
        log_weights = log_weights - (log_weights.exp().sum(1, keepdim=True) / T).log()
        found = method.weights(slice(None), features(losses, norms))
        torch.testing.assert_close(method.log_weights, log_weights)
        torch.testing.assert_close(found, log_weights.exp() / T)


def test_gradnorm_without_alpha_makes_norms_equal():
    method = prepared(GradNorm(alpha=0.0, lr=0.01))
    norms = torch.tensor([[100.0, 1.0, 0.01, 3.0], [2.0, 0.3, 50.0, 1.0]]).double()
    for _ in range(3_000):
        weights = method.weights(slice(None), features(torch.ones(N, T).double(), norms))
    weighted = weights * norms
    assert (weighted.amax(1) / weighted.amin(1) < 1.1).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(N).double())


def test_gradnorm_allows_negative_and_zero_losses():
    method = prepared(GradNorm())
    for losses in (MIXED, MIXED.flip(0)):
        weights = method.weights(slice(None), features(losses, torch.ones(N, T)))
        assert weights.isfinite().all() and (weights > 0).all()


def test_famo_is_algorithm_1_with_adam():
    method = prepared(FAMO(gamma=0.01, lr=0.05))
    xi = nn.Parameter(torch.zeros(N, T).double())
    adam = torch.optim.Adam([xi], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        old, new = torch.rand(2, N, T, generator=generator, dtype=torch.float64) + 0.1
        z = xi.softmax(1)
        expected = (z / old / (z / old).sum(1, keepdim=True)).detach()
        torch.testing.assert_close(method.weights(slice(None), features(old, old)), expected)
        adam.zero_grad()
        ((z * (old.log() - new.log())).sum() + 0.01 / 2 * xi.square().sum()).backward()
        adam.step()
        method.after_step(lambda new=new: new)
        torch.testing.assert_close(method.logits, xi.detach())


def test_famo_favours_the_slowest_task():
    method = prepared(FAMO())
    for _ in range(50):
        method.weights(slice(None), features(torch.ones(N, T).double(), torch.ones(N, T)))
        method.after_step(
            lambda: torch.tensor([[0.5, 0.5, 0.9, 0.5], [0.9, 0.5, 0.5, 0.5]]).double()
        )
    assert method.logits.argmax(1).tolist() == [2, 0]


def test_famo_allows_negative_losses():
    method = prepared(FAMO())
    for losses in (MIXED, MIXED.flip(0)):
        weights = method.weights(slice(None), features(losses, torch.ones(N, T)))
        method.after_step(lambda losses=losses: losses - 0.1)
        assert weights.isfinite().all()
        torch.testing.assert_close(weights.sum(1), torch.ones(N).double())
    assert method.logits.isfinite().all()


@pytest.mark.parametrize("name", ["gradnorm", "famo"])
def test_tasks_that_are_missing_keep_their_state(name):
    torch.manual_seed(0)
    model = MultiTaskModel(nn.Linear(3, 5), {k: nn.Linear(5, 1) for k in "abc"}, name).double()
    x = torch.randn(8, 3).double()

    def step(*tasks: str) -> None:
        outputs = model(x * len(tasks))
        losses = {k: outputs[k].square().mean() * (1 + ord(k) % 5) for k in tasks}
        model.backward(losses)
        model.after_step(lambda: losses)

    step("a", "b", "c")
    before = copy.deepcopy(model.surgery.state_dict())
    step("a", "c")
    for key in ("initial_losses", "lowest", "before"):
        if key in before:
            assert model.surgery.state_dict()[key][0, 1] == before[key][0, 1]
    changed = "log_weights" if name == "gradnorm" else "before"
    assert model.surgery.state_dict()[changed][0, 0] != before[changed][0, 0]
