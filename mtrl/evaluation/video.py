"""Videos of evaluated episodes, recorded by replaying their actions with a camera.

Recording therefore cannot change the results, and only frames of a video are rendered. The
simulator is deterministic; the return of the replay is checked against the evaluation's.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

from mtrl.config.fields import Camera
from mtrl.envs.processes import n_cores
from mtrl.envs.tasks import MT50
from mtrl.errors import UsageError, unknown
from mtrl.evaluation.camera import Job, Kind
from mtrl.evaluation.scores import Evaluation
from mtrl.folder import write_atomically
from mtrl.progress import shown

BACKENDS = ("egl", "osmesa")
"""Values of `MUJOCO_GL` that render without a display."""

_PROBE = """
import mujoco
mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).render()
"""


def find_backend() -> str:
    """Find a renderer that works here: `MUJOCO_GL` if it is set, else EGL or OSMesa.

    Raises:
        UsageError: If none of them can render an image.
    """
    asked = os.environ.get("MUJOCO_GL")
    for backend in (asked,) if asked else BACKENDS:
        if _python("-c", _PROBE, backend=backend).returncode == 0:
            return backend
    wanted = f"MUJOCO_GL={asked}" if asked else "EGL (libegl1) or OSMesa (libosmesa6)"
    raise UsageError(f"video: expected {wanted} for rendering, found none that works")


def film(
    evaluation: Evaluation,
    folder: Path | str,
    camera: Camera = "corner4",
    episodes: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Write one `<task>.mp4` per task with its first episodes, in real time; return the paths.

    Args:
        evaluation: Evaluation whose episodes are shown.
        folder: Output folder, created if missing; its parent must exist.
        camera: Name of a Meta-World camera.
        episodes: Number of episodes per task.
        progress: Show progress on standard error; see `mtrl.progress.shown`.

    Raises:
        UsageError: If the camera is unknown, the tasks are not Meta-World's, or no renderer works
            here.
        ChildProcessError: If rendering fails.
    """
    if camera not in get_args(Camera):
        raise UsageError(unknown("camera", camera, get_args(Camera)))
    if not set(evaluation.tasks) <= set(MT50):
        raise UsageError(f"video: expected Meta-World tasks, got {' '.join(evaluation.tasks)}")
    Path(folder).mkdir(exist_ok=True)
    films = _shoot(evaluation, Path(folder), "mp4", episodes, camera, size=480, every=2, speed=1.0)
    return list(shown(films, len(evaluation.tasks), "videos", progress))


def animations(evaluation: Evaluation, size: int = 160, every: int = 16) -> dict[str, bytes]:
    """Render a small GIF of each task's first episode, at twice its speed.

    Args:
        size: Height and width [pixels].
        every: Simulation steps between two frames.

    Raises:
        UsageError: If no renderer works here.
        ChildProcessError: If rendering fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder)
        paths = _shoot(evaluation, into, "gif", 1, "corner4", size=size, every=every, speed=2.0)
        return {path.stem: path.read_bytes() for path in paths}


def _shoot(
    evaluation: Evaluation, folder: Path, kind: Kind, episodes: int, camera: str, **settings: Any
) -> Iterator[Path]:
    """Yield the paths in the tasks' order, each when its video is written."""
    backend = find_backend()

    def shoot(t: int) -> Path:
        task = evaluation.tasks[t]
        played = evaluation.actions[t, :episodes], evaluation.returns[t, :episodes]

        def write(path: Path) -> None:
            job = Job(path, kind, task, evaluation.seed, *played, camera, **settings)
            done = _python("-m", "mtrl.evaluation.camera", backend=backend, given=pickle.dumps(job))
            if done.returncode:
                reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"]
                raise ChildProcessError(f"video of {task}: {reason[-1]}")

        path = folder / f"{task}.{kind}"
        write_atomically(path, write)
        return path

    with ThreadPoolExecutor(n_cores()) as threads:
        yield from threads.map(shoot, range(len(evaluation.tasks)))


def _python(
    *arguments: str, backend: str, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    # Otherwise Mesa would start one thread per core in each of the processes.
    environment = {**os.environ, "MUJOCO_GL": backend, "LP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, input=given, capture_output=True, env=environment, check=False)
