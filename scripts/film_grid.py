"""Record many tasks of one policy side by side in one animated image.

    python scripts/film_grid.py RUN_OR_POLICY [-o docs/images/mt10.webp]

The script evaluates the policy on the first goal of each task, as `mtrl-eval` does, renders these
episodes and arranges them in a grid. It lowers the quality until the file is small enough.
Rendering requires EGL or OSMesa.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageSequence

from mtrl.errors import UsageError
from mtrl.evaluation.saved import evaluate_file
from mtrl.evaluation.video import animations, find_backend
from mtrl.folder import write_atomically

QUALITIES = (80, 65, 50, 35, 20)
"""WebP qualities, tried in this order."""

COLORS = (256, 128, 64, 32)
"""Numbers of GIF colours, tried in this order."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("policy", type=Path, metavar="RUN_OR_POLICY")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/images/mt10.webp"))
    parser.add_argument("--tasks", nargs="+", help="default: the first ten of the policy")
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--size", type=int, default=200, help="image size of a task [pixels]")
    parser.add_argument("--limit", type=float, default=3.0, help="maximum size of the file [MB]")
    given = parser.parse_args(arguments)
    try:
        if given.out.suffix not in (".webp", ".gif"):
            raise UsageError(f"out: expected a name ending in .webp or .gif, got {given.out}")
        for name in ("columns", "size", "limit"):
            if getattr(given, name) <= 0:
                raise UsageError(f"{name}: expected more than 0, got {getattr(given, name)}")
        find_backend()  # before anything is evaluated
        tasks = tuple(given.tasks) if given.tasks else first_tasks(given.policy)
        evaluation, _ = evaluate_file(given.policy, episodes=1, tasks=tasks)
        films = animations(evaluation, size=given.size, every=8)
        frames, milliseconds = grid(list(films.values()), given.columns)
        quality = save(frames, milliseconds, given.out, round(given.limit * 1e6))
    except UsageError as error:
        print(f"film_grid: error: {error}", file=sys.stderr)
        return 2
    size = given.out.stat().st_size / 1e6
    print(f"{given.out}: {len(frames)} frames, {size:.2f} MB, {quality}")
    return 0


def first_tasks(policy: Path) -> tuple[str, ...]:
    """Return the first ten tasks of a policy."""
    from mtrl.folder import find_policy
    from mtrl.policy.policy import Policy

    return Policy.load(find_policy(policy)).tasks[:10]


def grid(films: Sequence[bytes], columns: int) -> tuple[list[Image.Image], float]:
    """Combine animated GIFs row by row; each stays on its last frame after its end.

    Returns:
        Frames, and the duration of each [ms].
    """
    reels = []
    for film in films:
        with Image.open(io.BytesIO(film)) as gif:
            milliseconds = gif.info["duration"]
            reels.append([frame.convert("RGB") for frame in ImageSequence.Iterator(gif)])
    width, height = reels[0][0].size
    columns = min(columns, len(reels))
    shape = (columns * width, math.ceil(len(reels) / columns) * height)
    frames = []
    for number in range(max(map(len, reels))):
        frame = Image.new("RGB", shape)
        for place, reel in enumerate(reels):
            row, column = divmod(place, columns)
            frame.paste(reel[min(number, len(reel) - 1)], (column * width, row * height))
        frames.append(frame)
    return frames, milliseconds


def save(frames: Sequence[Image.Image], milliseconds: float, path: Path, limit: int) -> str:
    """Write an endless animation with the best quality that fits in `limit` bytes.

    Returns:
        The quality, in words.

    Raises:
        UsageError: If it is too large even at the lowest quality.
    """
    is_webp = path.suffix == ".webp"
    for level in QUALITIES if is_webp else COLORS:
        film = encoded(frames, milliseconds, webp=level if is_webp else None, colors=level)
        if len(film) <= limit:
            break
    else:
        raise UsageError(
            f"limit: expected {limit / 1e6:g} MB to suffice, got {len(film) / 1e6:.2f} MB at the "
            "lowest quality; reduce --size"
        )
    write_atomically(path, lambda place: place.write_bytes(film))
    return f"quality {level}" if is_webp else f"{level} colours"


def encoded(
    frames: Sequence[Image.Image], milliseconds: float, webp: int | None, colors: int
) -> bytes:
    """Encode an endless animation: WebP of a quality, or a GIF with a number of colours."""
    film = io.BytesIO()
    shown = frames if webp is not None else [frame.quantize(colors) for frame in frames]
    settings = {"quality": webp, "method": 4} if webp is not None else {}
    shown[0].save(
        film,
        "GIF" if webp is None else "WEBP",
        save_all=True,
        append_images=shown[1:],
        duration=milliseconds,
        loop=0,
        **settings,
    )
    return film.getvalue()


if __name__ == "__main__":
    sys.exit(main())
