"""What a run leaves on disk, and how it gets there whole.

    <run_dir>/
    ├── config.yaml               the resolved configuration; `--config` accepts it
    ├── run.json                  command lines, package versions, machine
    ├── progress.csv, progress.json, events.out.tfevents.*    the logs
    ├── cosines.jsonl             cosines between the tasks' gradients at each diagnosis
    ├── checkpoints/
    │   └── step_<environment steps>.safetensors              the two newest
    ├── policy_final.safetensors  the final policy, once training is over
    └── eval.csv, eval.json       its full evaluation

A checkpoint is one safetensors file: every tensor of the training state, and in its header the
policy's description as YAML, all plain values as JSON, the versions of the packages that made it,
and a checksum over everything. So it is also a policy file. No pickle.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtrl.policy_file import digest
from mtrl.validation import UsageError, one_line

FORMAT = "mtrl-checkpoint-1"
FINAL = "policy_final.safetensors"
PACKAGES = (
    "mtrl",
    "torch",
    "numpy",
    "gymnasium",
    "metaworld",
    "mujoco",
    "stable-baselines3",
    "safetensors",
    "envpool",
)
KEEP = 2
"""Checkpoints kept: the newest, and the one before in case the disk fails."""


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


def save_checkpoint(run_dir: Path, steps: int, state: dict[str, Any], config: str) -> Path:
    """Write a checkpoint and remove all but the newest two.

    Args:
        steps: Environment steps over all tasks.
        state: Nested dictionaries with string keys; leaves are tensors, arrays or plain values.
        config: The agent's description as YAML; see `MTSAC.load`.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    _flatten(state, "", tensors, plain)
    header = {
        "format": FORMAT,
        "config": config,
        "state": json.dumps(plain),
        "versions": json.dumps(installed_versions()),
    }
    header["sha256"] = digest(header, sorted(tensors.items()))
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{steps:012d}.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))
    for old in sorted(folder.glob("step_*.safetensors"))[:-KEEP]:
        old.unlink()
    return path


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
    found = _newest_or_none(run_dir)
    if found is None:
        raise UsageError(f"resume: expected a run folder with a checkpoint, got {run_dir}")
    return found


def load_newest(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """The state of the newest checkpoint that is whole, and what there is to say about it.

    A damaged one is set aside under another name.

    Raises:
        UsageError: if there is no checkpoint, or none is whole.
    """
    notes: list[str] = []
    while True:
        path = newest_checkpoint(run_dir) if not notes else _newest_or_none(run_dir)
        if path is None:
            raise UsageError("; ".join(notes))
        try:
            state, versions = load_checkpoint(path)
        except UsageError as error:
            path.rename(path.with_suffix(".damaged"))
            notes.append(f"{error}; set aside, and the one before is tried")
            continue
        now = installed_versions()
        changed = [f"{k} {v} is now {now.get(k)}" for k, v in versions.items() if now.get(k) != v]
        if changed:
            notes.append(f"{path} was made with other versions: {', '.join(changed)}")
        return state, notes


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The `state` that `save_checkpoint` was given, and the versions it was made with.

    Everything comes back on the CPU, arrays as tensors.

    Raises:
        UsageError: if the file is damaged or no checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UsageError(f"resume: expected a {FORMAT} file, got {path}")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if digest(metadata, tensors.items()) != metadata.get("sha256"):
            raise UsageError(f"resume: {path} is damaged: its checksum does not fit")
        leaves = tensors | json.loads(metadata["state"])
        return _tree(leaves), json.loads(metadata["versions"])
    except UsageError:
        raise
    except (OSError, SafetensorError) as error:
        raise UsageError(f"resume: cannot read {path}: {one_line(error)}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"resume: {path} holds no state: {one_line(error)}") from None


def installed_versions() -> dict[str, str]:
    """Python's version, and those of the packages a run depends on that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra
            continue
    return found


def _newest_or_none(run_dir: Path) -> Path | None:
    found = sorted((run_dir / "checkpoints").glob("step_*.safetensors"))
    return found[-1] if found else None


def _tree(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _flatten(tree: Any, name: str, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _flatten(value, f"{name}/{key}" if name else key, tensors, plain)
    elif isinstance(tree, np.ndarray):
        tensors[name] = torch.from_numpy(tree)
    elif isinstance(tree, Tensor):
        tensors[name] = tree.cpu().contiguous()
    else:
        plain[name] = tree


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
