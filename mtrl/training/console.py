"""Console output of a run. Failed writes are ignored, so that output never ends a run."""

from __future__ import annotations

import sys
from contextlib import suppress

from tqdm import tqdm

UNWRITABLE = (OSError, ValueError, AttributeError)
"""Errors of a closed pipe, a full disk, a closed stream or no stream."""


def say(text: str) -> None:
    """Print a line to standard output, above a progress bar if there is one."""
    with suppress(*UNWRITABLE):
        try:
            tqdm.write(text, file=sys.stdout)
        except UnicodeEncodeError:  # the terminal's encoding lacks a character
            encoding = sys.stdout.encoding
            tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()


class Bar:
    """Progress bar from the step `start` to `total` on standard error, if it is a terminal."""

    def __init__(self, total: int, start: int) -> None:
        self._bar: tqdm | None = None
        with suppress(*UNWRITABLE):
            if sys.stderr.isatty():
                shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
                self._bar = tqdm(total=total, initial=start, unit_scale=True, bar_format=shape)

    def __bool__(self) -> bool:
        """Return whether it is shown."""
        return self._bar is not None

    def move(self, n: int, text: str | None = None) -> None:
        """Move to step `n`, and update the text next to the bar."""
        if self._bar is None:
            return
        try:
            if text is not None:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(n - self._bar.n)
        except UNWRITABLE:
            self._bar = None

    def close(self) -> None:
        """Stop updating the bar."""
        if self._bar is not None:
            with suppress(*UNWRITABLE):
                self._bar.close()
