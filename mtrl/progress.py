"""Progress of long computations: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

INTERVAL = 30.0
"""Minimum time between two lines [seconds]."""

Item = TypeVar("Item")


def shown(items: Iterable[Item], total: int, unit: str, progress: bool) -> Iterator[Item]:
    """Yield the items and show on standard error how many there have been, if `progress`.

    Args:
        items: What is computed.
        total: Their number.
        unit: Their name in the plural.
    """
    bar = tqdm(items, total=total, unit=f" {unit}", disable=None if progress else True)
    return lines(items, total, unit, tell) if progress and bar.disable else iter(bar)


def lines(
    items: Iterable[Item], total: int, unit: str, say: Callable[[str], object]
) -> Iterator[Item]:
    """Yield the items and say every half minute how many there have been.

    Args:
        items, total, unit: See `shown`.
        say: Prints a line.
    """
    start = last = time.monotonic()
    for n, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= INTERVAL and n < total:
            last = now
            left = duration((now - start) / n * (total - n))
            say(f"{n:,}/{total:,} {unit}  {left} left")


def duration(seconds: float | None) -> str:
    """Format a duration, such as `1:02:05`; None is unknown."""
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))


def tell(text: str) -> None:
    """Print a line to standard error; one that cannot be written is dropped."""
    with suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)
