"""`backward()` through users' graphs, against autograd and flat vectors in float64."""

import copy
import gc
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint
from weights_apart import Fixed

from mtrl.errors import UsageError
from mtrl.surgery import GramianSurgery, MultiTaskModel, available, get_surgery
from mtrl.surgery.graph import splits_below

pytestmark = pytest.mark.usefixtures("float64")

TASKS = "abc"
D = 6
METHODS = [name for name in available() if name not in ("first-task-only",)]
GRAMIAN = [name for name in METHODS if isinstance(get_surgery(name), GramianSurgery)]
ON_LOSSES = ["famo", "gradnorm"]


class Plain(nn.Module):
    """The same network without surgery, to compute per-task gradients by autograd."""

    def __init__(self, model):
        super().__init__()
        self.trunk, self.heads = model.trunk, model.heads

    def forward(self, x):
        if isinstance(x, dict):
            return {task: self.heads[task](self.trunk(own)) for task, own in x.items()}
        z = self.trunk(x)
        return {task: head(z) for task, head in self.heads.items()}


# ------------------------------------------------------------------------------ networks


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D))


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.first, self.rest, self.reentrant = nn.Linear(4, 8), nn.Linear(8, D), reentrant

    def forward(self, x):
        return checkpoint(self._all, x, use_reentrant=self.reentrant)

    def _all(self, x):
        return self.rest(self.first(x).tanh())


class Reparametrised(nn.Module):
    """w = base + delta, so that both get the same gradient."""

    def __init__(self):
        super().__init__()
        self.base, self.delta = (nn.Parameter(0.3 * torch.randn(D, 4)) for _ in range(2))

    def forward(self, x):
        return (x @ (self.base + self.delta).T).tanh()


class BasicBlock(nn.Module):
    """A block as in torchvision's ResNets."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def resnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Upsample(scale_factor=4),
        BasicBlock(1, 3, 2),
        BasicBlock(3, D, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, D, batch_first=True)

    def forward(self, x):
        return self.lstm(x[..., None])[0][:, -1]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Linear(1, D), nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        return self.encoder(self.embed(x[..., None])).mean(1)


class Embedding(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.table = nn.EmbeddingBag(5, D, mode="sum", sparse=sparse)

    def forward(self, x):
        return self.table((x > 0).long() + torch.arange(4) % 4).tanh()


class Table(nn.Module):
    """A parameter that is the features for any input."""

    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(torch.randn(12, D))

    def forward(self, x):
        return self.z


TRUNKS = {
    "table": Table,
    "mlp": mlp,
    "checkpointed": Checkpointed,
    "reparametrised": Reparametrised,
    "resnet": resnet,
    "lstm": Recurrent,
    "transformer": Encoder,
    "embedding": Embedding,
}


def make(surgery="none", trunk=mlp, **more):
    torch.manual_seed(0)
    heads = {task: nn.Linear(D, 2) for task in TASKS}
    return MultiTaskModel(trunk(), heads, surgery, n_features=D, **more)


def batch(seed=1, rows=12):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def losses(outputs, tasks=TASKS):
    """Return losses of different scales and signs, so that there are conflicts."""
    scales = {"a": 1.0, "b": 3.0, "c": 0.3}
    return {t: scales[t] * (outputs[t] - (-2) ** ord(t) % 5 + 2).square().mean() for t in tasks}


# --------------------------------------------------- what users write, as per-task losses


def shared_input(model):
    return losses(model(batch()))


def own_inputs(model):
    return losses(model({"a": batch(1), "b": batch(2, 5), "c": batch(3, 9)}))


def one_after_the_other(model):
    """Three tasks in three calls."""
    outputs = {}
    for seed, task in enumerate(TASKS):
        outputs |= model({task: batch(seed)})
    return losses(outputs)


def siamese(model):
    """Two forward passes of all tasks with a consistency loss."""
    first, second = model(batch(1)), model(batch(2))
    found = losses(first)
    return {t: found[t] + (first[t] - second[t]).square().mean() for t in TASKS}


def without_b(model):
    return losses(model(batch()), "ac")


USES = [shared_input, own_inputs, one_after_the_other, siamese, without_b]


GRAPHS = [
    pytest.param(trunk, use, id=f"{trunk}-{use.__name__}")
    for trunk in TRUNKS
    for use in USES
    if trunk != "resnet" or use not in (own_inputs, one_after_the_other)  # see test_batch_norm
]


def gradients(model):
    return {name: None if p.grad is None else p.grad for name, p in model.named_parameters()}


def by_autograd(model, loss):
    """Return the gradients of all parameters of a copy without surgery."""
    plain = Plain(copy.deepcopy(model))
    plain.zero_grad()
    loss(plain).backward()
    return gradients(plain)


def rows_of(model, use):
    """Return each task's flat trunk gradient by autograd, and the losses."""
    plain = Plain(copy.deepcopy(model))
    found = use(plain)
    parameters = list(plain.trunk.parameters())
    rows = {}
    for task, loss in found.items():
        gs = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gs)]  # noqa: B905
        rows[task] = torch.cat([g.to_dense().flatten() for g in filled])
    return rows, {task: loss.detach() for task, loss in found.items()}


