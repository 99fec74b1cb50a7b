"""Factored gradients of the layers in a graph, against flat vectors in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint
from weights_apart import Fixed

from mtrl.surgery import MultiTaskModel
from mtrl.surgery.layers import Embedding, Factored, layers_of

pytestmark = pytest.mark.usefixtures("float64")

TASKS = "abc"
B, D = 3, 5


@pytest.fixture(autouse=True)
def _small_layers(monkeypatch):
    """Factor layers of any size, and differentiate all tasks at once where nodes allow it."""
    monkeypatch.setattr("mtrl.surgery.layers.WORTH", 0)
    monkeypatch.setattr("mtrl.surgery.modules.AT_ONCE", 2)  # test_any_graph.py goes one by one


class Function(nn.Module):
    """A trunk with these modules or parameters and a forward function."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


def wide(**more):
    return nn.Linear(40, 40, **more)


def vectors():
    return torch.randn(B, 40)


def tokens():
    return torch.randn(B, 2, 40)


def words():
    return torch.tensor([[1, 2, 2, 0], [7, 0, 1, 1], [3, 3, 3, 3]])


def pictures():
    return torch.randn(1, 20, 4, 4)


def into(end=40):
    """Return the last layer, with D features."""
    return nn.Linear(end, D)


def hooked():
    """Add hooks that change gradients."""
    first, second, last = wide(), wide(), into()
    second.register_full_backward_pre_hook(lambda module, out: (5 * out[0],))
    second.register_full_backward_hook(lambda module, into, out: (3 * into[0],))

    def forward(m, x):
        z = m.first(x)
        z.register_hook(lambda g: 2 * g)
        return m.last(m.second(z.tanh()))

    return Function(forward, first=first, second=second, last=last)


def looked_at():
    """With a hook that wants numbers, and that therefore cannot have all tasks' at once."""
    first, last = wide(), into()

    def forward(m, x):
        z = m.first(x).tanh()
        z.register_hook(lambda g: g if g.norm().item() < 0.1 else 2 * g)
        return m.last(z)

    return Function(forward, first=first, last=last)


ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(),
               nn.SELU(), nn.LeakyReLU(), nn.Softplus(), nn.Mish(), nn.Hardtanh(), nn.Hardswish(),
               nn.Dropout(0.0)]  # fmt: skip


def tied():
    """An embedding tied to the weight of a linear layer."""
    table = nn.Embedding(50, 40)
    return Function(lambda m, x: linear(m.table(x).mean(1), m.table.weight)[:, :D], table=table)


def table(rows=90, **more):
    return Function(
        lambda m, x: m.last(m.table(x).tanh().mean(1)),
        table=nn.Embedding(rows, 40, **more),
        last=into(),
    )


def convolution(**more):
    return nn.Sequential(
        nn.Conv2d(20, 40, 3, **more), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        into(),
    )  # fmt: skip


def twice(m, x):
    return m.last(m.layer(m.layer(x).tanh()))


