"""Conflicts as text and figure, and as read by TensorBoard."""

import io
import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from mtrl.analysis.conflicts import cosine_figure
from mtrl.config.train import TrainConfig
from mtrl.surgery.diagnostics import cosines
from mtrl.training.logger import RunLogger
from mtrl.training.report import worst_pairs


def test_worst_pairs_are_sorted():
    tasks = ["a-v3", "b-v3", "c-v3", "d-v3"]
    values = torch.eye(4)
    pairs = [(0, 1, -0.25), (0, 2, 0.5), (0, 3, -0.75), (1, 2, 0.0), (1, 3, -0.5), (2, 3, 0.1)]
    for i, j, value in pairs:
        values[i, j] = values[j, i] = value
    head = ["| task | task | cosine |", "|---|---|---:|"]
    rows = ["| a-v3 | d-v3 | -0.750 |", "| b-v3 | d-v3 | -0.500 |", "| a-v3 | b-v3 | -0.250 |"]
    assert worst_pairs(values, tasks).splitlines() == head + rows
    assert worst_pairs(values, tasks, n=2).splitlines() == head + rows[:2]
    assert worst_pairs(values.abs(), tasks) == "No two tasks' gradients conflict."


def names(ticks) -> list[str]:
    return [label.get_text() for label in ticks]


@pytest.mark.parametrize("n_tasks", [2, 10, 12, 13, 50])
def test_the_figure_fits_its_tasks(n_tasks):
    tasks = [f"{'a' * (t % 20)}-{t}-v3" for t in range(n_tasks)]
    gradients = torch.randn(n_tasks, 6, generator=torch.Generator().manual_seed(0)).double()
    values = cosines(gradients @ gradients.T)
    values[0, 1] = -0.001
    figure = cosine_figure(values.numpy(), tasks, "critic 1")
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.get_clim() == (-1, 1)
    np.testing.assert_array_equal(image.get_array(), values)
    red, _, blue, _ = image.cmap(image.norm(-0.5))
    assert red > blue  # a conflict
    expected = [task.removesuffix("-v3") for task in tasks]
    assert names(axes.get_xticklabels()) == names(axes.get_yticklabels()) == expected
    cells = [text.get_text() for text in axes.texts]
    rounded = [f"{v:.2f}".replace("-0.00", "0.00") for v in values.flatten().tolist()]
    assert cells == (rounded if n_tasks <= 12 else [])
    assert bar.get_ylabel() == "cosine" and figure.get_suptitle() == "critic 1"

    figure.savefig(io.BytesIO())  # compute the layout
    room = figure.bbox
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        box = label.get_window_extent()
        assert box.x0 >= room.x0 and box.y0 >= room.y0  # no name is cut off
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def shown(run_dir, tag):
    """Read the values of a tag by step with TensorBoard's own reader.

    The other one, `event_accumulator.EventAccumulator`, never purges texts.
    """
    events = EventAccumulator(str(run_dir)).Reload()
    return {event.step: list(event.tensor_proto.string_val) for event in events.Tensors(tag)}


def test_figures_and_texts_are_only_in_tensorboard_and_purged_on_resume(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    tasks, text_tag = ("reach-v3", "push-v3"), "worst/text_summary"

    def log(logger, steps, value):
        """Each is flushed at once, so that a killed run keeps it."""
        logger.write(steps, {"x": value})
        figure = cosine_figure(np.array([[1.0, value], [value, 1.0]]), tasks, f"at {steps}")
        logger.figure(steps, "cosine", figure)
        assert steps in shown(tmp_path, "cosine")
        logger.text(steps, "worst", f"cosine {value}")
        assert shown(tmp_path, text_tag)[steps] == [f"cosine {value}".encode()]
        return figure

    logger = RunLogger(tmp_path, 400, TrainConfig(), tasks)
    figure = log(logger, 100, -1.0)
    log(logger, 200, 0.25)
    logger.close()
    images = shown(tmp_path, "cosine")
    assert list(images) == list(shown(tmp_path, text_tag)) == [100, 200]
    width, height, png = images[100]
    picture = Image.open(io.BytesIO(png))
    size = tuple((figure.get_size_inches() * figure.dpi).astype(int))
    assert picture.format == "PNG" and picture.size == size == (int(width), int(height))
    colors = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for color in ((103, 0, 31), (5, 48, 97)):  # the ends of RdBu: the cells of −1, and of 1
        assert (colors == color).all(1).mean() > 0.1
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"x", "time/total_timesteps"}] * 2

    logger = RunLogger(tmp_path, 400, TrainConfig(), tasks, resume_at=100)
    log(logger, 150, 0.5)
    logger.close()
    assert list(shown(tmp_path, "x")) == list(shown(tmp_path, text_tag)) == [100, 150]
    resumed = shown(tmp_path, "cosine")
    assert list(resumed) == [100, 150] and resumed[100][2] == png != resumed[150][2]
