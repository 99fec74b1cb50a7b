"""Runs of a grid, their folder names and their command lines."""

import re

import pytest

from mtrl.cli.sweep_options import parse
from mtrl.config import presets
from mtrl.config.presets import preset
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.sweep.folder import SweepFolder
from mtrl.sweep.grid import points, with_copies
from mtrl.sweep.jobs import Known, placed
from mtrl.sweep.plan import FIELDS, Plan, words
from mtrl.sweep.rules import Halving, Rules, Threshold

YAML = """
config: quickstart
seeds: [0, 1]
grid:
  surgery: [none, pcgrad]
  hidden_sizes: [[64, 64], [32]]
  total_timesteps: 60_000
variants:
  recipe: {}
  plain: {layer_norm: false, critic_bins: null, trunk: mlp}
exclude:
  - {variant: plain, surgery: pcgrad}
"""


def read(tmp_path, text=YAML, **flags):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return Plan.read(path, flags)


def known(found):
    return {point.method: Known(60_000, ("reach-v3",)) for point in found}


def test_a_file_gives_all_combinations_except_excluded_ones(tmp_path):
    found = points(read(tmp_path), "cpu")
    assert len(found) == 2 * (2 * 2 * 2 - 2)
    seen = {(p.label, p.config.seed) for p in found}
    assert len(seen) == len(found)
    assert ("plain, none, hidden_sizes 64 64", 1) in seen
    assert not any("plain" in label and "pcgrad" in label for label, _ in seen)
    assert [p.config.seed for p in found] == [0] * 6 + [1] * 6  # all methods start early
    for point in found:
        changes = {"surgery": point.config.learner.surgery, "seed": point.config.seed}
        changes |= {"hidden_sizes": point.config.agent.hidden_sizes, "total_timesteps": 60_000}
        if point.label.startswith("plain"):
            changes |= {"layer_norm": False, "critic_bins": None, "trunk": "mlp"}
        assert point.config == preset("quickstart", device="cpu", **changes)


