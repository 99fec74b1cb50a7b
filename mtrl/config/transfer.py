"""Configuration section for fine-tuning from an existing policy. Every field states its unit.

This module imports neither torch nor MuJoCo, so that `--help` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.rates import MAX_COUNT
from mtrl.config.section import Section

Part = Literal["trunk", "actor-trunk", "critic-trunk", "actor", "critic", "normalizer"]
"""Parts that can be frozen."""


class TransferConfig(Section):
    """Configuration of fine-tuning: the initial policy, and its frozen parts."""

    init_from: Path | None = Field(
        default=None,
        description="Run folder, checkpoint or policy file to start from. Copies its trunks, the "
        "heads and temperatures of tasks with the same name, the statistics of its observations, "
        "and its critics if it has them. Other tasks get new heads. Network sizes are those of the "
        "file.",
    )
    freeze: tuple[Part, ...] = Field(
        default=(),
        description="Parts of init_from to keep fixed: 'trunk' (of actor and critics), "
        "'actor-trunk', 'critic-trunk', the whole 'actor' or 'critic', or the 'normalizer' of "
        "observations. Heads and other per-task parameters are not part of a trunk.",
    )
    freeze_until: int | None = Field(
        default=None,
        gt=0,
        lt=MAX_COUNT,
        description="Step from which frozen parts are trained [environment steps over all tasks] "
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
        """Return the parts that are frozen after `steps` environment steps."""
        over = self.freeze_until is not None and steps >= self.freeze_until
        return frozenset() if over else frozenset(self.freeze)
