"""What a user of TensorBoard sees, as requested from a running server by its page."""

import json
import re
import time
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_runs import write_run
from tensorboard import program
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from mtrl.analysis.conflicts import cosine_figure
from mtrl.config.train import TrainConfig
from mtrl.training import charts
from mtrl.training.logger import RunLogger

FEW, MORE = ("reach-v3", "push-v3"), ("reach-v3", "push-v3", "door-open-v3")
TOTAL = 1_000


config = partial(
    TrainConfig,
    total_timesteps=TOTAL,
    learning_starts=300,
    log_every=100,
    eval_every=200,
    diagnose_every=200,
    batch_size=8,
)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    """A finished run, a killed one with more tasks, and one that was killed and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "finished", config(tasks=FEW, seed=0, surgery="pcgrad"))
    write_run(folder / "killed", config(tasks=MORE, seed=1, critic_surgery="mgda"), stop_at=600)
    resumed = write_run(folder / "resumed", config(tasks=FEW, seed=2), stop_at=700)
    now = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 3600)  # the clock was changed meanwhile
        logger = RunLogger(resumed, TOTAL, config(tasks=FEW, seed=2), FEW, resume_at=500)
    for steps, rate in ((600, 0.25), (TOTAL, 0.75)):
        rates = {f"eval/success_rate/{name}": rate for name in (*FEW, "mean", "worst")}
        logger.write(steps, rates)
        cosines = np.array([[1.0, -rate], [-rate, 1.0]])
        logger.cosines(steps, {"actor": cosines})
        logger.figure(steps, "surgery/actor/cosines", cosine_figure(cosines, FEW, f"{steps}"))
    logger.finish()
    logger.close()
    return folder


@pytest.fixture(scope="module")
def ask(logdir):
    """Send a GET or POST request to the server."""
    server = program.TensorBoard()
    server.configure(argv=["tensorboard", "--logdir", str(logdir), "--port", "0"])
    address = server.launch()

    def ask(path: str, post: object = None, **arguments: object):
        url = f"{address}{path}?{urllib.parse.urlencode(arguments)}"
        data = None if post is None else json.dumps(post).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers["Content-Type"] else body

    def loaded() -> bool:
        """The server reads the runs in the background, one after the other."""
        tag = "eval/success_rate/mean"
        for run, last in (("finished", TOTAL), ("killed", 600), ("resumed", TOTAL)):
            if tag not in ask("data/plugin/scalars/tags").get(run, {}):
                return False
            if ask("data/plugin/scalars/scalars", run=run, tag=tag)[-1][1] != last:
                return False
        return bool(ask("data/plugin/images/tags"))

    deadline = time.monotonic() + 60
    while not loaded():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return ask


def test_there_are_three_runs_and_every_dashboard_has_data(ask):
    assert set(ask("data/runs")) == {"finished", "killed", "resumed"}
    plugins = ask("data/plugins_listing")
    for name in ("scalars", "custom_scalars", "images", "text", "hparams"):
        assert plugins[name]["enabled"], name


def test_each_task_has_a_chart_shared_by_runs(ask):
    layout = ask("data/plugin/custom_scalars/layout")
    categories = {category["title"]: category for category in layout["category"]}
    assert list(categories) == [  # three runs, one layout
        "success rate (evaluation)",
        "success rate (training episodes)",
        "return (evaluation)",
        "return (training episodes)",
    ]
    assert [category.get("closed", False) for category in categories.values()] == [False] + 3 * [
        True
    ]
    first = categories["success rate (evaluation)"]["chart"]
    patterns = {chart["title"]: chart["multiline"]["tag"] for chart in first}
    titles = [task.removesuffix("-v3") for task in MORE]
    assert sorted(patterns) == sorted(["mean", "worst fifth", *titles]) and len(first) == len(
        patterns
    )
    for title, (pattern,) in patterns.items():
        name = {"mean": "mean", "worst fifth": "worst"}.get(title, f"{title}-v3")
        for run, tasks in (("finished", FEW), ("killed", MORE)):
            found = ask("data/plugin/custom_scalars/scalars", run=run, tag=pattern)
            assert found["regex_valid"]
            expected = [f"eval/success_rate/{name}"] if name in (*tasks, "mean", "worst") else []
            assert list(found["tag_to_events"]) == expected
    (pattern,) = patterns["push"]
    found = ask("data/plugin/custom_scalars/scalars", run="killed", tag=pattern)
    (events,) = found["tag_to_events"].values()
    assert [step for _, step, _ in events] == [200, 400, 600]  # environment steps


def test_without_success_the_charts_show_returns():
    tasks = ("gravity (0.5)", "gravity-9")
    (value,) = charts.layout(tasks, tells_success=False).value
    layout = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    assert [category.title.split()[0] for category in layout.category] == ["return", "return"]
    assert [chart.title for chart in layout.category[0].chart] == ["mean", *tasks]
    (pattern,) = layout.category[0].chart[1].multiline.tag
    assert re.match(pattern, "eval/return/gravity (0.5)")
    assert not re.match(pattern, "eval/return/gravity (0.5) and more")


def test_the_table_has_a_row_for_each_run_and_the_last_results(ask):
    experiment = ask("data/plugin/hparams/experiment", post={"includeMetrics": True})
    columns = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
    first_five = [info["name"] for info in experiment["hparamInfos"][:5]]
    assert first_five == ["batch_size", "benchmark", "hidden_sizes", "seed", "surgery"]
    # All runs have the same columns, including settings that only one run has.
    assert columns.keys() == TrainConfig().flat().keys() - {"run_dir", "total_timesteps"}
    assert columns["critic_surgery"] == columns["eval_every"] == "DATA_TYPE_STRING"
    assert columns["learning_rate"] == "DATA_TYPE_FLOAT64"
    assert columns["compile"] == "DATA_TYPE_BOOL"
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert metrics == ["eval/success_rate/mean", "eval/success_rate/worst", "eval/return/mean"]

    statuses = [f"STATUS_{word}" for word in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    question = {
        "allowedStatuses": statuses,
        "colParams": [{"hparam": name, "includeInResult": True} for name in columns]
        + [{"metric": {"tag": tag, "group": ""}} for tag in metrics],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = ask("data/plugin/hparams/session_groups", post=question)["sessionGroups"]
    rows = {group["name"]: group for group in groups}
    assert rows.keys() == {"finished", "killed", "resumed"}  # the resumed run appears once
    ended = {name: row["sessions"][0]["status"] for name, row in rows.items()}
    assert ended == {
        "finished": "STATUS_SUCCESS",
        "killed": "STATUS_UNKNOWN",
        "resumed": "STATUS_SUCCESS",
    }
    surgeries = {name: row["hparams"]["surgery"] for name, row in rows.items()}
    assert surgeries == {"finished": "pcgrad", "killed": "none", "resumed": "none"}
    assert rows["killed"]["hparams"]["critic_surgery"] == "mgda"
    assert rows["killed"]["hparams"]["seed"] == 1 and rows["killed"]["hparams"]["batch_size"] == 8
    assert rows["finished"]["hparams"]["benchmark"] == "custom"
    assert rows["resumed"]["metricValues"][0]["value"] == pytest.approx(0.75)
    assert rows["resumed"]["metricValues"][0]["trainingStep"] == TOTAL


def test_images_are_at_environment_steps(ask):
    tags = ask("data/plugin/images/tags")["resumed"]
    assert list(tags) == ["surgery/actor/cosines"]
    found = ask("data/plugin/images/images", run="resumed", tag="surgery/actor/cosines", sample=0)
    assert [picture["step"] for picture in found] == [600, TOTAL]
    (query,) = {picture["query"] for picture in found[-1:]}
    png = ask("data/plugin/images/individualImage", **dict(urllib.parse.parse_qsl(query)))
    assert png.startswith(b"\x89PNG")


def test_a_resumed_run_appears_once_without_lost_values(ask, logdir):
    seen = ask("data/plugin/scalars/scalars", run="resumed", tag="eval/success_rate/mean")
    assert [(step, value) for _, step, value in seen][-2:] == [(600, 0.25), (TOTAL, 0.75)]
    assert [step for _, step, _ in seen] == [200, 400, 600, TOTAL]
    rows = [
        json.loads(line) for line in (logdir / "resumed/cosines.jsonl").read_text().splitlines()
    ]
    assert [row["time/total_timesteps"] for row in rows] == [200, 400, 600, TOTAL]
    assert rows[-1]["actor"] == [[1.0, -0.75], [-0.75, 1.0]]

    events = EventAccumulator(str(logdir / "resumed")).Reload()
    for tag in (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG):
        assert len(events.Tensors(tag)) == 1
    (written,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    assert layout.category[0].title == "success rate (evaluation)"
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    assert start.hparams["seed"].number_value == 2
