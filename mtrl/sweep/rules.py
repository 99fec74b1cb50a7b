"""Rules that end a run before its end: by a number, or by how others do.

What they leave out is not left out by chance: the table at the end is of the runs that survived,
and tells too much good of a method that lost its bad seeds. Use them to search, not to compare.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from mtrl.errors import UsageError, unknown
from mtrl.folder import STEP

COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NUMBER = r"[-+]?[\d_]*\.?\d+(?:[eE][-+]?\d+)?"
_RULE = re.compile(rf"\s*(\S+)\s*(<=|>=|<|>)\s*({_NUMBER})\s+at\s+({_NUMBER})\s*")


class Threshold(BaseModel):
    """`<tag> < <bound> at <steps>`: judged once, by the first value logged at or after `steps`."""

    model_config = ConfigDict(frozen=True)
    text: str
    tag: str
    compare: str
    bound: float
    steps: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read one.

        Raises:
            UsageError: if it has another form.
        """
        found = _RULE.fullmatch(text)
        if found is None:
            raise UsageError(
                "stop_when: expected TAG < NUMBER at STEPS, such as 'eval/success_rate/mean < 0.2 "
                f"at 500000', got {text!r}"
            )
        tag, compare, bound, steps = found.groups()
        return cls(text=text, tag=tag, compare=compare, bound=float(bound), steps=float(steps))

    def verdict(self, rows: Sequence[dict[str, Any]]) -> str | None:
        """Why a run with these rows is to end, or None."""
        for row in rows:
            if row[STEP] >= self.steps and self.tag in row:
                value = row[self.tag]
                if COMPARE[self.compare](value, self.bound):
                    return f"{self.text}: it was {value:.3g} at {row[STEP]:.0f}"
                return None
        return None


class Halving(BaseModel):
    """Successive halving: at from, from·by, from·by², … steps only the best 1/by go on.

    Asynchronous, as Optuna has it (`SuccessiveHalvingPruner`; Li et al. 2020, arXiv 1810.05934): a
    run is compared with those that were there before it, so the first to come always goes on.
    """

    model_config = ConfigDict(frozen=True)
    tag: str
    start: int
    by: int = 3


class Rules(BaseModel):
    """All rules of a sweep."""

    model_config = ConfigDict(frozen=True)
    stop_when: tuple[Threshold, ...] = ()
    halving: Halving | None = None

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self.stop_when) or self.halving is not None

    def expect_tags(self, tasks: Sequence[str]) -> None:
        """Refuse a tag that no run of these tasks logs.

        Raises:
            UsageError: it names the nearest.
        """
        for rule in self.stop_when:
            expect_tag("stop_when", rule.tag, tasks)
        if self.halving is not None:
            expect_tag("halve_on", self.halving.tag, tasks)


def expect_tag(field: str, tag: str, tasks: Sequence[str]) -> None:
    """Refuse a tag that no run of these tasks logs; the error names the nearest."""
    known = ["eval/success_rate/mean", "eval/success_rate/worst", "eval/return/mean"]
    kinds = "eval/success_rate", "eval/return", "rollout/success_rate", "rollout/ep_rew_mean"
    known += [f"{kind}/{task}" for kind in kinds for task in tasks]
    if tag not in known:
        raise UsageError(unknown(field, tag, known))