# Each: trunk, input, number of layers except the last that are
# factored, and number of embeddings with only some rows.
GRAPHS = {
    "linear": (lambda: nn.Sequential(wide(), nn.Tanh(), wide(), nn.Tanh(), into()), vectors, 2, 0),
    "the features themselves": (wide, vectors, 1, 0),
    "no bias": (lambda: nn.Sequential(wide(bias=False), into()), vectors, 1, 0),
    "no learned bias": (
        lambda: Function(lambda m, x: m.last(linear(x, m.w, torch.ones(40))), w=weight(40, 40),
                         last=into()), vectors, 1, 0,
    ),
    "in place": (lambda: nn.Sequential(wide(), nn.ReLU(inplace=True), into()), vectors, 1, 0),
    "tokens": (
        lambda: nn.Sequential(wide(), nn.Tanh(), nn.Flatten(), nn.Linear(80, D)), tokens, 1, 0
    ),
    "tokens, no bias": (
        lambda: nn.Sequential(wide(bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(80, D)),
        tokens, 1, 0,
    ),
    "a matrix": (lambda: Function(lambda m, x: m.last(x @ m.w), w=weight(40, 40), last=into()),
                 vectors, 1, 0),
    "addmm": (
        lambda: Function(lambda m, x: m.last(torch.addmm(m.b, x, m.w, alpha=2.0, beta=3.0)),
                         w=weight(40, 40), b=weight(40), last=into()), vectors, 0, 0,
    ),
    "a bias of two dimensions": (
        lambda: Function(lambda m, x: m.last(torch.addmm(m.b, x, m.w)), w=weight(40, 40),
                         b=weight(B, 40), last=into()), vectors, 1, 0,
    ),
    "one bias for two layers": (
        lambda: Function(lambda m, x: m.last(linear(linear(x, m.w, m.b).tanh(), m.v, m.b)),
                         w=weight(40, 40), v=weight(40, 40), b=weight(40), last=into()),
        vectors, 2, 0,
    ),
    "one layer twice": (lambda: Function(twice, layer=wide(), last=into()), vectors, 0, 0),
    "one transposed weight twice": (
        lambda: Function(lambda m, x: m.last((x @ (t := m.w.t())).tanh() @ t), w=weight(40, 40),
                         last=into()), vectors, 0, 0,
    ),
    "a weight and its transpose": (
        lambda: Function(lambda m, x: m.last(linear(x, m.w).tanh() @ m.w), w=weight(40, 40),
                         last=into()), vectors, 0, 0,
    ),
    "a weight with a penalty on its output": (
        lambda: Function(lambda m, x: m.last(m.layer(x)) * m.layer.weight.square().mean(),
                         layer=wide(), last=into()), vectors, 0, 0,
    ),
    "spectral norm": (
        lambda: nn.Sequential(spectral_norm(wide()).eval(), into()), vectors, 0, 0
    ),
    "low rank": (
        lambda: Function(lambda m, x: m.last(linear(x, m.w + m.a @ m.b)), w=weight(40, 40),
                         a=weight(40, 2), b=weight(2, 40), last=into()), vectors, 0, 0,
    ),
    "a frozen layer": (
        lambda: nn.Sequential(wide().requires_grad_(False), nn.Tanh(), wide(), into()),
        vectors, 1, 0,
    ),
    "some rows of a batch": (
        lambda: Function(lambda m, x: torch.cat([m.last(m.layer(x[:2])), m.last(x[2:])]),
                         layer=wide(), last=into()), vectors, 1, 0,
    ),
    "a layer in a slice": (
        lambda: Function(lambda m, x: m.last(_put(x, m.layer(x))), layer=wide(), last=into()),
        vectors, 1, 0,
    ),
    "checkpointed": (
        lambda: Function(lambda m, x: checkpoint(lambda x: m.last(m.layer(x).tanh()), x,
                                                 use_reentrant=False),
                         layer=wide(), last=into()), vectors, 1, 0,
    ),
    "hooks": (hooked, vectors, 2, 0),
    "a hook that looks at numbers": (looked_at, vectors, 1, 0),
    "activations": (
        lambda: Function(lambda m, x: m.last(sum(f(m.layer(x)) for f in ACTIVATIONS)),
                         layer=wide(), last=into()), vectors, 0, 0,
    ),
    "an LSTM": (
        lambda: Function(lambda m, x: m.last(m.lstm(x)[0][:, -1]), last=into(),
                         lstm=nn.LSTM(40, 40, batch_first=True)), tokens, 1, 0,
    ),
    "embedding": (table, words, 0, 1),
    "embedding, padded": (lambda: table(padding_idx=0), words, 0, 1),
    "embedding, scaled": (lambda: table(scale_grad_by_freq=True), words, 0, 0),
    "embedding, sparse": (lambda: table(sparse=True), words, 0, 0),
    "embedding, small": (lambda: table(rows=9), words, 0, 0),
    "tied": (tied, words, 0, 0),
    "convolution": (convolution, pictures, 1, 0),
    "convolution, strided": (lambda: convolution(stride=2, padding=1), pictures, 1, 0),
    "convolution, dilated": (lambda: convolution(dilation=2, padding="same"), pictures, 1, 0),
    "convolution, padding by name": (lambda: convolution(padding="valid"), pictures, 1, 0),
    "convolution, no bias": (lambda: convolution(bias=False), pictures, 1, 0),
    "convolution, in groups": (lambda: convolution(groups=2), pictures, 0, 0),
    "convolution, padded in circles": (
        lambda: convolution(padding=1, padding_mode="circular", stride=2), pictures, 1, 0
    ),
    "convolution, transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(20, 40, 3, 2), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), into()), pictures, 0, 0,
    ),
    "convolution of one picture": (
        lambda: Function(lambda m, x: m.last(conv2d(x[0], m.w).mean((1, 2))[None]),
                         w=weight(40, 20, 3, 3), last=into()), pictures, 1, 0,
    ),
}  # fmt: skip


