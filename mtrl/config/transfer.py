"""The section of a configuration about what a run begins from. Every field states its unit.

Imports neither torch nor MuJoCo, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.rates import MAX_COUNT
from mtrl.config.section import Section

Part = Literal["trunk", "actor-trunk", "critic-trunk", "actor", "critic", "normalizer"]
"""What can be frozen."""


class TransferConfig(Section):
    """What a run begins from, and what of that stays as it is."""

    init_from: Path | None = Field(
        default=None,
        description="Run folder, checkpoint or policy file to begin from: its trunks, the heads "
        "and temperatures of tasks with the same name, its observations' mean and deviation, and "
        "its critics if it has them. All other tasks get new heads. The networks' sizes are those "
        "of the file.",
    )
    freeze: tuple[Part, ...] = Field(
        default=(),
        description="What stays as it was in init_from: 'trunk' (of actor and critics), "
        "'actor-trunk', 'critic-trunk', the whole 'actor' or 'critic', the 'normalizer' of "
        "observations. Heads and what else belongs to one task are not part of a trunk.",
    )
    freeze_until: int | None = Field(
        default=None,
        gt=0,
        lt=MAX_COUNT,
        description="Train what is frozen from here on [environment steps over all tasks] "
        "(default: never).",
    )

    @field_validator("init_from")
    @classmethod
    def _expand_user(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @model_validator(mode="after")
    def _fits_together(self) -> TransferConfig:
        if self.freeze and self.init_from is None:
            raise PydanticCustomError("freeze", "freeze: expected init_from with it")
        if self.freeze_until is not None and not self.freeze:
            raise PydanticCustomError("freeze", "freeze_until: expected freeze with it")
        if {"actor", "critic"} <= set(self.freeze) and self.freeze_until is None:
            raise PydanticCustomError(
                "freeze", "freeze: expected actor or critic, or both with freeze_until"
            )
        return self

    def frozen_at(self, steps: int) -> frozenset[str]:
        """What stays as it is after so many environment steps."""
        over = self.freeze_until is not None and steps >= self.freeze_until
        return frozenset() if over else frozenset(self.freeze)
