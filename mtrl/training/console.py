"""Console output of a run. Failed writes are ignored, so that output never ends a run."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line to standard output, above a progress bar if there is one."""
    try:
        try:
            tqdm.write(text, file=sys.stdout)
        except UnicodeEncodeError:  # the terminal's encoding lacks a character
            encoding = sys.stdout.encoding
            tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        pass  # a closed pipe, a full disk, a closed stream or no stream


class Bar:
    """Progress bar on standard error, if it is a terminal.

    Args:
        total: Final step.
        start: First step.
    """

    def __init__(self, total: int, start: int) -> None:
        self._bar: tqdm | None = None
        try:
            if sys.stderr.isatty():
                shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
                self._bar = tqdm(total=total, initial=start, unit_scale=True, bar_format=shape)
        except (OSError, ValueError, AttributeError):
            self._bar = None

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
        except (OSError, ValueError):
            self._bar = None

    def close(self) -> None:
        """Stop updating the bar."""
        if self._bar is not None:
            try:
                self._bar.close()
            except (OSError, ValueError):
                self._bar = None
