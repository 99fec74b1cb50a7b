"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already. An empty cell shows a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell or "–" for cell in line) + " |" for line in lines)


def plain(text: str) -> str:
    """Plain text, with what Markdown or a table would take for its own escaped."""
    return re.sub(r"([\\|*_<>\[\]`$^~])", r"\\\1", text)


def code(value: object) -> str:
    """A value as typed on the command line."""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if isinstance(value, bool):
        text = text.lower()
    return f"`{text}`" if text else "none"


def milliseconds(value: float) -> str:
    """A time in milliseconds; short ones with a digit more."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"
