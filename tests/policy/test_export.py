"""Exported policies: same actions, no code execution, and damaged files are rejected."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mtrl import MTSAC, Policy, export_policy
from mtrl.cli.eval import main as eval_main
from mtrl.cli.export import main as export_main
from mtrl.config.agent import AgentConfig
from mtrl.errors import UsageError
from mtrl.folder import EXPORT_FORMAT, POLICY_FORMAT
from mtrl.policy.export import card
from mtrl.policy.file import MAX_CONFIG, digest

TASKS = ("reach-v3", "push-v3")
OBSERVATIONS = np.random.default_rng(0).normal(size=(2, 39)).astype(np.float32)


RECIPE = {
    "layer_norm": True,
    "trunk": "residual",
    "task_embedding": 3,
    "normalize_observations": True,
    "actor_hidden_sizes": (12, 12),
}


def make_agent(heads: str = "multi", width: int = 8, **recipe: object) -> MTSAC:
    config = AgentConfig(hidden_sizes=(width, width), heads=heads, **recipe)
    agent = MTSAC(TASKS, config, 39, 4, seed=3)
    for parameter in agent.actor.parameters():  # heads start near zero
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=agent._generator))
    if agent.normalizer is not None:
        agent.normalizer.mean.add_(0.5)
        agent.normalizer.variance.mul_(3)
    return agent


def python(code: str, folder: Path | None = None) -> None:
    """Run code in a new interpreter, which must not fail."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def actions(policy: Policy) -> np.ndarray:
    return policy.predict(OBSERVATIONS, deterministic=True)[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    folder = tmp_path_factory.mktemp("policies")
    saved, exported = folder / "saved.safetensors", folder / "exported.safetensors"
    make_agent().save(saved, {"seed": 5, "horizon": 30, "surgery": "pcgrad"})
    export_policy(saved, exported)
    return saved, exported


def test_an_exported_policy_acts_the_same_and_holds_no_critics(files, tmp_path):
    saved, exported = files
    assert all(name.startswith("agent/actor.") for name in load_file(exported))
    policy, header = Policy.load_with_header(exported)
    assert (header.seed, header.horizon, header.surgery) == (5, 30, "pcgrad")
    assert type(policy) is Policy and policy.config == make_agent().config
    for read in (policy, Policy.load(saved), MTSAC.load(saved)):
        assert np.array_equal(actions(read), actions(make_agent()))
        by_name, _ = read.predict(OBSERVATIONS[0], deterministic=True, task="push-v3")
        by_one_hot, _ = read.predict(np.append(OBSERVATIONS[0], [0, 1]), deterministic=True)
        assert np.array_equal(by_name, by_one_hot)
    again = tmp_path / "again.safetensors"
    export_policy(exported, again)
    assert np.array_equal(actions(Policy.load(again)), actions(policy))
    assert card(again) == card(exported) == card(saved)


@pytest.mark.parametrize("deterministic", [True, False])
def test_no_rows_have_no_actions(files, deterministic):
    for policy in (Policy.load(files[1]), MTSAC.load(files[0])):
        for rows, task in (
            (np.zeros((0, 39)), None),
            (np.zeros((0, 41)), None),
            (np.zeros((0, 39), np.float32), "push-v3"),
        ):
            found, state = policy.predict(rows, deterministic=deterministic, task=task)
            assert found.shape == (0, 4) and found.dtype == np.float32 and state is None
        with pytest.raises(ValueError, match=r"expected length 39, or 41 .* got shape \(0, 40\)"):
            policy.predict(np.zeros((0, 40)))


@pytest.mark.parametrize("heads", ["multi", "single"])
@pytest.mark.parametrize("size", [None, 5])
def test_rotations_are_folded_into_the_heads(heads, size, tmp_path):
    agent = make_agent(heads)
    if heads == "multi":
        agent.actor.add_rotation(size)
        agent.actor.rotation[:] = torch.linalg.qr(torch.randn(agent.actor.rotation.shape))[0]
    agent.save(tmp_path / "a.safetensors")
    export_policy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not any("rotation" in name for name in load_file(tmp_path / "b.safetensors"))
    assert np.array_equal(actions(Policy.load(tmp_path / "b.safetensors")), actions(agent))


@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch 2.7 writes programs")
def test_a_program_for_pytorch_without_mtrl(tmp_path, monkeypatch, capsys):
    agents = {"multi": make_agent(), "single": make_agent("single"), "all": make_agent(**RECIPE)}
    for name, agent in agents.items():
        agent.save(tmp_path / "a.safetensors")
        export_policy(tmp_path / "a.safetensors", tmp_path / f"{name}.pt2")
    rows = np.random.default_rng(1).normal(size=(7, 39))
    rows = np.concatenate([rows, np.eye(2)[np.arange(7) % 2]], 1)
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    for arguments in (["multi.pt2"], ["multi.pt2", "--tasks", "push-v3"]):
        monkeypatch.chdir(tmp_path)
        assert eval_main(arguments) == 2
        error = capsys.readouterr().err
        assert "got multi.pt2, an archive such as the programs (.pt2) that mtrl-export" in error
        assert error.count("\n") == 1
    code = (
        "import sys, numpy as np, torch\n"
        "rows = torch.from_numpy(np.load('rows.npy'))\n"
        "for name in ('multi', 'single', 'all'):\n"
        "    program = torch.export.load(name + '.pt2').module()\n"
        "    for n in (1, 7):\n"
        "        np.save(f'{name}{n}.npy', program(rows[:n]).numpy())\n"
        "assert not any(name.split('.')[0] == 'mtrl' for name in sys.modules)"
    )
    python(code, tmp_path)
    for name, agent in agents.items():
        for n in (1, 7):
            expected, _ = agent.predict(rows[:n], deterministic=True)
            np.testing.assert_allclose(np.load(tmp_path / f"{name}{n}.npy"), expected, atol=1e-5)


def test_all_parts_of_a_recipe_are_exported(tmp_path):
    agent = make_agent(**RECIPE)
    agent.save(tmp_path / "a.safetensors")
    export_policy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    policy = Policy.load(tmp_path / "b.safetensors")
    assert policy.config == agent.config and np.array_equal(actions(policy), actions(agent))
    assert not np.allclose(actions(policy), actions(make_agent()), atol=1e-3)


def test_loading_needs_neither_training_code_nor_a_simulator(files):
    code = (
        f"import sys\nfrom mtrl import Policy\nPolicy.load({str(files[1])!r})\n"
        "packages = {name.split('.')[1] for name in sys.modules if name.startswith('mtrl.')}\n"
        "assert packages <= {'config', 'devices', 'errors', 'folder', 'nets', 'policy'}, packages\n"
        "assert not {'metaworld', 'mujoco', 'gymnasium', 'stable_baselines3'} & set(sys.modules)"
    )
    python(code)


def loaded(kind: type[Policy], path: Path) -> Policy | None:
    """Return the policy, or None if it was rejected in one line."""
    try:
        return kind.load(path)
    except UsageError as error:
        message = str(error)
    assert "\n" not in message and str(path) in message
    return None


def refused(load, path: Path) -> str:
    """Return the one-line error for a file."""
    with pytest.raises(UsageError) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


damages = st.one_of(
    st.tuples(
        st.just("flip"),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=3),
    ),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("text"), st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9))),
)


