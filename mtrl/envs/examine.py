"""Check of custom environments before anything heavy starts."""

from __future__ import annotations

import difflib
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import cloudpickle
import numpy as np
from gymnasium.spaces import Box

from mtrl.envs.benchmarks import Benchmark, EnvFactory
from mtrl.envs.custom import CustomTask
from mtrl.envs.processes import START_TIMEOUT
from mtrl.envs.worker import RESETS, NotFinite, expect_finite
from mtrl.errors import UsageError, with_line

EPISODES, STEPS = 2, 3
"""Episodes and steps played per task."""


def examined(benchmark: Benchmark) -> Benchmark:
    """Check every custom environment, and return the benchmark with its `spaces`.

    Each environment is created once in this process, reset, stepped with random actions and
    closed. The first episode is played twice, to warn if it does not repeat.

    Raises:
        UsageError: Naming the task, if an environment fails, breaks Gymnasium's contract, returns
            NaN at every reset, cannot be sent to another process, or its shapes differ from the
            first task's.
    """
    if benchmark.spaces is not None:
        return benchmark
    first: tuple[Box, Box] | None = None
    for task, make in benchmark.custom.items():
        with _same_folder():
            found = _play(task, make, benchmark.success_key)
        first = first or found
        for name, space, expected in zip(("observations", "actions"), found, first, strict=True):
            if space.shape != expected.shape:
                raise UsageError(
                    f"benchmark: expected {name} of equal shape, got {expected.shape} for task "
                    f"{benchmark.tasks[0]!r} and {space.shape} for task {task!r} "
                    "(a wrapper may pad the shorter ones with zeros)"
                )
    return replace(benchmark, spaces=first)


class _Hangs(BaseException):
    """An environment did not return in time. No Exception, because the environment may catch it."""


@contextmanager
def _same_folder() -> Iterator[None]:
    """Restore the working directory, which an environment may change; runs are relative to it."""
    here = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


@contextmanager
def _clock() -> Iterator[Callable[[], object]]:
    """Raise `_Hangs` inside if the yielded function is not called again within `START_TIMEOUT`.

    This uses a signal, which Python delivers only to the main thread, and only between bytecode
    instructions or in a system call. An endless loop in C code is not interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield int
        return

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield partial(signal.setitimer, signal.ITIMER_REAL, START_TIMEOUT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _play(task: str, make: EnvFactory, success_key: str | None) -> tuple[Box, Box]:
    doing = "creating it"
    env = None
    try:
        with _clock() as begin:
            begin()
            env = CustomTask(task, make, success_key)
            size, problem = (STEPS, *env.spaces[1].shape), ""
            played: list[tuple[int, list[np.ndarray]]] = []  # numbers, observations and rewards
            episodes = list(range(RESETS))
            while episodes:
                episode, doing = episodes.pop(0), "reset"
                begin()
                observation, _ = env.reset(seed=0, options={"episode": episode})
                try:
                    expect_finite("a reset's observation", observation)
                except NotFinite as error:  # allowed now and then: the row would reset again
                    problem = str(error)
                    continue
                doing, seen = "step", [observation]
                for action in np.random.default_rng(episode).uniform(-1, 1, size):
                    begin()
                    observation, reward, terminated, truncated, _ = env.step(action)
                    seen.append(np.append(observation, reward))
                    if terminated or truncated:
                        break
                _warn_of_another_key(task, success_key, env.told)
                played.append((episode, seen))
                if len(played) >= EPISODES:  # then the first once more
                    episodes = [played[0][0]] if len(played) == EPISODES else []
            _warn_unless_repeated(task, played)
            if not played:
                raise UsageError(f"expected finite observations, but {problem} at each of {RESETS}")
            doing = "close"
            begin()
            env.close()
        doing = "sending it to another process (cloudpickle)"
        cloudpickle.dumps(make)
        return env.spaces
    except (Exception, SystemExit, _Hangs) as error:
        if env is not None and doing in ("reset", "step"):
            _close(env)
        _refuse(task, doing, error)


def _warn_of_another_key(task: str, success_key: str | None, info: Mapping[str, Any]) -> None:
    """Warn if a step lacks the key of success but has one like it, such as `is_success`."""
    if success_key is None or success_key in info:
        return
    if near := difflib.get_close_matches(success_key, map(str, info), n=1):
        warnings.warn(
            f"task {task!r}: its info has {near[0]!r} but not {success_key!r}; if that says "
            f"whether it is solved, set Benchmark(..., success_key={near[0]!r})",
            stacklevel=2,
        )


def _warn_unless_repeated(task: str, played: Sequence[tuple[int, list[np.ndarray]]]) -> None:
    """Warn if the last episode is the first with the same seed and actions, but differs from it."""
    if len(played) < 2 or played[-1][0] != played[0][0]:
        return
    (_, first), *_, (_, last) = played
    same = (np.array_equal(a, b, equal_nan=True) for a, b in zip(first, last, strict=False))
    if len(first) != len(last) or not all(same):
        warnings.warn(
            f"task {task!r}: an episode repeated with the same seed and actions differed, so runs "
            "do not repeat; if a wrapper keeps statistics over episodes, such as "
            "gymnasium.wrappers.NormalizeObservation, evaluations use others than training: "
            "remove it, because the recipes of mtrl normalise observations and scale rewards",
            stacklevel=2,
        )


def _close(env: CustomTask) -> None:
    """Close after a failure; only that failure is reported, not those that follow from it."""
    with suppress(Exception, SystemExit, _Hangs), _clock() as begin:
        begin()
        env.close()


def _refuse(task: str, doing: str, error: BaseException) -> NoReturn:
    if isinstance(error, UsageError):
        raise UsageError(f"benchmark: task {task!r}: {error}") from None
    what = with_line(error)
    if isinstance(error, _Hangs):
        last = traceback.extract_tb(error.__traceback__)[-2]  # -1: the signal handler
        what = f"no answer for {START_TIMEOUT:.0f} s ({last.filename}, line {last.lineno})"
    raise UsageError(f"benchmark: task {task!r} failed at {doing}: {what}") from error