def on_trunk(model):
    return torch.cat([p.grad.to_dense().flatten() for p in model.trunk.parameters()])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-10)


def same(model, expected):
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            close(found[name], value)


@pytest.mark.parametrize(("trunk", "use"), GRAPHS)
def test_without_surgery_gradients_equal_autograd(trunk, use):
    model = make("none", TRUNKS[trunk])
    expected = by_autograd(model, lambda m: sum(use(m).values()))
    sum(use(model).values()).backward()
    same(model, expected)


@pytest.mark.parametrize(("trunk", "use"), GRAPHS)
def test_weights_multiply_flat_gradients(trunk, use):
    model = make(Fixed(), TRUNKS[trunk])
    expected = by_autograd(model, lambda m: sum(use(m).values()))
    rows, _ = rows_of(model, use)
    sum(use(model).values()).backward()
    stacked = torch.stack(list(rows.values()))
    weights = len(rows) * torch.arange(1, 1 + len(rows)) / 4
    close(on_trunk(model), weights.to(stacked) @ stacked)
    close(model.last.gramian, stacked @ stacked.T)
    heads = {name: value for name, value in expected.items() if name.startswith("heads")}
    assert heads
    for name, value in heads.items():
        found = gradients(model)[name]
        assert (found is None) == (value is None)
        if value is not None:
            close(found, value)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("method", GRAMIAN)
def test_methods_weigh_as_on_flat_gradients(method, use):
    model = make(method, seed=3)
    rows, _ = rows_of(model, use)
    stacked = torch.stack(list(rows.values()))
    generator = torch.Generator().manual_seed(3)
    weights = copy.deepcopy(model.surgery).weights((stacked @ stacked.T)[None], generator)[0]
    sum(use(model).values()).backward()
    close(on_trunk(model), len(rows) * weights @ stacked)


@pytest.mark.parametrize("use", [shared_input, own_inputs, without_b], ids=lambda u: u.__name__)
@pytest.mark.parametrize("method", sorted(set(METHODS) - set(GRAMIAN) - {"none"}))
def test_feature_methods_weigh_as_on_flat_gradients(method, use):
    model = make(method)
    plain = Plain(copy.deepcopy(model))
    found = use(Recorder := _Recorder(plain))
    norms = {
        task: torch.autograd.grad(loss, Recorder.z[task], retain_graph=True)[0].norm()
        for task, loss in found.items()
    }
    rows, values = rows_of(model, use)
    tasks = [TASKS.index(task) for task in found]
    reference = copy.deepcopy(model.surgery)
    if method in ON_LOSSES:
        evidence = type("Found", (), {
            "losses": torch.stack(list(values.values()))[None],
            "norms": torch.stack(list(norms.values()))[None],
        })  # fmt: skip
        weights = reference.weights(tasks, evidence)[0]
    else:
        weights = reference.weights(tasks, torch.stack(list(norms.values()))[None])[0]
    model.backward(use(model))
    close(on_trunk(model), len(rows) * weights @ torch.stack(list(rows.values())))