def _put(x, y):
    found = torch.zeros_like(x)
    found[:, :20] = y[:, :20]
    return found


def losses(outputs):
    scales = {"a": 1.0, "b": 3.0, "c": 0.3}
    return {t: scales[t] * (z - (-2) ** ord(t) % 5 + 2).square().mean() for t, z in outputs.items()}


def make(trunk, width, surgery=None, tasks=TASKS):
    torch.manual_seed(0)
    heads = {task: nn.Linear(width, 2) for task in tasks}
    return MultiTaskModel(trunk(), heads, surgery or Fixed())


def vectors_of(model, x):
    """Return each task's gradient of the trunk by autograd on a copy."""
    plain = copy.deepcopy(model)
    parameters = [p for p in plain.trunk.parameters() if p.requires_grad]
    rows = []
    for task in TASKS:
        loss = losses({task: plain.heads[task](plain.trunk(x))})[task]
        found = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.to_dense().flatten() for g in found]))
    return torch.stack(rows)


def on_trunk(model):
    found = [p.grad for p in model.trunk.parameters() if p.requires_grad]
    return torch.cat([g.to_dense().flatten() for g in found])


@pytest.fixture
def found(monkeypatch):
    """Records the layers that are factored."""
    seen = []

    def watched(*arguments):
        seen.append(layers_of(*arguments))
        return seen[-1]

    monkeypatch.setattr("mtrl.surgery.modules.layers_of", watched)
    return seen


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_equal_flat_vectors(name, found):
    trunk, inputs, n_factored, n_embeddings = GRAPHS[name]
    x = inputs()
    model = make(trunk, trunk()(x).shape[-1])
    stacked = vectors_of(model, x)
    weights = torch.arange(1, 4) / 4
    total = sum(losses(model(x)).values())
    for repeat in (1, 2):
        total.backward(retain_graph=repeat == 1)
        torch.testing.assert_close(model.last.gramian, stacked @ stacked.T)
        torch.testing.assert_close(on_trunk(model), repeat * 3 * weights.to(stacked) @ stacked)
    taken = [layer for layer in found[0] if len(layer.parameters[0]) != D]  # except the last
    assert sum(isinstance(layer, Factored) for layer in taken) == n_factored
    assert sum(isinstance(layer, Embedding) for layer in taken) == n_embeddings


AT_ONCE = ("linear", "no bias", "activations", "a matrix", "one layer twice", "low rank")


@pytest.mark.parametrize("name", [*AT_ONCE, "hooks", "convolution", "a hook that looks at numbers"])
def test_one_pass_for_all_tasks_where_nodes_allow_it(name):
    """Counted by a hook on the features."""
    trunk, inputs, *_ = GRAPHS[name]
    passes = []

    def forward(m, x):
        z = m.trunk(x)
        z.register_hook(lambda g: passes.append(1))
        return z

    model = make(lambda: Function(forward, trunk=trunk()), D)
    x = inputs()
    sum(losses(model(x)).values()).backward()
    at_once = 1 + 3 if name == "a hook that looks at numbers" else 1  # tried in vain
    assert len(passes) == (at_once if name in AT_ONCE or "looks" in name else 3)


