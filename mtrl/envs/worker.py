"""What runs inside a simulator process: several tasks, stepped in turn, seen through shared memory.

The parent writes actions, sends a word, and waits for the answer; arrays never travel through the
pipe. A finished episode is followed at once by the next one's reset (same-step autoreset), and its
last observation is kept aside, because the learner's target needs the true s′.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from typing import Any

import gymnasium as gym
import numpy as np

EnvFactory = Callable[[], gym.Env[np.ndarray, np.ndarray]]


Memory = dict[str, tuple[Any, tuple[int, ...]]]
"""Anonymous shared memory (no name to leak), and the shape of the array in it, by name."""


@dataclass
class SharedArrays:
    """What passes between the vector environment and its simulators, one row per environment."""

    observations: np.ndarray  # [N, observation], of the state to act in next
    final_observations: np.ndarray  # [N, observation], of the state before an autoreset
    actions: np.ndarray  # [N, action]
    rewards: np.ndarray  # [N]
    terminated: np.ndarray  # [N]
    truncated: np.ndarray  # [N]
    success: np.ndarray  # [N]


def allocate(rows: int, observation_size: int, action_size: int) -> Memory:
    """Memory for `SharedArrays` of so many rows."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "observations": ((rows, observation_size), "f"),
        "final_observations": ((rows, observation_size), "f"),
        "actions": ((rows, action_size), "f"),
        "rewards": ((rows,), "d"),
        "terminated": ((rows,), "B"),
        "truncated": ((rows,), "B"),
        "success": ((rows,), "B"),
    }
    return {
        name: (RawArray(code, int(np.prod(shape))), shape) for name, (shape, code) in shapes.items()
    }


def view(memory: Memory) -> SharedArrays:
    """NumPy arrays over the memory `allocate` gave."""
    return SharedArrays(
        **{
            name: np.frombuffer(raw, raw._type_).reshape(shape)
            for name, (raw, shape) in memory.items()
        }
    )


def run(
    index: int,
    rows: Sequence[int],
    factories: Sequence[EnvFactory],
    memory: Memory,
    busy: Any,
    pipe: Connection,
) -> None:
    """Serve `reset` and `step` until the parent says goodbye or is gone.

    `busy[index]` tells the parent which row this worker is at.
    """
    # A Ctrl-C or a scheduler's SIGTERM reaches the whole group; the parent decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(os, "SCHED_BATCH"):
        # Linux: a worker that is woken must not push the parent, which has others to wake, off
        # its core. Worth 7% of a vector step on two cores.
        with suppress(OSError):  # some container runtimes refuse it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    arrays = view(memory)
    try:
        envs = []
        for row, factory in zip(rows, factories, strict=True):
            busy[index] = row
            envs.append(factory())
        pipe.send(None)
        while True:
            command, arguments = pipe.recv()
            for position, (row, env) in enumerate(zip(rows, envs, strict=True)):
                busy[index] = row
                if command == "step":
                    _step(env, row, arrays)
                else:
                    _reset(env, row, arrays, *(argument[position] for argument in arguments))
            pipe.send(None)
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        with suppress(BrokenPipeError):
            pipe.send(traceback.format_exc())


def _step(env: gym.Env[np.ndarray, np.ndarray], row: int, arrays: SharedArrays) -> None:
    observation, reward, terminated, truncated, info = env.step(arrays.actions[row])
    if not (np.isfinite(observation).all() and np.isfinite(float(reward))):
        raise FloatingPointError(f"reward {reward}, observation {observation.tolist()}")
    arrays.rewards[row] = reward
    arrays.terminated[row] = terminated
    arrays.truncated[row] = truncated
    arrays.success[row] = info.get("success", False)
    if terminated or truncated:
        arrays.final_observations[row] = observation
        observation, _ = env.reset()
    arrays.observations[row] = observation


def _reset(
    env: gym.Env[np.ndarray, np.ndarray],
    row: int,
    arrays: SharedArrays,
    seed: int | None,
    episode: int,
    actions: Sequence[np.ndarray],
) -> None:
    """Start an episode and go on to where `actions` lead (see `TaskVectorEnv.restore`)."""
    arrays.observations[row], _ = env.reset(seed=seed, options={"episode": episode})
    for action in actions:
        arrays.actions[row] = action
        _step(env, row, arrays)
