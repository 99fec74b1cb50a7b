"""Layout of TensorBoard's Custom Scalars tab: one chart per task.

In that tab, colours distinguish runs, so tasks in one chart would share a colour. One chart per
task, in the order of the benchmark, makes runs easy to compare.
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
"""Categories with the prefix of their tags, and summaries with titles to chart before the tasks."""


def layout(tasks: Sequence[str], tells_success: bool) -> Summary:
    """Return the layout for a new run; TensorBoard merges the layouts of all runs.

    Args:
        tasks: Task names, in the order of their charts.
        tells_success: Whether any task may have a success rate.
    """
    titles = {task: task.removesuffix("-v3") for task in tasks}
    categories: list[layout_pb2.Category] = []
    for title, (prefix, summaries) in (SUCCESS | RETURN if tells_success else RETURN).items():
        charts = [_chart(f"{prefix}/{name}", shown) for name, shown in (summaries | titles).items()]
        closed = bool(categories)  # only the first category is open
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
    """Build a chart; TensorBoard matches a regular expression from the start of a tag."""
    lines = layout_pb2.MultilineChartContent(tag=[re.escape(tag) + "$"])
    return layout_pb2.Chart(title=title, multiline=lines)
