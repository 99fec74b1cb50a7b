"""Checkpoints: the whole training state in one file.

A checkpoint is a safetensors file with every tensor of the training state. Its header holds the
policy's description as YAML, all plain values as JSON, package versions, and a checksum over
everything. It is therefore also a policy file. There is no pickle.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtrl.errors import UsageError, one_line
from mtrl.folder import (
    CHECKPOINT_FORMAT,
    installed_versions,
    newest_checkpoint,
    newest_or_none,
    write_atomically,
)
from mtrl.policy.file import digest
from mtrl.sac.replay import Batch

KEEP = 2
"""Number of checkpoints to keep: the latest, and the previous one in case the disk fails."""


class CheckpointWriter:
    """Writes checkpoints in parallel to the loop; arguments of `save` may change once it returns.

    A thread hashes, writes and syncs a copy of the state on the host. Errors are raised by the next
    call of any method except `close`.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, "mtrl-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, steps: int, state: dict[str, Any], config: str) -> Path:
        """Write a checkpoint after the one before, keep the newest two, and return its path.

        Args:
            steps: Environment steps over all tasks.
            state: Nested dictionaries with string keys; leaves are tensors, arrays or plain values.
            config: The agent's description as YAML; see `MTSAC.load`.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        _flatten(state, "", tensors, plain)
        copies = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        work = steps, copies, json.dumps(plain), config
        self._pending = self._thread.submit(_write, self._run_dir, *work)
        return _path(self._run_dir, steps)

    def check(self) -> None:
        """Raise an error if writing has failed, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is written to the disk.

        Raises:
            OSError: If it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the thread, and end it."""
        self._thread.shutdown()


def _write(run_dir: Path, steps: int, tensors: dict[str, Tensor], plain: str, config: str) -> None:
    header = {
        "format": CHECKPOINT_FORMAT,
        "config": config,
        "state": plain,
        "versions": json.dumps(installed_versions()),
    }
    header["sha256"] = digest(header, sorted(tensors.items()))
    path = _path(run_dir, steps)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))
    for old in sorted(path.parent.glob("step_*.safetensors"))[:-KEEP]:
        old.unlink()


def _path(run_dir: Path, steps: int) -> Path:
    return run_dir / "checkpoints" / f"step_{steps:012d}.safetensors"


def load_newest(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """Load the state of the latest intact checkpoint, with notes for the user.

    Damaged checkpoints are renamed.

    Raises:
        UsageError: If there is no intact checkpoint.
    """
    notes: list[str] = []
    while True:
        path = newest_checkpoint(run_dir) if not notes else newest_or_none(run_dir)
        if path is None:
            raise UsageError("; ".join(notes))
        try:
            state, versions = load_checkpoint(path)
        except UsageError as error:
            path.rename(path.with_suffix(".damaged"))
            notes.append(f"{error}; it is set aside, and the previous one is tried")
            continue
        now = installed_versions()
        changed = [f"{k} {v} is now {now.get(k)}" for k, v in versions.items() if now.get(k) != v]
        if changed:
            notes.append(f"{path} was written with other versions: {', '.join(changed)}")
        return state, notes


def keep_batch(run_dir: Path, steps: int, batch: Batch | None) -> str:
    """Save the last batch of a failed run for debugging; return a note with its path."""
    if batch is None:  # before the first update
        return ""
    path = run_dir / f"stopped_{steps:012d}.safetensors"
    tensors = {name: value.contiguous() for name, value in vars(batch).items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    return f"; the last batch is in {path}"


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the `state` given to `CheckpointWriter.save`, and the package versions.

    All tensors are on the CPU, and arrays become tensors.

    Raises:
        UsageError: If the file is damaged or not a checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != CHECKPOINT_FORMAT:
                raise UsageError(f"resume: expected a {CHECKPOINT_FORMAT} file, got {path}")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if digest(metadata, tensors.items()) != metadata.get("sha256"):
            raise UsageError(f"resume: {path} is damaged: its checksum does not match")
        leaves = tensors | json.loads(metadata["state"])
        return _tree(leaves), json.loads(metadata["versions"])
    except UsageError:
        raise
    except (OSError, SafetensorError) as error:
        raise UsageError(f"resume: cannot read {path}: {one_line(error)}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"resume: {path} contains no state: {one_line(error)}") from None


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
        tensors[name] = tree
    else:
        plain[name] = tree
