"""Waiting for simulators, and replacing lost processes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from mtrl.envs.native import NativePools
from mtrl.envs.processes import WorkerError, WorkerProcesses
from mtrl.envs.shared import SharedArrays


class Restarts:
    """Waits for the simulators of a vector environment and replaces lost processes, with a warning.

    Args:
        names: Task name of each row.
        max_restarts: Maximum number of processes to replace.

    Attributes:
        count: Number of processes replaced so far.
    """

    def __init__(
        self,
        parts: Sequence[WorkerProcesses | NativePools],
        arrays: SharedArrays,
        names: Sequence[str],
        max_restarts: int,
    ) -> None:
        self._parts, self._arrays, self._names = parts, arrays, names
        self.max_restarts, self.count = max_restarts, 0

    def prepare(self) -> None:
        """Record the state before a step or reset; call this while no simulator is running."""
        self._generations = self._arrays.generations.copy()

    def wait(self, seed: int, episodes: np.ndarray, replace: bool = True) -> np.ndarray:
        """Wait for the simulators; lost rows restart their `episodes`. Return which, bool `[N]`.

        The generation of a row at fault is incremented, which gives it another episode under the
        same number: a deterministic environment would fail again in the same episode.

        Args:
            replace: Whether lost processes may be replaced.

        Raises:
            WorkerError: If a process is lost and may not be replaced. Generations are then
                unchanged.
        """
        arrays, restarted = self._arrays, np.zeros(len(episodes), bool)
        expected = self._generations.copy()
        # Pools come first, so that they reset while workers are still busy.
        for part in reversed(self._parts):
            lost: list[int] = []
            while True:
                try:
                    if lost and isinstance(part, WorkerProcesses):
                        part.restart(lost, seed, episodes)
                    else:
                        part.wait()
                    break
                except WorkerError as error:
                    if not (replace and self._may_replace(error)):
                        arrays.generations[:] = self._generations
                        raise
                    lost = sorted({*lost, *error.rows})
                    arrays.generations[error.at_fault] += 1
                    expected[error.at_fault] += 1
            restarted[lost] = True
        for row in np.flatnonzero(arrays.generations > expected).tolist():
            # Python shows equal warnings only once.
            warnings.warn(
                f"task {self._names[row]!r}: a reset returned an observation that is not finite in "
                "float32; the episode was restarted from another seed",
                RuntimeWarning,
                stacklevel=2,
            )
        for array in (arrays.terminated, arrays.truncated):
            array[restarted] = 0
        return restarted

    def _may_replace(self, error: WorkerError) -> bool:
        """Return whether the lost processes may be replaced, and count and warn if so."""
        if not error.rows or self.count >= self.max_restarts:
            return False
        self.count += 1
        warnings.warn(
            f"{str(error).splitlines()[0]}; its process is replaced (restart {self.count} of at "
            f"most {self.max_restarts})",
            RuntimeWarning,
            stacklevel=2,
        )
        return True
