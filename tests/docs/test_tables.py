"""The generated tables say what the package and the results say."""

import importlib
import sys

import pytest
from doc_pages import ROOT

from mtrl.config.presets import EXPECTED, preset
from mtrl.config.registry import METHODS, TRUNKS
from mtrl.config.train import TrainConfig

sys.path.append(str(ROOT / "docs/_ext"))
config = importlib.import_module("tables_config")
results = importlib.import_module("tables_results")
speed = importlib.import_module("tables_speed")
surgery = importlib.import_module("tables_surgery")


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each row, by the first."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert all(len(line) == len(lines[0]) for line in lines)
    return {first.strip("`*"): rest for first, *rest in lines}


def test_every_setting_has_a_row():
    found = {}
    for section in ("run", "transfer", "agent", "learner", "environment"):
        found |= rows(config.settings(section))
    flags = {"--" + name.replace("_", "-") for name in TrainConfig().flat()}
    assert found.keys() == flags - {"--imports"} | {"--import"}
    assert found["--batch-size"][1] == "`128`" and found["--capture"][1] == "`true`"
    assert found["--precision"][0] == "auto, fp32, tf32, bf16"
    with pytest.raises(ValueError, match="no section"):
        config.settings("nothing")


def test_presets():
    assert rows(config.presets()).keys() == EXPECTED.keys()
    values = rows(config.preset_values())
    assert values["gamma"][0] == str(preset("quickstart").learner.gamma)
    assert values["total_timesteps"][1] == "280,000 per task"
    assert values["target_entropy"][1] == "-0.5 per action"
    assert "max_grad_norm" not in values  # the same in all of them


@pytest.mark.parametrize("command", ["mtrl-eval", "mtrl-plot", "mtrl-export"])
def test_commands(command):
    assert {"mtrl-eval": "--seed", "mtrl-plot": "--x", "mtrl-export": "--card"}[command] in rows(
        config.command(command)
    )


def test_methods_and_trunks():
    methods = [line.split("`")[1] for line in surgery.methods().splitlines()[2:]]
    assert methods == list(METHODS.options)
    assert all((ROOT / f"docs/surgery/{page}.md").is_file() for page in surgery.PAGES.values())
    assert surgery.PAGES.keys() == METHODS.options.keys()
    papers = surgery.methods()
    for paper in ("2001.06782", "2103.02631", "2110.14048", "IMPnRXEWpvr", "2402.15638"):
        assert paper in papers
    assert rows(surgery.trunks()).keys() == TRUNKS.options.keys()
    assert "2311.11385" in rows(surgery.trunks())["moore"][1]


def test_results_are_of_the_runs():
    found = rows(results.runs("quickstart_seed0", "quickstart_seed1"))
    assert found["reach-v3"] == ["0.94 [0.84, 0.98]", "0.92 [0.81, 0.97]"]
    assert found["mean"] == ["**0.980**", "**0.973**"]


def test_which_simulator_trained_a_run():
    assert set(results.simulators("quickstart_seed0").values()) == {"metaworld"}  # as it was told
    assert set(results.simulators("mt10_cpu_pcgrad_seed1").values()) == {
        "metaworld"
    }  # had no other
    found = results.simulators("mt10_cpu_seed1")
    assert list(found.values()).count("envpool") == 6 and found["pick-place-v3"] == "metaworld"


def test_times():
    found = rows(speed.updates("bench_update.json", "mt10", "mt50"))
    assert found["one full update, `pcgrad"] == ["138 ms", "705 ms"]
    assert found["PCGrad by TorchJD's `mtl_backward"] == ["538 ms", "–"]
    assert rows(speed.engines())["MT10, 4096"][0] == "11,780 ms"
    assert rows(speed.trunk_updates())["moore"] == ["713 ms", "815 ms", "1.14", "155 MiB"]
    assert rows(speed.environments())["all tasks on EnvPool"] == ["4,045", "7,836"]
    assert rows(speed.preset_updates())["one full update, `none"] == ["36.3 ms", "23.2 ms"]
