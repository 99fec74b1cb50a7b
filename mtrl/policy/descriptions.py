"""Descriptions of Meta-World's tasks in words, and their sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np

from mtrl.config import yaml12

_FOLDER = files("mtrl.policy")


@cache
def texts() -> dict[str, str]:
    """Read a description of each of the 50 tasks, in our own words."""
    found: dict[str, str] = yaml12.load((_FOLDER / "descriptions.yaml").read_text("utf-8"))
    return found


def vectors(tasks: Sequence[str]) -> np.ndarray | None:
    """Return sentence embeddings of the descriptions, `[T, 384]`, of unit length up to rounding.

    They were computed with all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957) by
    `scripts/describe.py` and are stored in float16, so no language model is needed.

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
