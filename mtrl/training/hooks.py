"""Calling users' callbacks such that nothing of a run is lost, whatever they do."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger

from mtrl.config.spec import parse
from mtrl.errors import RunError, UsageError, one_line
from mtrl.folder import STEP
from mtrl.training.callbacks import Callback, check
from mtrl.training.checkpoint import what_is_left

if TYPE_CHECKING:
    from mtrl.training.trainer import Trainer


def made(specs: Sequence[str], given: Sequence[Callback]) -> list[Callback]:
    """All callbacks of a run: those that its configuration names, then those that were given.

    Raises:
        UsageError: if one cannot be made, or is none; or two would keep their states in one place.
    """
    found: list[Any] = []
    for spec in specs:
        _, options = parse("callbacks", spec)
        try:
            found.append(check(spec)(**options))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(f"callbacks: {spec} failed: {_reason(error)}") from error
    if isinstance(given, Callback) or not isinstance(given, Sequence):
        kind = type(given).__name__
        raise UsageError(f"callbacks: expected a list of mtrl.Callback objects, got {kind}")
    for callback in (found := [*found, *given]):
        if not isinstance(callback, Callback):
            raise UsageError(f"callbacks: expected an object of mtrl.Callback's, got {callback!r}")
    keys = [c.state_key for c in found if type(c).state_dict is not Callback.state_dict]
    for key in keys:
        if keys.count(key) > 1 or "/" in key:
            raise UsageError(
                f"callbacks: expected a state_key without '/' for each that has a state, got "
                f"{key!r}{' twice' if keys.count(key) > 1 else ''}"
            )
    return found


class _Mirror(Callback):
    """Gives every row to another logger."""

    def __init__(self, logger: Logger) -> None:
        self._to = logger

    def on_log(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._to.record(key, value, exclude="tensorboard" if key == STEP else None)
        self._to.dump(self.num_timesteps)


def mirror(logger: Any) -> Callback:
    """A callback that gives every row to Stable-Baselines3's logger, too.

    Raises:
        UsageError: if it is none of those.
    """
    if not isinstance(logger, Logger):
        kind = type(logger).__name__
        raise UsageError(
            f"logger: expected an object of stable_baselines3.common.logger.Logger, got {kind}"
        )
    return _Mirror(logger)


class Hooks:
    """The callbacks of one run, which a hook's answer or error asks to stop.

    The first error keeps all further hooks from being called; it is raised once the run has been
    put in order, so that no evaluation and no row of the logs is missed by a resumed run.

    Args:
        callbacks: In the order they are called.
        states: Of the checkpoint that the run goes on from, by `state_key`.

    Attributes:
        notes: What there is to say to whoever watches.
        stopped_by: The hook that returned False, as `Class.on_eval`.

    Raises:
        UsageError: if a callback does not take its state.
    """

    def __init__(self, callbacks: Sequence[Callback], states: dict[str, Any]) -> None:
        self._callbacks = tuple(callbacks)
        self._failure: tuple[str, BaseException] | None = None
        self.stopped_by: str | None = None
        self.notes: list[str] = []
        self._run_dir = Path()
        waiting = dict(states)
        for callback in callbacks:
            state = waiting.pop(callback.state_key, None)
            if state is not None:
                try:
                    callback.load_state_dict(state)
                except Exception as error:
                    name = f"{type(callback).__name__}.load_state_dict"
                    raise UsageError(f"resume: callback {name}: {_reason(error)}") from error
        for key in waiting:
            self.notes.append(
                f"callbacks: the state that {key} left in the checkpoint is dropped, for it is not "
                "among the callbacks any more"
            )

    @property
    def wanted(self) -> bool:
        """Whether the run is to stop."""
        return self.stopped_by is not None or self._failure is not None

    def begin(self, trainer: Trainer) -> None:
        """Show the callbacks the run, and call `on_training_start`.

        Raises:
            RunError: if one fails; the trainer is closed then.
        """
        self._run_dir = trainer.run_dir
        for callback in self._callbacks:
            callback._trainer = trainer
        self.call("on_training_start")
        if self._failure is not None:
            trainer.close()
            self.expect_none_failed()

    def listens(self, hook: str) -> bool:
        """Whether any callback has overridden the hook."""
        base = getattr(Callback, hook)
        return any(getattr(type(callback), hook) is not base for callback in self._callbacks)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call the hook of each callback; its answer and its error are noted."""
        for callback in self._callbacks:
            if self._failure is not None:
                return
            name = f"{type(callback).__name__}.{hook}"
            try:
                answer = getattr(callback, hook)(*arguments)
            except (Exception, SystemExit) as error:
                self._failure = name, error
                return
            if not (answer is None or isinstance(answer, bool | np.bool_)):
                self._failure = name, TypeError(f"expected True, False or None, got {answer!r}")
            elif answer is not None and not answer and self.stopped_by is None:
                self.stopped_by = name

    def state_dict(self) -> dict[str, Any]:
        """Of all callbacks that have one."""
        states = {}
        for callback in self._callbacks:
            try:
                if state := callback.state_dict():
                    _expect_plain(state)
                    states[callback.state_key] = state
            except (Exception, SystemExit) as error:
                if self._failure is None:
                    self._failure = f"{type(callback).__name__}.state_dict", error
        return {"callbacks": states} if states else {}

    def expect_none_failed(self) -> None:
        """Raise the first error, if there was one.

        Raises:
            RunError: naming the hook, and what there is to go on from.
        """
        if self._failure is not None:
            name, error = self._failure
            left = what_is_left(self._run_dir)
            raise RunError(f"callback {name}: {_reason(error)}. {left}") from error


def _expect_plain(state: dict[str, Any]) -> None:
    """Refuse what a checkpoint would not give back as it was."""
    for key, value in state.items():
        if not isinstance(key, str) or "/" in key:
            raise TypeError(f"expected strings without '/' as keys, got {key!r}")
        if isinstance(value, dict):
            _expect_plain(value)
        elif not isinstance(value, torch.Tensor | np.ndarray):
            json.dumps(value)


def _reason(error: BaseException) -> str:
    """The error and the line it comes from."""
    where = traceback.extract_tb(error.__traceback__)
    line = f" ({where[-1].filename}, line {where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {one_line(error)}{line}"
