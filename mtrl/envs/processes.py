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

START_TIMEOUT, STEP_TIMEOUT = 120.0, 15.0
"""Longest silence of a worker that is taken for work [seconds]. A dead one is noticed at once."""


def n_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerError(ChildProcessError):
    """A simulator failed, died, hangs or gives what is no number; the message names the task.

    Attributes:
        rows: The rows that are lost with it, if they can be begun again.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


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
        self._pipes: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        self._timeout = START_TIMEOUT

    def open(self, memory: worker.Memory) -> None:
        """Start the processes on `memory`; `wait` returns when they are ready."""
        # A server that has imported the simulator forks each worker: no second import per worker,
        # and none of the parent's threads or CUDA state in it.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mtrl.envs.metaworld"])
        self._memory = memory
        self._busy = self._context.RawArray("i", len(self._rows))  # the row each worker is at
        for index in range(len(self._rows)):
            self._launch(index)
        self.close = weakref.finalize(self, _stop, self._pipes, self._processes)

    def _launch(self, index: int) -> None:
        rows, factories = self._rows[index], self._factories[index]
        self._busy[index] = rows[0]
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(
            target=worker.run,
            args=(index, rows, factories, self._memory),
            kwargs={"busy": self._busy, "pipe": theirs},
            daemon=True,
            name=f"mtrl-worker-{index}",
        )
        process.start()
        theirs.close()
        self._pipes[index], self._processes[index] = pipe, process

    def start(
        self, seed: int | None, episodes: np.ndarray, actions: Sequence[np.ndarray] | None
    ) -> None:
        """Begin every row's episode, and play what `actions` there are in it."""
        for index in self._pipes:
            self._start(index, seed, episodes, actions)

    def _start(
        self,
        index: int,
        seed: int | None,
        episodes: np.ndarray,
        actions: Sequence[np.ndarray] | None,
    ) -> None:
        self._timeout, rows = START_TIMEOUT, self._rows[index]
        numbers = [int(episodes[row]) for row in rows]
        played = [() if actions is None else actions[row] for row in rows]
        self._send(self._pipes[index], ("reset", ([seed] * len(rows), numbers, played)))

    def restart(self, lost: Sequence[int], seed: int, episodes: np.ndarray) -> None:
        """Put another process in the place of each that had a lost row; `wait` follows.

        Args:
            lost: Rows that a `WorkerError` named.
            seed: Of the episodes.
            episodes: Each row's, to begin again.
        """
        for index, rows in enumerate(self._rows):
            if not set(rows).isdisjoint(lost):
                self._processes[index].kill()
                self._processes[index].join()
                self._pipes[index].close()
                self._launch(index)
                self._timeout = START_TIMEOUT
                self._answer(index)
                self._start(index, seed, episodes, None)
                self._answer(index)

    def step(self) -> None:
        """Begin a step with the actions in memory."""
        self._timeout = STEP_TIMEOUT
        for pipe in self._pipes.values():
            self._send(pipe, ("step", None))

    def wait(self) -> None:
        """Until every worker has done what was begun, or has failed.

        Raises:
            WorkerError: with the first failure's message, and the rows of all.
        """
        failures: list[WorkerError] = []
        for index in self._pipes:
            try:
                self._answer(index)
            except WorkerError as error:
                failures.append(error)
        if failures:
            raise WorkerError(str(failures[0]), [row for error in failures for row in error.rows])

    def _answer(self, index: int) -> None:
        pipe, process, rows = self._pipes[index], self._processes[index], self._rows[index]
        ready = multiprocessing.connection.wait([pipe, process.sentinel], self._timeout)
        if not ready:
            raise WorkerError(f"{self._at(index)}: no answer for {self._timeout:.0f} s", rows)
        try:
            failure = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join(1.0)
            code = f"exit code {process.exitcode}"
            raise WorkerError(
                f"{self._at(index)}: the simulator process died ({code})", rows
            ) from None
        if failure is not None:
            raise WorkerError(f"{self._at(index)}: {failure}", rows)

    @staticmethod
    def _send(pipe: Any, message: tuple[str, Any]) -> None:
        with suppress(BrokenPipeError):  # a dead worker: `wait` finds it, and says whose
            pipe.send(message)

    def _at(self, index: int) -> str:
        return f"task {self._tasks[int(self._busy[index])]!r}"


def _stop(pipes: dict[int, Any], processes: dict[int, Any]) -> None:
    for pipe in pipes.values():
        pipe.close()  # a worker leaves when its pipe ends
    for process in processes.values():
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()