def test_gradients_of_unreached_layers_are_zero(found):
    """Two features come from separate layers, and heads use one or both."""
    trunk = Function(lambda m, x: (m.p(x).tanh(), m.q(x).tanh()), p=wide(), q=wide())

    class Some(nn.Linear):
        def __init__(self, *which):
            super().__init__(40, 2)
            self.which = which

        def forward(self, z):
            return super().forward(sum(z[i] for i in self.which))

    heads = {"a": Some(0), "b": Some(1), "c": Some(0, 1)}
    model, x = MultiTaskModel(trunk, heads, Fixed()), vectors()
    stacked = torch.stack([
        torch.cat([torch.zeros(p.numel()) if g is None else g.flatten()
                   for p, g in zip(trunk.parameters(), gs, strict=True)])
        for gs in (torch.autograd.grad(losses({t: heads[t](trunk(x))})[t],
                                       list(trunk.parameters()), allow_unused=True) for t in TASKS)
    ])  # fmt: skip
    outputs = model(x)
    sum(losses(outputs).values()).backward()
    torch.testing.assert_close(model.last.gramian, stacked @ stacked.T)
    torch.testing.assert_close(on_trunk(model), 3 * torch.arange(1, 4) / 4 @ stacked)
    model.zero_grad()
    a = model(x)["a"].sum()  # on its own: the other layer has no gradient instead of zero
    a.backward()
    assert trunk.p.weight.grad is not None and trunk.q.weight.grad is None
    model.zero_grad()
    heads["c"].which = (0,)
    outputs = losses(model(x))
    (outputs["a"] + outputs["c"]).backward()
    assert trunk.p.weight.grad is not None and trunk.q.weight.grad is None
    assert found


@pytest.mark.parametrize("name", ["linear", "convolution", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype, name, found):
    trunk, inputs, *_ = GRAPHS[name]
    model = make(trunk, D)
    x = inputs()
    stacked = vectors_of(model, x)
    model.to(dtype)
    sum(losses(model(x if name == "embedding" else x.to(dtype))).values()).backward()
    assert found[0]
    gramian = stacked @ stacked.T
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    scale = gramian.diagonal().sqrt()
    assert ((model.last.gramian - gramian) / scale / scale[:, None]).abs().max() < tolerance
    assert all(p.grad.dtype == dtype for p in model.parameters())
    expected = 3 * torch.arange(1, 4) / 4 @ stacked
    assert (on_trunk(model) - expected).norm() < tolerance * expected.norm()


def test_autocast_is_left_to_autograd(found):
    torch.set_default_dtype(torch.float32)
    model = make(GRAPHS["linear"][0], D)
    x = vectors().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(losses(model(x)).values())
    loss.backward()
    assert found == [[]]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("use", ["an encoder in front", "two passes", "accumulated"])
def test_anything_other_than_one_pass_of_the_trunk_is_left_to_autograd(use, found):
    model, x = make(GRAPHS["linear"][0], D), vectors()
    if use == "an encoder in front":
        x = nn.Linear(40, 40)(x)
    if use == "two passes":
        first, second = model(x), model(-x)
        sum(losses({t: first[t] * second[t] for t in TASKS}).values()).backward()
    elif use == "accumulated":
        model.accumulate(losses(model(x)))
        model.backward(losses(model(x)))
    else:
        sum(losses(model(x)).values()).backward()
    assert found == []


def test_methods_may_ask_for_products_with_vectors():
    """As custom methods may."""
    model, x = make(GRAPHS["linear"][0], D), vectors()
    stacked = vectors_of(model, x)
    asked = []

    class Asking(Fixed):
        def forward(self, problem, generator):
            gradients = problem.task_gradients()
            direction = {name: p[None].detach() for name, p in model.trunk.named_parameters()}
            asked.extend([gradients.along(direction), gradients.products(gradients),
                          gradients.combine(torch.tensor([[1.0, 0.0, 2.0]]))])  # fmt: skip
            return super().forward(problem, generator)

    model.surgery = Asking()
    model.backward(losses(model(x)))
    flat = torch.cat([p.detach().flatten() for p in model.trunk.parameters()])
    torch.testing.assert_close(asked[0][0], stacked @ flat)
    torch.testing.assert_close(asked[1][0], stacked.square().sum(1))
    combined = torch.cat([asked[2][n].flatten() for n, _ in model.trunk.named_parameters()])
    torch.testing.assert_close(combined, stacked[0] + 2 * stacked[2])
