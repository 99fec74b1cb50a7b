"""Points with their run folders: which are done, and which are to be started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mtrl.config.train import TrainConfig
from mtrl.sweep.attempt import Job
from mtrl.sweep.folder import Entry, SweepFolder, is_finished, read_state
from mtrl.sweep.grid import Point
from mtrl.sweep.judge import Judge
from mtrl.sweep.rules import Rules
from mtrl.training.place import existing_run


class Known(NamedTuple):
    """Result of checking a method.

    Attributes:
        total: Length of its runs [environment steps over all tasks].
        tasks: Task names.
    """

    total: int
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """A point with its entry in the sweep.

    Attributes:
        point: Complete point, including threads and workers.
        entry: Entry in sweep.json.
        is_done: Whether it is finished, or was ended early by a rule that the sweep still has.
    """

    point: Point
    entry: Entry
    is_done: bool


def placed(
    folder: SweepFolder,
    points: Sequence[Point],
    cores: int,
    *,
    known: Mapping[str, Known],
    rules: Rules,
    trial: int | None = None,
) -> list[Planned]:
    """Assign every point its folder, and as many threads and simulator processes as cores.

    A run that has started keeps its numbers, because rounding depends on the number of threads.

    Args:
        known: Checked methods by name.
        trial: Number of the point in a search.

    Raises:
        UsageError: If a folder holds another run.
    """
    found = []
    for point in points:
        run_dir = folder.run_dir(point.name)
        fitting = {"threads": cores, "workers": cores}
        if existing_run(point.config.model_copy(update={"run_dir": run_dir}), True) is not None:
            before = TrainConfig.from_yaml(run_dir / "config.yaml").flat()
            fitting = {name: before[name] for name in fitting}
        fitted = point.changed({k: v for k, v in fitting.items() if k not in point.changes})
        state = read_state(folder.state(point.name))
        is_over = state is not None and state.what == "ended early" and rules.hold(state.why)
        total, tasks = known[point.method]
        entry = Entry(
            name=point.name,
            method=point.method,
            label=point.label,
            seed=point.config.seed,
            total=total,
            tasks=tasks,
            arguments=tuple(fitted.arguments(run_dir)),
            trial=trial,
        )
        found.append(Planned(fitted, entry, is_over or is_finished(run_dir)))
    return found


def job_of(folder: SweepFolder, entry: Entry, rules: Rules, where: Path) -> Job:
    """Return the job that starts or resumes a run in the working directory `where`."""
    return Job(
        name=entry.name,
        arguments=entry.arguments,
        run_dir=folder.run_dir(entry.name),
        log=folder.log(entry.name),
        state=folder.state(entry.name),
        folder=where,
        rule=Judge(rules, folder.storage) if rules else None,
    )
