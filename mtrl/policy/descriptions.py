"""Descriptions of Meta-World's tasks in words, and their sentence embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import numpy as np

from mtrl.config import yaml12
from mtrl.errors import UsageError

_FOLDER = files("mtrl.policy")


@cache
def texts() -> dict[str, str]:
    """Read a description of each of the 50 tasks, in our own words."""
    found: dict[str, str] = yaml12.load((_FOLDER / "descriptions.yaml").read_text("utf-8"))
    return found


LONGEST = 2**16
"""Largest length of a vector."""

Descriptions = Mapping[str, Sequence[float] | np.ndarray]
"""Vector of each task, all of the same length."""


def vectors(tasks: Sequence[str], own: Descriptions | None = None) -> np.ndarray | None:
    """Return the description vectors of tasks, `[T, e]` in float32.

    By default these are the sentence embeddings of Meta-World's task descriptions, `[T, 384]`, with
    unit norm up to rounding. They were computed with all-MiniLM-L6-v2 (Wang et al. 2020, arXiv
    2002.10957) by `scripts/describe.py` and are stored in float16, so no language model is needed.

    Args:
        tasks: Task names.
        own: Vector of each task, used unchanged, instead of Meta-World's.

    Returns:
        None if `own` is not given and a task is not from Meta-World.

    Raises:
        UsageError: If a task has no vector, or vectors differ in length or are not finite.
    """
    if own is not None:
        return np.stack(_checked(tasks, own))
    rows = {task: row for row, task in enumerate(texts())}
    if any(task not in rows for task in tasks):
        return None
    found: np.ndarray = _table()[[rows[task] for task in tasks]].astype(np.float32)
    return found


def _checked(tasks: Sequence[str], own: Descriptions) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for task in tasks:
        if task not in own:
            raise UsageError(
                f"descriptions: expected a vector for each task, got none for {task!r}"
            )
        try:
            row = np.asarray(own[task], np.float32)
        except (TypeError, ValueError):
            row = np.zeros((), np.float32)
        if row.ndim != 1 or not 1 <= len(row) <= LONGEST or not np.isfinite(row).all():
            raise UsageError(
                f"descriptions: expected a vector of 1 to {LONGEST} finite numbers for {task!r}, "
                f"got {own[task]!r:.80}"
            )
        if found and len(row) != len(found[0]):
            raise UsageError(
                f"descriptions: expected vectors of one length, got {len(found[0])} numbers for "
                f"{tasks[0]!r} and {len(row)} for {task!r}"
            )
        found.append(row)
    return found


@cache
def _table() -> np.ndarray:
    with (_FOLDER / "descriptions.npy").open("rb") as file:
        table: np.ndarray = np.load(file)
    return table
