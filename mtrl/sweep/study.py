"""Optuna's storage for a sweep, a journal in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtrl.errors import UsageError, import_extra, one_line


def open_study(storage: Path, name: str) -> Any:
    """Open a study that maximises, in a journal that several processes may write to.

    Raises:
        UsageError: If Optuna is not installed, or the journal is damaged.
    """
    optuna = import_extra("search", "optuna", "sweep")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = JournalFileSymlinkLock(str(storage))
    lock.acquire()
    try:
        _complete(storage)
    finally:
        lock.release()
    try:
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(storage), lock)),
            sampler=optuna.samplers.TPESampler(constant_liar=True),
            pruner=optuna.pruners.NopPruner(),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
    except (ValueError, KeyError) as error:
        reason = f"expected Optuna's journal in {storage}, got another text ({one_line(error)})"
        raise UsageError(f"search: {reason}") from None


def _complete(storage: Path) -> None:
    """Remove a last line that a killed process or a full disk has cut.

    The next line would be appended to it, and Optuna could not read the journal again.
    """
    if not storage.exists():
        return
    with storage.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def trial_of(study: Any, name: str) -> Any:
    """Return the trial of a run, created if needed."""
    from optuna.trial import Trial

    for frozen in study.get_trials(deepcopy=False):
        if frozen.user_attrs.get("run") == name:
            return Trial(study, frozen._trial_id)
    trial = study.ask()
    trial.set_user_attr("run", name)
    return trial
