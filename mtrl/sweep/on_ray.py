"""Backend for a Ray cluster: Ray tasks that start processes. Ray places them and reports losses.

This does not use Ray Tune, because a run resumes exactly from its own checkpoints. A run whose node
is lost is submitted to Ray again and continues on another node.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from mtrl.errors import RunError, UsageError, import_extra, one_line
from mtrl.sweep.attempt import Ending, Job, attempt
from mtrl.sweep.folder import SweepFolder
from mtrl.sweep.local import cores

ANSWER_TIMEOUT = 20.0
"""Timeout for a connection to the cluster's head [seconds]."""
PROBE_TIMEOUT = 120.0
"""Timeout for a node to report whether it sees the sweep's folder [seconds]."""


class RayBackend:
    """Backend with a Ray task per process.

    Args:
        folder: Folder of the sweep, which all nodes must see.
        address: Address of a running cluster; None for a temporary one on this machine.
        cpus: CPUs per run.
        gpus: GPUs per run; below 1, several runs share a GPU.
        at_a_time: Maximum number of parallel runs; None for as many as fit.

    Attributes:
        running: Number of runs submitted to Ray that have not ended.

    Raises:
        UsageError: If Ray is not installed, the cluster cannot be reached, a run fits on no node,
            or a node does not see the folder.
    """

    def __init__(
        self,
        folder: SweepFolder,
        address: str | None,
        *,
        cpus: int,
        gpus: float = 0.0,
        at_a_time: int | None = None,
    ) -> None:
        self.running = 0
        self._ray = ray = import_extra("backend", "ray", "ray")
        self._folder, self._at_a_time = folder, at_a_time
        self._jobs: dict[Any, Job] = {}
        self._stop = folder.path / f".stop-{uuid.uuid4().hex}"
        self._token = folder.path / f".shared-{uuid.uuid4().hex}"
        if not ray.is_initialized():
            _expect_answer(address)
            own: dict[str, Any] = {}
            if address is None:
                own = {"include_dashboard": False}
                if at_a_time is not None:  # Ray starts a process per CPU in advance
                    own["num_cpus"] = min(len(cores()), cpus * at_a_time)
                os.environ.setdefault("RAY_worker_niceness", "0")  # as the local backend
            try:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **own,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UsageError(f"address: cannot reach {address}: {one_line(error)}") from None
        self._token.touch()
        try:
            self._expect_room(cpus, gpus)
            self._expect_shared()
        except BaseException:
            self.close()
            raise
        # Losses are counted by the sweep and not by Ray, which does not know checkpoints.
        how = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0}
        self._task = ray.remote(**how)(_attempt)

    @property
    def has_room(self) -> bool:
        """Whether another run may be submitted to Ray."""
        return self._at_a_time is None or self.running < self._at_a_time

    def start(self, job: Job) -> None:
        """Submit a run to Ray, which starts it where it fits."""
        self._jobs[self._task.remote(job, self._token, self._stop)] = job
        self.running += 1

    def endings(self, timeout: float) -> list[Ending]:
        """Return runs that have ended, after waiting up to `timeout` seconds for the first."""
        done, _ = self._ray.wait(list(self._jobs), timeout=timeout)
        return [self._ending(reference) for reference in done]

    def _ending(self, reference: Any) -> Ending:
        errors = self._ray.exceptions
        job = self._jobs.pop(reference)
        self.running -= 1
        try:
            ending: Ending = self._ray.get(reference)
            return ending
        except errors.TaskCancelledError:
            return Ending(job.name, "stopped")
        except errors.RayTaskError as error:  # raised by the task, such as a full disk
            if isinstance(error.cause, UsageError):
                raise error.cause from None
            return Ending(job.name, "failed", (one_line(error.cause),))
        except errors.RayError as error:  # from its worker, node or memory
            return Ending(job.name, "lost", (one_line(error),))

    def stop(self) -> None:
        """Ask all runs to stop cleanly; waiting ones do not start."""
        self._stop.touch()

    def close(self) -> None:
        """Disconnect from the cluster."""
        for path in (self._stop, self._token):
            path.unlink(missing_ok=True)
        self._ray.shutdown()

    def _expect_room(self, cpus: int, gpus: float) -> None:
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        sizes = [(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in nodes]
        if not any(cpus <= has_cpus and gpus <= has_gpus for has_cpus, has_gpus in sizes):
            found = ", ".join(f"{c:g} CPUs and {g:g} GPUs" for c, g in sorted(set(sizes)))
            field, wanted = ("gpus_per_run", gpus) if gpus else ("cpus_per_run", cpus)
            raise UsageError(f"{field}: expected a run to fit on a node, got {wanted:g}; {found}")

    def _expect_shared(self) -> None:
        """Check that every node sees this folder."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = self._ray.remote(num_cpus=0, max_retries=0)(_sees)
        asked = {}
        for node in self._ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[probe.options(scheduling_strategy=there).remote(self._token)] = node
        waiting = list(asked)
        deadline = time.monotonic() + PROBE_TIMEOUT
        while waiting:
            done, waiting = self._ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                where = asked[waiting[0]]["NodeManagerHostname"]
                raise RunError(f"no answer from node {where} for {PROBE_TIMEOUT:.0f} s")
            for reference in done:
                if not self._ray.get(reference):
                    raise _not_shared(self._folder.path, asked[reference]["NodeManagerHostname"])


def _expect_answer(address: str | None) -> None:
    """Check that something listens at host:port, because Ray tries in silence for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "://" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise UsageError(f"address: cannot reach {address}: {one_line(error)}") from None


def _not_shared(folder: Path, host: str) -> UsageError:
    return UsageError(f"out: expected a folder that all nodes share, got {folder}, not on {host}")


def _sees(token: Path) -> bool:
    return token.exists()


def _attempt(job: Job, token: Path, stop: Path) -> Ending:
    """Run on a node, which must also see the folder if it has joined later."""
    if stop.exists():
        return Ending(job.name, "stopped")
    if not token.exists():
        raise _not_shared(token.parent, platform.node())
    return attempt(job, stop=stop.exists)
