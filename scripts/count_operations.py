"""Count the ATen operations of one SAC update, by name and by the line that calls them.

    python scripts/count_operations.py [--config mt10_cpu] [--tasks 10] [--precision bf16]
                                       [--surgery none pcgrad rotograd] [--lines]

An operation corresponds to about one kernel on the device. Views and allocations are counted
separately, because they only cost time on the host. A line is the innermost one in mtrl.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cases import Case
from torch.utils._python_dispatch import TorchDispatchMode

import mtrl
from mtrl.config.presets import named
from mtrl.devices import cpu_threads

ROOT = str(Path(mtrl.__file__).parent)
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Operations(TorchDispatchMode):
    """Counts operations in its context.

    Attributes:
        counts: Operations by (line, name).
        views: Views and allocations, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.views: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(a is not None and not a.is_write for a in aliases)
        free = is_view or name in ALLOCATIONS
        (self.views if free else self.counts)[_line(), name] += 1
        return func(*args, **(kwargs or {}))


def _line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT):
            return f"{path[len(ROOT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def operations_of(update: Callable[[], object]) -> Operations:
    """Count the operations of one update, after warm-up."""
    update()
    with Operations() as found:
        update()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", metavar="C", help="preset or file (default: 3x400)")
    parser.add_argument("--tasks", type=int, default=10, metavar="T")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--surgery", nargs="+", default=["none", "pcgrad", "rotograd"])
    parser.add_argument("--lines", action="store_true", help="count by line and name")
    given = parser.parse_args(arguments)
    config = None if given.config is None else named(given.config).config
    precision = given.precision or ("fp32" if config is None else config.learner.precision)
    case = Case(given.tasks, precision=precision, config=config)
    replay = case.full_replay(1000)
    with cpu_threads(1):
        for surgery in given.surgery:
            learner = case.learner(surgery)
            found = operations_of(lambda learner=learner: learner.step(replay))  # type: ignore[misc]
            total, views = found.counts.total(), found.views.total()
            print(f"{surgery}: {total} operations, {views} views and allocations")
            by: Counter[Any] = Counter()
            for (line, name), n in found.counts.items():
                by[f"{line:58} {name}" if given.lines else name] += n
            ordered = sorted(by.items()) if given.lines else by.most_common()
            for key, n in ordered:
                print(f"  {n:4} {key}")


if __name__ == "__main__":
    main()
