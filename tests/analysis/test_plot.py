"""mtrl-plot from run folders to figures and tables."""

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fake_runs import NETWORKS, write_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from mtrl.analysis.comparison import draw_comparison
from mtrl.analysis.conflicts import conflict_fraction, draw_conflicts
from mtrl.analysis.methods import group
from mtrl.analysis.runs import read_cosines, read_run
from mtrl.analysis.tables import summarise
from mtrl.cli.plot import main
from mtrl.config.train import TrainConfig
from mtrl.evaluation.scores import Evaluation

TASKS = ("reach-v3", "push-v3", "button-press-topdown-wall-v3")


def config(seed: int = 0, surgery: str = "none", **more: object) -> TrainConfig:
    learner = {"surgery": surgery} | more.pop("learner", {})
    tree = {"tasks": TASKS, "seed": seed, "learner": learner, "total_timesteps": 600_000}
    often = {"log_every": 20_000, "eval_every": 60_000, "diagnose_every": 60_000}
    return TrainConfig.model_validate(tree | often | more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two methods with three seeds each, one of them killed; a third with one seed."""
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


def test_what_is_written_is_the_same_every_time(runs, tmp_path, capsys):
    arguments = [*paths(runs), "--cosine", f"{runs}/pcgrad_0", "-o"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "b")]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    figures = "curves_mean curves_tasks scores improvement conflict_fraction cosines".split()
    figures += [f"cosines_{network}" for network in NETWORKS]
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    assert files.keys() == expected | {"table.md", "table.csv"}
    assert files["table.md"].decode() in printed
    for name in figures:
        assert b"<dc:date>" not in files[f"{name}.svg"]
        with Image.open(tmp_path / f"a/{name}.png") as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            inches = image.width / 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
        assert inches == pytest.approx({"cosines": 6.75, "curves_tasks": 4.05}.get(name, 3.25))


def test_the_table_against_the_files_it_is_made_of(runs, tmp_path):
    assert main([*paths(runs), "-o", str(tmp_path)]) == 0
    found = table(tmp_path)
    stored = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(runs.glob("*/eval.json"))
    }
    assert len(stored) == 6  # not the killed one
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
        best = found[surgery, "best quick evaluation on the way"]
        assert float(best["value"]) == pytest.approx(np.mean(quick))
    assert found["pcgrad", "seeds"]["remark"] == "and 1 unfinished"
    row = stored["rotograd_0"]["tasks"][0]  # one seed: Wilson's interval of its own evaluation
    ends = found["rotograd", TASKS[0]]
    assert float(ends["low"]) == pytest.approx(row["wilson_low"])
    assert float(ends["high"]) == pytest.approx(row["wilson_high"])
    assert found["rotograd", "mean"]["low"] == ""  # one seed says nothing of others
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"{runs}/pcgrad_2 (pcgrad, seed 2), at 300,000 steps" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5}


def test_logs_are_read_as_they_were_written(runs, tmp_path):
    run = read_run(runs / "pcgrad_2")
    np.testing.assert_array_equal(run.steps, 60_000 * np.arange(1, 6))
    np.testing.assert_allclose(run.axis("hours"), 7 * run.steps / 600_000)
    np.testing.assert_allclose(run.axis("updates"), np.maximum(0, run.steps - 12_000) // 3)
    # The table of numbers alone, as results are kept; a killed process leaves half a line.
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


def test_methods_are_named_by_what_differs(tmp_path):
    made = {
        name: read_run(write_run(tmp_path / name, settings))
        for name, settings in {
            "none_0": config(0),
            "none_1": config(1, total_timesteps=720_000, eval_every=90_000),
            "pcgrad_0": config(0, "pcgrad", learner={"batch_size": 64}),
            "wide_0": config(0, agent={"hidden_sizes": [512, 512]}),
        }.items()
    }

    def names(*chosen: str, **settings: object) -> list[tuple[str, int]]:
        methods = group([made[name] for name in chosen], **settings)
        return [(method.name, len(method.runs)) for method in methods]

    assert names("none_0", "none_1") == [("none", 2)]  # a longer run is no other method
    assert names("pcgrad_0", "none_0", "none_1") == [("pcgrad", 1), ("none", 2)]
    assert names("none_0", "wide_0") == [
        ("hidden_sizes=400 400 400", 1),
        ("hidden_sizes=512 512", 1),
    ]
    assert names("none_0", "wide_0", "pcgrad_0")[2] == (
        "hidden_sizes=400 400 400, pcgrad, batch_size=64",
        1,
    )
    assert names("none_0", "wide_0", "pcgrad_0", by=["surgery"]) == [("none", 2), ("pcgrad", 1)]
    labels = {"none": "MT-SAC"}
    assert names("none_0", "pcgrad_0", labels=labels) == [("MT-SAC", 1), ("pcgrad", 1)]
    text = summarise(group([made["none_0"], made["pcgrad_0"]]), "stratified").markdown()
    assert "batch_size: 128 (none), 64 (pcgrad)" in text and "in surgery" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "runs: expected a run folder, or --cosine with one, got none"),
        ("RUNS/none_0", "required: -o/--out"),
        ("RUNS -o OUT", "runs: expected a run folder with config.yaml and progress.json or"),
        ("RUNS/none_0 RUNS/none_0/ -o OUT", "expected every seed of a method once, got"),
        ("RUNS/none_0 TMP/other -o OUT", "expected the same tasks in the same order"),
        ("TMP/early -o OUT", "expected a run with an evaluation in its logs, got none in"),
        ("TMP/damaged -o OUT", "cannot read the logs in"),
        ("RUNS/none_0 -o RUNS/none_0/config.yaml", "out: expected a folder, got the file"),
        ("RUNS/none_0 -o OUT --labels none", "labels: expected OLD=NEW, got 'none'"),
        ("RUNS/none_0 -o OUT --labels nome=x", "labels: unknown 'nome'; did you mean 'none'?"),
        ("RUNS/none_0 -o OUT --group-by surgry", "did you mean 'surgery'?"),
        ("RUNS/none_0 -o OUT --x days", "x: input should be 'steps', 'updates' or 'hours'"),
        ("--cosine TMP/early -o OUT", "cosine: expected a run folder with cosines.jsonl"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_line(runs, tmp_path, capsys, arguments, message):
    write_run(tmp_path / "early", config(), stop_at=20_000)
    write_run(tmp_path / "other", config().model_copy(update={"tasks": TASKS[:2]}))
    shutil.copytree(runs / "none_0", tmp_path / "damaged")
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


def test_evaluations_outside_the_log_rows_have_no_hour(tmp_path):
    """No time is made up for them: the run is drawn over steps, and refused over hours."""
    run = read_run(write_run(tmp_path / "a", config(log_every=300_000), stop_at=240_000))
    assert np.isnan(run.axis("hours")).all() and np.isfinite(run.axis("steps")).all()
    draw_comparison(group([run]), "steps", "stratified")
    with pytest.raises(ValueError, match="x: expected logs that tell the hours of an evaluation"):
        draw_comparison(group([run]), "hours", "stratified")


def lines(axes) -> list:
    """Curves, without grids."""
    return [line for line in axes.get_lines() if len(line.get_xdata())]


def test_curves_show_where_seeds_are_missing(runs):
    methods = group([read_run(Path(path)) for path in paths(runs)])
    figures = draw_comparison(methods, "hours", "stratified")
    curves, seeds = figures["curves_mean"].axes
    counts = {line.get_ydata()[0].round() for line in lines(seeds)}
    assert counts == {1, 2, 3}
    dashed = [line for line in lines(curves) if line.get_linestyle() != "-"]
    whole = [line for line in lines(curves) if line.get_linestyle() == "-"]
    assert len(whole) == 3 and dashed  # a solid stretch of each method
    assert max(line.get_xdata().max() for line in lines(curves)) == pytest.approx(7)
    alone = draw_comparison(methods[:1], "steps", "stratified")
    assert len(alone["curves_mean"].axes) == 1 and "improvement" not in alone
    (curve,) = lines(alone["curves_mean"].axes[0])
    finals = methods[0].scores.mean()
    assert curve.get_ydata()[-1] == pytest.approx(finals)
    assert curve.get_xdata()[-1] == 600_000


@pytest.mark.parametrize("benchmark", ["mt10", pytest.param("mt50", marks=pytest.mark.slow)])
def test_everything_is_legible_at_the_size_it_is_printed(tmp_path, benchmark):
    """8 pt are 8 pt, no name is cut off, and none runs into another."""
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
        FigureCanvasAgg(figure).draw()
        width, height = figure.get_size_inches()
        assert width in (3.25, 6.75) and height <= 9
        renderer = figure.canvas.get_renderer()
        room = figure.bbox
        texts = [*figure.texts, *(text for legend in figure.legends for text in legend.texts)]
        for axes in figure.axes:
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        texts = [text for text in texts if text.get_visible() and text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        for text, box in boxes:
            inside = box.x0 >= room.x0 - 1 and box.x1 <= room.x1 + 1
            assert inside and box.y0 >= room.y0 - 1 and box.y1 <= room.y1 + 1, (name, text)
        assert min(text.get_fontsize() for text in texts) >= 6
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


def test_conflicts_are_those_of_the_file(runs):
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


def test_evaluations_know_no_order_of_seeds(runs):
    """The same runs in another order give the same numbers but not the same columns."""
    there = group([read_run(Path(path)) for path in paths(runs)])
    back = group([read_run(Path(path)) for path in reversed(paths(runs))])
    assert [m.name for m in back] == [m.name for m in there][::-1]
    rows = [summarise(methods, "stratified").rows for methods in (there, back)]
    for a, b in zip(*rows, strict=True):
        np.testing.assert_allclose([c[0] for c in a.cells], [c[0] for c in b.cells][::-1])


def test_fake_runs_are_judged_like_real_ones(runs):
    """The generator's eval.json is the protocol's own file."""
    stored = json.loads((runs / "none_0/eval.json").read_text())
    success = np.zeros((3, 50), bool)
    for t, row in enumerate(stored["tasks"]):
        success[t, : row["successes"]] = True
    again = Evaluation(TASKS, 0, success.astype(int), 100.0 * success, np.zeros((3, 50, 0, 4)))
    assert again.rows() == stored["tasks"]
