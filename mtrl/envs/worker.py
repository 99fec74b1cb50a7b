"""Main loop of a simulator process: it steps several tasks in turn through shared memory.

The parent writes actions, sends a command and waits for the reply; arrays never travel through the
pipe. The environment resets in the step that ends an episode (same-step autoreset). Its last
observation is kept separately, because the learner's target needs the true s′.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np

from mtrl.envs.shared import Memory, Progress, SharedArrays, view
from mtrl.errors import UsageError, one_line

EnvFactory = Callable[[], gym.Env[np.ndarray, np.ndarray]]


RESETS = 10
"""Number of resets that may return NaN in a row before the simulator counts as lost."""


@dataclass(frozen=True)
class Failure:
    """Reason why a worker exits.

    Attributes:
        text: Message for the user.
        is_lost: Whether a new process may succeed. False if the environment breaks Gymnasium's
            contract, because it would do so again.
    """

    text: str
    is_lost: bool


def run(
    index: int,
    rows: Sequence[int],
    factories: Sequence[EnvFactory],
    memory: Memory,
    *,
    progress: Any,
    pipe: Connection,
) -> None:
    """Serve `reset` and `step` until the parent closes its pipe, then close the environments.

    Args:
        progress: Shared memory of a `Progress`.
    """
    _ignore_signals()
    place, arrays = Progress(progress), view(memory)
    envs: list[gym.Env[np.ndarray, np.ndarray]] = []
    try:
        for row, factory in zip(rows, factories, strict=True):
            place.note(index, row)
            envs.append(factory())
            _expect_its_own(envs)
        pipe.send(None)
        while True:
            command, arguments = pipe.recv()
            for position, (row, env) in enumerate(zip(rows, envs, strict=True)):
                place.note(index, row)
                if command == "step":
                    _step(env, row, arrays)
                    continue
                seeds, episodes, played = arguments
                _reset(env, row, arrays, seeds[position], episodes[position])
                for action in played[position]:  # see `TaskVectorEnv.restore`
                    place.note(index, row)
                    arrays.actions[row] = action
                    _step(env, row, arrays)
            pipe.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException as error:  # an environment may call sys.exit
        with suppress(BrokenPipeError, ConnectionResetError):
            pipe.send(_failure(error))
    finally:
        for env in envs:
            with suppress(Exception):
                env.close()


def _expect_its_own(envs: Sequence[gym.Env[np.ndarray, np.ndarray]]) -> None:
    """Check that the newest environment is a new object; they would share episodes otherwise."""
    *earlier, newest = (env.unwrapped for env in envs)
    if any(env is newest for env in earlier):
        raise UsageError(
            "expected a function that creates a new environment at each call, got one that another "
            "task or copy already uses"
        )


def _ignore_signals() -> None:
    """Ignore Ctrl-C and a scheduler's signals; the parent decides when to stop."""
    # A process group of its own, so that the programs started by environments can be killed with
    # the worker, and do not receive Ctrl-C.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not SIG_IGN: those programs would inherit it and could no longer be terminated.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    # An environment may start processes, which multiprocessing forbids for daemons. The parent
    # still treats this process as a daemon; the flag is cleared only here.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if hasattr(os, "SCHED_BATCH"):
        # Linux: a worker that wakes up must not preempt the parent, which has other workers to
        # wake. This saves 7% of a vector step on two cores.
        with suppress(OSError):  # some container runtimes forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _failure(error: BaseException) -> Failure:
    if isinstance(error, UsageError):
        return Failure(str(error), is_lost=False)
    if isinstance(error, NotFinite):
        return Failure(str(error), is_lost=True)
    summary = f"{type(error).__name__}: {one_line(error)}"
    trace = "".join(traceback.format_exception(error)).rstrip()
    return Failure(f"{summary}\n{trace}", is_lost=True)


class NotFinite(ArithmeticError):
    """An environment returned a number that is infinite or NaN in float32."""


def expect_finite(what: str, numbers: Any) -> None:
    """Check that numbers are finite in float32, the type they are stored in.

    Raises:
        NotFinite: Naming the first one that is not.
    """
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.asarray(numbers, np.float32))
    if not finite.all():
        given, where = np.asarray(numbers), np.argwhere(~finite)[0].tolist()
        place = f" at index {where[0]}" if where else ""
        raise NotFinite(f"{what} is not finite in float32: {given[tuple(where)]}{place}")


def _step(env: gym.Env[np.ndarray, np.ndarray], row: int, arrays: SharedArrays) -> None:
    observation, reward, terminated, truncated, info = env.step(arrays.actions[row])
    expect_finite("a step's observation", observation)
    expect_finite("a step's reward", reward)
    arrays.rewards[row] = reward
    arrays.terminated[row] = terminated
    arrays.truncated[row] = truncated
    arrays.success[row] = info.get("success", False)
    arrays.tells_success[row] |= "success" in info
    if terminated or truncated:
        arrays.final_observations[row] = observation
        _reset(env, row, arrays, None, None)
    else:
        arrays.observations[row] = observation


def _reset(
    env: gym.Env[np.ndarray, np.ndarray],
    row: int,
    arrays: SharedArrays,
    seed: int | None,
    episode: int | None,
) -> None:
    """Start the episode with this number, or the next one.

    An episode whose first observation is not finite is replaced by one of the row's next
    generation, because the same seed would give the same observation.
    """
    options = {} if episode is None else {"episode": episode}
    for attempt in range(RESETS):
        options["generation"] = int(arrays.generations[row])
        observation, info = env.reset(seed=seed, options=options)
        try:
            expect_finite("a reset's observation", observation)
            break
        except NotFinite:
            if attempt == RESETS - 1:
                raise
            arrays.generations[row] += 1
            if "episode" in info:
                options["episode"] = info["episode"]
    arrays.observations[row] = observation
