"""A custom module as a trunk, against the module itself for one network and task."""

import copy
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import numpy as np
import own_trunks
import pytest
import torch
from torch.func import functional_call

from mtrl.config.agent import AgentConfig
from mtrl.config.registry import TRUNKS
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.nets.heads import head
from mtrl.nets.networks import MultiTaskNetworks
from mtrl.nets.trunks import MLP, MOORE, Trunk, get_trunk, load_trunk, register_trunk, trunk_of
from mtrl.policy.export import export_policy
from mtrl.policy.policy import Policy
from mtrl.sac.agent import MTSAC
from mtrl.surgery import StackedProblem, combine, gramian

N, T, B, IN, OUT = 2, 3, 5, 4, 2
NAME = "own_trunks:Attentive"


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(TRUNKS, "classes", dict(TRUNKS.classes))
    load_trunk(f"{NAME}(width=6)")


def make(spec: str = NAME, n_tasks: int = T, multi_head: bool = True) -> MultiTaskNetworks:
    load_trunk(spec)
    networks = MultiTaskNetworks(
        N,
        n_tasks,
        IN,
        OUT,
        get_trunk(spec),
        multi_head=multi_head,
        head_bound=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    return networks.double().requires_grad_(False)


def task_loss(shared, per_task, features, y):
    return (head(shared, per_task, features) - y).square().mean((-2, -1)), {}


@pytest.mark.parametrize("n_tasks", [T, 1])
@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_gradients_equal_those_of_the_module(n_tasks, engine):
    networks = make(n_tasks=n_tasks)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, n_tasks, B, IN, generator=generator, dtype=torch.float64)
    y = torch.randn(n_tasks, B, OUT, generator=generator, dtype=torch.float64)
    function, shared, per_task = networks.folded()
    problem = StackedProblem(function, task_loss, shared, per_task, x, (y,), engine=engine)
    module = own_trunks.Attentive(IN).double()
    rows, features = [], []
    for n in range(N):
        for t in range(n_tasks):
            own = {
                k.removeprefix("module:").replace(":", "."): v[n].clone().requires_grad_()
                for k, v in shared.items()
            }
            values = {k: v if k != "scale" else v.squeeze() for k, v in own.items()}
            z = functional_call(module, values, (x[0, t],))
            outputs = z @ per_task["head_weight"][n, t] + per_task["head_bias"][n, t]
            (outputs - y[t]).square().mean().backward()
            rows.append({k: own[k.removeprefix("module:").replace(":", ".")].grad for k in shared})
            features.append(z.detach())
    expected = {k: torch.stack([r[k] for r in rows]).unflatten(0, (N, n_tasks)) for k in shared}
    close = torch.testing.assert_close
    close(function(shared, per_task, x), torch.stack(features).unflatten(0, (N, n_tasks)))
    found = problem.task_gradients()
    close(found.gramian(), gramian(expected))
    weights = torch.linspace(-1, 2, N * n_tasks, dtype=torch.float64).view(N, n_tasks)
    for name, value in combine(weights, expected).items():
        close(found.weighted(weights).shared[name], value)
        close(problem.features().weighted(weights).shared[name], value)
    several = replace(problem, inputs=x.expand(N, -1, -1, -1))
    close(several.task_gradients().gramian(), found.gramian())


def test_initial_networks_differ_and_depend_on_the_seed():
    one, again = make(), make()
    for name, value in one.shared.items():
        assert torch.equal(value, again.shared[name])
    weight = one.shared["module:out:0:weight"]
    assert not torch.equal(weight[0], weight[1])


def test_a_policy_with_it_can_be_saved_and_loaded(tmp_path):
    agent = MTSAC(("a", "b"), AgentConfig(trunk=f"{NAME}(width=5)"), 7, 3, seed=2)
    agent.save(tmp_path / "a.safetensors")
    rows = np.random.default_rng(0).normal(size=(2, 7))
    for loaded in (Policy.load(tmp_path / "a.safetensors"), MTSAC.load(tmp_path / "a.safetensors")):
        found, expected = (p.predict(rows, deterministic=True)[0] for p in (loaded, agent))
        assert np.array_equal(found, expected)
    if torch.__version__ >= "2.7":
        export_policy(tmp_path / "a.safetensors", tmp_path / "a.pt2")
        program = torch.export.load(tmp_path / "a.pt2").module()
        given = np.concatenate([rows, np.eye(2)], 1).astype(np.float32)
        actions = program(torch.from_numpy(given)).detach().numpy()
        np.testing.assert_allclose(actions, expected, atol=1e-6)
    assert copy.deepcopy(agent).predict(rows, deterministic=True)[0].shape == (2, 3)


