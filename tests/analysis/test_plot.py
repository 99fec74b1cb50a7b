"""mtrl-plot from run folders to figures and tables."""

import base64
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from fake_runs import NETWORKS, write_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import mtrl
from mtrl.analysis.comparison import draw_comparison
from mtrl.analysis.conflicts import conflict_fraction, draw_conflicts
from mtrl.analysis.cosines import read_cosines
from mtrl.analysis.methods import differences, group
from mtrl.analysis.runs import read_run
from mtrl.analysis.statistics import curve
from mtrl.analysis.style import COLUMN, TEXT, between, number
from mtrl.analysis.tables import summarise
from mtrl.cli.plot import main
from mtrl.config.presets import preset
from mtrl.config.train import TrainConfig
from mtrl.envs.benchmarks import Benchmark
from mtrl.errors import UsageError
from mtrl.evaluation.scores import Evaluation

HOW = ("steps", "stratified")
TASKS = ("reach-v3", "push-v3", "button-press-topdown-wall-v3")


def config(seed: int = 0, surgery: str = "none", **more: object) -> TrainConfig:
    often = {"log_every": 20_000, "eval_every": 60_000, "diagnose_every": 60_000}
    tree = {"tasks": TASKS, "seed": seed, "surgery": surgery, "total_timesteps": 600_000}
    return TrainConfig(**tree | often | more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two methods with three seeds each, one run of them killed; a third method with one seed."""
    folder = tmp_path_factory.mktemp("runs")
    for surgery, n_seeds in (("none", 3), ("pcgrad", 3), ("rotograd", 1)):
        for seed in range(n_seeds):
            killed = 300_000 if (surgery, seed) == ("pcgrad", 2) else None
            write_run(folder / f"{surgery}_{seed}", config(seed, surgery), killed, 5 + seed)
    return folder


def paths(folder: Path) -> list[str]:
    return sorted(map(str, folder.iterdir()))


def table(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "table.csv").open(encoding="utf-8") as file:
        return {(row["method"], row["quantity"]): row for row in csv.DictReader(file)}


def test_output_is_reproducible(runs, tmp_path, capsys):
    arguments = [*paths(runs), "--cosine", f"{runs}/pcgrad_0", "-o"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "b")]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    figures = "curves_mean curves_tasks scores improvement conflict_fraction cosines".split()
    figures += [f"cosines_{network}" for network in NETWORKS]
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
    assert files.keys() == expected | {"table.md", "table.csv"}
    assert files["table.md"].decode() in printed
    for name in figures:
        assert files[f"{name}.pdf"].startswith(b"%PDF") and b"/Type3" not in files[f"{name}.pdf"]
        with Image.open(tmp_path / f"a/{name}.png") as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            inches = image.width / 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
        assert inches == pytest.approx({"cosines": 6.75, "curves_tasks": 4.05}.get(name, 3.25))


def test_the_table_agrees_with_the_run_folders(runs, tmp_path):
    assert main([*paths(runs), "-o", str(tmp_path)]) == 0
    found = table(tmp_path)
    stored = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(runs.glob("*/eval.json"))
    }
    assert len(stored) == 6  # not the killed run
    for surgery, n in (("none", 3), ("pcgrad", 2), ("rotograd", 1)):
        results = [stored[f"{surgery}_{seed}"] for seed in range(n)]
        rates = np.array([[row["success_rate"] for row in r["tasks"]] for r in results])
        assert float(found[surgery, "mean"]["value"]) == pytest.approx(rates.mean())
        for t, task in enumerate(TASKS):
            assert float(found[surgery, task]["value"]) == pytest.approx(rates[:, t].mean())
        worst = found[surgery, "worst task"]
        assert worst["remark"] == TASKS[int(rates.mean(0).argmin())]
        assert float(worst["value"]) == pytest.approx(rates.mean(0).min())
        assert float(found[surgery, "seeds"]["value"]) == n
        assert float(found[surgery, "steps per task"]["value"]) == 200_000
        hours = found[surgery, "wall-clock time [h]"]
        assert (float(hours["low"]), float(hours["high"])) == (5, 5 + n - 1)
        updates = found[surgery, "updates"]
        assert float(updates["value"]) == results[0]["updates"]
        quick = []
        for seed in range(n):
            lines = (runs / f"{surgery}_{seed}/progress.json").read_text().splitlines()
            means = [json.loads(line).get("eval/success_rate/mean") for line in lines]
            quick.append(max(value for value in means[:-1] if value is not None))
        best = found[surgery, "best quick evaluation during training"]
        assert float(best["value"]) == pytest.approx(np.mean(quick))
    assert found["pcgrad", "seeds"]["remark"] == "and 1 unfinished"
    row = stored["rotograd_0"]["tasks"][0]  # one seed: Wilson's interval of its evaluation
    ends = found["rotograd", TASKS[0]]
    assert float(ends["low"]) == pytest.approx(row["wilson_low"])
    assert float(ends["high"]) == pytest.approx(row["wilson_high"])
    assert found["rotograd", "mean"]["low"] == ""  # one seed has no interval
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"{runs}/pcgrad_2 (pcgrad, seed 2), at 300,000 steps" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}


def test_logs_are_read_as_they_were_written(runs, tmp_path):
    run = read_run(runs / "pcgrad_2")
    np.testing.assert_array_equal(run.steps, 60_000 * np.arange(1, 6))
    np.testing.assert_allclose(run.axis("hours"), 7 * run.steps / 600_000)
    np.testing.assert_allclose(run.axis("updates"), np.maximum(0, run.steps - 12_000) // 3)
    # Only progress.csv, as kept in results/; a killed process leaves a partial line.
    for name in ("config.yaml", "progress.csv"):
        shutil.copy(runs / "pcgrad_2" / name, tmp_path)
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("0.5,")
    for again in (read_run(tmp_path), read_run(runs / "pcgrad_2")):
        np.testing.assert_array_equal(again.scores, run.scores)
        np.testing.assert_array_equal(again.clock, run.clock)
    shutil.copy(runs / "pcgrad_2/progress.json", tmp_path)
    with (tmp_path / "progress.json").open("a") as file:
        file.write('{"eval/success_ra')
    np.testing.assert_array_equal(read_run(tmp_path).scores, run.scores)


def test_a_run_that_is_being_extended_is_unfinished(runs, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(runs / "none_0", folder)
    assert read_run(folder).final is not None
    longer = TrainConfig.from_yaml(folder / "config.yaml")
    longer = longer.model_copy(update={"total_timesteps": 900_000})
    (folder / "config.yaml").write_text(longer.to_yaml())
    assert read_run(folder).final is None


def test_methods_are_named_by_their_differences(tmp_path):
    made = {
        name: read_run(write_run(tmp_path / name, settings))
        for name, settings in {
            "none_0": config(0),
            "none_1": config(1, total_timesteps=720_000, eval_every=90_000),
            "pcgrad_0": config(0, "pcgrad", batch_size=64),
            "wide_0": config(0, hidden_sizes=(512, 512)),
        }.items()
    }

    def names(*chosen: str, **settings: object) -> list[tuple[str, int]]:
        methods = group([made[name] for name in chosen], **settings)
        return [(method.name, len(method.runs)) for method in methods]

    assert names("none_0", "none_1") == [("none", 2)]  # a longer run is the same method
    assert names("pcgrad_0", "none_0", "none_1") == [("pcgrad", 1), ("none", 2)]
    assert names("none_0", "wide_0") == [("hidden_sizes=3×400", 1), ("hidden_sizes=2×512", 1)]
    # As few fields as distinguish them; batch_size is in the footnote.
    assert names("none_0", "wide_0", "pcgrad_0") == [
        ("none, hidden_sizes=3×400", 1),
        ("none, hidden_sizes=2×512", 1),
        ("pcgrad, hidden_sizes=3×400", 1),
    ]
    assert names("none_0", "wide_0", "pcgrad_0", by=["surgery"]) == [("none", 2), ("pcgrad", 1)]
    text = summarise(group([made["none_0"], made["pcgrad_0"]]), "stratified").markdown()
    assert "batch_size: 128 (none), 64 (pcgrad)" in text and "in surgery" not in text


def test_methods_get_the_users_labels(runs):
    found = [read_run(Path(path)) for path in paths(runs)]

    def names(**labels: str) -> list[str]:
        return [method.name for method in group(found, labels=labels)]

    assert names() == ["none", "pcgrad", "rotograd"]
    assert names(none="MT-SAC", rotograd="RotoGrad") == ["MT-SAC", "pcgrad", "RotoGrad"]
    by_run = {f"{runs}/pcgrad_2": "PCGrad", "none_*": "MT-SAC", f"{runs}/rot*": "RotoGrad"}
    assert names(**by_run) == ["MT-SAC", "PCGrad", "RotoGrad"]
    for labels, message in (
        ({"nome": "x"}, "unknown 'nome'; did you mean 'none'?.* or a glob of it"),
        ({f"{runs}/*": "x"}, "matches none and pcgrad and rotograd; --group-by"),
        ({"none": "x", "none_0": "y"}, "expected one label for none, got 'x' and 'y'"),
        ({"none": "x", "pcgrad": "x"}, "expected a unique name for each method, got 'x' twice"),
    ):
        with pytest.raises(UsageError, match=message):
            names(**labels)


def test_two_presets_differ_in_a_footnote_not_in_a_legend(tmp_path):
    """They differ in twenty settings; figures name as many as fit, the table names all."""
    short = {"tasks": TASKS, "total_timesteps": 600_000, "eval_every": 60_000}
    runs = [
        read_run(write_run(tmp_path / name, preset(name).model_copy(update=short)))
        for name in ("mt10_cpu", "mt10_plain")
    ]
    methods = group(runs)
    assert [method.name for method in methods] == ["trunk=residual", "trunk=mlp"]
    assert len(differences(methods)) > 12
    for figure in draw_comparison(methods, "steps", "stratified").values():
        text = "".join(legend.get_title().get_text() for legend in figure.legends)
        assert text.split()[:5] == ["They", "also", "differ", "in", "actor_hidden_sizes,"]
        assert text.replace("\n", " ").endswith("more settings: see the table.")
        expect_legible(figure)
    notes = summarise(methods, "stratified").notes
    assert sum(note.startswith("Methods differ in ") for note in notes) == len(differences(methods))
    named = group(runs, labels={"mt10_cpu": "ours", "mt10_plain": "published"})
    for figure in draw_comparison(named, "steps", "stratified").values():
        assert all("differ" not in legend.get_title().get_text() for legend in figure.legends)


def test_runs_without_an_evaluation_are_skipped_with_a_note(runs, tmp_path, capsys):
    folder = tmp_path / "runs"
    shutil.copytree(runs / "none_0", folder / "none_0")
    write_run(folder / "early", config(1), stop_at=20_000)
    (folder / "plots").mkdir()
    assert main([*paths(folder), "-o", str(tmp_path / "out"), "--formats", "png"]) == 0
    words = capsys.readouterr().err.splitlines()
    assert len(words) == 2
    assert f"skipped {folder}/early: expected a run with an evaluation in its logs" in words[0]
    assert f"skipped {folder}/plots: expected a run folder with config.yaml" in words[1]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".md", ".csv"}


def test_tasks_in_another_order_are_the_same_tasks(runs, tmp_path):
    """progress.csv alone does not determine their order."""
    other = tmp_path / "pcgrad_9"
    write_run(other, config(9, "pcgrad").model_copy(update={"tasks": TASKS[::-1]}))
    methods = group([read_run(runs / "pcgrad_0"), read_run(other)])
    rates = [row["success_rate"] for row in json.loads((other / "eval.json").read_text())["tasks"]]
    np.testing.assert_allclose(methods[0].scores[:, 1], rates[::-1])
    assert methods[0].tasks == TASKS


@pytest.fixture(scope="module")
def returns(tmp_path_factory) -> Path:
    """Two methods with two seeds on custom tasks that do not report success."""
    makers = {f"gravity-{g}": partial(gymnasium.make, "Reacher-v5") for g in (5, 10)}
    reachers = Benchmark("reachers", makers, success_key=None)
    folder = tmp_path_factory.mktemp("returns")
    for surgery in ("none", "pcgrad"):
        for seed in range(2):
            settings = config(seed, surgery).model_copy(
                update={"benchmark": "reachers", "tasks": None}
            )
            path = folder / f"{surgery}_{seed}"
            write_run(path, settings, benchmark=reachers, tells_success=False)
    return folder


def test_tasks_scored_by_return_are_compared_by_return(returns, tmp_path):
    assert main([*paths(returns), "-o", str(tmp_path)]) == 0
    found = table(tmp_path)
    stored = [json.loads((returns / f"none_{k}/eval.json").read_text()) for k in range(2)]
    rates = np.array([[row["return_mean"] for row in each["tasks"]] for each in stored])
    for t, task in enumerate(("gravity-5", "gravity-10")):
        row = found["none", task]
        assert float(row["value"]) == pytest.approx(rates[:, t].mean())
        # Of two runs, a resample is one, the other or their mean.
        assert float(row["low"]) == pytest.approx(rates[:, t].min())
        assert float(row["high"]) == pytest.approx(rates[:, t].max())
        assert row["interval"] == "bootstrap, stratified"
    assert float(found["none", "mean"]["value"]) == pytest.approx(rates.mean())
    assert ("none", "worst task") not in found  # returns of tasks are not comparable
    assert "Scores are returns" in (tmp_path / "table.md").read_text()
    run = read_run(returns / "none_0")
    assert run.tasks == ("gravity-5", "gravity-10") and run.score == "return"
    lines = (returns / "none_0/progress.json").read_text().splitlines()
    logged = [json.loads(line).get("eval/return/gravity-10") for line in lines]
    np.testing.assert_array_equal(run.scores[:, 1], [x for x in logged if x is not None])
    figures = draw_comparison(group([read_run(Path(path)) for path in paths(returns)]), *HOW)
    assert figures["curves_mean"].axes[0].get_ylabel() == "mean return (2 seeds)"
    assert figures["scores"].get_supxlabel() == "final return"
    first, second = figures["curves_tasks"].axes
    assert first.get_ylim() != second.get_ylim()  # each task on its own scale
    assert all(axes.get_xlim()[0] <= 0 for axes in figures["scores"].axes)
    for figure in figures.values():
        expect_legible(figure)


def test_equal_task_names_of_different_benchmarks_differ(returns, tmp_path):
    """Custom tasks may have the names of other custom or Meta-World tasks."""
    shutil.copytree(returns / "none_0", tmp_path / "b")
    record = tmp_path / "b/benchmark.json"
    record.write_text(record.read_text().replace('"reachers"', '"other"'))
    with pytest.raises(UsageError, match=r"of one benchmark, got reachers of .* and other of .*b"):
        mtrl.plot([returns / "none_0", tmp_path / "b"])
    record.write_text(record.read_text().replace('"custom"', '"metaworld"'))
    with pytest.raises(UsageError, match=r"got Meta-World of .*b and reachers of"):
        mtrl.plot([tmp_path / "b", returns / "none_0"])


def test_the_score_can_be_chosen_for_all_runs(runs, returns, tmp_path, capsys):
    both = read_run(runs / "none_0", "return")
    stored = json.loads((runs / "none_0/eval.json").read_text())["tasks"]
    np.testing.assert_allclose(both.final.scores, [row["return_mean"] for row in stored])
    with pytest.raises(UsageError, match="expected eval/success_rate/ in the logs, got none"):
        read_run(returns / "none_0", "success_rate")
    # One task of three reports success.
    mixed = write_run(tmp_path / "mixed", config(5), tells_success=(True, False, False))
    assert read_run(mixed).score == "return" and read_run(mixed).tasks == TASKS
    assert read_run(mixed, "success_rate").tasks == TASKS[:1]
    assert main([str(runs / "none_0"), str(mixed), "-o", str(tmp_path / "out")]) == 2
    assert "--score return compares both" in capsys.readouterr().err
    command = [str(runs / "none_0"), str(mixed), "--score", "return", "-o", str(tmp_path / "out")]
    assert main(command) == 0


@pytest.mark.parametrize("late", [TASKS, TASKS[1:2]])
def test_evaluations_before_a_task_reported_success_are_missing_not_zero(late, tmp_path, capsys):
    """A custom task is scored by return until a step has the key; earlier rows have no rate."""
    write_run(tmp_path / "before", config(0))
    before = read_run(tmp_path / "before")
    write_run(tmp_path / "run", config(0))
    log = tmp_path / "run/progress.json"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    missing = [f"eval/success_rate/{task}" for task in late]
    missing += ["eval/success_rate/mean"] if late == TASKS else []
    for row in rows:
        if row["time/total_timesteps"] <= 180_000:
            for tag in missing:
                row.pop(tag, None)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path / "run")
    assert run.score == "success_rate" and run.tasks == TASKS
    later = before.steps > 180_000
    np.testing.assert_array_equal(run.steps, before.steps[later])
    np.testing.assert_array_equal(run.scores, before.scores[later])
    assert len(read_run(tmp_path / "run", "return").steps) == len(before.steps)
    write_run(tmp_path / "other", config(1))
    runs = [str(tmp_path / name) for name in ("run", "other")]
    for x in ("steps", "updates", "hours"):
        assert main([*runs, "--x", x, "-o", str(tmp_path / "out")]) == 0
    # Where only one seed has a rate, the curve is that seed's.
    (method,) = group([read_run(Path(path)) for path in runs])
    first = curve(method, *HOW)[0]
    assert first.n_runs == 1
    np.testing.assert_allclose(first.values[:3, 0], method.runs[1].scores[0])


def test_a_notebook_shows_what_the_command_draws(runs, tmp_path):
    """From any globs and folders; the table and every figure, without pyplot."""
    found = mtrl.plot([f"{runs}/none_*", runs / "pcgrad_0", runs / "none_0"])
    assert found.table.methods == ("none", "pcgrad") and found.skipped == ()
    assert list(found.figures) == ["curves_mean", "curves_tasks", "scores", "improvement"]
    page = found._repr_html_()
    assert page.count("<img ") == 4 and page.count("<table>") == 1 and "Wilson" in page
    encoded = re.findall(r'base64,([^"]+)"', page)
    for data in encoded:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format == "PNG" and image.width > 500
    written = found.save(tmp_path / "out", ["pdf"])
    assert sorted(path.name for path in written) == sorted(f"{name}.pdf" for name in found.figures)
    assert str(found) == (tmp_path / "out/table.md").read_text()
    one = mtrl.plot(runs / "none_0", labels={"none": "a|b <i>"})
    assert "a\\|b" in one.table.markdown() and "a|b &lt;i&gt;" in one.table.html()


def test_labels_may_contain_math_and_names_anything(tmp_path):
    tasks = {"cost $5 for $6": partial(gymnasium.make, "Reacher-v5"), "x" * 90: None}
    tasks["x" * 90] = tasks["cost $5 for $6"]
    benchmark = Benchmark("odd", tasks, success_key=None)
    settings = config().model_copy(update={"benchmark": "odd", "tasks": None})
    folder = write_run(tmp_path / "odd", settings, benchmark=benchmark, tells_success=False)
    found = mtrl.plot(folder, labels={"none": r"$\alpha = 0.1$"})
    figures = found.figures | draw_conflicts(*read_cosines(folder))
    for figure in figures.values():
        expect_legible(figure)
    titles = [axes.get_title() for axes in figures["curves_tasks"].axes]
    assert titles[0] == r"cost \$5 for \$6" and "…" in titles[1]
    with pytest.raises(UsageError, match=r"labels: cannot parse the math in "):
        mtrl.plot(folder, labels={"none": r"$\frac{a$"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"actor": [[1, 0.5], [0.5, 1]]}, "cannot read .*cosines.jsonl"),  # of two tasks
        ({"actor": [[1, 0.5], [0.5]]}, "cannot read .*cosines.jsonl"),
        ({"actor": "x"}, "cannot read .*cosines.jsonl"),
        ({}, "cannot read .*cosines.jsonl"),
    ],
)
def test_damaged_cosines_give_a_one_line_error(runs, tmp_path, line, message):
    folder = tmp_path / "damaged"
    shutil.copytree(runs / "none_0", folder)
    with (folder / "cosines.jsonl").open("a") as file:
        file.write(json.dumps({"time/total_timesteps": 700_000} | line) + "\n")
    with pytest.raises(UsageError, match=message):
        read_cosines(folder)


def test_undefined_cosines_are_grey(runs, tmp_path):
    folder = tmp_path / "unknown"
    shutil.copytree(runs / "none_0", folder)
    rows = [json.loads(line) for line in (folder / "cosines.jsonl").read_text().splitlines()]
    for row in rows:
        row["actor"] = [[math.nan] * 3] * 3
    (folder / "cosines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = draw_conflicts(*read_cosines(folder))
    shown = figures["cosines_actor"].axes[0].images[0]
    assert np.ma.getmaskarray(shown.get_array()).all()
    for figure in figures.values():
        FigureCanvasAgg(figure).draw()


@pytest.mark.parametrize("successes", [None, "many", math.nan, [3]])
def test_a_damaged_final_evaluation_gives_a_one_line_error(runs, tmp_path, successes):
    folder = tmp_path / "damaged"
    shutil.copytree(runs / "none_0", folder)
    stored = json.loads((folder / "eval.json").read_text())
    stored["tasks"][1]["successes"] = successes
    (folder / "eval.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="runs: cannot read the logs in"):
        read_run(folder)


def test_runs_without_diagnoses_give_a_hint(tmp_path):
    never = write_run(tmp_path / "never", config(diagnose_every=0))
    with pytest.raises(UsageError, match="the run has --diagnose-every 0"):
        read_cosines(never)


def test_curves_have_no_slivers_where_seeds_end_slightly_apart(tmp_path):
    """Over hours, seeds end at 10, 10.1 and 10.2; a seed that stops half-way is still shown."""
    for seed, hours in enumerate((10, 10.1, 10.2)):
        write_run(tmp_path / f"a{seed}", config(seed), hours=hours)
    runs = [read_run(tmp_path / f"a{seed}") for seed in range(3)]
    figures = draw_comparison(group(runs), "hours", "stratified")
    (axes,) = figures["curves_mean"].axes  # no panel with the number of seeds
    assert [line.get_linestyle() for line in lines(axes)] == ["-"]


def test_steps_are_written_out():
    assert [number(x) for x in (0.25, 1.5, 72, 6000, 1234567)] == [
        "0.25",
        "1.5",
        "72",
        "6,000",
        "1,234,567",
    ]
    assert between([6000, 6000]) == "6,000" and between([0.5, 0.7, 1.0]) == "0.5–1"


def test_nothing_heavy_is_imported():
    """The analysis imports neither torch nor a simulator."""
    heavy = "{'torch', 'mujoco', 'metaworld', 'gymnasium', 'stable_baselines3', 'tensorboard'}"
    modules = "mtrl.analysis.comparison, mtrl.analysis.conflicts, mtrl.cli.plot"
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "runs: expected a run folder, or --cosine with a run folder, got none"),
        ("RUNS/none_0", "required: -o/--out"),
        ("RUNS -o OUT", "runs: expected a run folder with config.yaml and progress.json or"),
        ("RUNS/none_0 TMP/copy -o OUT", "expected every seed of a method once, got"),
        ("RUNS/none_0 TMP/other -o OUT", "expected the same tasks, got the 3 of"),
        ("TMP/nowhere RUNS/none_0 -o OUT", "runs: no such folder: "),
        ("TMP/early RUNS -o OUT", "none of 2 has an evaluation yet: skipped"),
        ("TMP/early -o OUT", "expected a run with an evaluation in its logs, got none in"),
        ("TMP/damaged -o OUT", "cannot read the logs in"),
        ("RUNS/none_0 -o RUNS/none_0/config.yaml", "out: expected a folder, got the file"),
        ("RUNS/none_0 -o OUT --labels none", "labels: expected OLD=NEW, got 'none'"),
        ("RUNS/none_0 -o OUT --labels nome=x", "labels: unknown 'nome'; did you mean 'none'?"),
        ("RUNS/none_0 -o OUT --group-by surgry", "did you mean 'surgery'?"),
        ("RUNS/none_0 -o OUT --x days", "x: input should be 'steps', 'updates' or 'hours'"),
        ("--cosine TMP/early -o OUT", "cosine: expected cosines between task gradients, got"),
    ],
)
def test_what_cannot_be_drawn_gives_a_one_line_error(runs, tmp_path, capsys, arguments, message):
    write_run(tmp_path / "early", config(), stop_at=20_000)
    write_run(tmp_path / "other", config().model_copy(update={"tasks": TASKS[:2]}))
    for name in ("damaged", "copy"):
        shutil.copytree(runs / "none_0", tmp_path / name)
    (tmp_path / "damaged/eval.json").write_text("{}")
    places = {"RUNS": str(runs), "TMP": str(tmp_path), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        arguments = arguments.replace(name, place)
    if not arguments:
        arguments = f"-o {tmp_path}/out"
    capsys.readouterr()
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_many_methods_are_refused(runs):
    run = read_run(runs / "none_0")
    methods = group([run])
    with pytest.raises(ValueError, match="expected at most 8 methods"):
        draw_comparison(methods * 9, "steps", "stratified")


def test_evaluations_outside_the_log_rows_have_no_time(tmp_path):
    """Their time is not extrapolated: the run can be drawn over steps but not over hours."""
    run = read_run(write_run(tmp_path / "a", config(log_every=300_000), stop_at=240_000))
    assert np.isnan(run.axis("hours")).all() and np.isfinite(run.axis("steps")).all()
    draw_comparison(group([run]), "steps", "stratified")
    with pytest.raises(ValueError, match="x: expected logs with the hours of each evaluation"):
        draw_comparison(group([run]), "hours", "stratified")


def lines(axes) -> list:
    """Lines of curves, without grid lines."""
    return [line for line in axes.get_lines() if len(line.get_xdata())]


def test_curves_show_where_seeds_are_missing(runs):
    methods = group([read_run(Path(path)) for path in paths(runs)])
    figures = draw_comparison(methods, "hours", "stratified")
    curves, seeds = figures["curves_mean"].axes
    counts = {line.get_ydata()[0].round() for line in lines(seeds)}
    assert counts == {1, 2, 3}
    dashed = [line for line in lines(curves) if line.get_linestyle() != "-"]
    whole = [line for line in lines(curves) if line.get_linestyle() == "-"]
    assert len(whole) == 3 and dashed  # one solid stretch per method
    assert max(line.get_xdata().max() for line in lines(curves)) == pytest.approx(7)
    alone = draw_comparison(methods[:1], "steps", "stratified")
    assert len(alone["curves_mean"].axes) == 1 and "improvement" not in alone
    (curve,) = lines(alone["curves_mean"].axes[0])
    finals = methods[0].scores.mean()
    assert curve.get_ydata()[-1] == pytest.approx(finals)
    assert curve.get_xdata()[-1] == 600_000


def expect_legible(figure):
    """As wide as a column or the text block, with no text cut off or too small."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches()
    assert COLUMN <= width <= TEXT and height <= 9
    renderer, room = figure.canvas.get_renderer(), figure.bbox
    texts = list(figure.texts)
    for legend in figure.legends:
        texts += [*legend.texts, legend.get_title()]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    for text in texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= room.x0 - 1 and box.x1 <= room.x1 + 1, text
        assert box.y0 >= room.y0 - 1 and box.y1 <= room.y1 + 1, text
    assert min(text.get_fontsize() for text in texts) >= 6
    return renderer


@pytest.mark.parametrize("benchmark", ["mt10", pytest.param("mt50", marks=pytest.mark.slow)])
def test_everything_is_legible_at_print_size(tmp_path, benchmark):
    """8 pt are 8 pt, no name is cut off, and none overlaps another."""
    n = int(benchmark[2:])
    often = {"log_every": 50_000 * n, "eval_every": 50_000 * n, "diagnose_every": 100_000 * n}
    settings = {"tasks": None, "benchmark": benchmark, "total_timesteps": 400_000 * n}
    runs = [
        read_run(write_run(tmp_path / f"{s}{k}", config(k, s, **settings, **often)))
        for s in ("none", "pcgrad", "rotograd")
        for k in range(2)
    ]
    figures = draw_comparison(group(runs), "steps", "stratified")
    figures |= draw_conflicts(*read_cosines(tmp_path / "pcgrad0"))
    for name, figure in figures.items():
        renderer = expect_legible(figure)
        if name == "curves_tasks":
            assert [axes.get_title() for axes in figure.axes] == [
                task.removesuffix("-v3") for task in runs[0].tasks
            ]
            titles = [axes.title.get_window_extent(renderer) for axes in figure.axes]
            for row in range(0, n, 5):
                assert all(a.x1 < b.x0 for a, b in pairwise(titles[row : row + 5]))
        if name.startswith("cosines_"):
            (axes, _) = figure.axes
            names = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
            assert all(a.y0 >= b.y1 - 1.5 for a, b in pairwise(names))


def test_conflict_figures_agree_with_the_file(runs):
    steps, cosines, tasks = read_cosines(runs / "none_1")
    assert tasks == TASKS and list(cosines) == sorted(NETWORKS)
    np.testing.assert_array_equal(steps, 60_000 * np.arange(1, 11))
    figures = draw_conflicts(steps, cosines, tasks)
    (axes,) = figures["conflict_fraction"].axes
    for line, values in zip(lines(axes), cosines.values(), strict=True):
        by_hand = [np.mean([m[i, j] < 0 for i in range(3) for j in range(i)]) for m in values]
        np.testing.assert_allclose(line.get_ydata(), by_hand)
        np.testing.assert_allclose(conflict_fraction(values), by_hand)
    *panels, _ = figures["cosines"].axes
    assert len(panels) == 12
    shown = panels[-1].images[0]
    expected = cosines["critic2"][-2:].mean(0)  # 3, 3, 2 and 2 of ten diagnoses
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(np.asarray(shown.get_array())[off], expected[off])
    low, high = shown.get_clim()
    assert low == -high  # white is 0
    red, _, blue, _ = shown.cmap(shown.norm(low / 2))
    assert red > blue  # a conflict


def test_statistics_do_not_depend_on_the_order_of_seeds(runs):
    """The same runs in another order give the same numbers in another order of columns."""
    there = group([read_run(Path(path)) for path in paths(runs)])
    back = group([read_run(Path(path)) for path in reversed(paths(runs))])
    assert [m.name for m in back] == [m.name for m in there][::-1]
    rows = [summarise(methods, "stratified").rows for methods in (there, back)]
    for a, b in zip(*rows, strict=True):
        np.testing.assert_allclose([c[0] for c in a.cells], [c[0] for c in b.cells][::-1])


def test_fake_runs_have_real_evaluation_files(runs):
    """The eval.json of the generator is written by the protocol's own code."""
    stored = json.loads((runs / "none_0/eval.json").read_text())
    success = np.zeros((3, 50), bool)
    for t, row in enumerate(stored["tasks"]):
        success[t, : row["successes"]] = True
    returns = success * [[100.0], [200.0], [300.0]]
    again = Evaluation(TASKS, 0, success.astype(int), returns, np.zeros((3, 50, 0, 4)))
    assert again.rows() == stored["tasks"]
