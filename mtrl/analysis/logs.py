"""Files of a run folder read into plain rows, and the tasks they cover."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, one_line
from mtrl.folder import read_benchmark, read_rows

BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError)
"""Exceptions raised while reading a damaged log."""


Rows = Sequence[Mapping[str, Any]]


class Unevaluated(UsageError):
    """Folder without an evaluation: a run that has just started, or no run at all."""


def read_log(path: Path) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """Read the configuration, and the rows of progress.json or else of progress.csv."""
    lines, table = path / "progress.json", path / "progress.csv"
    if not path.exists():
        raise UsageError(f"runs: no such folder: {path}")
    if not (path / "config.yaml").is_file() or not (lines.is_file() or table.is_file()):
        expected = "a run folder with config.yaml and progress.json or progress.csv"
        raise Unevaluated(f"runs: expected {expected}, got {path}")
    config = TrainConfig.from_yaml(path / "config.yaml")
    try:
        if lines.is_file():
            return config, read_rows(lines)
        text = table.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1].splitlines()  # a killed run may end in a partial line
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(whole)]
        return config, rows
    except BROKEN as error:
        raise UsageError(f"runs: cannot read the logs in {path}: {one_line(error)}") from None


def read_final(path: Path) -> dict[str, Any] | None:
    """Read eval.json; None if it does not exist."""
    file = path / "eval.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def custom_name(path: Path) -> str | None:
    """Return the name of a custom benchmark; None for Meta-World's tasks, or if unknown."""
    record = read_benchmark(path)
    return record.name if record is not None and record.environments == "custom" else None


def tasks_of(
    path: Path, config: TrainConfig, stored: Mapping[str, Any] | None, rows: Rows
) -> tuple[str, ...]:
    """Return the task names: as recorded, or as listed in the files of older runs."""
    if (record := read_benchmark(path)) is not None:
        return record.names
    if config.tasks is not None:
        return config.tasks
    if stored is not None:
        return tuple(row["task"] for row in stored["tasks"])
    for prefix in ("eval/return/", "eval/success_rate/", "train/critic_loss/"):
        for row in rows:
            names = [tag.removeprefix(prefix) for tag in row if tag.startswith(prefix)]
            if names:
                return tuple(name for name in names if name not in ("mean", "worst"))
    raise UsageError(f"runs: expected logs that name the tasks, got none in {path}")