class _Recorder:
    """Records the inputs of each task's head."""

    def __init__(self, plain):
        self.plain, self.z = plain, {}

    def __call__(self, x):
        outputs = {}
        for task, head in self.plain.heads.items():
            if isinstance(x, dict) and task not in x:
                continue
            z = self.plain.trunk(x[task] if isinstance(x, dict) else x).detach().requires_grad_()
            self.z[task] = z
            outputs[task] = head(z)
        return outputs


# ----------------------------------------------------------------- the rest of the graph


@pytest.mark.parametrize("surgery", ["none", "pcgrad", "rotograd-scale"])
def test_the_rest_of_the_graph_equals_autograd(surgery):
    """An encoder in front, an L2 term, learned loss weights, another loss on the encoder."""
    encoder, log_scale = nn.Linear(4, 4), nn.Parameter(torch.zeros(3))

    def loss(model, encoder, log_scale):
        h = encoder(batch())
        found = torch.stack(list(losses(model(h)).values()))
        l2 = sum(p.square().sum() for p in model.trunk.parameters())
        return (found * log_scale.exp()).sum() + 0.1 * l2 + h.square().mean() - log_scale.sum()

    model = make(surgery)
    plain, front, scales = copy.deepcopy((Plain(model), encoder, log_scale))
    loss(plain, front, scales).backward()
    loss(model, encoder, log_scale).backward()
    close(log_scale.grad, scales.grad)
    if surgery == "none":
        close(encoder.weight.grad, front.weight.grad)
        close(on_trunk(model), on_trunk(plain))
        return
    # Σ w_k g_k through the trunk into the encoder, plus the other losses.
    weights = {task: weight.item() for task, weight in model.last.weights.items()}
    assert any(abs(weight - 1) > 1e-3 for weight in weights.values())
    plain.zero_grad()
    front.zero_grad()
    scales.grad = None
    h = front(batch())
    z = plain.trunk(h)
    total = sum(
        weights[task] * value
        for task, value in losses({t: plain.heads[t](z) for t in TASKS}).items()
    )
    l2 = sum(p.square().sum() for p in plain.trunk.parameters())
    (total + 0.1 * l2 + h.square().mean()).backward()
    close(on_trunk(model), on_trunk(plain))
    close(encoder.weight.grad, front.weight.grad)


def test_a_loss_on_two_tasks_outputs_belongs_to_its_task():
    def use(model):
        outputs = model(batch())
        found = losses(outputs)
        return found | {"a": found["a"] + (outputs["a"] * outputs["b"]).mean()}

    model = make(Fixed())
    rows, _ = rows_of(model, use)
    stacked = torch.stack(list(rows.values()))
    heads = by_autograd(model, lambda m: sum(use(m).values()))
    for scale in (1.0, 512.0):  # as from a GradScaler
        model.zero_grad()
        (scale * model.total(use(model))).backward()
        close(model.last.gramian, scale**2 * stacked @ stacked.T)
        close(on_trunk(model), scale * 3 * torch.tensor([1, 2, 3.0]) / 4 @ stacked)
        close(model.heads["b"].weight.grad, scale * heads["heads.b.weight"])


def test_heads_may_share_a_part():
    shared = nn.Linear(D, 3)
    model = make("none")
    for task in "ab":
        model.heads[task] = nn.Sequential(shared, nn.Linear(3, 2))
    expected = by_autograd(model, lambda m: sum(losses(m(batch())).values()))
    sum(losses(model(batch())).values()).backward()
    same(model, expected)


