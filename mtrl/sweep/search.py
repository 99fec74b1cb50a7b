"""Points that Optuna draws, from what earlier ones have shown; remembered in the sweep's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mtrl.config.section import leaf_types
from mtrl.errors import UsageError, one_line
from mtrl.sweep.folder import SweepFolder, is_finished, read_state
from mtrl.sweep.plan import FIELDS, Plan, Range
from mtrl.sweep.status import newest, tail
from mtrl.sweep.study import import_optuna, open_study

STUDY = "search"


def corners(plan: Plan) -> Iterator[dict[str, Any]]:
    """Points at the ends of every range and with every choice, to be checked before a search."""
    choices = [len(space) for space in plan.search.values() if isinstance(space, tuple)]
    for i in range(max([2, *choices])):
        ends = {k: (v.low, v.high) if isinstance(v, Range) else v for k, v in plan.search.items()}
        yield {name: values[i % len(values)] for name, values in ends.items()}


class Search:
    """Draws points, and tells Optuna how they did.

    Args:
        folder: Of the sweep.
        plan: It has the ranges.
        tag: What is to be large in the end: the mean over seeds of its last value.

    Raises:
        UsageError: if Optuna is missing, or a range fits no distribution.
    """

    def __init__(self, folder: SweepFolder, plan: Plan, tag: str) -> None:
        self._folder, self._tag = folder, tag
        self._distributions = {k: _distribution(k, space) for k, space in plan.search.items()}
        self._study = open_study(folder.storage, STUDY)

    def drawn(self, number: int) -> dict[str, Any]:
        """Point `number`: as it was drawn before, or by what is known now.

        Raises:
            UsageError: if the ranges do not go with those of before.
        """
        trials = self._study.get_trials(deepcopy=False)
        if number < len(trials):
            params = trials[number].params
            if params.keys() != self._distributions.keys():
                raise UsageError(
                    f"search: expected ranges of {', '.join(params)}, as this sweep began with, "
                    f"got {', '.join(self._distributions)}; another --out begins another search"
                )
        else:
            self._tell()
            try:
                params = self._study.ask(self._distributions).params
            except ValueError as error:
                reason = f"{one_line(error)}; another --out begins another search"
                raise UsageError(f"search: {reason}") from None
        return {name: _decoded(value) for name, value in params.items()}

    def failed(self, number: int) -> None:
        """A point that cannot be: it is not drawn again nearby."""
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _tell(self) -> None:
        """Tell Optuna of points whose runs have all ended since."""
        from optuna.trial import TrialState

        runs: dict[int, list[str]] = {}
        for entry in self._folder.entries():
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
        value = newest(tail(self._folder.run_dir(name) / "progress.json"), self._tag)
        return float("nan") if value is None else value

    def best(self, n: int) -> list[tuple[int, float, Mapping[str, Any]]]:
        """The best points so far: number, score, what was drawn."""
        self._tell()
        done = [t for t in self._study.get_trials(deepcopy=False) if t.value is not None]
        done = sorted(done, key=lambda trial: -float(trial.value or 0.0))[:n]
        return [
            (t.number, float(t.value or 0.0), {k: _decoded(v) for k, v in t.params.items()})
            for t in done
        ]


def _distribution(field: str, space: Range | tuple[Any, ...]) -> Any:
    distributions = import_optuna().distributions
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
