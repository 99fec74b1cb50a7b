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
from gymnasium.error import AlreadyPendingCallError, NoAsyncCallError
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
    """E environments per task; row t E + e of every array belongs to copy e of task t.

    One process per task, as `gymnasium.vector.AsyncVectorEnv` has it, spends its time on waking
    processes when there are more tasks than cores. Here each worker holds several.

    `step` is `step_async`, after which the caller may do other work while simulators step, and
    `step_wait`. Below, N = T E rows.

    Episodes end in the same step they are followed by the next (`AutoresetMode.SAME_STEP`): where
    `terminated | truncated`, `infos["final_obs"]` holds the true last observation, and
    `infos["final_info"]["episode"]` return `r`, length `l` and whether it ever saw success `s`.
    `infos["success"]` is each step's flag.

    Args:
        factories: For each row a picklable callable that makes its environment. Episode k must
            repeat from `reset(seed=seed, options={"episode": k})`, and a plain `reset()` go on by
            E: copy e of a task plays its episodes e, e + E, e + 2E, …
        names: The T tasks' names, for error messages.
        observation_space: Of every task, a `Box` of one dimension.
        action_space: Likewise.
        envs_per_task: The number E of copies of each task.
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
        envs_per_task: int = 1,
        workers: int | None = None,
    ) -> None:
        self.names = tuple(names)
        self.n_tasks, self.envs_per_task = len(names), envs_per_task
        self.num_envs = n = self.n_tasks * envs_per_task
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

        self._pending = False
        self._returns = np.zeros(n)
        self._success = np.zeros(n, bool)
        self._first = np.tile(np.arange(envs_per_task), self.n_tasks)
        self._episodes = self._first - envs_per_task
        self._history: list[list[np.ndarray]] = [[] for _ in range(n)]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every row's next episode, or its first one of `seed`. Observations [N, d]."""
        self._expect_no_step("reset")
        following = self._episodes + self.envs_per_task
        self._episodes = self._first.copy() if seed is not None else following
        self._start(seed, None)
        return self._shared.observations.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row once with actions [N, a] in [-1, 1]; returns [N, d], [N], [N], [N]."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Have every row step with actions [N, a], and return before they have.

        Raises:
            AlreadyPendingCallError: (Gymnasium's) if the last step has not been waited for.
        """
        self._expect_no_step("step_async")
        shared = self._shared
        shared.actions[:] = actions
        for pipe in self._pipes:
            self._send(pipe, ("step", None))
        for history, action in zip(self._history, shared.actions.copy(), strict=True):
            history.append(action)
        self._pending = True

    def step_wait(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """What came of `step_async`, as `step` returns it.

        Raises:
            NoAsyncCallError: (Gymnasium's) if there was none.
        """
        if not self._pending:
            raise NoAsyncCallError("step_wait: expected a step_async before it", "step")
        self._pending = False
        self._receive(STEP_TIMEOUT)

        shared = self._shared
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
            self._episodes[done] += self.envs_per_task
        return shared.observations.copy(), shared.rewards.copy(), terminated, truncated, infos

    def state(self) -> dict[str, Any]:
        """Where every row is: its episode's number, and what was done and seen in it so far."""
        self._expect_no_step("state")
        actions = {str(row): np.array(a, np.float32) for row, a in enumerate(self._history)}
        return {
            "episodes": self._episodes.tolist(),
            "returns": self._returns.tolist(),
            "success": self._success.tolist(),
            "actions": actions,
        }

    def restore(self, state: dict[str, Any], *, seed: int) -> np.ndarray:
        """Go back to a `state` under `seed` by playing its actions again. Observations [N, d].

        The simulator is deterministic, so this is exact, and needs nothing of its inside.
        """
        self._expect_no_step("restore")
        self._episodes = np.array(state["episodes"])
        actions = [np.asarray(state["actions"][str(row)]) for row in range(self.num_envs)]
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

    def _expect_no_step(self, call: str) -> None:
        if self._pending:
            raise AlreadyPendingCallError(f"{call}: expected step_wait after step_async", "step")

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
        return f"task {self.names[self._shared.busy[index] // self.envs_per_task]!r}"

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
    envs_per_task: int = 1,
) -> TaskVectorEnv:
    """The benchmark's tasks on the reference simulator; see `MetaWorldTask` for the arguments."""
    return TaskVectorEnv(
        [
            partial(MetaWorldTask, task, horizon, shuffle_goals, envs_per_task)
            for task in benchmark.tasks
            for _ in range(envs_per_task)
        ],
        benchmark.tasks,
        OBSERVATION_SPACE,
        ACTION_SPACE,
        envs_per_task,
        workers,
    )
