"""One process at a time in a run folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mtrl.errors import UsageError


@contextmanager
def locked(run_dir: Path) -> Iterator[str | None]:
    """Keep others out of a run folder.

    The kernel lets go of the lock with the process, however that ends, so none is ever stale; a
    note of who had it tells whether the last one left in good order.

    Yields:
        A line about a process that did not, or None.

    Raises:
        UsageError: if another process trains there; it is named.
    """
    lock, owner = FileLock(run_dir / ".lock"), run_dir / ".owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise UsageError(
            f"run_dir: expected a run that nobody is at, got {run_dir}, where {who} trains"
        ) from None
    try:
        before = owner.read_text(encoding="utf-8") if owner.exists() else None
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield before and f"taking over from {before}, which did not end in good order"
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
