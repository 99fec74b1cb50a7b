"""Optuna's storage for a sweep, a journal in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtrl.errors import UsageError


def import_optuna() -> Any:
    """Import Optuna, an optional dependency.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError('search: expected Optuna: pip install "mtrl-surgery[sweep]"') from None
    return optuna


def open_study(storage: Path, name: str) -> Any:
    """Open a study that maximises, in a journal that several processes may write to.

    Raises:
        UsageError: If Optuna is not installed.
    """
    optuna = import_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(storage))),
        sampler=optuna.samplers.TPESampler(constant_liar=True),
        pruner=optuna.pruners.NopPruner(),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )
