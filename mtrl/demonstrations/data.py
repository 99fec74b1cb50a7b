"""Demonstrations in memory and on disk.

The file is in NumPy's `.npz` format, as `numpy.savez_compressed` writes it:

| array | shape | content |
|---|---|---|
| `observations` | `[n, observation]` | s |
| `actions` | `[n, action]` | a, in [-1, 1] |
| `rewards` | `[n]` | r, as the environment returned it, not scaled |
| `next_observations` | `[n, observation]` | s′; at an episode's end, the one before the reset |
| `terminated` | `[n]` | whether the episode truly ended at this step |
| `truncated` | `[n]` | whether a time limit ended it |
| `tasks` | `[T]` | names |
| `task` | `[n]` | index of each row's task in `tasks`; optional if there is one task |
| `success` | `[n]` | whether the step was successful; optional |

The rows of an episode follow each other. An episode ends where `terminated` or `truncated` is set,
before a row of another task, and at the end of the file.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtrl.errors import UsageError, one_line
from mtrl.folder import write_atomically

REQUIRED = "observations actions rewards next_observations terminated truncated tasks".split()
"""Arrays that every file must have."""

_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Errors of NumPy for damaged files and other formats."""

_DIMENSIONS = {"observations": 2, "actions": 2, "next_observations": 2}
_FLAGS = ("terminated", "truncated", "success")


