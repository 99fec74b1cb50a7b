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
        arrays: What they share.
        names: Each row's task.
        most: So many processes are replaced.

    Attributes:
        count: How many were.
    """

    def __init__(
        self,
        parts: Sequence[WorkerProcesses | NativePools],
        arrays: SharedArrays,
        names: Sequence[str],
        most: int,
    ) -> None:
        self._parts, self._arrays, self._names = parts, arrays, names
        self.most, self.count = most, 0

    def begin(self) -> None:
        """To be called before anything is begun, with the simulators at rest."""
        self._generations = self._arrays.generations.copy()

    def wait(self, seed: int, episodes: np.ndarray, replace: bool = True) -> np.ndarray:
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
        arrays, restarted = self._arrays, np.zeros(len(episodes), bool)
        expected = self._generations.copy()
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
                        arrays.generations[:] = self._generations
                        raise
                    lost = sorted({*lost, *error.rows})
                    arrays.generations[error.at_fault] += 1
                    expected[error.at_fault] += 1
            restarted[lost] = True
        for row in np.flatnonzero(arrays.generations > expected).tolist():
            # Python shows an equal warning once.
            warnings.warn(
                f"task {self._names[row]!r}: a reset returned an observation that is not finite in "
                "float32; the episode was drawn again from another seed",
                RuntimeWarning,
                stacklevel=2,
            )
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
