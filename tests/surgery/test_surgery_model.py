"""Surgery for any PyTorch model, against autograd for each task."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from mtrl.errors import UsageError
from mtrl.surgery import GramianSurgery, MultiTaskModel, PCGrad
from mtrl.surgery.methods.pcgrad import random_orders

D = 6
SURGERIES = ["none", "pcgrad", "rotograd", "rotograd-scale", "rotograd-rotate", "gradnorm", "famo"]


class Fixed(GramianSurgery):
    """Returns different weights per task."""

    def weights(self, gramian, generator):
        return torch.arange(1, 1 + gramian.shape[-1], dtype=gramian.dtype).expand(gramian.shape[:2])


def make(surgery="none", dtype=torch.float64, heads="abc", **more) -> MultiTaskModel:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D))
    sizes = {"a": 1, "b": 3, "c": 2}
    deep = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2))
    modules = {k: deep if k == "c" else nn.Linear(D, sizes[k]) for k in heads}
    return MultiTaskModel(trunk, modules, surgery, n_features=D, **more).to(dtype)


def loss(task: str, output: torch.Tensor) -> torch.Tensor:
    scale = {"a": 1.0, "b": 20.0, "c": 0.1}[task]
    return scale * (output - ord(task) % 3).square().mean()


def inputs(seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(model: MultiTaskModel, x, tasks="abc") -> tuple[dict, dict]:
    """Return each task's gradients of trunk and head by one ordinary backward."""
    trunk, heads = {}, {}
    for task in tasks:
        other = copy.deepcopy(model)
        own = x[task] if isinstance(x, dict) else x
        loss(task, other.heads[task](other.trunk(own))).backward()
        trunk[task] = [p.grad for p in other.trunk.parameters()]
        heads[task] = [p.grad for p in other.heads[task].parameters()]
    return trunk, heads


def losses_of(model: MultiTaskModel, x, tasks="abc") -> dict[str, torch.Tensor]:
    outputs = model(x)
    return {task: loss(task, outputs[task]) for task in tasks}