@dataclass(frozen=True)
class Demonstrations:
    """Episodes of some tasks; see the top of this file.

    Attributes:
        tasks: Names of the T tasks.
        task: Index of each row's task in `tasks`, int64 `[n]`.
        observations: float32 `[n, observation]`.
        actions: float32 `[n, action]` in [-1, 1].
        rewards: float32 `[n]`.
        next_observations: float32 `[n, observation]`.
        terminated: bool `[n]`.
        truncated: bool `[n]`.
        success: bool `[n]`, or None if unknown.

    Raises:
        UsageError: If the arrays are inconsistent, or a number is not finite.
    """

    tasks: tuple[str, ...]
    task: np.ndarray
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(np.atleast_1d(self.observations))
        for name in ("observations", "actions", "rewards", "next_observations", *_FLAGS):
            values = getattr(self, name)
            if name != "success" or values is not None:
                object.__setattr__(self, name, _array(name, values, n))
        sizes = self.observations.shape[1], self.next_observations.shape[1]
        _expect(sizes[0] == sizes[1], f"next_observations of length {sizes[0]}", sizes[1])
        _expect(len(self.observations) > 0, "at least one transition", "none")
        largest = np.abs(self.actions).max(initial=0.0)
        _expect(largest <= 1, "actions in [-1, 1]", f"one of magnitude {largest:g}")
        task = np.asarray(self.task)
        whole = task.dtype.kind in "iu" and task.shape == (len(self),)
        _expect(whole, f"task as {len(self)} integers", f"{task.dtype} {task.shape}")
        within = task.min() >= 0 and task.max() < len(self.tasks)
        _expect(within, f"task below {len(self.tasks)}, the number of names in tasks", task.max())
        object.__setattr__(self, "task", task.astype(np.int64))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        _expect(len(set(self.tasks)) == len(self.tasks), "every task once", self.tasks)

    def __len__(self) -> int:
        """Return the number n of transitions."""
        return len(self.observations)

    def episodes(self, task: str) -> list[slice]:
        """Return the rows of each episode of a task."""
        ends = self.terminated | self.truncated
        ends[:-1] |= self.task[1:] != self.task[:-1]
        ends[-1] = True
        after = np.flatnonzero(ends) + 1
        starts = np.concatenate([[0], after[:-1]])
        mine = self.task[starts] == self.tasks.index(task)
        return [slice(int(a), int(b)) for a, b in zip(starts[mine], after[mine], strict=True)]

    def solved(self, task: str) -> int | None:
        """Return how many episodes of a task had a successful step, or None if unknown."""
        if self.success is None:
            return None
        return sum(bool(self.success[rows].any()) for rows in self.episodes(task))

    def __str__(self) -> str:
        """Return one line with the episodes and successes of each task."""
        parts = []
        for task in self.tasks:
            n, solved = len(self.episodes(task)), self.solved(task)
            known = "" if solved is None else f", {solved} solved"
            parts.append(f"{task} {n} episode{'s' * (n != 1)}{known}")
        return "; ".join(parts)

    def select(self, tasks: Sequence[str]) -> Demonstrations:
        """Return the rows of these tasks, in this order of tasks."""
        parts = [np.flatnonzero(self.task == self.tasks.index(task)) for task in tasks]
        rows = np.concatenate(parts)
        columns = {name: getattr(self, name)[rows] for name in REQUIRED if name != "tasks"}
        success = None if self.success is None else self.success[rows]
        task = np.repeat(np.arange(len(tasks)), [len(part) for part in parts])
        return Demonstrations(tuple(tasks), task, **columns, success=success)

    @classmethod
    def joined(cls, parts: Sequence[Demonstrations]) -> Demonstrations:
        """Return all episodes of all parts, with `success` if all parts have it.

        Raises:
            UsageError: If observations or actions differ in length.
        """
        tasks = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
        for name in ("observations", "actions"):
            sizes = sorted({getattr(part, name).shape[1] for part in parts})
            _expect(len(sizes) == 1, f"{name} of one length", " and ".join(map(str, sizes)))
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in REQUIRED
            if name != "tasks"
        }
        known = [part.success for part in parts if part.success is not None]
        success = np.concatenate(known) if len(known) == len(parts) else None
        indices = [
            np.array([tasks.index(task) for task in part.tasks])[part.task] for part in parts
        ]
        return cls(tasks, np.concatenate(indices), **columns, success=success)

    def save(self, path: Path | str) -> None:
        """Write a `.npz` file; see the top of this file."""
        arrays = {name: getattr(self, name) for name in ("task", *REQUIRED)}
        arrays["tasks"] = np.array(self.tasks)
        if self.success is not None:
            arrays["success"] = self.success

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # NumPy would add its suffix to a name
                np.savez_compressed(file, **arrays)

        write_atomically(Path(path), write)

    @classmethod
    def load(cls, path: Path | str) -> Demonstrations:
        """Read a `.npz` file, without executing anything in it.

        Raises:
            UsageError: If the file cannot be read, or an array is missing or invalid.
        """
        try:
            opened = np.load(Path(path).expanduser(), allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise ValueError("expected several arrays, got one")
            with opened as file:
                held = [name for name in (*REQUIRED, "task", "success") if name in file]
                arrays = {name: file[name] for name in held}
        except _UNREADABLE as error:
            raise UsageError(f"demonstrations: cannot read {path}: {one_line(error)}") from None
        try:
            for name in REQUIRED:
                _expect(name in arrays, f"an array {name!r}", "none")
            names = arrays.pop("tasks")
            text = names.dtype.kind == "U" and names.ndim == 1
            _expect(text, "tasks as a list of names", f"{names.dtype} {names.shape}")
            if len(names) == 1:
                arrays.setdefault("task", np.zeros(len(arrays["observations"]), np.int64))
            _expect("task" in arrays, "an array 'task' for several tasks", "none")
            return cls(tuple(map(str, names)), **arrays)
        except UsageError as error:
            reason = str(error).removeprefix("demonstrations: ")
            raise UsageError(f"demonstrations: {path}: {reason}") from None

    def digest(self) -> str:
        """Return a checksum of everything that affects training."""
        found = hashlib.sha256("\n".join(self.tasks).encode())
        for name in ("task", *REQUIRED):
            if name != "tasks":
                found.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return found.hexdigest()


def _array(name: str, values: object, n: int) -> np.ndarray:
    """Return the values as float32 or bool, after checking shape and numbers."""
    found = np.asarray(values)
    dimensions = _DIMENSIONS.get(name, 1)
    kinds = "biuf" if name in _FLAGS else "iuf"
    right = found.ndim == dimensions and found.dtype.kind in kinds and len(found) == n
    expected = f"{n} rows" if dimensions == 2 else f"{n} values"
    _expect(right, f"{name} as {expected} of numbers", f"{found.dtype} of shape {found.shape}")
    if name in _FLAGS:
        _expect(bool(np.isin(found, (0, 1)).all()), f"{name} as true or false", "other numbers")
        return found.astype(bool)
    with np.errstate(over="ignore"):
        found = found.astype(np.float32)
    _expect(bool(np.isfinite(found).all()), f"finite {name}", "infinite ones or NaN")
    return found


def _expect(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise UsageError(f"demonstrations: expected {expected}, got {got}")
