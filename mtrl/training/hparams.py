"""Configuration of a run as a row in TensorBoard's HParams tab.

It is written with TensorBoard's protocol buffers, because `SummaryWriter.add_hparams` would create
a separate run for the row, and `tensorboard.plugins.hparams.api` needs TensorFlow.
"""

from __future__ import annotations

from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)

from mtrl.config.train import TrainConfig, shown

RESULTS = ("eval/success_rate/mean", "eval/success_rate/worst", "eval/return/mean")
"""Scalars whose last values are shown next to the settings."""

FIRST = frozenset(("benchmark", "surgery", "hidden_sizes", "batch_size", "seed"))
"""Settings in the columns that are shown at first."""

LEFT_OUT = frozenset(("run_dir", "total_timesteps"))
"""Fields that a resumed run may change, whereas the table would keep showing the first value."""


def start(config: TrainConfig) -> tuple[Summary, Summary]:
    """Return the summaries of a new run: the columns, and its values in them.

    The plugin uses the columns of any run for all runs. They are therefore the same in every run,
    each of one type: fields that may be unset are strings.
    """
    defaults = TrainConfig().flat()
    row = {name: value for name, value in config.flat().items() if name not in LEFT_OUT}
    if config.tasks is not None:
        row["benchmark"] = "custom"
    columns, values = [], SessionStartInfo()
    for name, value in row.items():
        if isinstance(value, bool):
            values.hparams[name].bool_value = value
            kind = api_pb2.DATA_TYPE_BOOL
        elif isinstance(value, int | float) and defaults[name] is not None:
            values.hparams[name].number_value = value
            kind = api_pb2.DATA_TYPE_FLOAT64
        else:
            values.hparams[name].string_value = shown(value)
            kind = api_pb2.DATA_TYPE_STRING
        columns.append(api_pb2.HParamInfo(name=name, type=kind, differs=name in FIRST))
    results = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in RESULTS]
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=results)
    return (
        _summary(metadata.EXPERIMENT_TAG, experiment=experiment),
        _summary(metadata.SESSION_START_INFO_TAG, session_start_info=values),
    )


def end() -> Summary:
    """Return the summary of a finished run."""
    info = SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    return _summary(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _summary(tag: str, **data: Any) -> Summary:
    content = metadata.create_summary_metadata(HParamsPluginData(**data))
    return Summary(value=[Summary.Value(tag=tag, metadata=content, tensor=metadata.NULL_TENSOR)])
