"""One process at a time in a run folder."""

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
"""What a file system answers that has none, such as Lustre without `flock` or NFS without lockd."""


@contextmanager
def locked(run_dir: Path) -> Iterator[str | None]:
    """Keep others out of a run folder.

    The kernel lets go of the lock with the process, however that ends, so none is ever stale; a
    note of who had it tells whether the last one left in good order.

    Yields:
        A line about a process that did not, or about a file system without locks, or None.

    Raises:
        UsageError: if another process trains there; it is named.
    """
    lock, owner = FileLock(run_dir / ".lock"), run_dir / ".owner"
    unlocked = None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise UsageError(
            f"run_dir: expected a run that nobody is at, got {run_dir}, where {who} trains"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        unlocked = (
            f"run_dir: the file system of {run_dir} has no locks ({one_line(error)}): nothing "
            "keeps a second process from training there"
        )
    try:
        before = owner.read_text(encoding="utf-8") if owner.exists() else None
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        died = before and f"taking over from {before}, which did not end in good order"
        yield "\n".join(filter(None, (unlocked, died))) or None
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
