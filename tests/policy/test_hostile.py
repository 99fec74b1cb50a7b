"""Fuzzing of files and command lines: each is accepted or rejected in one line."""

import string
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import save_checkpoint

from mtrl.cli.eval import main as eval_main
from mtrl.cli.export import main as export_main
from mtrl.cli.flags import _leaves
from mtrl.cli.plot import main as plot_main
from mtrl.cli.train import main as train_main
from mtrl.config.agent import AgentConfig
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.policy.policy import Policy
from mtrl.sac.agent import MTSAC
from mtrl.training.checkpoint import load_checkpoint

MANY = [200, pytest.param(3_500, marks=pytest.mark.slow)]
"""Number of inputs of each kind; more than 10,000 in all in the slow tests."""


def fuzz(examples: int, strategy: st.SearchStrategy, check) -> None:
    run = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(check))
    run()


def taken_or_refused(load, path: Path):
    """Return what is loaded, or None if it was rejected in one line."""
    try:
        return load(path)
    except UsageError as error:
        message = str(error)
    assert "\n" not in message and len(message) < 4_000
    return None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    agent = MTSAC(("reach-v3", "push-v3"), AgentConfig(hidden_sizes=(4,)), 39, 4)
    state = {"agent": agent.state_dict(), "steps": 3, "empty": torch.zeros(0)}
    import yaml

    return save_checkpoint(
        tmp_path_factory.mktemp("files"), 3, state, yaml.safe_dump(agent.description())
    )


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]),
        st.floats(0, 1),
        st.integers(0, 255),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, mutations) -> bytes:
    """Most fragile parts are in the first kilobytes, so half of the changes go there."""
    data = bytearray(content)
    for kind, where, value, in_header in mutations:
        if not data:
            break
        position = int(where * (min(len(data), 3_000) - 1 if in_header else len(data) - 1))
        if kind == "flip":
            data[position] ^= value
        elif kind == "cut":
            del data[position:]
        elif kind == "insert":
            data[position:position] = bytes([value]) * 3
        else:
            data[position:position] = data[position : position + value]
    return bytes(data)


@pytest.mark.parametrize("examples", MANY)
def test_checkpoints(examples, checkpoint, tmp_path):
    content, path = checkpoint.read_bytes(), tmp_path / "x.safetensors"
    whole, _ = load_checkpoint(checkpoint)

    def check(mutations) -> None:
        path.write_bytes(mutated(content, mutations))
        for load in (Policy.load, MTSAC.load):
            taken_or_refused(load, path)
        found = taken_or_refused(load_checkpoint, path)
        if found is not None:
            assert torch.equal(found[0]["agent"]["log_alpha"], whole["agent"]["log_alpha"])

    fuzz(examples, MUTATIONS, check)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["mt10", "pcgrad", "reach-v3", "none", [400, 400], 1e400, -0.0, 2**70])
)
LEAVES = [name for _, name, _, _ in _leaves(TrainConfig())]
TREES = st.dictionaries(
    st.sampled_from([*LEAVES, "agent", "learner", "environment"]) | st.text(max_size=8),
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(LEAVES) | st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


@pytest.mark.parametrize("examples", MANY)
def test_configurations(examples, tmp_path):
    import yaml

    path = tmp_path / "x.yaml"

    def check(source) -> None:
        kind, tree, text, raw = source
        content = {"tree": yaml.safe_dump(tree).encode(), "text": text.encode(), "raw": raw}[kind]
        path.write_bytes(content)
        taken_or_refused(lambda path: TrainConfig.from_yaml(path).schedule(10), path)

    kinds = st.sampled_from(["tree", "tree", "text", "raw"])
    texts = st.text(alphabet=string.printable, max_size=200)
    fuzz(examples, st.tuples(kinds, TREES, texts, st.binary(max_size=100)), check)


VALUES = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(
        ["", "-1", "0", "1e9", "nan", "true", "/", "/dev/null", "\0", "--", "a" * 300]
    )
)


@pytest.mark.parametrize("examples", MANY)
def test_command_lines(examples, tmp_path, monkeypatch, capfd):
    """Up to the start of a run: nothing is written, and the exit code is 2, or 0 for --help."""

    def start(*arguments, **given) -> None:
        raise UsageError("far enough")

    for heavy in ("train", "resume"):
        monkeypatch.setattr(f"mtrl.training.run.{heavy}", start)
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name.replace('_', '-')}" for name in LEAVES]
    others = (
        "--config --resume --json --csv --video --output -o --x --cosine --labels --help -h".split()
    )
    words = st.sampled_from(flags + others) | VALUES
    programs = st.sampled_from([train_main, train_main, eval_main, plot_main, export_main])

    def check(program, arguments) -> None:
        capfd.readouterr()
        try:
            code = program(arguments)
        except SystemExit as end:  # --help
            code = ("help", end.code)
        if code == ("help", 0):
            return
        assert code == 2, arguments
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and ": error: " in said, said
        assert not list(tmp_path.iterdir()), arguments

    fuzz(
        examples,
        st.tuples(programs, st.lists(words, max_size=6)),
        lambda given: check(*given),
    )


def test_a_bomb_of_aliases_is_defused(tmp_path):
    """Nine levels of nine aliases: a billion values in a kilobyte."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "bomb.yaml"
    for text in ("\n".join(levels), "\n".join(levels) + "\ntasks: *a9\n"):
        path.write_text(text)
        tracemalloc.start()
        with pytest.raises(UsageError) as refusal:
            TrainConfig.from_yaml(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 2_000
        assert peak < 50 * 2**20


def test_endless_brackets_are_rejected(tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 5_000)
    with pytest.raises(UsageError, match=r"config: cannot read .*recursion"):
        TrainConfig.from_yaml(path)