class Trees(nn.Module):
    """Several feature tensors, and a value that is not a tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, D), nn.Linear(4, D)

    def forward(self, x):
        a, b, mask = self.a(x).tanh(), self.b(x).tanh(), x[:, :1] > 0
        if self.kind is tuple:
            return a, (b, mask)
        return self.kind(a=a, b=b, mask=mask, n=None)


@dataclass(frozen=True)
class Fields:
    a: torch.Tensor
    b: torch.Tensor
    mask: torch.Tensor
    n: None

    def __getitem__(self, name):
        return getattr(self, name)


class Named(dict):
    """A dictionary that torch's trees do not know."""


def in_a_list(**parts):
    """A dataclass beside a tensor; torch's trees take it for a constant."""
    return [Fields(**parts), parts["a"]]


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2 * D, 2)

    def forward(self, z):
        z = z[0] if isinstance(z, list) else z
        a, b, mask = (z[0], *z[1]) if isinstance(z, tuple) else (z["a"], z["b"], z["mask"])
        return self.out(torch.cat([a, b * mask], -1))


@pytest.mark.parametrize("kind", [tuple, dict, Named, Fields, in_a_list])
@pytest.mark.parametrize("surgery", ["none", "weights", "rotograd-scale"])
def test_features_may_be_several_tensors(kind, surgery):
    method = Fixed() if surgery == "weights" else surgery
    model = MultiTaskModel(Trees(kind), {task: Mixing() for task in TASKS}, method)
    rows, _ = rows_of(model, shared_input)
    sum(shared_input(model).values()).backward()
    weights = torch.stack(list(model.last.weights.values())) if model.last else torch.ones(3)
    close(on_trunk(model), weights.to(torch.float64) @ torch.stack(list(rows.values())))


def test_features_of_one_task_are_not_those_of_another():
    """A head may change the object that it gets."""

    class Emptying(nn.Linear):
        def forward(self, z):
            return super().forward(z.pop("a"))

    class Trunk(nn.Linear):
        def forward(self, x):
            return Named(a=super().forward(x))

    model = MultiTaskModel(Trunk(4, D), {task: Emptying(D, 2) for task in TASKS}, "none")
    z = model.trunk(batch())["a"]
    for task, output in model(batch()).items():
        close(output, nn.functional.linear(z, *model.heads[task].parameters()))


def test_rotations_need_one_feature_tensor():
    model = MultiTaskModel(Trees(tuple), {"a": Mixing()}, "rotograd", n_features=D)
    with pytest.raises(ValueError, match="expected one tensor of features for rotations, got 2"):
        model(batch())


def test_keywords_are_passed_to_the_trunk():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, D)

        def forward(self, values, mask=None):
            return self.layer(values if mask is None else values * mask)

    model = make("none", Named)
    x, mask = batch(), batch(5) > 0
    assert torch.equal(model(values=x, mask=mask)["a"], model(x * mask)["a"])
    assert torch.equal(model({"a": {"values": x, "mask": mask}})["a"], model(x * mask)["a"])


