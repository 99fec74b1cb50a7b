"""What a run leaves on disk, and how it gets there whole.

<run_dir>/
├── config.yaml               the resolved configuration; `--config` accepts it
├── benchmark.json            the tasks, how each is scored, where they came from
├── demonstrations.npz        with `--demonstrations`, all of them; see mtrl/demonstrations/data.py
├── run.json                  command lines, package versions, each task's simulator, machine
├── progress.csv, progress.json, events.out.tfevents.*    the logs
├── cosines.jsonl             cosines between the tasks' gradients at each diagnosis
├── checkpoints/
│   └── step_<environment steps>.safetensors              the two newest
├── policy_final.safetensors  the final policy, once training is over
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

- `environments`: `"metaworld"`, or `"custom"` for environments that a user brought.
- `source`: the `package.module:attribute` that gives the benchmark again; null if it is
  Meta-World's, or was made in Python and no module holds it.
- `tasks`: in the order of every `[T, …]` array.
- `score`: `"success"` if some step so far said whether the task is solved. Then
  `eval/success_rate/<task>` and `rollout/success_rate/<task>` are logged, and the task's row in
  eval.json has `success_rate`. `"return"` if no step did: the task is judged by
  `eval/return/<task>`. During a run a task may change from `"return"` to `"success"`, never back;
  evaluations before that found no success.
- `eval/success_rate/mean` and `/worst` are over the tasks with a success rate, and missing if there
  are none; `eval/return/mean` is over all tasks.

Runs made before there was this file have config.yaml alone to tell.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
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
"""What a policy file says it is; so do a checkpoint and an exported file."""
CHECKPOINT_FORMAT = "mtrl-checkpoint-1"
EXPORT_FORMAT = "mtrl-export-1"

DISTRIBUTION = "mtrl-surgery"
"""What pip calls this package; `mtrl` on PyPI is somebody else's."""

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


_UMASK = os.umask(0)  # there is no way to ask but to set it
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, sync it, and give it its name: all of it or nothing.

    Raises:
        OSError: if the disk is full, or for whatever else it has.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # safetensors makes files its owner alone can read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class TaskRecord(BaseModel):
    """A task of a run; see the top of this file."""

    model_config = ConfigDict(frozen=True)
    name: str
    score: Literal["success", "return"]


class BenchmarkRecord(BaseModel):
    """What a run was trained on; see the top of this file."""

    model_config = ConfigDict(frozen=True)
    name: str
    environments: Literal["metaworld", "custom"]
    source: str | None = None
    tasks: tuple[TaskRecord, ...] = Field(min_length=1)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(task.name for task in self.tasks)


def read_benchmark(run_dir: Path) -> BenchmarkRecord | None:
    """What the run was trained on; None for a run from before this was recorded.

    Raises:
        UsageError: if the record cannot be read.
    """
    path = run_dir / BENCHMARK
    try:
        return BenchmarkRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UsageError(f"runs: cannot read {path}: {one_line(error)}") from None


def write_benchmark(run_dir: Path, record: BenchmarkRecord) -> None:
    """What `read_benchmark` gives back."""
    write_text(run_dir / BENCHMARK, record.model_dump_json(indent=2) + "\n")


def find_policy(source: Path) -> Path:
    """The policy file that is meant: of a run folder the final one, or else its newest checkpoint.

    Raises:
        UsageError: if a folder has neither.
    """
    try:
        if not source.is_dir():
            return source
    except (OSError, ValueError) as error:  # no name that a file could have
        raise UsageError(f"policy: cannot read {str(source)!r}: {one_line(error)}") from None
    if (final := source / FINAL).exists():
        return final
    try:
        return newest_checkpoint(source)
    except UsageError:
        raise UsageError(
            f"policy: expected a policy, a checkpoint or a run folder with one, got {source}"
        ) from None


def newest_checkpoint(run_dir: Path) -> Path:
    """The checkpoint to go on from.

    Raises:
        UsageError: if there is none.
    """
    found = newest_or_none(run_dir)
    if found is None:
        raise UsageError(f"resume: expected a run folder with a checkpoint, got {run_dir}")
    return found


def installed_versions() -> dict[str, str]:
    """Python's version, and those of the packages a run depends on that are installed."""
    found = {"python": platform.python_version()}
    for name, package in {"mtrl": DISTRIBUTION, **{name: name for name in PACKAGES}}.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:  # an extra; or mtrl, run from its folder
            continue
    return found


def newest_or_none(run_dir: Path) -> Path | None:
    """The newest checkpoint's path, or None."""
    found = sorted((run_dir / "checkpoints").glob("step_*.safetensors"))
    return found[-1] if found else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: Path, up_to: float = math.inf) -> list[dict[str, Any]]:
    """One JSON object per line, those `up_to` so many steps; none if there is no such file.

    Lines that a crash or a full disk has spoilt are left out, wherever they are.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line.strip("\0 \t\r"))  # a lost block of a file reads as zeros
            if 0 <= row[STEP] <= up_to:
                rows.append(row)
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return rows