def damage(data: bytes, how) -> bytes:
    kind, what = how
    if kind == "cut":
        return data[: int(what * len(data))]
    changed = bytearray(data)
    if kind == "text":
        at = int(what[0] * (len(data) - 1))
        changed[at : at + len(what[1])] = what[1]
    else:
        # Half of all flips are in the header, where more can go wrong.
        header = int.from_bytes(data[:8], "little") + 8
        for place, bit in what:
            at = 2 * place * header if place < 0.5 else (2 * place - 1) * len(data)
            changed[min(int(at), len(data) - 1)] ^= 1 << bit
    return bytes(changed)


quickly = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quickly
@given(damages)
def test_a_damaged_export_is_rejected_or_acts_the_same(files, tmp_path, how):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(files[1].read_bytes(), how))
    policy = loaded(Policy, path)
    assert policy is None or np.array_equal(actions(policy), actions(make_agent()))


@quickly
@given(damages, st.sampled_from([Policy, MTSAC]))
def test_a_damaged_file_without_a_checksum_raises_only_usage_errors(files, tmp_path, how, kind):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(files[0].read_bytes(), how))
    policy = loaded(kind, path)
    assert policy is None or actions(policy).shape == (len(TASKS), 4)


def written(tmp_path: Path, config: str, tensors: dict | None = None, whole: bool = True) -> Path:
    """Write a file with this header and a correct checksum."""
    path = tmp_path / "made.safetensors"
    tensors = {} if tensors is None else tensors
    metadata = {"format": EXPORT_FORMAT if whole else POLICY_FORMAT, "config": config}
    if whole:
        metadata["sha256"] = digest(metadata, sorted(tensors.items()))
    save_file(tensors, path, metadata)
    return path


BOMB = "a: &a [x,x]\nb: &b [*a,*a]\n" + "".join(
    f"{chr(99 + i)}: &{chr(99 + i)} [*{chr(98 + i)},*{chr(98 + i)}]\n" for i in range(20)
)
HEADER = {"tasks": ["a"], "observation_size": 39, "action_size": 4, "agent": {"hidden_sizes": [8]}}


