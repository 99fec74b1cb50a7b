"""Which runs are seeds of one method, and how methods differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtrl.analysis.runs import Run
from mtrl.config.train import shown
from mtrl.errors import UsageError, unknown

NOT_THE_METHOD = frozenset(
    "seed run_dir benchmark tasks workers device total_timesteps eval_every eval_episodes "
    "checkpoint_every log_every diagnose_every eval_video max_runtime max_restarts threads".split()
)
"""Fields that do not change what an update does. Task sets are compared by their tasks."""


@dataclass(frozen=True)
class Method:
    """Runs that differ in nothing but their seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """T task names."""
        return self.runs[0].tasks

    @property
    def finished(self) -> list[Run]:
        """Those with a final evaluation."""
        return [run for run in self.runs if run.final is not None]

    @property
    def scores(self) -> np.ndarray:
        """Final success rate of each task and finished run, `[T, N]`."""
        finals = [run.final.solved / run.final.episodes for run in self.runs if run.final]
        return np.stack(finals, -1) if finals else np.empty((len(self.tasks), 0))


def group(
    runs: Sequence[Run], by: Sequence[str] = (), labels: Mapping[str, str] | None = None
) -> list[Method]:
    """Runs with the same configuration except the seed, as one method each, in order of arrival.

    A method is named by its surgery where that tells them apart, else by all that differs.

    Args:
        by: Configuration fields that make a method, instead of all.
        labels: Other names for the methods.

    Raises:
        UsageError: if the runs' tasks differ, one run is given twice, or a name is unknown.
    """
    leaves = [run.config.flat() for run in runs]
    for run in runs:
        if run.tasks != runs[0].tasks:
            first, other = (f"{len(r.tasks)} of {r.path}" for r in (runs[0], run))
            raise UsageError(
                f"runs: expected the same tasks in the same order, got the {first} and the {other}"
            )
    for field in by:
        if field not in leaves[0]:
            raise UsageError(unknown("group_by", field, leaves[0]))
    fields = list(by) or [field for field in leaves[0] if field not in NOT_THE_METHOD]
    members: dict[tuple[Any, ...], list[Run]] = {}
    seen: dict[tuple[Any, ...], Run] = {}
    for run, values in zip(runs, leaves, strict=True):
        identity = tuple(values[f] for f in values if f == "seed" or f not in NOT_THE_METHOD)
        if identity in seen:
            twice = f"{seen[identity].path} and {run.path}"
            raise UsageError(f"runs: expected every seed of a method once, got {twice}")
        seen[identity] = run
        members.setdefault(tuple(values[field] for field in fields), []).append(run)

    by_surgery = not by and len({key[fields.index("surgery")] for key in members}) == len(members)
    columns = dict(zip(fields, zip(*members, strict=True), strict=True))
    named_by = [field for field, column in columns.items() if len(set(column)) > 1]
    if by_surgery or not named_by:
        named_by = ["surgery"]
    names = []
    for same in members.values():
        values = same[0].config.flat()
        names.append(", ".join(_assignment(field, values[field]) for field in named_by))
    labels = labels or {}
    for name in labels:
        if name not in names:
            raise UsageError(unknown("labels", name, names))
    return [
        Method(labels.get(name, name), tuple(same))
        for name, same in zip(names, members.values(), strict=True)
    ]


def differences(methods: Sequence[Method]) -> list[str]:
    """In words, in which fields methods differ, beyond what their names say."""
    told = []
    for field in methods[0].runs[0].config.flat().keys() - NOT_THE_METHOD:
        values = [
            " or ".join(dict.fromkeys(shown(run.config.flat()[field]) for run in method.runs))
            for method in methods
        ]
        pairs = list(zip(methods, values, strict=True))
        in_names = all(_assignment(field, value) in method.name for method, value in pairs)
        if len(set(values)) > 1 and not in_names:
            told.append(f"{field}: " + ", ".join(f"{v} ({method.name})" for method, v in pairs))
    return sorted(told)


def _assignment(field: str, value: Any) -> str:
    return shown(value) if field == "surgery" else f"{field}={shown(value)}"
