"""Calls of callbacks; a run loses nothing if one of them fails."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger

from mtrl.config.registry import parse
from mtrl.errors import RunError, UsageError, with_line
from mtrl.folder import STEP
from mtrl.training.callbacks import Callback, check

if TYPE_CHECKING:
    from mtrl.training.trainer import Trainer


def made(specs: Sequence[str], given: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks of a run: those that its configuration names, then the given ones.

    Raises:
        UsageError: If one cannot be created, is not a callback, or has the state key of another.
    """
    found: list[Any] = []
    for spec in specs:
        _, options = parse("callbacks", spec)
        try:
            found.append(check(spec)(**options))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(f"callbacks: {spec} failed: {with_line(error)}") from error
    if isinstance(given, Callback) or not isinstance(given, Sequence):
        kind = type(given).__name__
        raise UsageError(f"callbacks: expected a list of mtrl.Callback objects, got {kind}")
    for callback in (found := [*found, *given]):
        if not isinstance(callback, Callback):
            raise UsageError(f"callbacks: expected an mtrl.Callback object, got {callback!r}")
    keys = [c.state_key for c in found if type(c).state_dict is not Callback.state_dict]
    for key in keys:
        if keys.count(key) > 1 or "/" in key:
            raise UsageError(
                f"callbacks: expected a state_key without '/' for each that has a state, got "
                f"{key!r}{' twice' if keys.count(key) > 1 else ''}"
            )
    return found


class GivenLogger(Callback):
    """Sends every row to a user's logger.

    Raises:
        UsageError: If it is not a logger of Stable-Baselines3.
    """

    def __init__(self, logger: Any) -> None:
        if not isinstance(logger, Logger):
            raise UsageError(
                "logger: expected a stable_baselines3.common.logger.Logger, got "
                f"{type(logger).__name__}"
            )
        self._to = logger

    def on_log(self, values: Mapping[str, float]) -> None:
        """Record and dump the row."""
        for key, value in values.items():
            self._to.record(key, value, exclude="tensorboard" if key == STEP else None)
        self._to.dump(self.num_timesteps)


class Hooks:
    """Callbacks of a run, their answers and the first error.

    After an error no further hook is called. The error is raised after the run has finished its
    step and written a checkpoint. So a resumed run misses no evaluation and no row of the logs.

    Args:
        callbacks: Callbacks in the order of their calls.
        saved: State in the checkpoint to resume from, as `state_dict` returned it.

    Attributes:
        n_calls: Number of `on_step` calls since the start of the run.
        notes: Messages to print.
        stopped_by: Hook that returned False, such as `Patience.on_eval`.

    Raises:
        UsageError: If a callback does not accept its state.
    """

    def __init__(self, callbacks: Sequence[Callback], saved: dict[str, Any]) -> None:
        self._callbacks = tuple(callbacks)
        self._failure: tuple[str, BaseException] | None = None
        self.stopped_by: str | None = None
        self.notes: list[str] = []
        self._trainer: Trainer | None = None
        self._recorded: list[tuple[str, float]] = saved.get("recorded", [])
        self.n_calls: int = saved.get("n_calls", 0)
        waiting = dict(saved.get("callbacks", {}))
        for callback in callbacks:
            state = waiting.pop(callback.state_key, None)
            if state is not None:
                try:
                    callback.load_state_dict(state)
                except Exception as error:
                    name = f"{type(callback).__name__}.load_state_dict"
                    raise UsageError(f"resume: callback {name}: {with_line(error)}") from error
        for key in waiting:
            self.notes.append(
                f"callbacks: the checkpoint's state of {key} is discarded, because {key} is no "
                "longer among the callbacks"
            )

    @property
    def wanted(self) -> bool:
        """Whether the run should stop."""
        return self.stopped_by is not None or self._failure is not None

    def begin(self, trainer: Trainer) -> None:
        """Attach the callbacks to a run and call `on_training_start`.

        Raises:
            RunError: If one fails; the trainer is closed then.
        """
        self._trainer = trainer
        for name, value in self._recorded:
            trainer.logger.record(name, value)
        for callback in self._callbacks:
            callback._trainer = trainer
        self.call("on_training_start")
        if self._failure is not None:
            trainer.close()
            self.expect_none_failed()

    def listens(self, hook: str) -> bool:
        """Return whether any callback overrides the hook."""
        base = getattr(Callback, hook)
        return any(getattr(type(callback), hook) is not base for callback in self._callbacks)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks and note their answers and errors."""
        self.n_calls += hook == "on_step"
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
        """Return the states of all callbacks, and recorded numbers that are not yet logged."""
        states = {}
        for callback in self._callbacks:
            try:
                if state := callback.state_dict():
                    _expect_plain(state)
                    states[callback.state_key] = state
            except (Exception, SystemExit) as error:
                if self._failure is None:
                    self._failure = f"{type(callback).__name__}.state_dict", error
        found: dict[str, Any] = {"callbacks": states, "n_calls": self.n_calls}
        if self._trainer is not None and (waiting := self._trainer.logger.recorded):
            found["recorded"] = waiting
        return found

    def expect_none_failed(self) -> None:
        """Raise the first error of a hook, if any.

        Raises:
            RunError: With the hook and the error.
        """
        if self._failure is not None:
            name, error = self._failure
            raise RunError(f"callback {name}: {with_line(error)}") from error


def _expect_plain(state: dict[str, Any]) -> None:
    """Raise an error if a checkpoint cannot hold the state."""
    for key, value in state.items():
        if not isinstance(key, str) or "/" in key:
            raise TypeError(f"expected strings without '/' as keys, got {key!r}")
        if isinstance(value, dict):
            _expect_plain(value)
        elif not isinstance(value, torch.Tensor | np.ndarray):
            json.dumps(value)
