"""Environments in worker processes, as many as there are cores, seen from the parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mtrl.envs import worker

START_TIMEOUT, STEP_TIMEOUT = 120.0, 60.0
"""Longest silence of a worker that is taken for work [seconds]. A dead one is noticed at once."""


def n_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerError(ChildProcessError):
    """A simulator process failed, died or hangs; the message names the task it was at."""


class WorkerProcesses:
    """Some rows of a vector environment, dealt out to processes that hold several each.

    Args:
        rows: Which rows of the vector environment these are.
        factories: For each of them a picklable callable that makes its environment.
        tasks: For each of them its task's name, for error messages.
        workers: Number of processes; default: one per core this process may use.
    """

    def __init__(
        self,
        rows: Sequence[int],
        factories: Sequence[worker.EnvFactory],
        tasks: Sequence[str],
        workers: int | None = None,
    ) -> None:
        n = min(len(rows), workers or n_cores())
        # Dealt in turn, because neighbours in Meta-World's lists cost alike (0.2 to 0.7 ms a step).
        self._rows = [list(rows[index::n]) for index in range(n)]
        self._factories = [factories[index::n] for index in range(n)]
        self._tasks = dict(zip(rows, tasks, strict=True))
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._timeout = START_TIMEOUT

    def open(self, memory: worker.Memory) -> None:
        """Start the processes on `memory`; `wait` returns when they are ready."""
        # A server that has imported the simulator forks each worker: no second import per worker,
        # and none of the parent's threads or CUDA state in it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mtrl.envs.metaworld"])
        busy = context.RawArray("i", [rows[0] for rows in self._rows])
        self._busy = np.frombuffer(busy, np.int32)  # the row each worker is at
        for index, (rows, factories) in enumerate(zip(self._rows, self._factories, strict=True)):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=worker.run,
                args=(index, rows, factories, memory, busy, theirs),
                daemon=True,
                name=f"mtrl-worker-{index}",
            )
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        self.close = weakref.finalize(self, _stop, self._pipes, self._processes)

    def start(
        self, seed: int | None, episodes: np.ndarray, actions: Sequence[np.ndarray] | None
    ) -> None:
        """Begin every row's episode, and play what `actions` there are in it."""
        self._timeout = START_TIMEOUT
        for pipe, rows in zip(self._pipes, self._rows, strict=True):
            seeds = [seed] * len(rows)
            numbers = [int(episodes[row]) for row in rows]
            played = [() if actions is None else actions[row] for row in rows]
            self._send(pipe, ("reset", (seeds, numbers, played)))

    def step(self) -> None:
        """Begin a step with the actions in memory."""
        self._timeout = STEP_TIMEOUT
        for pipe in self._pipes:
            self._send(pipe, ("step", None))

    def wait(self) -> None:
        """Until every worker has done what was begun.

        Raises:
            WorkerError: for the first that cannot.
        """
        for index, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True)):
            ready = multiprocessing.connection.wait([pipe, process.sentinel], self._timeout)
            if not ready:
                raise WorkerError(f"{self._at(index)}: no answer for {self._timeout:.0f} s")
            try:
                failure = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join(1.0)
                raise WorkerError(
                    f"{self._at(index)}: the simulator process died (exit code {process.exitcode})"
                ) from None
            if failure is not None:
                raise WorkerError(f"{self._at(index)}: {failure}")

    @staticmethod
    def _send(pipe: Any, message: tuple[str, Any]) -> None:
        with suppress(BrokenPipeError):  # a dead worker: `wait` finds it, and says whose
            pipe.send(message)

    def _at(self, index: int) -> str:
        return f"task {self._tasks[int(self._busy[index])]!r}"


def _stop(pipes: list[Any], processes: list[Any]) -> None:
    for pipe in pipes:
        pipe.close()  # a worker leaves when its pipe ends
    for process in processes:
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()