def test_only_used_parameters_have_a_gradient():
    """An adapter counts as zero for a task that skips it; an unused layer has no gradient."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter, self.spare = (nn.Linear(4, 4) for _ in range(3))
            self.base.requires_grad_(False)

        def forward(self, x, adapt=True):
            z = self.base(x).tanh()
            return self.adapter(z) if adapt else z

    heads = {task: nn.Linear(4, 2) for task in TASKS}
    model = MultiTaskModel(Adapted(), heads, Fixed())
    inputs = {t: {"x": batch(i), "adapt": t != "b"} for i, t in enumerate(TASKS)}
    found = losses(model(inputs))
    (expected,) = torch.autograd.grad(
        sum(w * losses({t: model.heads[t](model.trunk(**inputs[t])) for t in TASKS})[t]
            for w, t in ((2 * 1 / 4, "a"), (2 * 2 / 4, "c"))),
        [model.trunk.adapter.weight],
    )  # fmt: skip
    sum(found.values()).backward()
    # Task b's features need no gradient, so it is left out of this step of surgery.
    assert list(model.last.weights) == ["a", "c"]
    close(model.trunk.adapter.weight.grad, expected)
    assert model.trunk.base.weight.grad is None and model.trunk.spare.weight.grad is None
    assert model.heads["b"].weight.grad is not None


def test_gradients_of_unused_parameters_are_zero():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.extra = nn.Linear(4, D), nn.Linear(4, D)

        def forward(self, x, extra=True):
            return self.base(x) + (self.extra(x) if extra else 0)

    model = make(Fixed(), Gated)

    def use(m):
        outputs = {t: m.heads[t](m.trunk(batch(i), t == "a")) for i, t in enumerate(TASKS)}
        return losses(outputs)

    plain = copy.deepcopy(model)
    stacked = []
    for loss in use(plain).values():
        gs = torch.autograd.grad(loss, list(plain.trunk.parameters()), allow_unused=True)
        stacked.append(torch.cat([
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(plain.trunk.parameters(), gs, strict=True)
        ]))  # fmt: skip
    outputs = model({t: {"x": batch(i), "extra": t == "a"} for i, t in enumerate(TASKS)})
    sum(losses(outputs).values()).backward()
    close(on_trunk(model), 3 * torch.tensor([1, 2, 3.0]) / 4 @ torch.stack(stacked))


# ------------------------------------------------------------- how gradients are handled


@pytest.mark.parametrize("surgery", ["pcgrad", "rotograd-scale", "none"])
def test_gradients_do_not_share_memory(surgery):
    model = make(surgery, Reparametrised)
    sum(shared_input(model).values()).backward()
    before = model.trunk.base.grad.clone()
    model.trunk.base.grad.mul_(0.5)
    close(model.trunk.delta.grad, before)


def test_hooks_of_parameters_run_once():
    model, calls = make("pcgrad"), []
    expected = make("pcgrad")
    sum(shared_input(expected).values()).backward()
    for parameter in model.trunk.parameters():
        parameter.register_hook(lambda g: calls.append(1) or 2 * g)
    sum(shared_input(model).values()).backward()
    assert len(calls) == 4
    close(on_trunk(model), 2 * on_trunk(expected))


def test_gradients_accumulate_and_graphs_may_be_retained():
    model = make("mgda")
    total = sum(shared_input(model).values())
    total.backward(retain_graph=True)
    once = on_trunk(model)
    total.backward()
    close(on_trunk(model), 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("surgery", ["none", "mgda", "rotograd-scale"])
def test_parameters_may_be_frozen_after_the_forward(surgery):
    model, expected = make(surgery), make(surgery)
    expected.trunk[0].requires_grad_(False)
    sum(shared_input(expected).values()).backward()
    losses = shared_input(model)
    model.trunk[0].requires_grad_(False)
    sum(losses.values()).backward()
    assert model.trunk[0].weight.grad is None
    close(model.trunk[2].weight.grad, expected.trunk[2].weight.grad)


def test_torch_autograd_grad_is_the_same():
    model = make("mgda")
    sum(shared_input(model).values()).backward()
    found = torch.autograd.grad(sum(shared_input(model).values()), list(model.trunk.parameters()))
    close(torch.cat([g.flatten() for g in found]), on_trunk(model))


def test_a_single_loss_gives_its_own_gradient():
    model = make("pcgrad")
    rows, _ = rows_of(model, shared_input)
    shared_input(model)["b"].backward()
    close(on_trunk(model), rows["b"])


def test_a_failed_backward_leaves_no_state():
    model = make("mgda")
    expected = make("mgda")
    sum(shared_input(expected).values()).backward()
    outputs = model(batch())
    outputs["a"].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sum(losses(outputs).values()).backward()
    model.zero_grad()
    sum(shared_input(model).values()).backward()
    close(on_trunk(model), on_trunk(expected))


def test_nested_passes_are_rejected():
    model = make("pcgrad")

    def loss():
        first = model(batch())
        return sum(losses(model(torch.cat([first["a"], first["b"]], 1))).values())

    with pytest.raises(UsageError, match="expected independent forward passes"):
        loss().backward()
    bare = MultiTaskModel(nn.Linear(4, 4), {task: nn.Identity() for task in TASKS}, "pcgrad")
    with pytest.raises(UsageError, match="expected independent forward passes"):
        sum(losses(bare(bare(batch())["a"])).values()).backward()
    model = make("none")
    expected = by_autograd(model, lambda m: sum(
        losses(m(torch.cat([(first := m(batch()))["a"], first["b"]], 1))).values()
    ))  # fmt: skip
    first = model(batch())
    sum(losses(model(torch.cat([first["a"], first["b"]], 1))).values()).backward()
    same(model, expected)


@pytest.mark.parametrize("surgery", ["none", "pcgrad", "rotograd-scale"])
def test_losses_with_derivatives_of_outputs(surgery):
    """Of ∂²u/∂x², as in the residual of a differential equation, by autograd; or refused."""

    def loss(model):
        x = batch().requires_grad_()
        outputs = model(x)
        (slope,) = torch.autograd.grad(outputs["a"].sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (second - 1).square().mean() + slope.square().mean() + outputs["b"].square().mean()

    model = make(surgery)
    if surgery != "none":
        with pytest.raises(UsageError, match=r"derivatives of outputs .* with surgery 'none' only"):
            loss(model)
        sum(shared_input(model).values()).backward()  # training continues
        return
    expected = by_autograd(model, loss)
    loss(model).backward()
    same(model, expected)
    assert on_trunk(model).norm() > 0


def test_reentrant_checkpointing_is_rejected_if_trunk_gradients_are_needed():
    model = make("pcgrad", lambda: Checkpointed(reentrant=True))
    x = batch().requires_grad_()
    with pytest.raises(UsageError, match="use_reentrant=False"):
        sum(losses(model(x)).values()).backward()
    model = make("rotograd-scale", lambda: Checkpointed(reentrant=True))
    expected = make("rotograd-scale", Checkpointed)
    for m in (model, expected):
        sum(losses(m(batch().requires_grad_())).values()).backward()
    close(on_trunk(model), on_trunk(expected))


# ------------------------------------------------------------------- kinds of parameters


@pytest.mark.parametrize("surgery", METHODS)
def test_half_floats(surgery):
    torch.set_default_dtype(torch.float32)
    model = make(surgery).bfloat16()
    for buffer in [*model.surgery.buffers(), *model.rotations()]:
        assert buffer.dtype in (torch.float32, torch.int64)
    x = batch().bfloat16()
    for _ in range(2):
        model.backward(losses(model(x)))
        model.after_step(lambda: losses(model(x)))
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all()
               for p in model.trunk.parameters())  # fmt: skip


def test_complex_parameters_count_as_two_numbers():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, D, dtype=torch.complex128))

        def forward(self, x):
            z = x.to(torch.complex128) @ self.weight
            return z.real * z.imag

    model = make("mgda", Complex)
    plain = Plain(copy.deepcopy(model))
    parts = [torch.autograd.grad(loss, [plain.trunk.weight])[0] for loss in
             (losses(plain(batch()))[t] for t in TASKS)]  # fmt: skip
    stacked = torch.stack([torch.view_as_real(g).flatten() for g in parts])
    weights = model.surgery.weights((stacked @ stacked.T)[None], torch.Generator())[0]
    sum(shared_input(model).values()).backward()
    close(torch.view_as_real(model.trunk.weight.grad).flatten(), 3 * weights @ stacked)


def test_sparse_gradients_stay_sparse():
    dense, sparse = make("pcgrad", Embedding), make("pcgrad", lambda: Embedding(sparse=True))
    for model in (dense, sparse):
        sum(shared_input(model).values()).backward()
    assert sparse.trunk.table.weight.grad.is_sparse
    close(sparse.trunk.table.weight.grad.to_dense(), dense.trunk.table.weight.grad)


# --------------------------------------------------------------------------- names, state


def test_tasks_may_be_called_anything():
    names = ["type", "values", "train", "to", "v1.0", "v1_0", ""]
    model = MultiTaskModel(mlp(), {name: nn.Linear(D, 1) for name in names}, "pcgrad")
    outputs = model(batch())
    assert list(outputs) == names
    model.backward({name: output.square().mean() for name, output in outputs.items()})
    assert all(p.grad is not None for p in model.parameters())
    other = MultiTaskModel(mlp(), {name: nn.Linear(D, 1) for name in names})
    other.load_state_dict(model.state_dict(), strict=False)
    for name in names:
        assert torch.equal(other(batch())[name], outputs[name])
    model.train().to(torch.float32)


@pytest.mark.parametrize("surgery", ["none", "pcgrad", "rotograd"])
def test_a_model_is_copied_and_pickled_with_a_graph_alive(surgery, tmp_path):
    model = make(surgery)
    sum(losses(model(batch())).values()).backward()
    outputs = model(batch())
    other = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    third = torch.load(tmp_path / "model.pt", weights_only=False)
    sum(losses(outputs).values()).backward()
    for again in (other, third):
        again.zero_grad()
        sum(losses(again(batch())).values()).backward()
    assert torch.equal(on_trunk(other), on_trunk(third))


def test_heads_that_modify_their_input_get_a_copy():
    torch.manual_seed(0)
    heads = {t: nn.Sequential(nn.ReLU(inplace=t == "a"), nn.Linear(D, 2)) for t in TASKS}
    model = MultiTaskModel(mlp(), heads, "none")
    plain = copy.deepcopy(model)
    plain.heads["a"][0].inplace = False
    expected = by_autograd(plain, lambda m: sum(losses(m(batch())).values()))
    sum(losses(model(batch())).values()).backward()
    same(model, expected)
    with torch.no_grad():
        for task, output in Plain(plain)(batch()).items():
            assert torch.equal(model(batch())[task], output)


def test_a_constant_loss_is_ignored():
    model = make("gradnorm")
    found = shared_input(model)
    model.backward(found | {"b": torch.tensor(0.0)})
    assert list(model.last.weights) == ["a", "c"]
    assert model.surgery.initial_losses[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("method", ON_LOSSES)
def test_methods_that_need_losses_ask_for_them(method):
    model = make(method)
    with pytest.raises(UsageError, match=r"call model\.backward\(losses\), or model\.total"):
        sum(shared_input(model).values()).backward()
    model.zero_grad()
    model.total(shared_input(model)).backward()
    assert model.trunk[0].weight.grad is not None


@pytest.mark.parametrize("method", ON_LOSSES)
def test_losses_of_a_failed_backward_are_forgotten(method):
    model = make(method)
    losses = shared_input(model)
    losses["a"].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.backward(losses)
    with pytest.raises(UsageError, match="expected the losses"):
        sum(shared_input(model).values()).backward()


@pytest.mark.parametrize("method", ON_LOSSES)
def test_two_totals_in_one_backward_are_one(method):
    model, expected = make(method), make(method)
    expected.backward(shared_input(expected))
    losses = shared_input(model)
    first = {"a": losses.pop("a")}
    (model.total(first) + model.total(losses)).backward()
    close(on_trunk(model), on_trunk(expected))
    for name, buffer in model.surgery.named_buffers():
        close(buffer, expected.surgery.get_buffer(name))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_learns_after_the_step_warns_once(method):
    def train(after):
        model = make(method)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(25):
                model.backward(shared_input(model))
                if after:
                    model.after_step(lambda: shared_input(model))
        return [str(w.message) for w in seen if "after_step" in str(w.message)]

    assert train(after=True) == []
    found = train(after=False)
    assert len(found) == (method == "famo")
    assert not found or "expected model.after_step(losses) after each optimiser step" in found[0]


def test_batch_norm():
    """A joint forward has one batch's statistics; separate inputs do not."""
    model = make("pcgrad", resnet)
    with pytest.raises(UsageError, match=r"with batch statistics, got '2.bn1'"):
        model({"a": batch(), "b": batch(2)})
    twin = copy.deepcopy(model.trunk)
    model(batch())
    twin(batch())
    torch.testing.assert_close(model.trunk[2].bn1.running_mean, twin[2].bn1.running_mean)
    model.eval()
    model({"a": batch(), "b": batch(2)})
    still = nn.Sequential(nn.Linear(4, D), nn.BatchNorm1d(D, track_running_stats=False)).eval()
    model = MultiTaskModel(still, {task: nn.Linear(D, 2) for task in TASKS})
    with pytest.raises(UsageError, match="batch statistics"):  # eval mode uses them too
        model({"a": batch(), "b": batch(2)})


