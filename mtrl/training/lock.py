"""Lock that allows one process at a time in a run folder."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mtrl.errors import UsageError, one_line

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Error codes of file systems without locks (Lustre without `flock`, NFS without lockd)."""


@contextmanager
def locked(run_dir: Path) -> Iterator[str | None]:
    """Lock a run folder for this process.

    The kernel releases the lock when the process ends in any way, so it is never stale. A file with
    the owner shows whether the last process ended cleanly.

    Yields:
        A line about a process that did not end cleanly, or about a file system without locks; or
        None.

    Raises:
        UsageError: If another process trains in the folder; the message names it.
    """
    lock, owner = FileLock(run_dir / ".lock"), run_dir / ".owner"
    unlocked = None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise UsageError(
            f"run_dir: expected a run without another process, got {run_dir}, where {who} trains"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        unlocked = (
            f"run_dir: the file system of {run_dir} does not support locks ({one_line(error)}): "
            "make sure that no second process trains there"
        )
    try:
        before = owner.read_text(encoding="utf-8") if owner.exists() else None
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        died = before and f"taking over from {before}, which did not end cleanly"
        yield "\n".join(filter(None, (unlocked, died))) or None
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
