"""Stop in good order at a signal from keyboard, scheduler or terminal, or at a time limit."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = tuple(  # a closed terminal sends SIGHUP, Slurm SIGUSR1 if asked to; Windows lacks both
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)


class Interrupt:
    """While it is entered, a signal is noted instead of ending the process; a second one ends it.

    Args:
        max_runtime: Ask to stop after so many hours; by a clock that nobody sets back.

    Attributes:
        signal: The number of the signal that came, or None.
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
        # Python delivers signals to the main thread alone, and lets no other ask for them.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._handlers[number])
