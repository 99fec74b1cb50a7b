"""All tasks as one `gymnasium.vector.VectorEnv`, over as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from mtrl.benchmarks import Benchmark
from mtrl.envs import worker
from mtrl.envs.metaworld import ACTION_SPACE, OBSERVATION_SPACE, MetaWorldTask

START_TIMEOUT, STEP_TIMEOUT = 120.0, 60.0
"""Longest silence of a worker that is taken for work [seconds]. A dead one is noticed at once."""


def n_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerError(ChildProcessError):
    """A simulator process failed, died or hangs; the message names the task it was at."""


class TaskVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """One environment per task, row t of every array belonging to task t.

    One process per task, as `gymnasium.vector.AsyncVectorEnv` has it, spends its time on waking
    processes when there are more tasks than cores. Here each worker holds several tasks.

    Episodes end in the same step they are followed by the next (`AutoresetMode.SAME_STEP`): where
    `terminated | truncated`, `infos["final_obs"]` holds the true last observation, and
    `infos["final_info"]["episode"]` return `r`, length `l` and whether it ever saw success `s`.
    `infos["success"]` is each step's flag.

    Args:
        factories: For each task a picklable callable that makes its environment. Episode e of an
            environment must repeat from `reset(seed)`, `reset(options={"episode": e})`.
        names: The tasks' names, for error messages.
        observation_space: Of every task, a `Box` of one dimension.
        action_space: Likewise.
        workers: Number of processes; default: one per core this process may use.

    Raises:
        WorkerError: from any method, if a process is lost.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        factories: Sequence[worker.EnvFactory],
        names: Sequence[str],
        observation_space: Box,
        action_space: Box,
        workers: int | None = None,
    ) -> None:
        self.names = tuple(names)
        self.num_envs = n = len(names)
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, n)
        self.action_space = batch_space(action_space, n)

        workers = min(n, workers or n_cores())
        # Dealt in turn, because neighbours in Meta-World's lists cost alike (0.2 to 0.7 ms a step).
        rows = [np.arange(n)[index::workers] for index in range(workers)]
        (d,), (a,) = observation_space.shape, action_space.shape
        self.observation_size, self.action_size = d, a
        # A server that has imported the simulator forks each worker: no second import per worker,
        # and none of the parent's threads or CUDA state in it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        memory = worker.allocate(
            context,
            {
                "observations": ((n, d), "f"),
                "final_observations": ((n, d), "f"),
                "actions": ((n, a), "f"),
                "rewards": ((n,), "d"),
                "terminated": ((n,), "B"),
                "truncated": ((n,), "B"),
                "success": ((n,), "B"),
                "busy": ((workers,), "i"),
            },
        )
        self._shared = worker.view(memory)
        self._rows, self._pipes, self._processes = rows, [], []
        for index, part in enumerate(rows):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=worker.run,
                args=(index, part.tolist(), [factories[i] for i in part], memory, theirs),
                daemon=True,
                name=f"mtrl-worker-{index}",
            )
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        self._stop = weakref.finalize(self, _stop, self._pipes, self._processes)
        self._receive(START_TIMEOUT)

        self._returns = np.zeros(n)
        self._success = np.zeros(n, bool)
        self._episodes = np.full(n, -1)
        self._history: list[list[np.ndarray]] = [[] for _ in names]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every task's next episode, or its first one of `seed`. Observations [T, d]."""
        self._episodes = np.zeros_like(self._episodes) if seed is not None else self._episodes + 1
        self._start(seed, None)
        return self._shared.observations.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every task once with actions [T, a] in [-1, 1]; returns [T, d], [T], [T], [T]."""
        shared = self._shared
        shared.actions[:] = actions
        for pipe in self._pipes:
            self._send(pipe, ("step", None))
        for history, action in zip(self._history, shared.actions.copy(), strict=True):
            history.append(action)
        self._receive(STEP_TIMEOUT)

        terminated, truncated = shared.terminated.astype(bool), shared.truncated.astype(bool)
        success = shared.success.astype(bool)
        self._returns += shared.rewards
        self._success |= success
        infos: dict[str, Any] = {"success": success}
        done = terminated | truncated
        if done.any():
            lengths = np.array([len(history) for history in self._history])
            episode = {"r": self._returns.copy(), "l": lengths, "s": self._success.copy()}
            infos |= {
                "final_obs": shared.final_observations.copy(),
                "_final_obs": done,
                "final_info": {"episode": episode, "_episode": done},
                "_final_info": done,
            }
            self._begin(done)
            self._episodes[done] += 1
        return shared.observations.copy(), shared.rewards.copy(), terminated, truncated, infos

    def state(self) -> dict[str, Any]:
        """Where every task is: its episode's number, and what was done and seen in it so far."""
        actions = {str(t): np.array(rows, np.float32) for t, rows in enumerate(self._history)}
        return {
            "episodes": self._episodes.tolist(),
            "returns": self._returns.tolist(),
            "success": self._success.tolist(),
            "actions": actions,
        }

    def restore(self, state: dict[str, Any], *, seed: int) -> np.ndarray:
        """Go back to a `state` under `seed` by playing its actions again. Observations [T, d].

        The simulator is deterministic, so this is exact, and needs nothing of its inside.
        """
        self._episodes = np.array(state["episodes"])
        actions = [np.asarray(state["actions"][str(t)]) for t in range(self.num_envs)]
        self._start(seed, actions)
        self._history = [list(rows) for rows in actions]
        self._returns, self._success = np.array(state["returns"]), np.array(state["success"])
        return self._shared.observations.copy()

    def _start(self, seed: int | None, actions: list[np.ndarray] | None) -> None:
        """Start the episodes of `self._episodes`, and play `actions` in them."""
        for pipe, rows in zip(self._pipes, self._rows, strict=True):
            seeds = [seed] * len(rows)
            episodes = [int(self._episodes[row]) for row in rows]
            played = [() if actions is None else actions[row] for row in rows]
            self._send(pipe, ("reset", (seeds, episodes, played)))
        self._receive(START_TIMEOUT)
        self._begin(np.ones(self.num_envs, bool))

    def _begin(self, started: np.ndarray) -> None:
        self._returns[started] = 0.0
        self._success[started] = False
        for row in np.flatnonzero(started):
            self._history[row] = []

    @staticmethod
    def _send(pipe: Connection, message: tuple[str, Any]) -> None:
        with suppress(BrokenPipeError):  # a dead worker: `_receive` finds it, and says whose
            pipe.send(message)

    def _receive(self, timeout: float) -> None:
        """Wait until every worker has answered; raise for the first that cannot."""
        for index, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True)):
            ready = multiprocessing.connection.wait([pipe, process.sentinel], timeout)
            if not ready:
                raise WorkerError(f"{self._at(index)}: no answer for {timeout:.0f} s")
            try:
                failure = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join(1.0)
                raise WorkerError(
                    f"{self._at(index)}: the simulator process died (exit code {process.exitcode})"
                ) from None
            if failure is not None:
                raise WorkerError(f"{self._at(index)}: {failure}")

    def _at(self, index: int) -> str:
        return f"task {self.names[self._shared.busy[index]]!r}"

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes."""
        self._stop()


def _stop(pipes: list[Any], processes: list[Any]) -> None:
    for pipe in pipes:
        pipe.close()  # a worker leaves when its pipe ends
    for process in processes:
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()


def make_vector_env(
    benchmark: Benchmark,
    horizon: int = 500,
    workers: int | None = None,
    shuffle_goals: bool = True,
) -> TaskVectorEnv:
    """The benchmark's tasks on the reference simulator; see `MetaWorldTask` for the arguments."""
    return TaskVectorEnv(
        [partial(MetaWorldTask, task, horizon, shuffle_goals) for task in benchmark.tasks],
        benchmark.tasks,
        OBSERVATION_SPACE,
        ACTION_SPACE,
        workers,
    )
