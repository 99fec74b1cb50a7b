"""Meta-World's tasks in words, and these words as vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np

from mtrl.config import yaml12

_FOLDER = files("mtrl.policy")


@cache
def texts() -> dict[str, str]:
    """A description of each of the 50 tasks, in our own words."""
    found: dict[str, str] = yaml12.load((_FOLDER / "descriptions.yaml").read_text("utf-8"))
    return found


def vectors(tasks: Sequence[str]) -> np.ndarray | None:
    """The descriptions' sentence embeddings, `[T, 384]`, of unit length up to rounding.

    They are all-MiniLM-L6-v2's (Wang et al. 2020, arXiv 2002.10957), kept in float16: no language
    model is needed. `scripts/describe.py` made the file.

    Returns:
        None if one of the tasks has no description.
    """
    rows = {task: row for row, task in enumerate(texts())}
    if any(task not in rows for task in tasks):
        return None
    found: np.ndarray = _table()[[rows[task] for task in tasks]].astype(np.float32)
    return found


@cache
def _table() -> np.ndarray:
    with (_FOLDER / "descriptions.npy").open("rb") as file:
        table: np.ndarray = np.load(file)
    return table
