"""Memory that the parent shares with the simulators, so that no array travels through a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

Memory = dict[str, tuple[Any, tuple[int, ...]]]
"""Anonymous shared memory (no name to leak) and its array shape, by field of `SharedArrays`."""


@dataclass
class SharedArrays:
    """Arrays shared by the vector environment and its simulators, one row per environment."""

    observations: np.ndarray  # [N, observation], of the state to act in next
    final_observations: np.ndarray  # [N, observation], of the last state before an autoreset
    actions: np.ndarray  # [N, action]
    rewards: np.ndarray  # [N]
    terminated: np.ndarray  # [N]
    truncated: np.ndarray  # [N]
    success: np.ndarray  # [N]
    tells_success: np.ndarray  # [N], whether any step so far reported success or failure
    generations: np.ndarray  # [N], number of failures of the row; selects its episodes


def allocate(rows: int, observation_size: int, action_size: int) -> Memory:
    """Allocate shared memory for the `SharedArrays` of `rows` environments."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "observations": ((rows, observation_size), "f"),
        "final_observations": ((rows, observation_size), "f"),
        "actions": ((rows, action_size), "f"),
        "rewards": ((rows,), "d"),
        "terminated": ((rows,), "B"),
        "truncated": ((rows,), "B"),
        "success": ((rows,), "B"),
        "tells_success": ((rows,), "B"),
        "generations": ((rows,), "l"),
    }
    return {
        name: (RawArray(code, int(np.prod(shape))), shape) for name, (shape, code) in shapes.items()
    }


def view(memory: Memory) -> SharedArrays:
    """Return NumPy arrays over the memory that `allocate` returned."""
    return SharedArrays(
        **{
            name: np.frombuffer(raw, raw._type_).reshape(shape)
            for name, (raw, shape) in memory.items()
        }
    )


class Progress:
    """Progress of n workers, shared with the parent: current row and number of calls."""

    def __init__(self, memory: Any) -> None:
        self._numbers = np.frombuffer(memory, np.int64).reshape(-1, 2)

    def note(self, worker: int, row: int) -> None:
        """Record that the worker is about to call the environment of this row."""
        self._numbers[worker, 0] = row
        self._numbers[worker, 1] += 1

    def row(self, worker: int) -> int:
        """Return the row whose environment was called last."""
        return int(self._numbers[worker, 0])

    def calls(self, worker: int) -> int:
        """Return the number of calls started so far."""
        return int(self._numbers[worker, 1])
