"""Presets and changes to them: no requested change is silently ignored."""

import inspect

import pytest

from mtrl.config import presets
from mtrl.config.presets import override, preset
from mtrl.config.registry import METHODS
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError


def test_a_preset_takes_changes():
    config = preset("quickstart", surgery="pcgrad", seed=3)
    assert (config.learner.surgery, config.seed) == ("pcgrad", 3)
    assert config.learner.batch_size == preset("quickstart").learner.batch_size
    with pytest.raises(UsageError, match="unknown 'surgry'; did you mean 'surgery'"):
        preset("quickstart", surgry="pcgrad")


def test_a_copy_is_validated_and_finds_the_section():
    config = preset("quickstart").model_copy(update={"surgery": "pcgrad", "horizon": "1e2"})
    assert (config.learner.surgery, config.environment.horizon) == ("pcgrad", 100)
    assert config.learner.tau == preset("quickstart").learner.tau
    with pytest.raises(UsageError, match="gamma: input should be less than or equal to 1"):
        preset("quickstart").model_copy(update={"gamma": 2})
    with pytest.raises(UsageError, match="unknown 'surgry'"):
        preset("quickstart").model_copy(update={"surgry": "pcgrad"})
    learner = preset("quickstart").learner
    assert learner.model_copy(update={"tau": 0.5}).tau == 0.5
    with pytest.raises(UsageError, match="tau"):
        learner.model_copy(update={"tau": 7})


def test_a_section_as_a_dict_changes_the_fields_in_it():
    """It does not replace the section, which would silently reset its other fields."""
    before = preset("quickstart")
    for found in (
        before.model_copy(update={"learner": {"surgery": "pcgrad"}, "seed": 4}),
        preset("quickstart", learner={"surgery": "pcgrad"}, seed=4),
        before.model_copy(update={"surgery": "pcgrad", "seed": 4}),
    ):
        assert found.flat() == before.flat() | {"surgery": "pcgrad", "seed": 4}
    wide = preset("quickstart", agent={"hidden_sizes": (64, 64)})
    assert wide.agent.actor_hidden_sizes is None and wide.agent.critic_bins == 101
    with pytest.raises(UsageError, match="surgery: expected one value, got two"):
        before.model_copy(update={"surgery": "none", "learner": {"surgery": "pcgrad"}})
    with pytest.raises(UsageError, match="unknown 'surgrey'; did you mean 'surgery'"):
        before.model_copy(update={"learner": {"surgrey": "pcgrad"}})
    with pytest.raises(UsageError, match="learner: input should be a mapping"):
        before.model_copy(update={"learner": 3})


def test_a_change_resets_what_would_take_precedence_over_it():
    start = preset("mt10_cpu")
    assert start.agent.actor_hidden_sizes == (192, 192)
    config, lines = override(start, {"hidden_sizes": (400, 400, 400)})
    assert (config.agent.hidden_sizes, config.agent.actor_hidden_sizes) == ((400,) * 3, None)
    assert lines == ["--hidden-sizes replaces the configuration's actor_hidden_sizes: 192 192"]
    both = {"hidden_sizes": (400,), "actor_hidden_sizes": (32,)}
    config, lines = override(start, both)
    assert config.agent.actor_hidden_sizes == (32,) and not lines

    config, lines = override(preset("quickstart"), {"benchmark": "mt10"})
    assert config.tasks is None and "tasks: reach-v3 drawer-close-v3 door-close-v3" in lines[0]
    mixed = TrainConfig(actor_surgery="pcgrad", critic_surgery="mgda")
    config, lines = override(mixed, {"surgery": "rotograd", "critic_surgery": "none"})
    assert (config.learner.actor_surgery, config.learner.critic_surgery) == (None, "none")
    assert len(lines) == 1 and "actor_surgery: pcgrad" in lines[0]


@pytest.mark.parametrize("name", presets.EXPECTED)
def test_every_preset_diagnoses(name):
    config = preset(name)
    n_tasks = 50 if config.benchmark == "mt50" else len(config.tasks or range(10))
    schedule = config.schedule(n_tasks)
    assert 0 < schedule.diagnose_every <= schedule.total_timesteps // 5


def test_methods_known_without_pytorch_agree_with_the_registry():
    built_in = {n: m for n, m in METHODS.classes.items() if m.__module__.startswith("mtrl.")}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = {
        name: tuple(
            parameter.name
            for parameter in inspect.signature(method).parameters.values()
            if parameter.kind not in variable
        )
        for name, method in built_in.items()
    }
    assert found == METHODS.options
