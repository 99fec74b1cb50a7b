"""Application of the rules that stop runs early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtrl.folder import STEP, read_rows
from mtrl.sweep.rules import Halving, Rules
from mtrl.sweep.study import open_study, trial_of

WHY = "why"
"""Attribute of a trial with the reason for which its run is stopped."""


@dataclass
class Judge:
    """Applies the rules of a sweep to its runs.

    Args:
        storage: Optuna's journal, with the state of successive halving.
    """

    rules: Rules
    storage: Path
    _seen: dict[str, int] = field(default_factory=dict)

    def verdict(self, name: str, run_dir: Path) -> str | None:
        """Return the reason why a run should stop, or None."""
        log = run_dir / "progress.json"
        size = log.stat().st_size if log.exists() else 0
        if self._seen.get(name) == size:  # nothing new
            return None
        self._seen[name] = size
        rows = read_rows(log)
        for rule in self.rules.stop_when:
            if (why := rule.verdict(rows)) is not None:
                return why
        return None if self.rules.halving is None else self._halved(self.rules.halving, name, rows)

    def _halved(self, halving: Halving, name: str, rows: Sequence[dict[str, Any]]) -> str | None:
        study = open_study(self.storage, f"{halving.tag} from {halving.start} by {halving.by}")
        from optuna.pruners import SuccessiveHalvingPruner  # `open_study` says if it is missing

        study.pruner = SuccessiveHalvingPruner(halving.start, halving.by)
        trial = trial_of(study, name)
        if (why := trial.user_attrs.get(WHY)) is not None:  # told, but then the sweep was killed
            return str(why)
        told = study._storage.get_trial(trial._trial_id).intermediate_values
        for row in rows:
            step = int(row[STEP])
            if halving.tag not in row or step in told:
                continue
            trial.report(row[halving.tag], step)
            if trial.should_prune():
                value = f"{row[halving.tag]:.3g} at {step}"
                why = f"{halving.text}: {value} is not in the best 1/{halving.by}"
                trial.set_user_attr(WHY, why)
                return why
        return None
