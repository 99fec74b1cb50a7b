"""What a sweep is to run, as a YAML file or flags say it.

config: quickstart                  # presets or files that points change; several make an axis
seeds: [0, 1, 2]
grid:                               # every combination
  surgery: [none, pcgrad]
  hidden_sizes: [[256, 256], [400, 400, 400]]
  total_timesteps: 120_000          # one value, of all points
variants:                           # each of these sets of fields, with every combination
  recipe: {}
  plain: {layer_norm: false, critic_bins: null}
exclude:                            # points that have all of this
  - {variant: plain, surgery: pcgrad}
search:                             # instead of combinations, --search N draws of these
  learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}
  batch_size: {low: 32, high: 256, step: 32}
  trunk: [mlp, residual]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config import yaml12
from mtrl.config.section import Section, leaf_types, validate
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, one_line, unknown

TAKEN = {
    "seed": "seeds says which",
    "run_dir": "the sweep names its runs' folders itself",
}
"""Fields that are no axis, and why."""


def fields() -> dict[str, Any]:
    """Every leaf of a training configuration, with its annotation."""
    found: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        inside = getattr(field.annotation, "model_fields", None)
        leaves = {name: field} if inside is None else inside
        found |= {leaf: each.annotation for leaf, each in leaves.items()}
    return found


FIELDS = fields()


def is_list(field: str) -> bool:
    """Whether one value of the field is a list."""
    return "tuple[" in str(FIELDS[field])


class Range(Section):
    """Numbers that a search draws from, as `optuna.Trial.suggest_float` has it."""

    low: float = Field(description="The least.")
    high: float = Field(description="The largest, which belongs to it.")
    log: bool = Field(default=False, description="Draw the logarithm uniformly.")
    step: float | None = Field(default=None, gt=0, description="Distance of the numbers.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low >= self.high:
            raise PydanticCustomError("range", f"low: expected less than high, {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise PydanticCustomError("range", "log: expected low above 0 and no step with it")
        return self


class Plan(Section):
    """What a sweep is to run; the top of this file has an example."""

    config: tuple[str, ...] = Field(default=(), description="Presets or files.")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="Of every point.")
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="Axes.")
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict, description="By name.")
    exclude: tuple[dict[str, Any], ...] = Field(default=(), description="What is left out.")
    search: dict[str, Range | tuple[Any, ...]] = Field(
        default_factory=dict, description="What --search draws."
    )

    @field_validator("config", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("grid", mode="before")
    @classmethod
    def _values(cls, grid: Any) -> Any:
        return {k: _values(k, v) for k, v in grid.items()} if isinstance(grid, Mapping) else grid

    @field_validator("seeds", "config", mode="after")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        for value in values:
            if values.count(value) > 1:
                raise PydanticCustomError("twice", f"expected each once, got {value} twice")
        return values

    @classmethod
    def read(cls, path: Path | None, flags: Mapping[str, Any]) -> Plan:
        """The file, with what flags say in place of what it says.

        Args:
            path: None for flags alone.
            flags: `config`, `seeds`, or a field of `TrainConfig`; values as words.

        Raises:
            UsageError: if the file cannot be read, or holds an unknown key or a bad value.
        """
        tree: Any = {}
        if path is not None:
            try:
                tree = yaml12.load(path.read_text(encoding="utf-8"))
            except Exception as error:  # a hostile text makes the parser raise anything
                raise UsageError(f"grid: cannot read {path}: {one_line(error)}") from None
        if not isinstance(tree, dict):
            raise UsageError(f"grid: expected a mapping in {path}, got {type(tree).__name__}")
        source = "" if path is None else f"{path}: "
        plan = validate(cls, tree, source)
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
        """Refuse unknown fields, and one in two places."""
        places: list[tuple[str, str, Mapping[str, Any]]] = [
            ("grid", "grid", self.grid),
            ("search", "search", self.search),
            *(("variants", f"variants.{name}", fields) for name, fields in self.variants.items()),
        ]
        seen: dict[str, str] = {}
        for kind, place, names in places:
            for name in names:
                _expect_field(source + place, name)
                if (other := seen.setdefault(name, kind)) != kind:
                    raise UsageError(
                        f"{source}{name}: expected one place for it, got {other} and {place}"
                    )
        for change in self.exclude:
            for name in change.keys() - {"variant", "config", "seed"}:
                _expect_field(f"{source}exclude", name)


def _expect_field(place: str, name: str) -> None:
    if name in TAKEN:
        raise UsageError(f"{place}: {name} cannot be varied: {TAKEN[name]}")
    if name not in FIELDS:
        raise UsageError(unknown(place, name, FIELDS.keys() - TAKEN.keys()))


def _values(field: str, given: Any) -> tuple[Any, ...]:
    """The values of an axis; one alone stands for itself."""
    if not isinstance(given, list | tuple):
        return (given,)
    if field not in FIELDS or not is_list(field):
        return tuple(given)
    if any(isinstance(value, list | tuple) or value is None for value in given):
        return tuple(tuple(v) if isinstance(v, list | tuple) else v for v in given)
    return (tuple(given),)


def words(field: str, given: Sequence[str]) -> tuple[Any, ...]:
    """The values of an axis from a flag's words.

    A field whose value is a list has one value, of all words: `--hidden-sizes 256 256`; unless some
    word holds several: `--hidden-sizes "256 256" "400 400 400"`.
    """
    if not is_list(field):
        if bool in leaf_types(FIELDS[field]) and not given:
            return ("true",)
        return tuple(given)
    if any(len(word.split()) > 1 for word in given):
        return tuple(tuple(word.split()) for word in given)
    return (tuple(given),)
