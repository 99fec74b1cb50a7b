"""Make small wheels to transfer: EnvPool with only Meta-World, Meta-World with small textures.

python scripts/gpu/slim_wheels.py ENVPOOL_WHEEL ENVPOOL_ASSETS_WHEEL METAWORLD_WHEEL OUT
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from PIL import Image

SIDE = 64
"""Maximum side of a texture [pixels]; they are not rendered there."""
ENTRY = b"import envpool.mujoco.metaworld.registration  # noqa: F401\n"
FOLDERS = ("envpool", "envpool/python", "envpool/mujoco", "envpool/mujoco/metaworld")


def read(wheel: Path) -> dict[str, bytes]:
    """Read the files of a wheel."""
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        return {name: archive.read(name) for name in names}


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a wheel of these files with a new record."""
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    kept = {name: data for name, data in files.items() if name != record}
    rows = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in kept.items()]
    text = "\n".join([*rows, f"{record},,", ""])
    with ZipFile(path, "w", ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in {**kept, record: text.encode()}.items():
            archive.writestr(name, data)
    print(path.name, round(path.stat().st_size / 2**20, 2), "MiB")


def _digest(data: bytes) -> str:
    digest = hashlib.sha256(data).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def envpool(wheel: Path, assets: Path) -> dict[str, bytes]:
    """Return the files that Meta-World's tasks need."""
    files = {
        name: data
        for name, data in read(wheel).items()
        if (name.rpartition("/")[0] in FOLDERS and name.endswith(".py"))
        or name.endswith("robotics_envpool.so")
        or ".dist-info/" in name
        or "envpool.libs" in name
    }
    prefixes = ("envpool_assets/__init__.py", "envpool_assets/mujoco/metaworld/")
    files |= {name: data for name, data in read(assets).items() if name.startswith(prefixes)}
    return files | {"envpool/entry.py": ENTRY}


def metaworld(wheel: Path) -> dict[str, bytes]:
    """Return all files, with large textures shrunk."""
    files = read(wheel)
    large = {n for n, data in files.items() if n.endswith(".png") and len(data) > 20_000}
    return files | {name: _shrunk(files[name]) for name in large}


def _shrunk(picture: bytes) -> bytes:
    image = Image.open(io.BytesIO(picture))
    factor = min(1, SIDE / max(image.size))  # keep the aspect ratio of cube maps
    width, height = (max(1, round(side * factor)) for side in image.size)
    buffer = io.BytesIO()
    image.resize((width, height)).save(buffer, "PNG")
    return min(picture, buffer.getvalue(), key=len)


def main() -> None:
    """Write both wheels."""
    pool, assets, world, out = map(Path, sys.argv[1:])
    out.mkdir(exist_ok=True)
    write(out / pool.name, envpool(pool, assets))
    write(out / world.name, metaworld(world))


if __name__ == "__main__":
    main()