# ------------------------------------------------------------- gradients that are not finite


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_that_is_not_finite_leaves_no_state(method, bad):
    """As in an overflow with GradScaler, the gradient is not finite and the state unchanged."""
    model, twin = make(method), make(method)
    for m in (model, twin):
        m.backward(losses(m(batch(1))))
        m.after_step(lambda m=m: losses(m(batch(1))))
    before = copy.deepcopy({**model.surgery.state_dict(), "rotation": model.rotation})
    found = losses(model(batch(2)))
    model.zero_grad()
    model.backward(found | {"b": found["b"] * bad})
    assert not on_trunk(model).isfinite().all()
    model.after_step(lambda: {t: loss * bad for t, loss in losses(model(batch(2))).items()})
    after = {**model.surgery.state_dict(), "rotation": model.rotation}
    for name, value in before.items():
        if name != "before":  # belongs to this step only
            assert value is None or torch.equal(value.nan_to_num(-1), after[name].nan_to_num(-1)), (
                name
            )
    for m in (model, twin):
        m.zero_grad()
        m.backward(losses(m(batch(3))))
        assert on_trunk(m).isfinite().all()
    if method != "pcgrad":  # pcgrad has drawn orders for the lost step
        close(on_trunk(model), on_trunk(twin))


@pytest.mark.parametrize("surgery", ["none", "pcgrad", "rotograd"])
def test_graphs_are_freed_without_the_garbage_collector(surgery):
    model = make(surgery)
    gc.disable()
    try:
        for backward in (False, True):
            outputs = model(batch())
            graph = weakref.ref(splits_below(outputs["a"])[0][0].crossing)
            if backward:
                sum(losses(outputs).values()).backward()
            del outputs
            assert graph() is None
    finally:
        gc.enable()


# ----------------------------------------------------------------------- what can be seen


@pytest.mark.parametrize("method", METHODS)
def test_cosines_are_available_with_any_method(method):
    model = make(method, watch=True)
    rows, _ = rows_of(model, shared_input)
    expected = torch.corrcoef(torch.stack(list(rows.values())))
    unit = torch.stack([row / row.norm() for row in rows.values()])
    expected = unit @ unit.T
    step = model.backward(shared_input(model))
    close(step.cosines, expected)
    assert model.last is step and list(step.weights) == list(TASKS)


def test_gradients_of_mse_losses_in_closed_form():
    """One linear layer with a single weight."""
    model = MultiTaskModel(nn.Linear(1, 1, bias=False), {k: nn.Identity() for k in "ab"}, "pcgrad")
    with torch.no_grad():
        model.trunk.weight.fill_(0.0)
    outputs = model(torch.ones(1, 1))
    loss = mse_loss(outputs["a"], torch.full((1, 1), 2.0)) + mse_loss(
        outputs["b"], torch.full((1, 1), -1.0)
    )
    loss.backward()  # −4 and 2: both are projected to zero
    close(model.trunk.weight.grad, torch.zeros(1, 1))
    close(model.last.cosines, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