def check(model, trunk, heads, weights) -> None:
    """`.grad` is T Σ w_k g_k on the trunk, and equals autograd on the heads."""
    for i, parameter in enumerate(model.trunk.parameters()):
        pairs = zip(weights, trunk.values(), strict=True)
        expected = len(trunk) * sum(w * rows[i] for w, rows in pairs)
        torch.testing.assert_close(parameter.grad, expected)
    for task, gradients in heads.items():
        for parameter, gradient in zip(model.heads[task].parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


OWN = {"a": inputs(1), "b": inputs(2)[:5], "c": inputs(3)[:9]}


@pytest.mark.parametrize("x", [inputs(), OWN], ids=["same inputs", "inputs of their own"])
@pytest.mark.parametrize("surgery", ["none", "weights"])
def test_gradients_equal_autograd(x, surgery):
    model = make("none" if surgery == "none" else Fixed())
    trunk, heads = by_hand(model, x)
    model.backward(losses_of(model, x))
    check(model, trunk, heads, [1 / 3] * 3 if surgery == "none" else [1, 2, 3])


def test_pcgrad_is_algorithm_1():
    model = make("pcgrad", seed=5)
    trunk, heads = by_hand(model, inputs())
    flat = torch.stack([torch.cat([g.flatten() for g in rows]) for rows in trunk.values()])
    orders = random_orders(1, 3, torch.Generator().manual_seed(5))[0]
    projected = flat.clone()
    for i, g in enumerate(projected):
        for j in orders[i].tolist():
            if g @ flat[j] < 0:
                g -= g @ flat[j] / flat[j].square().sum() * flat[j]
    model.backward(losses_of(model, inputs()))
    found = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    torch.testing.assert_close(found, projected.sum(0))
    assert not torch.allclose(found, flat.sum(0))  # there was a conflict
    for task, gradients in heads.items():
        for parameter, gradient in zip(model.heads[task].parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("surgery", ["none", "weights", "rotograd-scale"])
def test_accumulated_batches_equal_one_large_batch(surgery):
    name = Fixed() if surgery == "weights" else surgery
    whole, parts = make(copy.deepcopy(name)), make(copy.deepcopy(name))
    x = inputs()
    whole.backward(losses_of(whole, x))
    for i, batch in enumerate(x.split(4)):
        losses = {task: value / 4 for task, value in losses_of(parts, batch).items()}
        parts.accumulate(losses) if i < 3 else parts.backward(losses)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_accumulation_projects_once():
    """PCGrad of the summed gradients, not the sum of projected gradients."""
    at_once, parts, separate = make("pcgrad"), make("pcgrad"), make("pcgrad")
    x = inputs()
    at_once.backward(losses_of(at_once, x))
    first, second = x.split(8)
    parts.accumulate({k: v / 2 for k, v in losses_of(parts, first).items()})
    assert all(p.grad is None for p in parts.trunk.parameters())
    parts.backward({k: v / 2 for k, v in losses_of(parts, second).items()})
    for batch in (first, second):
        separate.backward({k: v / 2 for k, v in losses_of(separate, batch).items()})
    grads = [torch.cat([p.grad.flatten() for p in m.trunk.parameters()])
             for m in (at_once, parts, separate)]  # fmt: skip
    torch.testing.assert_close(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_grad_accumulates_until_zero_grad():
    model = make()
    for _ in range(2):
        model.backward(losses_of(model, inputs()))
    trunk, heads = by_hand(model, inputs())
    doubled = {k: [2 * g for g in v] for k, v in heads.items()}
    check(model, trunk, doubled, [2 / 3] * 3)


@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("own", [False, True])
def test_missing_tasks_are_left_out(surgery, own):
    model = make(surgery)
    x = {k: OWN[k] for k in "ac"} if own else inputs()
    trunk, heads = by_hand(model, x, "ac")
    model.backward(losses_of(model, x, "ac"))
    assert all(p.grad is None for p in model.heads["b"].parameters())
    if surgery == "none":
        check(model, trunk, heads, [1 / 2, 1 / 2])
    if model.rotation is not None:
        assert torch.equal(model.rotation[0, 1], torch.eye(D).double())


@pytest.mark.parametrize("surgery", SURGERIES)
def test_frozen_parameters_are_ignored(surgery):
    model = make(surgery)
    frozen = [*model.trunk[0].parameters(), *model.heads["c"][0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.backward(losses_of(model, inputs()))
    assert all(p.grad is None for p in frozen)
    assert model.trunk[2].weight.grad is not None and model.heads["c"][2].weight.grad is not None
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(False)
    model.zero_grad()
    model.accumulate(losses_of(model, inputs()))
    model.backward(losses_of(model, inputs()))  # only the heads
    assert model.trunk[2].weight.grad is None and model.heads["a"].weight.grad is not None


@pytest.mark.parametrize("surgery", SURGERIES)
def test_any_optimiser_works(surgery):
    model, x = make(surgery), inputs()
    optimizer = torch.optim.SGD([*model.trunk.parameters(), *model.heads.parameters()], lr=0.02 / 3)
    before = losses_of(model, x)
    for _ in range(100):
        losses = losses_of(model, x)
        model.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(lambda: losses_of(model, x))
    after = losses_of(model, x)
    assert sum((after[k] / before[k]).item() for k in "abc") / 3 < 0.7


def test_autocast_computes_in_bf16_and_weighs_in_float32():
    seen = []

    class Spy(PCGrad):
        def weights(self, gramian, generator):
            seen.append(gramian)
            return super().weights(gramian, generator)

    model, x = make(Spy(), torch.float32), inputs(dtype=torch.float32)
    exact = make("pcgrad", torch.float32)
    exact.backward(losses_of(exact, x))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
        assert outputs["a"].dtype == torch.bfloat16
        model.backward({task: loss(task, outputs[task].float()) for task in "abc"})
    assert seen[0].dtype == torch.float32
    rows = (seen[0] * 256).round() / 256
    assert not torch.equal(rows.bfloat16().float(), seen[0])  # it has more than eight bits
    for a, b in zip(exact.parameters(), model.parameters(), strict=True):
        assert b.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm()


@pytest.mark.parametrize("surgery", ["rotograd", "rotograd-rotate"])
def test_rotations_change_and_are_saved_with_the_model(surgery, tmp_path):
    model, x = make(surgery), inputs()
    for _ in range(3):
        model.backward(losses_of(model, x))
    assert (model.rotation[0] - torch.eye(D)).abs().amax((1, 2)).min() > 1e-5
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make(surgery)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for task, output in model(x).items():
        assert torch.equal(output, other(x)[task])
        plain = model.heads[task](model.trunk(x))
        assert not torch.allclose(output, plain)
    with pytest.raises(
        UsageError, match=r"rotation_size: expected at most n_features \(6\), got 7"
    ):
        make(f"{surgery}(rotation_size=7)")
    with pytest.raises(UsageError, match="n_features: expected"):
        MultiTaskModel(nn.Linear(2, 2), {"a": nn.Linear(2, 1)}, "rotograd")


def test_evaluation_has_no_side_effects():
    model = make()
    with torch.no_grad():
        outputs = model.eval()(inputs())
    with pytest.raises(ValueError, match="expected a loss that depends on the model"):
        model.backward({"a": outputs["a"].sum()})


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda o: {}, "expected the loss of at least one task, got none"),
        (lambda o: {"d": o["a"].sum()}, "losses: unknown 'd'"),
        (lambda o: {"b": o["b"]}, r"expected a scalar tensor for 'b', got shape \(16, 3\)"),
        (lambda o: {"a": o["a"].sum(), "b": None}, "a scalar tensor for 'b', got None; leave out"),
        (lambda o: {"a": o["a"].sum(), "b": 0.0}, r"expected a scalar tensor for 'b', got 0\.0"),
        (lambda o: [o["a"].sum()], "a dictionary with the loss of each task, got list"),
        (lambda o: o["a"].sum(), "a dictionary with the loss of each task, got Tensor"),
        (lambda o: {"a": torch.zeros((), requires_grad=True) * 1}, "'a' to depend on its head"),
    ],
)
def test_wrong_losses_are_named(losses, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model.backward(losses(model(inputs())))
    assert all(p.grad is None for p in model.parameters())
    model.backward(losses_of(model, inputs()))  # training continues


def test_a_function_from_gramian_to_weights_is_a_method():
    """As in the manual: inverse squared norms; the trunk gets T Σ w_k g_k."""
    model, x = make(lambda gramian: 1 / gramian.diagonal()), inputs()
    trunk, _ = by_hand(model, x)
    done = model.backward(losses_of(model, x))
    weights = {task: 3 / sum(g.square().sum() for g in trunk[task]) for task in "abc"}
    torch.testing.assert_close(done.weights, weights)
    for number, p in enumerate(model.trunk.parameters()):
        torch.testing.assert_close(p.grad, sum(weights[t] * trunk[t][number] for t in "abc"))


@pytest.mark.parametrize("wrong", [Fixed, None, 3])
def test_what_is_no_method_is_named(wrong):
    with pytest.raises(UsageError, match="surgery: expected a name, an object of a Surgery class"):
        make(wrong)


@pytest.mark.parametrize(
    ("weights", "shown"),
    [
        (torch.ones(()), r"\(\)"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(1, 1), r"\(1, 1\)"),
        (torch.ones(1, 3, 3), r"\(1, 3, 3\)"),
        ([1, 1, 1], "list"),
    ],
)
def test_weights_of_another_shape_are_an_error(weights, shown):
    class Wrong(GramianSurgery):
        def weights(self, gramian, generator):
            return weights

    model = make(Wrong())
    expected = r"weights of shape \(1, 3\) for a Gramian of shape \(1, 3, 3\)"
    with pytest.raises(UsageError, match=f"{expected}, got {shown} from Wrong$"):
        model.backward(losses_of(model, inputs()))


def test_a_trunk_must_return_tensors():
    class Text(nn.Module):
        def forward(self, x):
            return "z"

    with pytest.raises(ValueError, match=r"expected a tensor of features, .* got str"):
        MultiTaskModel(Text(), {"a": nn.Linear(4, 1)})(inputs())


def test_surgery_needs_no_reinforcement_learning():
    code = (
        "import sys, mtrl.surgery\n"
        "rl = {'gymnasium', 'mujoco', 'metaworld', 'stable_baselines3'} & set(sys.modules)\n"
        "assert not rl, rl"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rotations_are_orthonormalised_at_intervals(monkeypatch):
    monkeypatch.setattr("mtrl.surgery.surgeon.MAINTAIN_EVERY", 3)
    heads = {"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)}
    model = MultiTaskModel(nn.Linear(2, 4), heads, "rotograd", n_features=4)
    model.rotation.mul_(1.01)
    for _ in range(3):
        before = (model.rotation.mT @ model.rotation - torch.eye(4)).abs().max()
        model.backward({task: output.mean() for task, output in model(torch.ones(5, 2)).items()})
    after = (model.rotation.mT @ model.rotation - torch.eye(4)).abs().max()
    assert before > 1e-2 and after < 1e-3


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([nn.Linear(D, 1)], "a dictionary from each task's name to its module, got list"),
        ({}, "a dictionary from each task's name to its module, got none"),
        ({0: nn.Linear(D, 1)}, "heads: expected text and a torch.nn.Module, got 0: Linear"),
        ({"a": torch.relu}, "heads: expected text and a torch.nn.Module, got 'a': <built-in"),
    ],
)
def test_what_are_no_heads_is_named(heads, message):
    with pytest.raises(UsageError, match=message):
        MultiTaskModel(nn.Linear(4, D), heads)


def test_a_trunk_must_be_a_module():
    with pytest.raises(UsageError, match=r"trunk: expected a torch\.nn\.Module, got <built-in"):
        MultiTaskModel(torch.relu, {"a": nn.Linear(D, 1)})


@pytest.mark.parametrize("width", [D - 1, D + 1])
def test_rotations_of_another_width_are_an_error(width):
    model = MultiTaskModel(nn.Linear(4, D), {"a": nn.Linear(D, 1)}, "rotograd", n_features=width)
    with pytest.raises(UsageError, match=rf"expected {D}, the trunk's output width, got {width}"):
        model(torch.randn(16, 4))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda o: {"a": o["a"].mean()}, "the tasks of the last backward, got none of 'b'"),
        (lambda o: {"a": o["a"], "b": o["b"].mean()}, "expected a scalar tensor for 'a'"),
    ],
)
def test_losses_after_a_step_are_those_of_its_tasks(after, message):
    """FAMO learned from the losses of one task for both."""
    model, expected, x = make("famo"), make("famo"), inputs()
    for one in (model, expected):
        one.backward(losses_of(one, x, "ab"))
        torch.optim.SGD(one.parameters(), 0.01).step()
    with pytest.raises(ValueError, match=message):
        model.after_step(lambda: after(model(x)))
    model.after_step(lambda: losses_of(model, x, "abc"))  # those of c are not used
    expected.after_step(lambda: losses_of(expected, x, "ab"))
    assert torch.equal(model.surgery.logits, expected.surgery.logits)
    assert (expected.surgery.logits[0, :2] != 0).all()


def test_a_method_learns_nothing_before_the_first_step():
    model = make("famo")
    before = copy.deepcopy(model.surgery.state_dict())
    model.after_step(lambda: losses_of(model, inputs()))
    for name, value in model.surgery.state_dict().items():
        assert torch.equal(before[name], value), name
