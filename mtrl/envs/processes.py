"""Environments in worker processes, as many as there are cores, seen from the parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mtrl.envs import worker

START_TIMEOUT, STEP_TIMEOUT = 120.0, 60.0
"""Longest time in one call of an environment that is taken for work [seconds]: to make or reset it,
and to step it. A dead process is noticed at once."""
CLOSE_TIMEOUT = 5.0
"""Longest time that a process may take to close its environments [seconds]."""
NO_MAIN_GUARD = 77
"""A worker's exit code if the script that it imports would start simulators itself."""


def n_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def expect_main_guard() -> None:
    """End a worker whose script starts simulators when it is imported; its parent says why.

    A worker imports the script that was started, as `multiprocessing` does everywhere, to find
    what the script defines. Without `if __name__ == "__main__":` it would train within.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(NO_MAIN_GUARD)


class WorkerError(ChildProcessError):
    """A simulator failed, died, hangs or returned NaN; the message names the task.

    Attributes:
        rows: The rows that are lost with it, if they can be begun again.
        at_fault: Those whose environments were being called.
    """

    def __init__(
        self, message: str, rows: Sequence[int] = (), at_fault: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.rows, self.at_fault = list(rows), list(at_fault)


class WorkerProcesses:
    """Some rows of a vector environment, dealt out to processes that hold several each.

    Args:
        rows: Which rows of the vector environment these are.
        factories: For each of them a picklable callable that makes its environment.
        tasks: For each of them its task's name, for error messages.
        workers: Number of processes; default: one per core this process may use.
        step_timeout: In place of `STEP_TIMEOUT`.
    """

    def __init__(
        self,
        rows: Sequence[int],
        factories: Sequence[worker.EnvFactory],
        tasks: Sequence[str],
        workers: int | None = None,
        step_timeout: float | None = None,
    ) -> None:
        expect_main_guard()
        n = min(len(rows), workers or n_cores())
        # Dealt in turn, because neighbours in Meta-World's lists cost alike (0.2 to 0.7 ms a step).
        self._rows = [list(rows[index::n]) for index in range(n)]
        self._factories = [factories[index::n] for index in range(n)]
        self._tasks = dict(zip(rows, tasks, strict=True))
        self._pipes: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        self._leaving: set[int] = set()
        self._timeout, self._step_timeout = START_TIMEOUT, step_timeout

    def open(self, memory: worker.Memory) -> None:
        """Start the processes on `memory`; `wait` returns when they are ready."""
        # A server that has imported the simulator forks each worker: no second import per worker,
        # and none of the parent's threads or CUDA state in it.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mtrl.envs.metaworld"])
        self._memory = memory
        self._shared = self._context.RawArray("q", 2 * len(self._rows))
        self._progress = worker.Progress(self._shared)
        for index in range(len(self._rows)):
            self._launch(index)
        self.close = weakref.finalize(self, _stop, self._pipes, self._processes)

    def _launch(self, index: int) -> None:
        rows, factories = self._rows[index], self._factories[index]
        self._progress.note(index, rows[0])
        pipe, theirs = self._context.Pipe()
        process = self._context.Process(
            target=worker.run,
            args=(index, rows, factories, self._memory),
            kwargs={"progress": self._shared, "pipe": theirs},
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
                self._pipes[index].close()
                # One that has said why it failed closes its environments; others cannot.
                _end(self._processes[index], CLOSE_TIMEOUT if index in self._leaving else 0.0)
                self._leaving.discard(index)
                self._launch(index)
                self._timeout = START_TIMEOUT
                self._answer(index)
                self._start(index, seed, episodes, None)
                self._answer(index)

    def step(self) -> None:
        """Begin a step with the actions in memory."""
        self._timeout = self._step_timeout or STEP_TIMEOUT
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
        if not failures:
            return
        for failure in failures:
            if not failure.rows:  # of no use to begin again
                raise failure
        raise WorkerError(
            str(failures[0]),
            [row for failure in failures for row in failure.rows],
            [row for failure in failures for row in failure.at_fault],
        )

    def _answer(self, index: int) -> None:
        pipe, process = self._pipes[index], self._processes[index]
        calls = self._progress.calls(index)
        while not multiprocessing.connection.wait([pipe, process.sentinel], self._timeout):
            if calls == self._progress.calls(index):
                raise self._lost(index, f"no answer for {self._timeout:.0f} s")
            calls = self._progress.calls(index)
        try:
            failure = pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join(1.0)
            if process.exitcode == NO_MAIN_GUARD:
                raise WorkerError(_NO_MAIN_GUARD) from None
            raise self._lost(
                index, f"the simulator process died (exit code {process.exitcode})"
            ) from None
        if failure is None:
            return
        self._leaving.add(index)
        if not failure.is_lost:
            raise WorkerError(f"{self._at(index)}: {failure.text}")
        raise self._lost(index, failure.text)

    def _lost(self, index: int, why: str) -> WorkerError:
        row = self._progress.row(index)
        return WorkerError(f"{self._at(index)}: {why}", self._rows[index], [row])

    @staticmethod
    def _send(pipe: Any, message: tuple[str, Any]) -> None:
        with suppress(BrokenPipeError):  # a dead worker: `wait` finds it, and says whose
            pipe.send(message)

    def _at(self, index: int) -> str:
        return f"task {self._tasks[self._progress.row(index)]!r}"


_NO_MAIN_GUARD = (
    "simulators run in processes of their own, each of which imports the script that was started: "
    'expected what trains or evaluates there to stand under `if __name__ == "__main__":`'
)


def _stop(pipes: dict[int, Any], processes: dict[int, Any]) -> None:
    for pipe in pipes.values():
        pipe.close()  # a worker leaves when its pipe ends
    for process in processes.values():
        _end(process, CLOSE_TIMEOUT)


def _end(process: Any, patience: float) -> None:
    """Wait so long [seconds] for a worker to leave, or else kill it, and what it has started."""
    process.join(patience)
    if process.exitcode == 0:
        return
    with suppress(ProcessLookupError, PermissionError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
