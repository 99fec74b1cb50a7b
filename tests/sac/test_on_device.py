"""Properties needed on a GPU, tested without one: updates stay on the device and in precision.

An update on the `meta` device computes nothing but knows the device of every tensor. As on CUDA, a
number from the host that enters it would be frozen into a captured graph.
"""

import contextlib
import copy
import sys
from collections import Counter
from types import ModuleType

import pytest
import small_learner
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtrl.config.agent import AgentConfig
from mtrl.config.registry import TRUNKS as REGISTRY
from mtrl.sac.learner import Learner
from mtrl.sac.replay import ReplayBuffer
from mtrl.sac.values import CategoricalValue
from mtrl.surgery import available, get_surgery, methods
from mtrl.surgery.methods import pcgrad
from mtrl.surgery.methods.rotograd import RotoGrad

T, FIRST = 3, 12
AGENTS = {
    "mlp, scalar": AgentConfig(hidden_sizes=(FIRST, 11)),
    "residual, categorical": AgentConfig(
        hidden_sizes=(FIRST, FIRST),
        trunk="residual",
        layer_norm=True,
        critic_bins=9,
        normalize_observations=True,
    ),
}
TRUNKS = [name for name in REGISTRY.options if name not in ("mlp", "residual")]
CAPTURED = [name for name in available() if get_surgery(name).capturable]
FORMS = ("pcgrad",)  # per-task gradients, which the other engine avoids


def make_learner(surgery: str, agent: AgentConfig, device: str = "cpu", **settings) -> Learner:
    return small_learner.make_learner(
        T, agent=agent, device=device, seed=1, surgery=surgery, **settings
    )


def filled_replay(device: str = "cpu") -> ReplayBuffer:
    return small_learner.filled_replay(T, 30, ends=True, device=device)


class OnMeta(TorchDispatchMode):
    """Raises at an operation with a tensor on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta", (
                f"{func} has a tensor of the host's in a captured update"
            )
        return out


@pytest.fixture
def meta(monkeypatch):
    """Allow a learner on `meta`, which has no generators, autocast or fused optimiser."""

    class Generator(torch.Generator):
        device = torch.device("meta")

        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(
        "mtrl.sac.learner.make_optimizer",
        lambda decaying, others, config: torch.optim.SGD([*decaying, *others], foreach=True),
    )
    return OnMeta


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize(
    ("surgery", "engine"),
    [(name, "jacobian") for name in CAPTURED] + [(name, "factored") for name in FORMS],
)
def test_a_captured_update_uses_no_tensor_on_the_host(surgery, engine, agent, meta):
    learner = make_learner(surgery, AGENTS[agent], "meta", gradient_engine=engine, precision="fp32")
    replay = filled_replay("meta")
    learner.step(replay)
    with meta():
        learner.step(replay)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize(
    ("surgery", "engine"), [("pcgrad", "jacobian"), ("pcgrad", "factored"), ("rotograd", "auto")]
)
def test_a_captured_update_of_any_trunk_uses_no_tensor_on_the_host(surgery, engine, trunk, meta):
    trunk = trunk if trunk != "care" else "care(embedding=4)"  # these tasks have no descriptions
    agent = AgentConfig(trunk=trunk, hidden_sizes=(FIRST, 11), normalize_observations=True)
    learner = make_learner(surgery, agent, "meta", gradient_engine=engine, precision="fp32")
    replay = filled_replay("meta")
    learner.step(replay)
    with meta():
        learner.step(replay)


class Launches(TorchDispatchMode):
    """Counts operations that are a kernel on a GPU: no views and no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        name = func.overloadpacket.__name__
        if not (is_view or "empty" in name):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def test_pcgrad_launches_only_its_kernel_and_random_numbers(monkeypatch):
    """The kernel itself is tested in test_cuda.py; without Triton, memory stands for its result."""
    kernel = ModuleType("mtrl.surgery.methods.pcgrad_triton")
    kernel.weights = lambda gramian, keys: gramian.new_empty(gramian.shape[:2])
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    monkeypatch.setattr(methods, "pcgrad_triton", kernel, raising=False)
    gramian, draw = torch.eye(T).repeat(2, 1, 1), torch.Generator().manual_seed(0)
    with Launches() as launches:
        pcgrad.PCGrad().weights_or_nan(gramian, draw)
    assert launches.names.keys() >= {"rand", "nan_to_num_", "sum", "sort", "mean"}
    monkeypatch.setattr(pcgrad, "is_fused", lambda *sizes: True)
    with Launches() as launches:
        pcgrad.PCGrad().weights_or_nan(gramian, draw)
    assert launches.names == {"rand": 1}


def test_a_tensor_on_the_host_is_detected(meta):
    learner = make_learner("rotograd", AGENTS["mlp, scalar"], "meta", precision="fp32")
    for surgery in learner.surgeries.values():
        surgery.updates = torch.zeros((), dtype=torch.int64)  # a counter left on the host
    replay = filled_replay("meta")
    with pytest.raises(AssertionError, match="tensor of the host's"), meta():
        learner.step(replay)


