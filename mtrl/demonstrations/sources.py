"""Sources of demonstrations, as `--demonstrations` names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtrl.demonstrations.data import Demonstrations
from mtrl.envs.benchmarks import N_GOALS, Benchmark, select
from mtrl.errors import UsageError, unknown

EXPERT = "expert"
"""Name of Meta-World's scripted policies as a source."""


@dataclass(frozen=True)
class Sources:
    """Demonstrations read from files, and numbers of episodes to collect from experts.

    Attributes:
        files: Demonstrations of the run's tasks.
        experts: Number of episodes of the expert, by task.
    """

    files: tuple[Demonstrations, ...]
    experts: dict[str, int]

    def gather(
        self, benchmark: Benchmark, seed: int, horizon: int | None, workers: int | None
    ) -> Demonstrations:
        """Return all demonstrations, in task order; arguments are those of `collect`."""
        parts = list(self.files)
        if self.experts:
            from mtrl.demonstrations.collect import collect, experts  # imports PyTorch

            tasks, counts = tuple(self.experts), list(self.experts.values())
            chosen = select(benchmark, tasks)
            parts.append(collect(experts(tasks), chosen, counts, seed, horizon, workers=workers))
        found = Demonstrations.joined(parts)
        return found.select([task for task in benchmark.tasks if task in found.tasks])


def sources(entries: Sequence[str], benchmark: Benchmark) -> Sources:
    """Read entries of the form `[TASK=]FILE` or `[TASK=]expert:N`.

    An entry without a task applies to all tasks that no other entry names.

    Args:
        entries: One or more entries.
        benchmark: The tasks. Sizes are compared only if custom tasks are `examined`.

    Raises:
        UsageError: If an entry has another form, names an unknown task, asks for an expert that
            does not exist, or names a file that cannot be read or does not match the tasks.
    """
    named, rest = [], []
    for entry in entries:
        task = max((t for t in benchmark.tasks if entry.startswith(f"{t}=")), key=len, default=None)
        if task is not None:
            named.append((task, entry[len(task) + 1 :]))
        elif "=" in entry and not Path(entry).expanduser().exists():
            raise UsageError(
                unknown("demonstrations: task", entry.partition("=")[0], benchmark.tasks)
            )
        else:
            rest.append(entry)
    others = [t for t in benchmark.tasks if t not in dict(named)]
    files: list[Demonstrations] = []
    experts: dict[str, int] = {}
    for tasks, source in [
        *(((task,), source) for task, source in named),
        *((others, s) for s in rest),
    ]:
        if source.partition(":")[0] != EXPERT:
            files.append(_read(source, tasks, benchmark))
            continue
        episodes = _episodes(source)
        for task in tasks:
            if task in benchmark.custom:
                raise UsageError(
                    f"demonstrations: expected a file for {task!r}, because Meta-World has no "
                    f"expert for a custom task, got {source}"
                )
            if task in experts:
                raise UsageError(
                    f"demonstrations: expected one number of expert episodes for {task}, got "
                    f"{experts[task]} and {episodes}"
                )
            experts[task] = episodes
    return Sources(tuple(files), experts)


def _episodes(source: str) -> int:
    number = source.partition(":")[2]
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= N_GOALS):
        raise UsageError(
            f"demonstrations: expected {EXPERT}:N with N from 1 to {N_GOALS}, at most one episode "
            f"per goal, got {source!r}"
        )
    return int(number)


def _read(source: str, tasks: Sequence[str], benchmark: Benchmark) -> Demonstrations:
    found = Demonstrations.load(source)
    held = [task for task in tasks if task in found.tasks]
    if not held:
        raise UsageError(
            f"demonstrations: {source}: expected some of the tasks {', '.join(tasks) or 'left'}, "
            f"got {', '.join(found.tasks)}"
        )
    for name, space in zip(("observations", "actions"), benchmark.spaces or (), strict=False):
        expected, got = space.shape, getattr(found, name).shape[1:]
        if expected != got:
            raise UsageError(
                f"demonstrations: {source}: expected {name} of length {expected[0]}, got {got[0]}"
            )
    return found.select(held)
