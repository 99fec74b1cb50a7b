"""A plain `backward()` through random graphs, against autograd in float64.

The gradient is linear in how much of each task goes on into the trunk. So a copy of the network
without surgery, whose features scale what each head sends back, has every truth: a task's own
gradient, the Gramian, and what any weights should give, for the trunk and for all around it.
"""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from mtrl.surgery import GramianSurgery, MultiTaskModel, available, get_surgery

D = 6
GRAMIAN = [name for name in available() if isinstance(get_surgery(name), GramianSurgery)]
few = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Reparametrised(nn.Linear):
    def __init__(self):
        super().__init__(D, D)
        self.delta = nn.Parameter(0.3 * torch.randn(D, D))

    def forward(self, x):
        return linear(x, self.weight + self.delta, self.bias)


OPERATIONS = {
    "linear": (lambda: nn.Linear(D, D), lambda m, x, y: m(x)),
    "in place": (lambda: nn.Linear(D, D), lambda m, x, y: m(x).relu_()),
    "no bias": (lambda: nn.Linear(D, D, bias=False), lambda m, x, y: m(x)),
    "twice": (lambda: nn.Linear(D, D), lambda m, x, y: m(m(x).tanh())),
    "tied": (lambda: nn.Linear(D, D), lambda m, x, y: m(x).tanh() @ m.weight),
    "checkpointed": (
        lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)),
        lambda m, x, y: checkpoint(m, x, use_reentrant=False),
    ),
    "reparametrised": (Reparametrised, lambda m, x, y: m(x)),
    "frozen": (lambda: nn.Linear(D, D).requires_grad_(False), lambda m, x, y: m(x)),
    "convolution": (lambda: nn.Conv1d(1, 1, 3, padding=1), lambda m, x, y: m(x[:, None])[:, 0]),
    "embedding": (lambda: nn.Embedding(30, D), lambda m, x, y: m((x > 0).sum(-1)) + x),
    "recurrent": (lambda: nn.GRU(D, D, batch_first=True), lambda m, x, y: m(x[:, None])[0][:, 0]),
    "normalised": (lambda: nn.LayerNorm(D), lambda m, x, y: m(x)),
    "unused": (lambda: nn.Linear(D, D), lambda m, x, y: x),
    "activated": (nn.Identity, lambda m, x, y: torch.nn.functional.silu(x)),
    "attention": (nn.Identity, lambda m, x, y: (x @ y.T).softmax(-1) @ y),
    "added": (nn.Identity, lambda m, x, y: x + y),
    "multiplied": (nn.Identity, lambda m, x, y: x * y.tanh()),
}


class Trunk(nn.Module):
    """Each operation takes two of what is there by then: the numbers say which."""

    def __init__(self, operations, two):
        super().__init__()
        self.operations, self.two = operations, two
        self.parts = nn.ModuleList(OPERATIONS[name][0]() for name, *_ in operations)

    def forward(self, x):
        values = [x]
        for (name, i, j), part in zip(self.operations, self.parts, strict=True):
            x, y = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(OPERATIONS[name][1](part, x, y))
        z = values[-1] + values[1]  # so that something is learned below
        return (z, values[-1]) if self.two else z


class Head(nn.Linear):
    """Of one feature tensor, or of the first or of both of two."""

    def __init__(self, both):
        super().__init__(D, 2)
        self.both = both

    def forward(self, z):
        if isinstance(z, tuple):
            z = z[0] * z[1].tanh() if self.both else z[0]
        return super().forward(z)


class Plain(nn.Module):
    """The same network without surgery; `factors` scale what the heads send into the trunk."""

    def __init__(self, model):
        super().__init__()
        self.trunk, self.heads = copy.deepcopy((model.trunk, model.heads))
        self.factors = None

    def _copy(self, z, task):
        if isinstance(z, tuple):
            return tuple(self._copy(part, task) for part in z)
        z = z.clone()
        if self.factors is not None and z.requires_grad:
            factor = self.factors[task]
            z.register_hook(lambda g: factor * g)
        return z

    def forward(self, x):
        if isinstance(x, dict):
            return {t: self.heads[t](self._copy(self.trunk(own), t)) for t, own in x.items()}
        z = self.trunk(x)
        return {t: head(self._copy(z, t)) for t, head in self.heads.items()}


