"""Files of a run folder, and writing them atomically.

<run_dir>/
├── config.yaml               resolved configuration; `--config` accepts it
├── benchmark.json            tasks, the score of each, and where they are defined
├── demonstrations.npz        all demonstrations; see mtrl/demonstrations/data.py
├── run.json                  command lines, package versions, each task's simulator, machine
├── progress.csv, progress.json, events.out.tfevents.*    logs
├── cosines.jsonl             cosines between task gradients at each diagnosis
├── checkpoints/
│   └── step_<environment steps>.safetensors              the two latest
├── policy_final.safetensors  final policy, once training is finished
└── eval.csv, eval.json       its full evaluation

benchmark.json, read by `read_benchmark`:

    {
      "name": "reachers",
      "environments": "custom",
      "source": "my_module:reachers",
      "tasks": [
        {"name": "gravity0", "score": "success"},
        {"name": "gravity9", "score": "return"}
      ]
    }

- `environments`: `"metaworld"`, or `"custom"` for a user's environments.
- `source`: the `package.module:attribute` from which the benchmark can be imported; null if it is
  Meta-World's, or was created in Python and no module holds it.
- `tasks`: in the order of every `[T, …]` array.
- `score`: `"success"` if any step so far reported success or failure. Then
  `eval/success_rate/<task>` and `rollout/success_rate/<task>` are logged, and the task's row in
  eval.json has `success_rate`. `"return"` if no step did: the task is scored by
  `eval/return/<task>`. During a run, a task may change from `"return"` to `"success"` but never
  back; evaluations before the change had no success.
- `eval/success_rate/mean` and `/worst` cover the tasks with a success rate and are missing if there
  are none; `eval/return/mean` covers all tasks.

Older runs lack this file; for them, config.yaml names the tasks.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from mtrl.errors import UsageError, one_line

FINAL = "policy_final.safetensors"
STEP = "time/total_timesteps"
COSINES = "cosines.jsonl"
BENCHMARK = "benchmark.json"
DEMONSTRATIONS = "demonstrations.npz"

POLICY_FORMAT = "mtrl-policy-1"
"""Value of `format` in the header of a policy file; likewise for checkpoints and exported files."""
CHECKPOINT_FORMAT = "mtrl-checkpoint-1"
EXPORT_FORMAT = "mtrl-export-1"

DISTRIBUTION = "mtrl-surgery"
"""Name of this package for pip; `mtrl` on PyPI is another project."""

PACKAGES = (
    "torch",
    "numpy",
    "gymnasium",
    "metaworld",
    "mujoco",
    "stable-baselines3",
    "safetensors",
    "envpool",
)


_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: `write` fills a temporary file, which is renamed.

    Raises:
        OSError: If the disk is full, or writing fails for another reason.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # safetensors' files are readable only by their owner
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text with `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class TaskRecord(BaseModel):
    """A task in benchmark.json; see the top of this file."""

    model_config = ConfigDict(frozen=True)
    name: str
    score: Literal["success", "return"]


class BenchmarkRecord(BaseModel):
    """Contents of benchmark.json; see the top of this file."""

    model_config = ConfigDict(frozen=True)
    name: str
    environments: Literal["metaworld", "custom"]
    source: str | None = None
    tasks: tuple[TaskRecord, ...] = Field(min_length=1)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in self.tasks)


def read_benchmark(run_dir: Path) -> BenchmarkRecord | None:
    """Read benchmark.json; None for older runs, which lack it.

    Raises:
        UsageError: If the record cannot be read.
    """
    path = run_dir / BENCHMARK
    try:
        return BenchmarkRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UsageError(f"runs: cannot read {path}: {one_line(error)}") from None


def write_benchmark(run_dir: Path, record: BenchmarkRecord) -> None:
    """Write benchmark.json, which `read_benchmark` reads."""
    write_text(run_dir / BENCHMARK, record.model_dump_json(indent=2) + "\n")


def find_policy(source: Path, field: str = "policy") -> Path:
    """Return the policy file: for a run folder, the final policy or else the latest checkpoint.

    While an extended run trains, its final policy is an earlier one than its latest checkpoint's.

    Args:
        source: Run folder or file.
        field: Name of the field in errors.

    Raises:
        UsageError: If a folder has neither, or the file cannot be opened.
    """
    try:
        if not source.is_dir():
            source.open("rb").close()  # commands notice it before they import PyTorch
            return source
    except (OSError, ValueError) as error:
        raise UsageError(f"{field}: cannot read {str(source)!r}: {one_line(error)}") from None
    checkpoint, evaluated = newest_or_none(source), steps_evaluated(source)
    is_earlier = checkpoint is not None and f"step_{evaluated:012d}" < checkpoint.stem
    if (final := source / FINAL).exists() and not (is_earlier and evaluated >= 0):
        return final
    if checkpoint is None:
        expected = "a policy, a checkpoint or a run folder with one"
        raise UsageError(f"{field}: expected {expected}, got {source}")
    return checkpoint


def newest_checkpoint(run_dir: Path) -> Path:
    """Return the checkpoint to resume from.

    Raises:
        UsageError: If there is none.
    """
    found = newest_or_none(run_dir)
    if found is None:
        got = run_dir if run_dir.is_dir() else f"{run_dir.absolute()}, which is no folder"
        raise UsageError(f"resume: expected a run folder with a checkpoint, got {got}")
    return found


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages a run depends on."""
    found = {"python": platform.python_version()}
    for name, package in {"mtrl": DISTRIBUTION, **{name: name for name in PACKAGES}}.items():
        with suppress(PackageNotFoundError):  # an extra, or mtrl run from its source folder
            found[name] = version(package)
    return found


def newest_or_none(run_dir: Path) -> Path | None:
    """Return the path of the latest checkpoint, or None."""
    found = sorted((run_dir / "checkpoints").glob("step_*.safetensors"))
    return found[-1] if found else None


def steps_evaluated(run_dir: Path) -> int:
    """Return the environment steps of the policy in eval.json; -1 if there is no such file."""
    try:
        return int(json.loads((run_dir / "eval.json").read_bytes())["total_timesteps"])
    except (OSError, ValueError, LookupError, TypeError):
        return -1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: Path, up_to: float = math.inf, last: int | None = None) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line, up to a step; [] if there is no such file.

    Lines damaged by a crash or a full disk are skipped, wherever they are.

    Args:
        last: Number of bytes to read, at the end of the file; default: all.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if last is not None:
            file.seek(max(0, file.seek(0, os.SEEK_END) - last))
        text = file.read().decode("utf-8", errors="replace")
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line.strip("\0 \t\r"))  # a lost block of a file reads as zeros
            if 0 <= row[STEP] <= up_to:
                rows.append(row)
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return rows
