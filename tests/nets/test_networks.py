"""Initial weights of networks, and results that autocast must not change."""

import math

import pytest
import torch

from mtrl.config.agent import AgentConfig
from mtrl.nets.build import Layer
from mtrl.nets.heads import head
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.params import Params
from mtrl.nets.precision import trunks_in
from mtrl.nets.trunks import MLP, Residual
from mtrl.sac.agent import MTSAC

N, T, IN, OUT = 2, 3, 50, 20
TRUNK = MLP((80, 60))


def make(bound: float = 0.01, multi_head: bool = True, trunk=TRUNK) -> MultiTaskNetworks:
    generator = torch.Generator().manual_seed(0)
    return MultiTaskNetworks(
        N,
        T,
        IN,
        OUT,
        trunk,
        multi_head=multi_head,
        head_bound=bound,
        generator=generator,
    ).requires_grad_(False)


def expect_uniform(tensor: torch.Tensor, bound: float) -> None:
    """The largest of n draws is about bound · n/(n + 1), and their mean 0 ± bound/√(3n)."""
    n = tensor.numel()
    assert n >= 200
    assert bound * (1 - 12 / n) < tensor.abs().max() <= bound
    assert abs(tensor.mean()) < 5 * bound / math.sqrt(3 * n)
    assert tensor.std() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(n))


@pytest.mark.parametrize("multi_head", [True, False])
def test_initial_weights_are_he_uniform_and_heads_within_their_bound(multi_head):
    networks = make(0.01, multi_head)
    shared, own = networks.shared, networks.per_task
    first = math.sqrt(6 / (IN + T))  # as for a layer on inputs and one-hot
    expect_uniform(shared["weight0"], first)
    expect_uniform(own["bias0"], first)  # the one-hot's columns
    expect_uniform(shared["weight1"], math.sqrt(6 / 80))
    assert not shared["bias1"].any()
    expect_uniform((own if multi_head else shared)["head_weight"], 0.01)
    assert 0 < (own if multi_head else shared)["head_bias"].abs().max() <= 0.01


def test_initial_residual_blocks_and_embeddings():
    networks = make(trunk=Residual((80, 80), embedding=10))
    shared = networks.shared
    expect_uniform(shared["weight0"], math.sqrt(6 / (IN + 10)))
    expect_uniform(shared["task_weight"], math.sqrt(6 / (IN + 10)))
    expect_uniform(shared["weight1"], math.sqrt(6 / 80))
    expect_uniform(shared["weight2"], math.sqrt(6 / 80))
    assert not shared["bias0"].any() and not shared["bias2"].any()
    lengths = networks.per_task["embedding"].norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(N, T))


def test_initial_heads_of_an_agent_are_small():
    agent = MTSAC(("a", "b"), AgentConfig(hidden_sizes=(64, 64)), 39, 4, seed=0)
    expect_uniform(agent.actor.per_task["head_weight"], 1e-3)
    expect_uniform(agent.critics.per_task["head_weight"], 3e-3)


@pytest.mark.parametrize(
    ("kind", "rows"), [("own", 5), ("single", 5), ("rotated", 5), ("rotated", 25)]
)
def test_heads_stay_exact_inside_an_autocast(kind, rows):
    """A rotation is applied to a few rows of features, or folded into the weights for many."""
    networks = make(1.0, kind != "single")
    if kind == "rotated":
        networks.add_rotation(7)
        turn = torch.linalg.qr(torch.randn(N, T, 7, 7, generator=torch.Generator().manual_seed(1)))
        networks.rotation.copy_(turn.Q)
    own = dict(networks.per_task)
    if networks.rotation is not None:
        own["rotation"] = networks.rotation
    features = torch.randn(N, T, rows, 60, generator=torch.Generator().manual_seed(2))
    expected = head(dict(networks.shared), own, features)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(dict(networks.shared), own, features)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_the_requested_precision_holds_inside_an_autocast():
    a = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    exact = a @ a.mT
    with torch.autocast("cpu", torch.bfloat16):
        with trunks_in("fp32", a.device):
            assert torch.equal(a @ a.mT, exact)
        assert (a @ a.mT).dtype == torch.bfloat16  # the outer autocast is unchanged
    with trunks_in("bf16", a.device):
        assert (a @ a.mT).dtype == torch.bfloat16
    assert torch.equal(a @ a.mT, exact)


def test_another_rotation_keeps_outputs():
    """A RotoGrad run may train an agent that was trained with RotoGrad before."""
    networks = MTSAC(("a", "b"), AgentConfig(hidden_sizes=(8,)), 3, 2, seed=1).actor
    networks.per_task["head_weight"].normal_(generator=torch.Generator().manual_seed(0))
    networks.add_rotation()
    turned = torch.linalg.qr(torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1)))[0]
    networks.rotation.copy_(turned)
    inputs = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(2))
    before = networks.folded()(inputs)
    networks.add_rotation(4)
    assert networks.rotation.shape == (1, 2, 4, 4)
    torch.testing.assert_close(networks.folded()(inputs), before)
    assert not torch.equal(networks.folded()(inputs), torch.zeros_like(before))


@pytest.mark.parametrize("option", ["offset", "residual"])
def test_a_composed_layer_ignores_no_option(option):
    layers = {"layer": Layer("weight", "bias", experts=2, composed=True)}
    params = Params(layers, {"weight": torch.ones(1, 2, 3, 3), "bias": torch.ones(1, 2, 3)}, {})
    inputs, mix = torch.ones(1, 1, 4, 3), torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="linear: expected no offset or residual beside mix"):
        params.linear("layer", inputs, mix=mix, **{option: inputs})