def trunk_header(trunk: str) -> str:
    return yaml.safe_dump(HEADER | {"agent": {"trunk": trunk}})


@pytest.mark.parametrize("load", [Policy.load, MTSAC.load, card])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BOMB + "tasks: *v\n", "expected no aliases"),
        ("tasks: [" + "x," * 2_000_000 + "]", f"at most {MAX_CONFIG} characters"),
        ("[" * 30_000, "cannot read"),
        ("x: !!python/object/apply:os.system [touch pwned]", "could not determine a constructor"),
        ("x: !!int ''", "cannot read"),
        ("- 1", "a mapping from fields to values"),
        # This would need 1.6 GB if it were allocated before it is compared.
        (
            yaml.safe_dump(HEADER | {"agent": {"hidden_sizes": [20_000] * 2}}),
            "do not match its header",
        ),
        (yaml.safe_dump(HEADER | {"observation_size": 10**9}), "do not match its header"),
        (yaml.safe_dump(HEADER | {"observation_size": 10**30}), "do not match its header"),
        (yaml.safe_dump(HEADER | {"agent": {"hidden_sizes": [10**6] * 9}}), "expected widths from"),
        (
            yaml.safe_dump(HEADER | {"agent": {"hidden_sizes": [10**12] * 2}}),
            "expected widths from",
        ),
        (trunk_header("moore(experts=1000000)"), "expected experts from 1 to 256, got 1000000"),
        (trunk_header("soft-modules(layers=10**9)"), "expected NAME or NAME(option=value, …)"),
        (trunk_header("paco(sets=True)"), "expected sets from 1 to 256, got True"),
        (trunk_header("mlp(widths='a')"), "expected widths of 1 to 256 layers"),
        (trunk_header("mlp(" + "(" * 9_000), "trunk: expected NAME or NAME(option=value, …)"),
        (trunk_header("os:system"), "trunk: unknown 'os:system'"),
        (yaml.safe_dump(HEADER | {"tasks": ["\x1b[2J"]}), "expected printable characters"),
        (yaml.safe_dump(HEADER | {"tasks": ["a\nb"]}), "expected printable characters"),
        (yaml.safe_dump(HEADER | {"evaluation": 3}), "evaluation"),
        (yaml.safe_dump(HEADER | {"horizon": 0}), "horizon: input should be greater than 0"),
    ],
)
def test_malicious_headers(config, message, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refused(load, written(tmp_path, config))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert [path.name for path in tmp_path.iterdir()] == ["made.safetensors"]


def test_a_header_that_is_too_long(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{" * 100)
    assert "has a header of more than 16777216 bytes" in refused(Policy.load, path)


def test_every_tensor_must_match_the_header(tmp_path):
    agent = make_agent()
    config = yaml.safe_dump(agent.description())
    all_tensors = agent.tensors()
    name = "agent/actor.shared.weight1"
    assert np.array_equal(
        actions(Policy.load(written(tmp_path, config, all_tensors))), actions(agent)
    )
    wrong = [
        all_tensors | {name: all_tensors[name][:, :, :-1].contiguous()},
        {key: value for key, value in all_tensors.items() if key != name},
        all_tensors | {"agent/normaliser.mean": torch.zeros(39)},  # from a future version
        {},
    ]
    for tensors in wrong:
        for load in (Policy.load, MTSAC.load):
            refused(load, written(tmp_path, config, tensors))
    doubles = {key: value.double() for key, value in all_tensors.items()}
    assert np.array_equal(actions(Policy.load(written(tmp_path, config, doubles))), actions(agent))


def test_an_export_cannot_be_trained(files):
    assert "'agent/" in refused(MTSAC.load, files[1])
    with safe_open(files[1], "pt") as file:
        assert file.metadata()["card"] == card(files[1])


def test_a_policy_does_not_change_with_its_file(files, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(data := files[1].read_bytes())
    policy = Policy.load(path)
    with path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(b"\xff" * (len(data) // 2))
    assert np.array_equal(actions(policy), actions(make_agent()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "output: expected -o FILE or --card, got neither"),
        (["-o", "x.onnx"], "output: expected a name that ends in .safetensors or .pt2, got x.onnx"),
        (["-o", "nowhere/x.pt2"], "output: expected a file in a folder that exists"),
        (["-o", "policy.safetensors"], "output: expected a file other than the policy's"),
        (["--crad"], "flag: unknown '--crad'; did you mean '--card'"),
    ],
)
def test_invalid_arguments_of_export(arguments, message, policy, capsys, monkeypatch):
    monkeypatch.chdir(policy.parent)
    before = policy.read_bytes()
    assert export_main(["policy.safetensors", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert policy.read_bytes() == before and list(policy.parent.iterdir()) == [policy]
    assert export_main(["missing.safetensors", "--card"]) == 2