def test_a_file_imports_nothing(tmp_path):
    agent = MTSAC(("a",), AgentConfig(trunk=f"{NAME}(width=5)"), 7, 3)
    config = agent.config.model_copy(update={"trunk": "own_trunks:Refuses"})
    agent.config = config
    agent.save(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"a.safetensors: trunk: unknown 'own_trunks:Refuses'"):
        Policy.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_trunks:Waits", r".item\(\).*own_trunks.py, line 31: return self.layer"),
        ("own_trunks:Branches", r"control flow.*own_trunks.py, line 37: return y if y.sum\(\) > 0"),
        ("own_trunks:Averages", r"parameters only, got 'own_trunks:Averages' with the buffer '1"),
        ("own_trunks:Flat", r"expected features of shape \(2, d\) from .* got \(2,\)"),
        ("own_trunks:Idle", r"depend on every parameter of .* got .* not depend on 'layer.weight'"),
        ("own_trunks:Empty", r"expected a module with parameters"),
        ("own_trunks:Refuses(width=4)", r"cannot create own_trunks:Refuses\(4, …\): width 4"),
        ("own_trunks:Refuses(depth=4)", r"cannot create own_trunks:Refuses\(4, …\): .*'depth'"),
        ("own_trunks:Fourier", r"parameters only, got 'own_trunks:Fourier' with the tensor 'freq"),
        ("own_trunks:Remembers", r"parameters only, got 'own_trunks:Remembers' with .* 'last'"),
        ("own_trunks:Pretrained", r"all trained, got .* with requires_grad=False for '0.weight'"),
        ("own_trunks:Lazy", r"known shape, got 'own_trunks:Lazy' with the lazy '0.weight'"),
        ("own_trunks:Drops", "expected no random numbers, such as those of dropout"),
        ("own_trunks:Nothing", r"expected features of shape \(2, d\) from .* got \(2, 0\)"),
        ("own_trunks:torch", r"expected a class of torch.nn.Module at 'own_trunks:torch'"),
        ("own_trunks:None", r"trunk: cannot import 'own_trunks:None'"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unsupported_modules_are_rejected(spec, message, device):
    with pytest.raises(UsageError, match=message) as refused, torch.device(device):
        make(spec)
    assert "\n" not in str(refused.value)


def test_features_of_a_row_do_not_depend_on_other_rows():
    with pytest.raises(UsageError, match="depend on one observation from 'own_trunks:Mixes'"):
        make("own_trunks:Mixes")


def test_features_are_finite():
    with pytest.raises(UsageError, match="expected finite features from 'own_trunks:Roots'"):
        make("own_trunks:Roots")


@pytest.mark.parametrize("name", ["Shuffles", "Counts"])
def test_features_depend_on_parameters_and_observations_only(name):
    """Otherwise a loaded policy would not act like the one that was saved."""
    with pytest.raises(UsageError, match=rf"observations only, got 'own_trunks:{name}', whose"):
        make(f"own_trunks:{name}")


def test_tied_weights_stay_tied(tmp_path):
    agent = MTSAC(("a", "b"), AgentConfig(trunk="own_trunks:Tied"), 7, 3, seed=2)
    agent.save(tmp_path / "a.safetensors")
    assert sum("weight" in name for name in agent.actor.shared) == 2  # of three layers
    rows = np.random.default_rng(0).normal(size=(2, 7))
    loaded = Policy.load(tmp_path / "a.safetensors")
    found, expected = (p.predict(rows, deterministic=True)[0] for p in (loaded, agent))
    assert np.array_equal(found, expected)


def test_a_part_with_several_names_is_one_part():
    """Torch's `functional_call` would leave its parameters in the module."""
    networks = make("own_trunks:Repeated")
    function, shared, per_task = networks.folded()
    assert len(shared) == 4  # weights and biases of two layers
    x = torch.randn(1, T, B, IN, dtype=torch.float64)
    y = torch.zeros(T, B, OUT, dtype=torch.float64)
    gradients = StackedProblem(function, task_loss, shared, per_task, x, (y,)).task_gradients()
    module = own_trunks.Repeated(IN).double()
    for n in range(N):
        for name, value in module.named_parameters():
            value.data = shared["module:" + name.replace(".", ":")][n]
        rows = []
        for t in range(T):
            z = module(x[0, t])
            outputs = z @ per_task["head_weight"][n, t] + per_task["head_bias"][n, t]
            found = torch.autograd.grad(outputs.square().mean(), list(module.parameters()))
            rows.append(torch.cat([g.flatten() for g in found]))
            torch.testing.assert_close(function(shared, per_task, x)[n, t], z.detach())
        stacked = torch.stack(rows)
        torch.testing.assert_close(gradients.gramian()[n], stacked @ stacked.T)


def build(n_inputs, depth=1):
    layers = [torch.nn.Linear(n_inputs, 6), *(torch.nn.Linear(6, 6) for _ in range(depth))]
    return torch.nn.Sequential(*layers, torch.nn.Tanh())


@pytest.mark.parametrize("told", ["one-hot", "description", "embedding"])
def test_what_tells_the_task_follows_the_observation(told):
    """Then one head is enough: features are those of the module on [x, what is told]."""
    vectors = {"reach-v3": [1.0, 2.0], "push-v3": [-1.0, 0.5]}
    config = AgentConfig(trunk=build, task_input=told, heads="single")
    policy = Policy(("reach-v3", "push-v3"), config, IN, OUT, seed=1, descriptions=vectors)
    actor = policy.actor
    known = {
        "one-hot": torch.eye(2),
        "description": torch.tensor(list(vectors.values())),
        "embedding": dict(actor.per_task).get("embedding", torch.zeros(1))[0],
    }[told]
    x = torch.randn(2, IN)
    module = build(IN + known.shape[-1])
    values = {
        name.removeprefix("module:").replace(":", "."): value[0]
        for name, value in actor.shared.items()
        if name.startswith("module:")
    }
    z = functional_call(module, values, (torch.cat([x, known], -1),))
    outputs = z @ actor.shared["head_weight"][0] + actor.shared["head_bias"][0]
    found = policy.act(x, torch.arange(2))
    torch.testing.assert_close(found, torch.tanh(outputs[:, :OUT]))


def test_classes_functions_and_trunks_are_named_by_themselves():
    """What Python is given becomes a text that a file can hold, and is registered under it."""
    config = AgentConfig(
        trunk=own_trunks.Attentive, actor_trunk=build, critic_trunk=MOORE((9, 8), experts=3)
    )
    assert config.trunk == NAME and config.actor_trunk == f"{__name__}:build"
    assert config.critic_trunk == "moore(widths=(9, 8), experts=3)"
    assert trunk_of(config, "critic") == MOORE((9, 8), experts=3)
    assert AgentConfig(trunk=MLP()).trunk == "mlp"
    assert TrainConfig(trunk=build).agent.trunk == f"{__name__}:build"
    agent = MTSAC(("a", "b"), config, 7, 3)
    assert agent.critics.n_features == 8 and agent.actor.n_features == 6
    with pytest.raises(ValueError, match="trunk: expected a class or a named function"):
        AgentConfig(trunk=lambda n: torch.nn.Linear(n, 3))


def test_an_installed_packages_trunk(tmp_path):
    """By an entry point of the group `mtrl.trunks`; a policy file alone does not import it."""
    (tmp_path / "their_trunks.py").write_text(
        "from torch import nn\n"
        "class Narrow(nn.Linear):\n"
        "    def __init__(self, n_inputs, width=3): super().__init__(n_inputs, width)\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mtrl.trunks]\nnarrow = their_trunks:Narrow\n")
    make = (
        "import sys\nfrom mtrl.config.registry import TRUNKS\nTRUNKS.check('narrow(width=5)')\n"
        "assert not {'torch', 'their_trunks'} & set(sys.modules)\n"
        "from mtrl import AgentConfig, MTSAC\n"
        "MTSAC(('a',), AgentConfig(trunk='narrow(width=5)'), 7, 3).save('a.safetensors')\n"
    )
    read = (
        "import sys\nfrom mtrl import Policy\nfrom mtrl.nets.trunks import import_trunks\n"
        "try: Policy.load('a.safetensors')\n"
        "except ValueError as error: assert '--import narrow makes it known' in str(error), error\n"
        "assert 'their_trunks' not in sys.modules\n"
        "import_trunks(['narrow'])\n"
        "assert Policy.load('a.safetensors').actor.n_features == 5\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    for code in (make, read):
        environment = os.environ | {"PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)


def test_the_pages_example_is_a_trunk(request):
    """Of docs/architectures.md: made, told the task in each way, and acting."""
    page = (request.config.rootpath / "docs" / "architectures.md").read_text(encoding="utf-8")
    (code,) = re.findall(r'^    (@register_trunk\("gated"\).*?)(?=^\S)', page, re.M | re.S)
    space = {"register_trunk": register_trunk, "dataclass": dataclass, "Trunk": Trunk}
    exec(textwrap.dedent(f"    {code}"), space)
    for told in ("one-hot", "embedding", "description"):
        config = AgentConfig(trunk="gated", task_input=told, hidden_sizes=(5, 6))
        policy = Policy(("reach-v3", "push-v3"), config, IN, OUT)
        assert policy.predict(np.ones((2, IN)))[0].shape == (2, OUT)


def test_one_head_cannot_tell_tasks_apart():
    with pytest.raises(UsageError, match="heads: expected 'multi'"):
        make(multi_head=False)
