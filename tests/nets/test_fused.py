"""Fused layer against autograd on its formula in float64, and its rounding in bf16."""

from itertools import product

import pytest
import torch
from torch.nn.functional import layer_norm

from mtrl.nets.fused import layer
from mtrl.nets.heads import fold, head, rotate
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.trunks import MLP

N, T, B, IN, OUT = 2, 3, 5, 7, 6
HOW = [
    (norm, relu, residual)
    for norm, relu, residual in product((False, True), repeat=3)
    if not (relu and residual)
]


def plain(x, weight, bias, residual, norm, relu):
    """Compute the formula with one matrix per network and task."""
    y = torch.einsum("ntbi,ntio->ntbo", x, weight) + bias
    y = layer_norm(y, y.shape[-1:]) if norm else y
    y = y.relu() if relu else y
    return y if residual is None else y + residual


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("bias", ["shared", "view", "task", "output"])
@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize(("norm", "relu", "residual"), HOW)
def test_equals_its_formula_forward_and_backward(norm, relu, residual, by_task, bias):
    x = drawn(N, T, B, IN).requires_grad_()
    weight = drawn(N, IN, OUT)[:, None].expand(-1, T, -1, -1)
    biases = {
        "shared": drawn(N, OUT),
        "view": drawn(N, OUT)[:, None].expand(-1, T, -1),
        "task": drawn(N, T, OUT),
        "output": drawn(N, T, OUT)[:, :, None].expand(-1, -1, B, -1),
    }
    ours = [x, weight if by_task else weight[:, 0], biases[bias]]
    ours = [value.detach().requires_grad_() for value in ours]
    skip = drawn(N, T, B, OUT, seed=1).requires_grad_() if residual else None
    ours += [skip] if residual else []
    found = layer(*ours[:3], norm=norm, relu=relu, residual=skip)

    theirs = [value.detach().clone().requires_grad_() for value in ours]
    every = theirs[1] if by_task else theirs[1][:, None]
    entering = {2: lambda b: b[:, None, None], 3: lambda b: b[:, :, None], 4: lambda b: b}
    every_bias = entering[theirs[2].ndim](theirs[2])
    expected = plain(
        theirs[0], every.expand(N, T, IN, OUT), every_bias, *theirs[3:] or [None], norm, relu
    )

    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    at = drawn(N, T, B, OUT, seed=2)
    pairs = zip(
        torch.autograd.grad(found, ours, at), torch.autograd.grad(expected, theirs, at), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("norm", "relu", "residual"), HOW)
def test_without_a_graph_it_computes_the_same(norm, relu, residual):
    arguments = drawn(1, T, B, IN), drawn(N, IN, OUT), drawn(N, T, OUT)
    skip = drawn(N, T, B, OUT) if residual else None
    with_graph = layer(*arguments, norm=norm, relu=relu, residual=skip)
    with torch.no_grad():
        assert torch.equal(with_graph, layer(*arguments, norm=norm, relu=relu, residual=skip))


def test_bf16_rounds_the_product_and_not_the_statistics():
    """Far from zero, a bf16 mean would lose the spread; these statistics keep it."""
    x = drawn(1, 1, 64, 32, dtype=torch.float32)
    weight, bias = drawn(1, 32, 128, dtype=torch.float32), drawn(1, 128, dtype=torch.float32)
    exact = layer(x.double(), weight.double(), bias.double(), norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x, weight, bias, norm=True)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.06  # values to 4, each of 8 bits, from inputs of 8 bits
    assert (found.double().std(-1, correction=0) - 1).abs().max() < 4e-3


@pytest.mark.parametrize("size", [OUT, OUT - 2])
def test_rotating_features_equals_rotating_the_head(size):
    """With fewer samples than outputs, features are rotated, else the head; both agree."""
    rotation = torch.linalg.qr(drawn(N, T, size, size))[0]
    z, weight, bias = drawn(N, T, B, OUT), drawn(N, T, OUT, 9), drawn(N, T, 9)
    assert weight.shape[-1] > B
    by_hand = rotate(rotation, z) @ weight + bias[:, :, None]
    folded = z @ fold(rotation, weight) + bias[:, :, None]
    torch.testing.assert_close(by_hand, folded, atol=1e-12, rtol=1e-9)
    own = {"rotation": rotation, "head_weight": weight, "head_bias": bias}
    many = torch.cat([z, z], 2)
    torch.testing.assert_close(head({}, own, z), folded, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(head({}, own, many)[:, :, :B], folded, atol=1e-12, rtol=1e-9)


def test_parameters_by_name_are_the_parameters():
    generator = torch.Generator().manual_seed(0)
    sizes = N, T, IN, OUT
    networks = MultiTaskNetworks(
        *sizes, MLP((4, 4)), multi_head=True, head_bound=1.0, generator=generator
    )
    shared, own = networks.named()
    assert shared["weight1"] is networks.shared["weight1"] and set(own) == set(networks.per_task)
    shared.clear()
    assert set(networks.shared) == {"weight0", "weight1", "bias1"}


def test_relu_and_a_residual_exclude_each_other():
    arguments = drawn(1, T, B, IN), drawn(N, IN, OUT), drawn(N, T, OUT)
    with pytest.raises(ValueError, match="got both"):
        layer(*arguments, relu=True, residual=drawn(N, T, B, OUT))
