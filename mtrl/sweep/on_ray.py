"""Runs on a Ray cluster: core tasks that start processes. Ray places them and tells who is lost.

Not Ray Tune: a run goes on from its own checkpoints, to the same weights, so there is nothing to
save for it. A run whose node is lost is given to Ray again, and goes on elsewhere.
"""

from __future__ import annotations

import logging
import platform
import time
import uuid
from pathlib import Path
from typing import Any

from mtrl.errors import RunError, UsageError, one_line
from mtrl.sweep.attempt import Ending, Job, attempt
from mtrl.sweep.folder import SweepFolder

PROBE_TIMEOUT = 120.0
"""So long a node may take to say whether it sees the sweep's folder [seconds]."""


class RayBackend:
    """Ray tasks, each of which looks after a process.

    Args:
        folder: Of the sweep; all nodes must see it.
        address: Of a running cluster; None for one on this machine, for as long as the sweep.
        cpus: Of each run.
        gpus: Of each run; below 1, several share one.
        at_a_time: At most so many runs; None for as many as Ray finds room for.

    Attributes:
        running: How many runs Ray has been given and has not given back.

    Raises:
        UsageError: if Ray is missing, the cluster cannot be reached, no node could ever take a run,
            or one does not see the folder.
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
        self._ray = ray = _import_ray()
        self._folder, self._at_a_time = folder, at_a_time
        self._jobs: dict[Any, Job] = {}
        self._stop = folder.path / f".stop-{uuid.uuid4().hex}"
        self._token = folder.path / f".shared-{uuid.uuid4().hex}"
        if not ray.is_initialized():
            try:
                ray.init(
                    address=address or "local", log_to_driver=False, logging_level=logging.ERROR
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
        # It is here that losses are counted, not in Ray, which knows nothing of checkpoints.
        how = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0}
        self._task = ray.remote(**how)(_attempt)

    @property
    def has_room(self) -> bool:
        """Whether another run may be given to Ray."""
        return self._at_a_time is None or self.running < self._at_a_time

    def start(self, job: Job) -> None:
        """Give Ray a run, which starts where there is room."""
        self._jobs[self._task.remote(job, self._token, self._stop)] = job
        self.running += 1

    def endings(self, timeout: float) -> list[Ending]:
        """Runs that have ended by now; waits so long for the first [seconds]."""
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
        except errors.RayTaskError as error:  # its own, such as a disk that is full
            if isinstance(error.cause, UsageError):
                raise error.cause from None
            return Ending(job.name, "failed", (one_line(error.cause),))
        except errors.RayError as error:  # its worker's, node's or memory's
            return Ending(job.name, "lost", (one_line(error),))

    def stop(self) -> None:
        """Ask all runs to stop in good order; those that wait for room do not start."""
        self._stop.touch()

    def close(self) -> None:
        """Let go of the cluster."""
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
        """Ask every node whether it sees this folder."""
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


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError('backend: expected Ray: pip install "mtrl-surgery[ray]"') from None
    return ray


def _not_shared(folder: Path, host: str) -> UsageError:
    return UsageError(f"out: expected a folder that all nodes share, got {folder}, not on {host}")


def _sees(token: Path) -> bool:
    return token.exists()


def _attempt(job: Job, token: Path, stop: Path) -> Ending:
    """On a node: one that has joined since must see the folder, too."""
    if stop.exists():
        return Ending(job.name, "stopped")
    if not token.exists():
        raise _not_shared(token.parent, platform.node())
    return attempt(job, stop=stop.exists)
