"""Points of a plan: configurations with the names of their folders and command lines."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtrl.config import presets
from mtrl.config.section import DEFAULT, flag_of
from mtrl.config.train import TrainConfig, shown
from mtrl.errors import UsageError
from mtrl.sweep.plan import Plan
from mtrl.training.place import file_name

NOT_IN_A_NAME = frozenset("seed run_dir max_runtime max_restarts device threads workers".split())
"""Fields that do not change what a run computes, and the seed, which is added separately."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        base: Preset or file that it starts from.
        changes: Differences from the base by field, including the seed.
        label: Name of the method for display: the variant and varied fields, without the seed.
        config: Complete configuration.
        drawn: The part of `changes` that a search has drawn.
    """

    base: str
    changes: Mapping[str, Any]
    label: str
    config: TrainConfig
    drawn: Mapping[str, Any] | None = None

    @property
    def method(self) -> str:
        """Permanent name of the configuration without its seed, independent of the grid."""
        config = self.config
        default, leaves = (each.model_dump(mode="json") for each in (TrainConfig(), config))
        text = json.dumps(_differing(leaves, default), sort_keys=True)
        code = hashlib.sha256(text.encode()).hexdigest()[:8]
        tasks = config.tasks or ()
        where = f"{len(tasks)}-tasks" if len(tasks) > 1 else "".join(tasks) or config.benchmark
        return f"{file_name(where)}_{file_name(config.learner.surgery)}_{code}"

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{self.method}_seed{self.config.seed}"

    def changed(self, changes: Mapping[str, Any]) -> Point:
        """Return the point with further changes."""
        config = self.config.model_copy(update=changes)
        return replace(self, config=config, changes={**self.changes, **changes})

    def arguments(self, run_dir: Path) -> list[str]:
        """Return the arguments of `mtrl-train` that start or resume this run in a folder."""
        found = ["--config", self.base]
        for field, value in self.changes.items():
            found += [flag_of(field), *words] if (words := _words(value)) else []
        return [*found, "--run-dir", str(run_dir), "--resume-if-exists"]


def points(plan: Plan, device: str, drawn: Mapping[str, Any] | None = None) -> list[Point]:
    """Return every point of a plan, seed by seed, so that all methods get their first runs early.

    Args:
        device: `cpu` or `cuda`, for the choice of presets and for the runs.
        drawn: Values drawn by a search, for every point.

    Raises:
        UsageError: If a value is invalid, two points are equal, or an exclusion has no effect.
    """
    found: dict[str, Point] = {}
    used: set[int] = set()
    bases: Sequence[str | None] = plan.config or (None,)
    variants: Sequence[str | None] = tuple(plan.variants) or (None,)
    axes = plan.seeds, bases, variants, *plan.grid.values()
    for seed, base, variant, *combined in itertools.product(*axes):
        values = dict(zip(plan.grid, combined, strict=True))
        variation = plan.variants.get(variant or "", {})
        changes = {**values, **variation, **(drawn or {}), "seed": seed}
        several = {k: v for k, v in values.items() if len(plan.grid[k]) > 1} | dict(drawn or {})
        label = _label(_short(base, plan.config), variant, several, drawn or {})
        where = changes.get("device", "auto")
        where = device if where == "auto" else where
        start = presets.start(base, changes.get("benchmark"), changes.get("tasks"), where)
        point = _point(start, {"device": device, **changes}, label, drawn)
        excluded = [
            number
            for number, which in enumerate(plan.exclude)
            if all(_has(point, variant, base, key, value) for key, value in which.items())
        ]
        used.update(excluded)
        if excluded:
            continue
        if (twin := found.get(point.name)) is not None:
            one, other = (f"{p.label or 'the configuration'} seed {seed}" for p in (twin, point))
            what = f"{one} twice" if one == other else f"{one} and {other}, which are equal"
            raise UsageError(f"grid: expected each run once, got {what}")
        found[point.name] = point
    for number, which in enumerate(plan.exclude):
        if number not in used and drawn is None:
            raise UsageError(f"exclude: expected a point with {which}, got none")
    if not found:
        raise UsageError("exclude: expected remaining points, got none")
    return list(found.values())


def _point(
    start: presets.Start, changes: Mapping[str, Any], label: str, drawn: Mapping[str, Any] | None
) -> Point:
    config, _ = presets.override(start.config, changes)
    flat = config.flat()
    read = {name: flat[name] for name in changes}
    typed = {k: w if isinstance(read[k], tuple) else w[0] for k in read if (w := _words(read[k]))}
    if presets.override(start.config, typed)[0] != config:
        raise UsageError(f"grid: expected values that flags can give, got {dict(changes)}")
    return Point(start.name, read, label, config, drawn)


def _short(base: str | None, bases: Sequence[str]) -> str | None:
    """Return the name of a preset or file that tells it from the others; None if it is alone."""
    if base is None or len(bases) == 1:
        return None
    stem = Path(base).stem
    return stem if [Path(each).stem for each in bases].count(stem) == 1 else base


def _label(
    base: str | None, variant: str | None, varied: Mapping[str, Any], drawn: Mapping[str, Any]
) -> str:
    parts = [part for part in (base, variant) if part is not None]
    for field, value in varied.items():
        is_drawn = field in drawn and isinstance(value, float)
        text = f"{value:.3g}" if is_drawn else shown(value)
        parts.append(text if field == "surgery" else f"{field} {text}")
    return ", ".join(parts).replace("=", ":")  # --labels OLD=NEW


def _has(point: Point, variant: str | None, base: str | None, key: str, value: Any) -> bool:
    """Return whether the point has one of these values."""
    own: Any
    if key in ("variant", "config"):
        own = variant if key == "variant" else base
    else:
        own = point.config.flat()[key]
    candidates = value if isinstance(value, list) and not isinstance(own, tuple) else [value]
    return any(_text(own) == _text(each) for each in candidates)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else shown(value)


def _words(value: Any) -> list[str]:
    """Return the words after a flag; an empty list has none."""
    if isinstance(value, tuple):
        return [_text(each) for each in value]
    return [DEFAULT if value is None else _text(value)]


def _differing(tree: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return leaves that differ from the defaults, so that new fields do not change names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(default[name], dict):  # a section
            found |= _differing(value, default[name])
        elif name not in NOT_IN_A_NAME and value != default[name]:
            found[name] = value
    return found


def with_copies(points: Sequence[Point], folder: Path) -> tuple[list[Point], dict[Path, str]]:
    """Replace base files by copies, so that later edits have no effect.

    A copy holds every value, because the file may build on others, which may change, too.

    Returns:
        The points, and the text of each copy to be written to `folder`.
    """
    copies: dict[Path, str] = {}
    names: dict[str, str] = {}
    for base in dict.fromkeys(point.base for point in points):
        if base in presets.EXPECTED:
            continue
        text = presets.named(base).config.to_yaml()
        code = hashlib.sha256(text.encode()).hexdigest()[:8]
        stem = re.sub(r"[^\w-]+", "-", Path(base).stem)
        path = folder / f"{stem}-{code}.yaml"
        copies[path], names[base] = text, str(path)
    return [replace(p, base=names.get(p.base, p.base)) for p in points], copies