def test_a_method_counts_on_the_networks_device():
    """Its decay and resets follow the count: the step halves, and norms are measured again at 7."""
    learner = make_learner("rotograd", AGENTS["mlp, scalar"])
    for name, networks in learner.agent.networks().items():
        method = RotoGrad(rotation_lr=0.1, rotation_decay=0.5, reset_every=7)
        method.prepare(networks)
        assert method.updates.device == networks.shared["weight0"].device
        learner.surgeries[name] = method
    surgery, replay = learner.surgeries["actor"], filled_replay()
    moved, initial = [], []
    for _ in range(9):
        before = learner.agent.actor.rotation.clone()
        learner.step(replay)
        moved.append(float((learner.agent.actor.rotation - before).norm()))
        initial.append(surgery.initial_norms.clone())
    assert surgery.updates == 9
    assert moved[8] < moved[0] / 2**6
    assert all(torch.equal(a, initial[0]) for a in initial[:7])
    assert not torch.equal(initial[7], initial[0]) and torch.equal(initial[8], initial[7])


class Products(TorchDispatchMode):
    """Records sizes and precision of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[set[int], str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "mv"):
            factors = [leaf for leaf in args if isinstance(leaf, torch.Tensor)][-2:]
            sizes = {size for factor in factors for size in factor.shape[-2:]}
            setting = torch.get_float32_matmul_precision()
            self.found.append((sizes, setting, factors[0].dtype))
        return out


@pytest.mark.parametrize("bins", [None, 9])
@pytest.mark.parametrize("surgery", ["none", "pcgrad", "rotograd"])
def test_only_trunks_use_tf32(surgery, bins):
    """Forward and backward; the first layer's width occurs in no other product."""
    agent = AgentConfig(hidden_sizes=(FIRST, 11), critic_bins=bins)
    learner = make_learner(surgery, agent)
    learner.precision = "tf32"  # unsupported on a CPU, but can be set
    before = torch.get_float32_matmul_precision()
    with Products() as products:
        learner.step(filled_replay())
    trunks = [setting for sizes, setting, _ in products.found if FIRST in sizes]
    others = [(sizes, setting) for sizes, setting, _ in products.found if FIRST not in sizes]
    assert set(trunks) == {"high"}
    # Heads, forward and backward; Gramians and their combination, or rotations.
    count = {"none": 8, "pcgrad": 20, "rotograd": 18}[surgery] + (2 if bins else 0)
    assert len(others) == count and {setting for _, setting in others} == {"highest"}
    assert torch.get_float32_matmul_precision() == before


def test_values_are_not_rounded_like_trunks():
    value = CategoricalValue(101, 10.0)
    logits = torch.randn(2, 3, 4, 101, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = value.mean(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), value.mean(logits.double()), atol=1e-5, rtol=1e-5)


def held(learner: Learner) -> dict[str, torch.Tensor]:
    """Return every tensor that a captured graph would refer to."""
    found = {f"agent.{name}": value for name, value in learner.agent.state_dict().items()}
    for name, method in learner.surgeries.items():
        found |= {f"{name}.{key}": value for key, value in method.state_dict().items()}
    for name, optimizer in learner.optimizers.items():
        for i, state in enumerate(optimizer.state.values()):
            found |= {f"{name}.{i}.{key}": value for key, value in state.items()}
    return found


def test_a_state_is_loaded_in_place():
    """A graph captured before uses the loaded values."""
    learner, other = (make_learner("rotograd", AGENTS["mlp, scalar"]) for _ in range(2))
    replay = filled_replay()
    for _ in range(3):
        learner.step(replay)
    state = copy.deepcopy((learner.agent.state_dict(), learner.state_dict()))
    expected = {name: value.clone() for name, value in held(learner).items()}
    for _ in range(2):
        learner.step(replay)
    addresses = {name: value.data_ptr() for name, value in held(learner).items()}
    for each in (learner, other):  # also without any update so far
        each.agent.load_state_dict(state[0])
        each.load_state_dict(state[1])
        torch.testing.assert_close(held(each), expected, rtol=0, atol=0)
    assert {name: value.data_ptr() for name, value in held(learner).items()} == addresses
    fresh = make_learner("rotograd", AGENTS["mlp, scalar"]).state_dict()
    learner.load_state_dict(fresh)
    moments = learner.optimizers["actor"].state.values()
    assert all(not value.any() for state in moments for value in state.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda moments: moments | {"99": moments["0"]}, "parameter 99"),
        (lambda moments: moments | {"0": {"exp_avg": torch.zeros(1)}}, "expected shape"),
    ],
)
def test_moments_of_other_networks_are_rejected(change, message):
    learner = make_learner("none", AGENTS["mlp, scalar"])
    learner.step(filled_replay())
    state = learner.state_dict()
    state["optimizers"]["actor"] = change(state["optimizers"]["actor"])
    with pytest.raises((IndexError, RuntimeError), match=message):
        learner.load_state_dict(state)
