"""The layout of TensorBoard's Custom Scalars tab: a chart for each task.

In that tab a colour is a run, so tasks that share a chart share a colour. One task per chart makes
runs easy to compare, in the benchmark's order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

MEAN = {"mean": "mean"}
WORST = {"worst": "worst fifth"}
SUCCESS = {
    "success rate (evaluation)": ("eval/success_rate", MEAN | WORST),
    "success rate (training episodes)": ("rollout/success_rate", {}),
}
RETURN = {
    "return (evaluation)": ("eval/return", MEAN),
    "return (training episodes)": ("rollout/ep_rew_mean", {}),
}
"""Categories; of each how its tags begin, and what is charted before the tasks, with titles."""


def layout(tasks: Sequence[str], tells_success: bool) -> Summary:
    """What a new run writes; TensorBoard merges the layouts of all runs.

    Args:
        tasks: In the order of their charts.
        tells_success: Whether any task may have a success rate.
    """
    titles = {task: task.removesuffix("-v3") for task in tasks}
    categories: list[layout_pb2.Category] = []
    for title, (prefix, summaries) in (SUCCESS | RETURN if tells_success else RETURN).items():
        charts = [_chart(f"{prefix}/{name}", shown) for name, shown in (summaries | titles).items()]
        closed = bool(categories)  # one category is enough to look at first
        categories.append(layout_pb2.Category(title=title, chart=charts, closed=closed))
    content = layout_pb2.Layout(category=categories).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    tensor = TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto())
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        tensor=tensor,
        metadata=SummaryMetadata(plugin_data=plugin),
    )
    return Summary(value=[value])


def _chart(tag: str, title: str) -> layout_pb2.Chart:
    """TensorBoard takes a regular expression, which matches from a tag's beginning."""
    lines = layout_pb2.MultilineChartContent(tag=[re.escape(tag) + "$"])
    return layout_pb2.Chart(title=title, multiline=lines)
