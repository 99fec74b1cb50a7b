"""The README is short, and what it shows works as it stands there."""

import json
import re

import pytest
from doc_pages import PAGES, README, ROOT, anchors, commands, links, name, read

from mtrl.config.train import TrainConfig


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 150
    assert len(README.read_bytes()) <= 8 * 1024


def test_two_commands_set_up_and_one_trains_and_one_tests():
    found = commands(README)
    start = found.index("pip install .")
    assert found[start + 1] == "mtrl-train --benchmark mt10 --surgery pcgrad"
    start = found.index('pip install -e ".[test]"')
    assert found[start + 1] == "pytest"
    assert 'pip install -q -e ".[test]" && pytest' in read(ROOT / ".ci/run")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configurations_that_are_named_exist(page):
    for path in set(re.findall(r"\b(?:configs|results)/\w[\w/]*\.yaml", read(page))):
        TrainConfig.from_yaml(ROOT / path)


@pytest.mark.parametrize("preset", ["quickstart", "mt10_cpu"])
def test_the_table_of_results_is_of_the_runs(preset):
    """Mean success of each seed, and the environment steps of the shortest and the longest run."""
    (row,) = re.findall(rf"^\| `{preset}` \|.*$", read(README), re.MULTILINE)
    means, steps = [], []
    for seed in range(3):
        folder = ROOT / f"results/{preset}_seed{seed}"
        means.append(json.loads(read(folder / "eval.json"))["mean_success_rate"])
        steps.append(TrainConfig.from_yaml(folder / "config.yaml").total_timesteps)
    assert ", ".join(f"{mean:.3f}".lstrip("0") for mean in means) in row
    assert all(f"{count:,}" in row for count in (min(steps), max(steps)))


def test_the_costs_of_surgery_are_those_measured():
    ratios = json.loads(read(ROOT / "results/bench_update.json"))["ratios"]
    text = " ".join(read(README).split())
    for method in ("pcgrad", "rotograd"):
        assert f"{100 * (ratios[f'mt10/{method}/none'] - 1):.0f}%" in text
    published = ratios["mt10/published/pcgrad"] * ratios["mt10/pcgrad/none"]
    rotation = ratios["mt10/rotograd, matrix_exp/none"]
    assert f"take {published:.0f} and {rotation:.0f} times as long as" in text