def test_flags_form_a_grid_and_replace_axes_of_the_file(tmp_path):
    plan = read(tmp_path, surgery=("rotograd",), seeds=("7",))
    found = points(plan.model_copy(update={"exclude": ()}), "cpu")
    assert {p.config.learner.surgery for p in found} == {"rotograd"}
    assert {p.config.seed for p in found} == {7}
    alone = Plan.read(None, {"benchmark": ("mt10", "mt50"), "surgery": ("none", "pcgrad")})
    bases = {(p.config.benchmark, p.base) for p in points(alone, "cpu")}
    assert bases == {("mt10", "mt10_cpu"), ("mt50", "mt50_cpu")}  # as mtrl-train starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--halve-by 2", "halve_by: expected --halve-on with it, got none"),
        ("--goal eval/return/mean", "goal: expected --search with it, got none"),
        ("--halve-from 100", "halve_on: expected --halve-on and --halve-from together"),
        ("--gpus-per-run 1", "gpus_per_run: expected --backend ray with it, got local"),
        ("--max-parallel 1024", "max_parallel: expected at most the"),
    ],
)
def test_options_without_effect_are_rejected(arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(["-o", "out", "--device", "cpu", *arguments.split()])


def test_a_curriculum_comes_from_a_configuration_file(tmp_path):
    path = tmp_path / "stages.yaml"
    path.write_text("base: quickstart\ncurriculum: {0: [reach-v3], 9_000: [reach-v3, push-v3]}\n")
    found = points(Plan.read(None, {"config": (str(path), "quickstart")}), "cpu")
    assert [point.config.transfer.tasks for point in found] == [("reach-v3", "push-v3"), None]
    assert len({point.name for point in found}) == 2
    _, copies = with_copies(found, tmp_path / "configs")
    path.write_text(*copies.values())
    assert TrainConfig.from_yaml(path).transfer == found[0].config.transfer


def test_an_unknown_device_is_rejected():
    with pytest.raises(UsageError, match=r"device: input should be .*, got 'gpu'"):
        points(Plan.read(None, {"device": ("gpu",)}), "gpu")


def test_a_switch_needs_no_value():
    sweep = parse("-o out --device cpu --layer-norm --gamma 0.9 0.99".split())
    assert sweep.plan.grid["layer_norm"] == ("true",) and len(sweep.plan.grid["gamma"]) == 2


def test_a_rule_beyond_the_longest_run_is_rejected():
    rules = Rules(stop_when=(Threshold.parse("eval/return/mean < 1 at 2000"),))
    rules.expect_steps(2_000)
    with pytest.raises(UsageError, match=r"stop_when: expected at most the 1999 .*, got 2000"):
        rules.expect_steps(1_999)
    with pytest.raises(UsageError, match=r"halve_from: expected at most the 99 "):
        Rules(halving=Halving(tag="eval/return/mean", start=100)).expect_steps(99)


def test_words_of_a_list_flag():
    assert words("hidden_sizes", ["256", "256"]) == (("256", "256"),)
    assert words("hidden_sizes", ["256 256", "32"]) == (("256", "256"), ("32",))
    spec = "cb:Two(every=10, at=2)"  # its space is within one value
    assert words("callbacks", [spec, "cb:One"]) == ((spec, "cb:One"),)
    assert words("callbacks", [f"{spec} cb:One", spec]) == ((spec, "cb:One"), (spec,))
    assert words("surgery", ["none", "pcgrad"]) == ("none", "pcgrad")
    assert words("layer_norm", []) == ("true",)


def test_the_command_line_reproduces_the_configuration(tmp_path):
    """Parse the command line of each run with the parser of the command."""
    from mtrl.cli.flags import Parser, add_flags

    folder = SweepFolder(tmp_path / "sweep")
    found = points(read(tmp_path), "cpu")
    for planned in placed(folder, found, 3, known=known(found), rules=Rules()):
        parser = Parser()
        parser.add_argument("--config")
        parser.add_argument("--resume-if-exists", action="store_true")
        add_flags(parser, TrainConfig())
        given = parser.parse(planned.entry.arguments)
        assert given.pop("resume_if_exists") and given.pop("config") == "quickstart"
        config, _ = presets.override(preset("quickstart"), given)
        placement = {"threads": 3, "workers": 3, "run_dir": folder.run_dir(planned.entry.name)}
        assert config == planned.point.config.model_copy(update=placement)
        assert (config.agent.critic_bins is None) == planned.entry.label.startswith("plain")


def test_a_name_depends_only_on_the_configuration(tmp_path):
    before = {p.name: p for p in points(read(tmp_path), "cpu")}
    wider = YAML.replace("[none, pcgrad]", "[none, pcgrad, rotograd]").replace("[0, 1]", "[2, 0]")
    after = {p.name: p for p in points(read(tmp_path, wider), "cpu")}
    for name in before.keys() & after.keys():
        assert before[name].config == after[name].config
    assert len(before.keys() & after.keys()) == 6  # seed 0
    by_hand = Plan.read(
        None,
        {
            "config": ("quickstart",),
            "surgery": ("pcgrad",),
            "hidden_sizes": (("32",),),
            "total_timesteps": ("6e4",),
        },
    )
    (point,) = points(by_hand, "cuda")
    assert point.name in before and point.config.device == "cuda"
    assert re.fullmatch(r"3-tasks_pcgrad_[0-9a-f]{8}_seed0", point.name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {surgry: [none]}", "grid: unknown 'surgry'; did you mean 'surgery'"),
        ("grids: {}", "key: unknown 'grids'; did you mean 'grid'"),
        ("grid: {seed: [0]}", "grid: seed cannot be varied: use seeds"),
        ("grid: {run_dir: a}", "grid: run_dir cannot be varied"),
        ("grid: {curriculum: a.yaml}", "grid: curriculum cannot be varied: write it in a "),
        ("variants: {a: {gama: 1}}", "variants.a: unknown 'gama'; did you mean 'gamma'"),
        ("grid: {gamma: 0.9}\nvariants: {a: {gamma: 1}}", "gamma: expected one place for it, got"),
        ("seeds: [0, 0]", "seeds: expected each value once, got [0, 0]"),
        ("seeds: 0..2", "seeds: input should be a valid integer"),
        ("grid:", "grid: input should be a mapping from names to values, got None"),
        ("grid: {surgery: []}", "grid: surgery: expected a value, got none"),
        ("search: {surgery: []}", "search: surgery: expected a value, got none"),
        ("seeds: []", "seeds: "),
        ("[1]", "grid: expected a mapping"),
        ("search: {gamma: {low: 1, high: 0}}", "low: expected less than high"),
        ("search: {gamma: {low: 0, high: 1, log: true}}", "log: expected low above 0"),
    ],
)
def test_an_invalid_file_is_rejected_with_the_field(tmp_path, text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {gamma: [0.9, 2]}", "gamma: input should be less than or equal to 1, got 2"),
        ("grid: {gamma: [0.9, 0.90]}", "expected each run once, got gamma 0.9 seed 0 twice"),
        ("grid: {threads: [1, 2]}", "expected each run once, got threads 1 seed 0 and threads 2"),
        ("exclude: [{surgery: pcgrad}]", "exclude: expected a point with {'surgery': 'pcgrad'"),
        ("exclude: [{seed: 0}]", "exclude: expected remaining points, got none"),
        ("config: no-such", "config: unknown 'no-such'"),
    ],
)
def test_invalid_points_are_rejected(tmp_path, text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        points(read(tmp_path, text), "cpu")


def test_a_base_file_is_copied_before_it_or_its_own_base_changes(tmp_path):
    base, below = tmp_path / "my base.yaml", tmp_path / "below.yaml"
    base.write_text("base: below.yaml\ngamma: 0.9\n")
    below.write_text("base: quickstart\ntasks: [reach-v3]\n")
    plan = Plan.read(None, {"config": (str(base),), "surgery": ("none", "pcgrad")})
    expected = preset("quickstart", tasks=("reach-v3",), gamma=0.9, device="cpu", surgery="none")
    found, copies = with_copies(points(plan, "cpu"), tmp_path / "configs")
    assert found[0].config == expected
    ((path, text),) = copies.items()
    assert {point.base for point in found} == {str(path)}
    path.parent.mkdir()
    path.write_text(text)
    for changed in (base, below):
        changed.write_text(changed.read_text() + "batch_size: 16\n")
        (other,) = with_copies(points(plan, "cpu")[:1], tmp_path / "configs")[1]
        assert other != path
    changes = {"device": "cpu", "surgery": "none"}
    assert presets.override(presets.named(str(path)).config, changes)[0] == expected


def test_files_stand_relative_to_the_grid_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("wide", "narrow"):
        (tmp_path / f"{name}.yaml").write_text("base: quickstart\ntasks: [reach-v3]\n")
    text = "config: [wide.yaml, quickstart, narrow.yaml]\ngrid: {surgery: [none, pcgrad]}\n"
    text += "exclude: [{config: [narrow.yaml, quickstart], surgery: pcgrad}]\n"
    with pytest.raises(UsageError, match="which are equal"):
        points(read(tmp_path, text), "cpu")
    (tmp_path / "wide.yaml").write_text(f"base: {tmp_path}/narrow.yaml\ngamma: 0.9\n")
    labels = [point.label for point in points(read(tmp_path, text), "cpu")]
    assert labels == ["wide, none", "wide, pcgrad", "quickstart, none", "narrow, none"]


def test_every_field_can_be_varied_or_gives_a_reason():
    assert {"surgery", "hidden_sizes", "envs_per_task", "gamma"} <= FIELDS.keys()
    assert FIELDS.keys() == TrainConfig().flat().keys()


@pytest.mark.parametrize(
    "text", ["eval/success_rate/mean 0.2 at 5", "a < b at 5", "a < 1", "a == 1 at 5", ""]
)
def test_a_malformed_rule_is_rejected(text):
    with pytest.raises(UsageError, match="stop_when: expected TAG < NUMBER at STEPS"):
        Threshold.parse(text)


def test_a_rule_is_applied_once_to_the_first_value_from_its_step():
    rule = Threshold.parse("eval/success_rate/mean < 0.2 at 1_000")
    step, tag = "time/total_timesteps", "eval/success_rate/mean"
    early, other = {step: 900, tag: 0.0}, {step: 1_000, "time/fps": 1.0}
    assert rule.verdict([early, other]) is None
    good, bad = {step: 1_100, tag: 0.3}, {step: 1_100, tag: 0.1}
    assert rule.verdict([early, other, good, {step: 1_200, tag: 0.0}]) is None
    assert rule.verdict([early, other, bad]) == f"{rule.text}: it was 0.1 at 1100"


def test_a_tag_that_is_not_logged_is_rejected():
    rules = Rules(stop_when=(Threshold.parse("eval/succes_rate/mean < 1 at 1"),))
    with pytest.raises(UsageError, match="did you mean 'eval/success_rate/mean'"):
        rules.expect_tags(("reach-v3",))
    Rules(stop_when=(Threshold.parse("eval/return/reach-v3 < 1 at 1"),)).expect_tags(("reach-v3",))
