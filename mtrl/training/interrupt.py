"""Clean stop on a signal from keyboard, scheduler or terminal, or at a time limit."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""A closed terminal sends SIGHUP, and Slurm SIGUSR1 if asked to."""


class Interrupt:
    """Context in which a first signal is recorded, and a second one ends the process.

    Args:
        max_runtime: Time limit [hours], by a monotonic clock.

    Attributes:
        signal: Number of the received signal, or None.
    """

    def __init__(self, max_runtime: float | None = None) -> None:
        self.signal: int | None = None
        hours = math.inf if max_runtime is None else max_runtime
        self._deadline = time.monotonic() + 3600 * hours
        self._handlers: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        """Whether to stop now."""
        return self.signal is not None or time.monotonic() >= self._deadline

    def __enter__(self) -> Interrupt:
        # Python delivers signals only to the main thread, where alone handlers can be set.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as set by nohup
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._handlers[number])
