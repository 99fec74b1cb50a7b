"""GradNorm and FAMO against their papers' formulas, written out with autograd and torch's Adam."""

import copy

import pytest
import torch
from torch import nn

from mtrl.surgery import FAMO, FeatureGradients, GradNorm, MultiTaskModel

T = 4


class Shape(nn.Linear):
    """What a method may know of its networks."""

    n_networks, n_tasks = 1, T


def prepared(method):
    method.prepare(Shape(1, 1).double())
    return method


def features(norms: torch.Tensor) -> FeatureGradients:
    return FeatureGradients(norms[:, None, None].double())


def test_gradnorm_steps_against_the_gradient_of_its_objective():
    method = prepared(GradNorm(alpha=1.5, lr=0.1))
    norms, first = torch.tensor([1.0, 4.0, 0.5, 2.0]), torch.tensor([2.0, 1.0, 3.0, 1.0]).double()
    log_weights = torch.zeros(T).double()
    for losses in (first, first * torch.tensor([0.5, 0.9, 1.0, 2.0])):
        leaf = log_weights.clone().requires_grad_()
        weighted = leaf.exp() * norms
        rate = losses / first
        rate = rate / rate.mean()
        objective = (weighted - (weighted.mean() * rate**1.5).detach()).abs().sum()
        objective.backward()
        log_weights = log_weights - 0.1 * leaf.grad.sign()
        log_weights = log_weights - (log_weights.exp().sum() / T).log()
        found = method.weights(0, slice(None), losses, features(norms))
        torch.testing.assert_close(found, log_weights.exp() / T)


def test_gradnorm_without_alpha_makes_norms_equal():
    method, norms = prepared(GradNorm(alpha=0.0, lr=0.01)), torch.tensor([100.0, 1.0, 0.01, 3.0])
    for _ in range(3_000):
        weights = method.weights(0, slice(None), torch.ones(T).double(), features(norms))
    weighted = weights * norms
    assert weighted.max() / weighted.min() < 1.1
    assert weights.sum().item() == pytest.approx(1)


def test_gradnorm_survives_losses_of_either_sign_and_zero():
    method = prepared(GradNorm())
    for losses in ([0.0, 1.0, -1.0, 2.0], [1.0, -1.0, -2.0, 0.0]):
        weights = method.weights(
            0, slice(None), torch.tensor(losses).double(), features(torch.ones(T))
        )
        assert weights.isfinite().all() and (weights > 0).all()


def test_famo_is_algorithm_1_with_adam():
    method = prepared(FAMO(gamma=0.01, lr=0.05))
    xi = nn.Parameter(torch.zeros(T).double())
    adam = torch.optim.Adam([xi], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        old, new = torch.rand(2, T, generator=generator, dtype=torch.float64) + 0.1
        z = xi.softmax(0)
        expected = (z / old / (z / old).sum()).detach()
        torch.testing.assert_close(method.weights(0, slice(None), old, features(old)), expected)
        adam.zero_grad()
        ((z * (old.log() - new.log())).sum() + 0.01 / 2 * xi.square().sum()).backward()
        adam.step()
        method.after_step(lambda new=new: new[None])
        torch.testing.assert_close(method.logits[0], xi.detach())


def test_famo_favours_the_task_that_falls_behind():
    method = prepared(FAMO())
    for _ in range(50):
        method.weights(0, slice(None), torch.ones(T).double(), features(torch.ones(T)))
        method.after_step(lambda: torch.tensor([[0.5, 0.5, 0.9, 0.5]]).double())
    assert method.logits[0].argmax() == 2


def test_famo_takes_losses_below_zero():
    method = prepared(FAMO())
    for losses in ([0.0, 1.0, -1.0, 2.0], [1.0, -1.0, -2.0, 0.0]):
        values = torch.tensor(losses).double()
        weights = method.weights(0, slice(None), values, features(torch.ones(T)))
        method.after_step(lambda values=values: values[None] - 0.1)
        assert weights.isfinite().all() and weights.sum().item() == pytest.approx(1)
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
