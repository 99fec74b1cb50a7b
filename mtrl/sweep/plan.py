"""Plan of a sweep, from a YAML file or flags.

config: quickstart                  # presets, or files beside this one; several make an axis
seeds: [0, 1, 2]
grid:                               # every combination
  surgery: [none, pcgrad]
  hidden_sizes: [[256, 256], [400, 400, 400]]
  total_timesteps: 120_000          # a single value for all points
variants:                           # sets of fields, each with every combination
  recipe: {}
  plain: {layer_norm: false, critic_bins: null}
exclude:                            # points with all of these values
  - {variant: plain, surgery: pcgrad}
search:                             # --search N draws from these instead of combining them
  learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}
  batch_size: {low: 32, high: 256, step: 32}
  trunk: [mlp, residual]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.base import read_file
from mtrl.config.section import Section, is_tuple, leaf_types, validate
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, unknown

TAKEN = {
    "seed": "use seeds",
    "run_dir": "the sweep names the run folders itself",
    "curriculum": "write it in a configuration file, and name that file in config",
}
"""Fields that cannot be varied, with the reason."""


def fields() -> dict[str, Any]:
    """Return every leaf of a training configuration with its annotation."""
    found: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        inside = getattr(field.annotation, "model_fields", None)
        leaves = {name: field} if inside is None else inside
        found |= {leaf: each.annotation for leaf, each in leaves.items()}
    return found


FIELDS = fields()

_SPACE = re.compile(r"\s+(?![^()]*\))")
"""Space between values, but not between options, as in `Name(every=10, at=2)`."""


class Range(Section):
    """Range of numbers that a search draws from, as in `optuna.Trial.suggest_float`."""

    low: float = Field(description="Lower end.")
    high: float = Field(description="Upper end, inclusive.")
    log: bool = Field(default=False, description="Whether to draw the logarithm uniformly.")
    step: float | None = Field(default=None, gt=0, description="Distance between values.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low >= self.high:
            raise PydanticCustomError("range", f"low: expected less than high, {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise PydanticCustomError("range", "log: expected low above 0 and no step with it")
        return self


class Plan(Section):
    """Plan of a sweep; see the example at the top of this file."""

    config: tuple[str, ...] = Field(default=(), description="Presets or files.")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="Seeds of every point.")
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="Axes.")
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict, description="By name.")
    exclude: tuple[dict[str, Any], ...] = Field(default=(), description="Points to leave out.")
    search: dict[str, Range | tuple[Any, ...]] = Field(
        default_factory=dict, description="Ranges and choices that --search draws from."
    )

    @field_validator("config", "seeds", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int) else value

    @field_validator("grid", mode="before")
    @classmethod
    def _values(cls, grid: Any) -> Any:
        return {k: _values(k, v) for k, v in grid.items()} if isinstance(grid, Mapping) else grid

    @field_validator("seeds", "config", mode="after")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise PydanticCustomError("twice", "expected each value once")
        return values

    @classmethod
    def read(cls, path: Path | None, flags: Mapping[str, Any]) -> Plan:
        """Read the file, overridden by flags.

        Args:
            path: File, or None for only flags.
            flags: `config`, `seeds`, or fields of `TrainConfig`; values as words.

        Raises:
            UsageError: If the file cannot be read, or holds an unknown key or an invalid value.
        """
        tree = {} if path is None else read_file("grid", path)
        if not isinstance(tree, dict):
            raise UsageError(f"grid: expected a mapping in {path}, got {type(tree).__name__}")
        source = "" if path is None else f"{path}: "
        plan = validate(cls, tree, source)
        if path is not None:
            exclude = [{k: _beside(path, v, k) for k, v in each.items()} for each in plan.exclude]
            config = _beside(path, plan.config)
            plan = plan.model_copy(update={"config": config, "exclude": exclude})
        plan._expect_fields(source)
        if not flags:
            return plan
        own = {name: flags[name] for name in ("config", "seeds") if name in flags}
        axes = {name: value for name, value in flags.items() if name not in own}
        for name in axes.keys() & plan.search.keys():
            raise UsageError(f"{name}: expected one place for it, got it as a flag and in search")
        merged = plan.model_dump() | own | {"grid": dict(plan.grid) | axes}
        plan = validate(cls, merged)
        plan._expect_fields("")
        return plan

    def _expect_fields(self, source: str) -> None:
        """Check that fields exist and have values, and that none is given in two places."""
        places: list[tuple[str, str, Mapping[str, Any]]] = [
            ("grid", "grid", self.grid),
            ("search", "search", self.search),
            *(("variants", f"variants.{name}", fields) for name, fields in self.variants.items()),
        ]
        seen: dict[str, str] = {}
        for kind, place, names in places:
            for name in names:
                _expect_field(source + place, name)
                if kind != "variants" and names[name] == ():
                    raise UsageError(f"{source}{place}: {name}: expected a value, got none")
                if (other := seen.setdefault(name, kind)) != kind:
                    raise UsageError(
                        f"{source}{name}: expected one place for it, got {other} and {place}"
                    )
        for change in self.exclude:
            for name in change.keys() - {"variant", "config", "seed"}:
                _expect_field(f"{source}exclude", name)


def _beside(path: Path, value: Any, field: str = "config") -> Any:
    """Return a value of `config` with files relative to the folder of `path`, like a `base`."""
    if field != "config":
        return value
    if isinstance(value, list | tuple):
        return [_beside(path, each) for each in value]
    is_file = isinstance(value, str) and value.endswith((".yaml", ".yml"))
    return str(path.parent / Path(value).expanduser()) if is_file else value


def _expect_field(place: str, name: str) -> None:
    if name in TAKEN:
        raise UsageError(f"{place}: {name} cannot be varied: {TAKEN[name]}")
    if name not in FIELDS:
        raise UsageError(unknown(place, name, FIELDS.keys() - TAKEN.keys()))


def _values(field: str, given: Any) -> tuple[Any, ...]:
    """Return the values of an axis; a single value may be given without a list."""
    if not isinstance(given, list | tuple):
        return (given,)
    if field not in FIELDS or not is_tuple(FIELDS[field]):
        return tuple(given)
    if any(isinstance(value, list | tuple) or value is None for value in given):
        return tuple(tuple(v) if isinstance(v, list | tuple) else v for v in given)
    return (tuple(given),)


def words(field: str, given: Sequence[str]) -> tuple[Any, ...]:
    """Return the values of an axis from the words after a flag.

    For a field whose values are lists, all words form one value, `--hidden-sizes 256 256`, unless a
    word contains several, `--hidden-sizes "256 256" "400 400 400"`.
    """
    if not is_tuple(FIELDS[field]):
        if bool in leaf_types(FIELDS[field]) and not given:
            return ("true",)
        return tuple(given)
    parts = [tuple(_SPACE.split(word.strip())) for word in given]
    return tuple(parts) if any(len(part) > 1 for part in parts) else (tuple(given),)
