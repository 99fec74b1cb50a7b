"""Waiting for simulators, and putting others in the place of processes that are lost."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from mtrl.envs.native import NativePools
from mtrl.envs.processes import WorkerError, WorkerProcesses
from mtrl.envs.worker import SharedArrays


class Restarts:
    """Replaces lost processes of a vector environment's parts, with a warning for each.

    Args:
        parts: The simulators.
        most: So many processes are replaced.

    Attributes:
        count: How many were.
    """

    def __init__(self, parts: Sequence[WorkerProcesses | NativePools], most: int) -> None:
        self._parts, self.most, self.count = parts, most, 0

    def wait(
        self, arrays: SharedArrays, seed: int, episodes: np.ndarray, replace: bool = True
    ) -> np.ndarray:
        """Wait for what was begun; lost rows begin their `episodes`, `[N]`, again.

        The row that was at fault counts up its generation, which gives it another episode under
        the same number: in the same one a deterministic environment would fail again.

        Args:
            replace: Whether a process may be lost at all.

        Returns:
            Which rows have begun again, bool `[N]`.

        Raises:
            WorkerError: if a process is lost and is not to be replaced; generations are then as
                before.
        """
        restarted = np.zeros(len(episodes), bool)
        generations = arrays.generations.copy()
        # Pools first: what they reset, they reset while workers still work.
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
                    if not (replace and self._counts(error)):
                        arrays.generations[:] = generations
                        raise
                    lost = sorted({*lost, *error.rows})
                    arrays.generations[error.at_fault] += 1
            restarted[lost] = True
        for array in (arrays.terminated, arrays.truncated):
            array[restarted] = 0
        return restarted

    def _counts(self, error: WorkerError) -> bool:
        """Whether its processes are to be replaced."""
        if not error.rows or self.count >= self.most:
            return False
        self.count += 1
        warnings.warn(
            f"{str(error).splitlines()[0]}; its process is replaced (restart {self.count} of at "
            f"most {self.most})",
            RuntimeWarning,
            stacklevel=2,
        )
        return True
