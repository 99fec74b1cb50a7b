"""Process that films episodes: `python -m mtrl.evaluation.camera`.

It is a separate process because MuJoCo reads `MUJOCO_GL`, which selects the renderer, on import.
It reads a pickled `Job` from standard input and writes a video file.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio_ffmpeg
import mujoco
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtrl.envs.metaworld import MetaWorldTask

Kind = Literal["mp4", "gif"]


@dataclass(frozen=True)
class Job:
    """Description of one video.

    Attributes:
        path: File to write.
        kind: MP4 or animated GIF.
        task: Meta-World task name.
        seed: Seed of the goals; episode e uses goal e.
        actions: Actions of the first n episodes, `[n, H, A]`.
        returns: Returns of these episodes in the evaluation, `[n]`.
        camera: Name of a Meta-World camera.
        size: Height and width of a frame [pixels].
        every: Simulation steps between two frames.
        speed: Simulated seconds per second of video.
    """

    path: Path
    kind: Kind
    task: str
    seed: int
    actions: np.ndarray
    returns: np.ndarray
    camera: str
    size: int
    every: int
    speed: float


def shoot(job: Job) -> None:
    """Replay the episodes and write the video.

    Raises:
        RuntimeError: If the return of a replayed episode differs from the evaluation's.
    """
    env = MetaWorldTask(job.task, job.actions.shape[1], shuffle_goals=False)
    fps = env.metadata["render_fps"] / job.every * job.speed
    if job.kind == "mp4":
        size, how = (job.size, job.size), ["-f", "mp4"]  # whatever the path's suffix
        writer = imageio_ffmpeg.write_frames(str(job.path), size, fps=fps, output_params=how)
        writer.send(None)  # start the generator
        for picture in pictures(env, job):
            writer.send(picture.tobytes())
        writer.close()
    else:
        first, *rest = pictures(env, job)
        first.save(job.path, "GIF", save_all=True, append_images=rest, duration=1e3 / fps, loop=0)


def pictures(env: MetaWorldTask, job: Job) -> Iterator[Image.Image]:
    """Yield frames with captions: the first of each episode, every `every` steps, and the last."""
    model, data = env.simulator.model, env.simulator.data
    # Without a GPU, shadows and antialiasing take five times as long as all the rest.
    model.vis.quality.offsamples = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = job.size
    with mujoco.Renderer(model, job.size, job.size) as renderer:
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False

        def picture(step: int, first_success: int) -> Image.Image:
            renderer.update_scene(data, job.camera)
            image = Image.fromarray(renderer.render())
            # Some of Meta-World's cameras are upside down.
            turned = image.rotate(180) if data.camera(job.camera).xmat[7] < -1e-3 else image
            return caption(turned, job.task, step, first_success)

        for episode, actions in enumerate(job.actions):
            env.reset(seed=job.seed, options={"episode": episode})
            total, first_success = 0.0, 0
            yield picture(0, 0)
            for step, action in enumerate(actions, start=1):
                _, reward, _, _, info = env.step(action)
                total += reward
                first_success = first_success or (step if info["success"] else 0)
                if step % job.every == 0 or step == len(actions):
                    yield picture(step, first_success)
            if total != job.returns[episode]:
                raise RuntimeError(
                    f"expected episode {episode} to have return {job.returns[episode]}, as in the "
                    f"evaluation, got {total}"
                )


def caption(image: Image.Image, task: str, step: int, first_success: int) -> Image.Image:
    """Draw the task, the step and the first success into a band at the top of the image."""
    line = image.height // 16
    font = ImageFont.load_default(line)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, image.width, round(2.6 * line)), "black")
    draw.text((line // 2, line * 0.1), task, "white", font)
    text = f"step {step}: " + (f"success at {first_success}" if first_success else "no success")
    draw.text((line // 2, line * 1.3), text, "lime" if first_success else "white", font)
    return image


if __name__ == "__main__":
    shoot(pickle.load(sys.stdin.buffer))