class Case(nn.Module):
    """A network in what a user built around it."""

    def __init__(self, drawn, surgery):
        super().__init__()
        torch.manual_seed(drawn["seed"])
        self.drawn, self.names = drawn, "abcde"[: drawn["n_tasks"]]
        heads = {task: Head(both=task in "bd") for task in self.names}
        trunk = Trunk(drawn["operations"], drawn["two"])
        self.model = MultiTaskModel(trunk, heads, surgery, seed=3)
        self.encoder = nn.Linear(D, D) if drawn["encoder"] else nn.Identity()
        self.scales = nn.Parameter(0.1 * torch.randn(len(self.names)))
        self.x = torch.randn(2, len(self.names), drawn["rows"], D)

    def plain(self):
        """A copy that autograd alone differentiates."""
        found = copy.deepcopy(self)
        found.model = Plain(found.model)
        return found

    def gradients(self, factors=None):
        """By parameter, after a backward."""
        if factors is not None:
            self.model.factors = dict(zip(self.names, factors, strict=True))
        self.zero_grad()
        self.loss().backward()
        return {name: p.grad for name, p in self.named_parameters()}

    def loss(self):
        drawn, total = self.drawn, self.scales.sum()
        here = [t for t in self.names if t != drawn["absent"]]
        for x in self.x[: drawn["passes"]]:
            h = self.encoder(x)
            if drawn["own"]:
                outputs = self.model({t: h[self.names.index(t)] for t in here})
            else:
                outputs = self.model(h[0])
            for i, task in enumerate(here):
                loss = (1 + i) * (outputs[task] - (-1) ** i).square().mean()
                total = total + loss * (self.scales[i].exp() if drawn["learned"] else 1)
            if drawn["crossed"]:
                total = total + (outputs[here[0]] * outputs[here[-1]].tanh()).mean()
        if drawn["penalty"]:
            total = total + sum(p.square().sum() for p in self.model.trunk.parameters())
        return total


@st.composite
def cases(draw):
    numbers = st.integers(0, 9)
    rest = st.tuples(st.sampled_from(sorted(OPERATIONS)), numbers, numbers)
    n_tasks = draw(st.integers(2, 5))
    flags = ("two", "own", "encoder", "learned", "crossed", "penalty", "factored")
    return {
        "operations": [("linear", 0, 0), *draw(st.lists(rest, max_size=5))],
        "n_tasks": n_tasks,
        "absent": draw(st.sampled_from("x" * 3 + "abcde"[:n_tasks])),
        "passes": draw(st.integers(1, 2)),
        "rows": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 99)),
        **{flag: draw(st.booleans()) for flag in flags},
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9, msg=name)


@few
@given(cases())
def test_without_surgery_it_is_autograd(drawn):
    case = Case(drawn, "none")
    same(case.gradients(), case.plain().gradients())


@few
@given(cases(), st.sampled_from([*GRAMIAN, "rotograd-scale"]))
def test_every_method_weighs_vectors(drawn, method):
    case = Case(drawn, method)
    plain = case.plain()
    with patch("mtrl.surgery.layers.WORTH", 0 if drawn["factored"] else 2**23):
        found = case.gradients()
    last, n_tasks = case.model.last, len(case.names)
    here = [i for i, task in enumerate(case.names) if task in last.weights]
    factors = torch.zeros(n_tasks)
    factors[here] = torch.stack(list(last.weights.values())).to(factors)
    same(found, plain.gradients(factors))
    if last.gramian is None:
        return
    trunk = [name for name, _ in case.named_parameters() if name.startswith("model.trunk")]

    def row(factors):
        grads = plain.gradients(factors)
        flat = [torch.zeros(1) if grads[n] is None else grads[n].flatten() for n in trunk]
        return torch.cat(flat)

    zero = row(torch.zeros(n_tasks))
    rows = torch.stack([row(unit) - zero for unit in torch.eye(n_tasks)[here]])
    gramian = rows @ rows.T
    scale = gramian.diagonal().max()
    torch.testing.assert_close(last.gramian / scale, gramian / scale, rtol=1e-8, atol=1e-9)
    reference = get_surgery(method)
    reference.prepare(case.model)
    weights = reference.weights(last.gramian[None], torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(factors[here], len(here) * weights)
