"""YAML 1.2's core schema, value by value, from section 10.3 of its specification."""

import math

import pytest
import yaml

from mtrl.config.train import TrainConfig
from mtrl.config.yaml12 import dump, load
from mtrl.errors import UsageError

SCALARS = {
    # values that YAML 1.1 reads differently
    "12:00": "12:00",
    "1:30:00": "1:30:00",
    "010": 10,
    "-010": -10,
    "yes": "yes",
    "No": "No",
    "on": "on",
    "y": "y",
    "1e6": 1_000_000.0,
    "-1e-3": -0.001,
    "1E3": 1000.0,
    "2024-01-01": "2024-01-01",
    "0b101": "0b101",
    "0o17": 15,
    "=": "=",
    # values that both read alike
    "0x1F": 31,
    "+3": 3,
    ".5": 0.5,
    "1.": 1.0,
    "6.02e+23": 6.02e23,
    "20_000_000": 20_000_000,
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    "1__0": "1__0",
    "mt1:reach-v3": "mt1:reach-v3",
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars(text):
    found = load(text)
    assert found == SCALARS[text] and type(found) is type(SCALARS[text])
    assert load(dump({"value": found})) == {"value": found}
    assert load(dump({text: [text]})) == {text: [text]}  # quoted if necessary


def test_not_a_number():
    assert math.isnan(load(".nan")) and math.isnan(load(dump([math.nan]))[0])


@pytest.mark.parametrize(
    "text",
    [
        "learner: {tau: 0.1}\nseed: 1\nlearner: {gamma: 0.9}\n",
        "learner:\n  tau: 0.1\n  tau: 0.1\n",
        "agent: {trunk: mlp, 'trunk': mlp}\n",
        "010: a\n10: b\n",
    ],
)
def test_duplicate_keys_are_refused(text, tmp_path):
    with pytest.raises(yaml.YAMLError, match="is given twice"):
        load(text)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"cannot read .*is given twice"):
        TrainConfig.from_yaml(path)


def test_equal_keys_of_different_mappings_are_allowed():
    assert load("a: {x: 1}\nb: {x: 2}\nc: &c {x: 3}\nd: *c") == {
        "a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}, "d": {"x": 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_runtime: 12:00\n", "max_runtime: input should be a valid number"),
        ("seed: yes\n", "seed: input should be a valid integer"),
        ("seed: true\n", "seed: input should be a number, got True"),
        ("learner: {gamma: true}\n", "learner.gamma: input should be a number, got True"),
        ("agent: {hidden_sizes: [8, false]}\n", "agent.hidden_sizes: input should be a number"),
        ("total_timesteps: 1.5\n", "total_timesteps: input should be a valid integer"),
        ("total_timesteps: 1e18\n", "total_timesteps: input should be less than 1000000000000"),
        ("<<: {seed: 1}\n", "key: unknown '<<'"),
    ],
)
def test_invalid_values(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        TrainConfig.from_yaml(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_common_spellings_of_values(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "total_timesteps: 1e6\nseed: 010\nrun_dir: 2024-01-01\nmax_runtime: .5\n"
        "learner: {target_entropy: -1e-3, capture: no, learning_rate: 3e-4}\n"
    )
    config = TrainConfig.from_yaml(path)
    assert (config.total_timesteps, config.seed, config.max_runtime) == (1_000_000, 10, 0.5)
    assert str(config.run_dir) == "2024-01-01" and config.learner.capture is False
    assert (config.learner.target_entropy, config.learner.learning_rate) == (-0.001, 3e-4)
    path.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(path) == config
