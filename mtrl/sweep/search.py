"""Search with Optuna, which draws points based on earlier results; stored in the sweep's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mtrl.config.section import leaf_types
from mtrl.errors import UsageError, import_extra, one_line
from mtrl.folder import read_rows
from mtrl.sweep.folder import SweepFolder, is_finished, read_state
from mtrl.sweep.plan import FIELDS, Plan, Range
from mtrl.sweep.status import TAIL, newest
from mtrl.sweep.study import open_study

STUDY = "search"


def corners(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield points at the ends of every range and with every choice, to check before a search."""
    choices = [len(space) for space in plan.search.values() if isinstance(space, tuple)]
    for i in range(max([2, *choices])):
        ends = {k: (v.low, v.high) if isinstance(v, Range) else v for k, v in plan.search.items()}
        yield {name: values[i % len(values)] for name, values in ends.items()}


class Search:
    """Draws points, and reports their results to Optuna.

    Args:
        plan: Plan with the ranges.
        tag: Tag to maximise: the mean over seeds of its last value.

    Raises:
        UsageError: If Optuna is not installed, or a range is invalid.
    """

    def __init__(self, folder: SweepFolder, plan: Plan, tag: str) -> None:
        self._folder, self._tag = folder, tag
        self._distributions = {k: _distribution(k, space) for k, space in plan.search.items()}
        self._study = open_study(folder.storage, STUDY)

    def drawn(self, number: int) -> dict[str, Any]:
        """Return point `number`, as drawn before or newly drawn from the results so far.

        Raises:
            UsageError: If the ranges are inconsistent with earlier ones.
        """
        trials = self._study.get_trials(deepcopy=False)
        if number < len(trials):
            params = self._complete(trials[number])
            if params.keys() != self._distributions.keys():
                raise UsageError(
                    f"search: expected ranges of {', '.join(params)}, as this sweep started with, "
                    f"got {', '.join(self._distributions)}; use another --out for a new search"
                )
        else:
            self._tell()
            try:
                params = self._study.ask(self._distributions).params
            except ValueError as error:
                reason = f"{one_line(error)}; use another --out for a new search"
                raise UsageError(f"search: {reason}") from None
        return {name: _decoded(value) for name, value in params.items()}

    def _complete(self, found: Any) -> Mapping[str, Any]:
        """Return a trial's values; a sweep killed while it drew them has stored only some."""
        from optuna.trial import Trial

        missing = self._distributions.keys() - found.params.keys()
        has_runs = found.number in {entry.trial for entry in self._folder.contents().runs}
        if not missing or has_runs or found.state.is_finished():
            return dict(found.params)
        trial = Trial(self._study, found._trial_id)
        for name in missing:
            trial._suggest(name, self._distributions[name])
        return trial.params

    def failed(self, number: int) -> None:
        """Report an invalid point, so that it is not drawn again nearby."""
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _tell(self) -> None:
        """Report points whose runs have all ended to Optuna."""
        from optuna.trial import TrialState

        runs: dict[int, list[str]] = {}
        for entry in self._folder.contents().runs:
            if entry.trial is not None:
                runs.setdefault(entry.trial, []).append(entry.name)
        for number, names in runs.items():
            states = [read_state(self._folder.state(name)) for name in names]
            whats = {state.what if state is not None else None for state in states}
            if all(is_finished(self._folder.run_dir(name)) for name in names):
                values = [self._score(name) for name in names]
                value = sum(values) / len(values)
                self._study.tell(number, value, skip_if_finished=True)
            elif "ended early" in whats:
                self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
            elif "failed" in whats:
                self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _score(self, name: str) -> float:
        rows = read_rows(self._folder.run_dir(name) / "progress.json", last=TAIL)
        value = newest(rows, self._tag)
        return float("nan") if value is None else value

    def best(self, n: int) -> list[tuple[int, float, Mapping[str, Any]]]:
        """Return the best points so far: number, score and drawn values."""
        self._tell()
        done = [t for t in self._study.get_trials(deepcopy=False) if t.value is not None]
        done = sorted(done, key=lambda trial: -float(trial.value or 0.0))[:n]
        return [
            (t.number, float(t.value or 0.0), {k: _decoded(v) for k, v in t.params.items()})
            for t in done
        ]


def best_points(folder: SweepFolder, n: int) -> list[tuple[int, float, Mapping[str, Any]]]:
    """Return the best points of a sweep as `Search.best` does; [] if it is not a search."""
    goal = folder.contents().goal
    return [] if goal is None else Search(folder, Plan(), goal).best(n)


def _distribution(field: str, space: Range | tuple[Any, ...]) -> Any:
    distributions = import_extra("search", "optuna", "sweep").distributions
    if not isinstance(space, Range):
        return distributions.CategoricalDistribution([json.dumps(choice) for choice in space])
    kinds = leaf_types(FIELDS[field])
    if int in kinds:
        for end in (space.low, space.high, space.step or 1):
            if end != int(end):
                raise UsageError(f"search: {field}: expected whole numbers, got {end}")
        step = int(space.step or 1)
        return distributions.IntDistribution(int(space.low), int(space.high), space.log, step)
    if float not in kinds:
        raise UsageError(f"search: {field}: expected a list of choices, got a range")
    return distributions.FloatDistribution(space.low, space.high, space.log, space.step)


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
