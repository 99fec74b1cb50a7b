"""Configuration section for the initial policy of a run and its tasks in each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mtrl.config.base import read_file
from mtrl.config.fields import UserPath
from mtrl.config.rates import MAX_COUNT
from mtrl.config.section import Section
from mtrl.errors import UsageError

Part = Literal["trunk", "actor-trunk", "critic-trunk", "actor", "critic", "normalizer"]
"""Parts that can be frozen."""


class TransferConfig(Section):
    """Configuration of the initial policy, its frozen parts, and the tasks of each stage."""

    init_from: UserPath | None = Field(
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

    curriculum: dict[int, tuple[str, ...]] | None = Field(
        default=None,
        min_length=1,
        description="YAML file with one line per stage of the run, `STEP: [task, …]`: these tasks "
        "are trained from this environment step on, instead of one list for the whole run. Tasks "
        "that stay keep their heads, replay data and temperatures; new tasks start from scratch.",
    )

    @field_validator("curriculum", mode="before")
    @classmethod
    def _read_stages(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        try:
            return read_file("curriculum", value) or {}
        except UsageError as error:
            text = str(error).removeprefix("curriculum: ")
            raise PydanticCustomError("file", "{text}", {"text": text}) from None

    @field_validator("curriculum")
    @classmethod
    def _starts_and_increases(
        cls, stages: dict[int, tuple[str, ...]] | None
    ) -> dict[int, tuple[str, ...]] | None:
        if stages is None:
            return None
        steps = list(stages)
        if steps[0] != 0 or steps != sorted(steps):
            raise PydanticCustomError("stages", "expected steps that start at 0 and increase")
        for step, tasks in stages.items():
            if not tasks:
                raise PydanticCustomError("stages", f"expected tasks for the stage at {step}")
            if len(set(tasks)) < len(tasks):
                what = f"expected every task once in the stage at {step}"
                raise PydanticCustomError("stages", what)
        return stages

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

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """All tasks of the curriculum, in the order of their first stage."""
        if self.curriculum is None:
            return None
        return tuple(dict.fromkeys(task for stage in self.curriculum.values() for task in stage))

    def frozen_at(self, steps: int) -> frozenset[str]:
        """Return the parts that are frozen after `steps` environment steps."""
        over = self.freeze_until is not None and steps >= self.freeze_until
        return frozenset() if over else frozenset(self.freeze)
