"""Take pictures of runs in TensorBoard with a real browser, for docs/tensorboard.md.

    pip install playwright
    python scripts/tensorboard_pictures.py RUNS [-o docs/images] [--browser /usr/bin/chromium]

The runs must have their event files, which `results/` does not keep.
"""

from __future__ import annotations

import argparse
import io
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PICTURES = {
    "custom_scalars": ("#custom_scalars", 1180),
    "conflicts": (
        "?smoothing=0&tagFilter=surgery/(actor|critic1)/(conflict_fraction|conflict_repeats$|self)"
        "#timeseries",
        1060,
    ),
    "cosines": ("#images", 600),
}
"""Address and height of each picture [pixels]."""


def main() -> None:
    """Start TensorBoard on a run and write a picture of each tab."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--browser", help="program of a Chromium (default: playwright's own)")
    given = parser.parse_args()
    with serving(given.runs) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.browser)
        for name, (address, height) in PICTURES.items():
            page = browser.new_page(viewport={"width": 1460, "height": height})
            page.goto(f"{url}/{address}")
            settle(page)
            if "#timeseries" in address:
                page.get_by_role("button", name="Settings").click()  # closes the side pane
                settle(page)
            path = given.out / f"{name}.png"
            save(page.screenshot(), path)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


@contextmanager
def serving(runs: Path) -> Iterator[str]:
    """Run TensorBoard on a free port; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs.name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    with subprocess.Popen(
        command, cwd=runs.resolve().parent, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            while "http://" not in (line := process.stderr.readline()):
                if not line:
                    raise SystemExit("tensorboard did not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def settle(page: Page) -> None:
    """Wait until the page has loaded and its charts no longer change."""
    page.wait_for_load_state("networkidle")
    before = b""
    while (now := page.screenshot()) != before:
        before = now
        page.wait_for_timeout(4000)


def save(png: bytes, path: Path) -> None:
    """Write a picture with 128 colours, which are enough for charts."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
