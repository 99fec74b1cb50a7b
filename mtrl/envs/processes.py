"""Environments in worker processes, one process per core, as seen from the parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from typing import Any

import numpy as np

from mtrl.envs import shared, worker

START_TIMEOUT, STEP_TIMEOUT = 120.0, 60.0
"""Maximum time of one call of an environment [seconds]: to create or reset it, and to step it."""
CLOSE_TIMEOUT = 5.0
"""Maximum time for a process to close its environments [seconds]."""
Replay = Sequence[np.ndarray] | None
"""Actions to take again in each row's episode, [n, action]."""
NO_MAIN_GUARD = 77
"""Exit code of a worker whose main script would start simulators when imported."""


def n_cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def expect_main_guard() -> None:
    """Exit a worker whose main script starts simulators on import; its parent reports why.

    Like every `multiprocessing` child, a worker imports the main script to find its definitions.
    Without `if __name__ == "__main__":`, that import would start the training again.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(NO_MAIN_GUARD)


class WorkerError(ChildProcessError):
    """A simulator failed, died, hung or returned NaN; the message names the task.

    Attributes:
        rows: Rows lost with the process, if they can be restarted.
        at_fault: Rows whose environments were being called.
    """

    def __init__(
        self, message: str, rows: Sequence[int] = (), at_fault: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.rows, self.at_fault = list(rows), list(at_fault)


class WorkerProcesses:
    """Rows of a vector environment, distributed over processes that hold several rows each.

    Args:
        rows: Indices of the rows in the vector environment.
        factories: Picklable callable that creates the environment of each row.
        tasks: Task name of each row, for error messages.
        workers: Number of processes; default: one per core this process may use.
        step_timeout: Timeout in place of `STEP_TIMEOUT` [seconds].
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
        # Round-robin, because neighbours in Meta-World's lists cost alike (0.2 to 0.7 ms a step).
        self._rows = [list(rows[index::n]) for index in range(n)]
        self._factories = [factories[index::n] for index in range(n)]
        self._tasks = dict(zip(rows, tasks, strict=True))
        self._pipes: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        self._leaving: set[int] = set()
        self._timeout, self._step_timeout = START_TIMEOUT, step_timeout

    def open(self, memory: shared.Memory) -> None:
        """Start the processes on shared memory; `wait` returns when they are ready."""
        # A server imports the simulator once and forks the workers, without our threads or CUDA.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["mtrl.envs.metaworld"])
        # Ctrl-C in a terminal also signals the server, which would die of it while it imports.
        resource_tracker.ensure_running()  # would unblock the signal when it starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._memory = memory
        self._shared = self._context.RawArray("q", 2 * len(self._rows))
        self._progress = shared.Progress(self._shared)
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
        try:
            process.start()
        except (EOFError, ConnectionError):  # a signal to the whole process group ended the server
            process.start()  # from a new one
        theirs.close()
        self._pipes[index], self._processes[index] = pipe, process

    def start(self, seed: int | None, episodes: np.ndarray, actions: Replay) -> None:
        """Start every row's episode, and replay `actions` in it if given."""
        for index in self._pipes:
            self._start(index, seed, episodes, actions)

    def _start(self, index: int, seed: int | None, episodes: np.ndarray, actions: Replay) -> None:
        self._timeout, rows = START_TIMEOUT, self._rows[index]
        numbers = [int(episodes[row]) for row in rows]
        played = [() if actions is None else actions[row] for row in rows]
        self._send(self._pipes[index], ("reset", ([seed] * len(rows), numbers, played)))

    def restart(self, lost: Sequence[int], seed: int, episodes: np.ndarray) -> None:
        """Replace each process that held a lost row, and restart the episodes of its rows.

        Args:
            lost: Rows named by a `WorkerError`.
            seed: Seed of the episodes.
            episodes: Episode number of every row.
        """
        for index, rows in enumerate(self._rows):
            if not set(rows).isdisjoint(lost):
                self._pipes[index].close()
                # A process that reported its failure closes its environments; others cannot.
                _end(self._processes[index], CLOSE_TIMEOUT if index in self._leaving else 0.0)
                self._leaving.discard(index)
                self._launch(index)
                self._timeout = START_TIMEOUT
                self._answer(index)
                self._start(index, seed, episodes, None)
                self._answer(index)

    def step(self) -> None:
        """Start a step with the actions in memory."""
        self._timeout = self._step_timeout or STEP_TIMEOUT
        for pipe in self._pipes.values():
            self._send(pipe, ("step", None))

    def wait(self) -> None:
        """Wait until every worker has finished its command or failed.

        Raises:
            WorkerError: With the first failure's message and the rows of all failures.
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
            if not failure.rows:  # a restart would not help
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
            died = f"the simulator process died (exit code {process.exitcode})"
            raise self._lost(index, died) from None
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
        with suppress(BrokenPipeError):  # the worker is dead: `wait` reports it with its task
            pipe.send(message)

    def _at(self, index: int) -> str:
        return f"task {self._tasks[self._progress.row(index)]!r}"


_NO_MAIN_GUARD = (
    "simulators run in separate processes, each of which imports the main script: expected the "
    'code that trains or evaluates there to be under `if __name__ == "__main__":`'
)


def _stop(pipes: dict[int, Any], processes: dict[int, Any]) -> None:
    for pipe in pipes.values():
        pipe.close()  # a worker exits when its pipe is closed
    for process in processes.values():
        _end(process, CLOSE_TIMEOUT)


def _end(process: Any, patience: float) -> None:
    """Wait up to `patience` seconds for a worker to exit, then kill it and its child processes."""
    process.join(patience)
    if process.exitcode == 0:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
