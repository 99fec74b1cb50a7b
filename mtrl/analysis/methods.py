"""Grouping of runs into methods (the seeds of one configuration), their names and differences."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np

from mtrl.analysis.runs import Run, Score
from mtrl.config.train import shown
from mtrl.errors import UsageError, unknown

NOT_THE_METHOD = frozenset(
    "seed run_dir benchmark tasks workers device total_timesteps eval_every eval_episodes "
    "checkpoint_every log_every diagnose_every eval_video max_runtime max_restarts threads".split()
)
"""Fields that do not change an update. Task sets are compared by their tasks."""

NAMED_FIRST = (
    "surgery actor_surgery critic_surgery trunk actor_trunk critic_trunk heads hidden_sizes "
    "gradient_steps batch_size"
).split()
"""Fields preferred for a method's name where several fields would distinguish it."""


@dataclass(frozen=True)
class Method:
    """Runs that differ only in their seeds.

    Attributes:
        name: Name in legends and tables.
        runs: One or more runs with the same tasks and score.
        named_by: Configuration fields that form the name; None if the user chose it.
    """

    name: str
    runs: tuple[Run, ...]
    named_by: tuple[str, ...] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """T task names."""
        return self.runs[0].tasks

    @property
    def score(self) -> Score:
        """Score that is compared."""
        return self.runs[0].score

    @property
    def finished(self) -> list[Run]:
        """Runs with a final evaluation."""
        return [run for run in self.runs if run.final is not None]

    @property
    def scores(self) -> np.ndarray:
        """Final success rate or return of each task and finished run, `[T, N]`."""
        finals = [run.final.scores for run in self.runs if run.final]
        return np.stack(finals, -1) if finals else np.empty((len(self.tasks), 0))

    def setting(self, field: str) -> str:
        """Return the value of a configuration field; all values of its runs, if they differ."""
        return " or ".join(dict.fromkeys(shown(run.config.flat()[field]) for run in self.runs))


def group(
    runs: Sequence[Run], by: Sequence[str] = (), labels: Mapping[str, str] | None = None
) -> list[Method]:
    """Group runs that differ only in the seed into methods, in the order of their first run.

    A method is named by its surgery if that distinguishes all methods, else by as few fields as
    possible.

    Args:
        by: Configuration fields that define a method, instead of all fields.
        labels: New names for methods, keyed by the default name, or by the folder of one of their
            runs or a glob that matches it: `{"runs/mt10_cpu_*": "CPU recipe"}`.

    Raises:
        UsageError: If runs differ in their tasks or score, a run is given twice, a name is
            unknown, or a label does not match exactly one method.
    """
    runs = [_like_the_first(run, runs[0]) for run in runs]
    leaves = [run.config.flat() for run in runs]
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
    named_by = _telling_fields(fields, list(members))
    methods = []
    for same in members.values():
        values = same[0].config.flat()
        name = ", ".join(_assignment(field, values[field]) for field in named_by)
        methods.append(Method(name, tuple(same), named_by))
    return _labelled(methods, labels or {})


def differences(methods: Sequence[Method]) -> list[str]:
    """Return the fields in which methods differ and which their names do not show, sorted."""
    fields = methods[0].runs[0].config.flat().keys() - NOT_THE_METHOD
    named = set.intersection(*(set(method.named_by or ()) for method in methods))
    return sorted(
        field for field in fields - named if len({method.setting(field) for method in methods}) > 1
    )


def _like_the_first(run: Run, first: Run) -> Run:
    if run.custom != first.custom:
        names = [f"{each.custom or 'Meta-World'} of {each.path}" for each in (first, run)]
        raise UsageError(f"runs: expected tasks of one benchmark, got {' and '.join(names)}")
    if set(run.tasks) != set(first.tasks):
        raise UsageError(
            f"runs: expected the same tasks, got the {len(first.tasks)} of {first.path} and the "
            f"{len(run.tasks)} of {run.path}"
        )
    if run.score != first.score:
        by_success, other = (first, run) if first.score == "success_rate" else (run, first)
        raise UsageError(
            f"runs: expected one score, got success rates of {by_success.path} and only returns "
            f"of {other.path}; --score return compares both"
        )
    return run if run.tasks == first.tasks else run.reordered(first.tasks)


def _telling_fields(fields: Sequence[str], keys: Sequence[tuple[Any, ...]]) -> tuple[str, ...]:
    """Choose few fields that distinguish all methods, greedily: each splits them most."""
    columns = dict(zip(fields, zip(*keys, strict=True), strict=True))
    first = [field for field in NAMED_FIRST if field in columns]
    order = [*first, *(field for field in fields if field not in first)]
    if len(set(columns.get("surgery", ()))) == len(keys):
        return ("surgery",)
    chosen: list[str] = []

    def groups(field: str) -> int:
        return len(set(zip(*(columns[each] for each in (*chosen, field)), strict=True)))

    while not chosen or groups(chosen[-1]) < len(keys):
        chosen.append(max(order, key=groups))  # the first one on ties
    return tuple(sorted(chosen, key=order.index))


def _labelled(methods: Sequence[Method], labels: Mapping[str, str]) -> list[Method]:
    """Rename methods as the user chose."""
    chosen: dict[int, str] = {}
    for old, new in labels.items():
        meant = [m for m, method in enumerate(methods) if method.name == old] or [
            m for m, method in enumerate(methods) if any(_matches(run, old) for run in method.runs)
        ]
        if not meant:
            names = [method.name for method in methods]
            raise UsageError(unknown("labels", old, names) + ", or a run's folder or a glob of it")
        if len(meant) > 1:
            several = " and ".join(methods[m].name for m in meant)
            raise UsageError(
                f"labels: expected runs of one method, but {old!r} matches {several}; --group-by "
                "merges methods that differ in other fields"
            )
        (m,) = meant
        if chosen.setdefault(m, new) != new:
            raise UsageError(
                f"labels: expected one label for {methods[m].name}, got {chosen[m]!r} and {new!r}"
            )
    renamed = [
        Method(chosen[m], method.runs) if m in chosen else method
        for m, method in enumerate(methods)
    ]
    names = [method.name for method in renamed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"labels: expected a unique name for each method, got {twice[0]!r} twice")
    return renamed


def _matches(run: Run, pattern: str) -> bool:
    path, pattern = os.path.normpath(run.path), os.path.normpath(pattern)
    return path == pattern or fnmatch(path, pattern) or fnmatch(run.path.name, pattern)


def _assignment(field: str, value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 1 and len(set(value)) == 1:
        return f"{field}={len(value)}×{value[0]}"
    return shown(value) if field == "surgery" else f"{field}={shown(value)}"
