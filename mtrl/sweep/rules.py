"""Rules that stop a run early: by a threshold, or by comparison with others.

They select runs by their results: the final table shows only the runs that survived, so a method
that lost its bad seeds looks better than it is. Use them to search, not to compare.
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
    """`<tag> < <bound> at <steps>`: applied once, to the first value logged at or after `steps`."""

    model_config = ConfigDict(frozen=True)
    text: str
    tag: str
    compare: str
    bound: float
    steps: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Parse a rule.

        Raises:
            UsageError: If it has another form.
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
        """Return the reason why a run with these log rows should stop, or None."""
        for row in rows:
            if row[STEP] >= self.steps and self.tag in row:
                value = row[self.tag]
                if COMPARE[self.compare](value, self.bound):
                    return f"{self.text}: it was {value:.3g} at {row[STEP]:.0f}"
                return None
        return None


class Halving(BaseModel):
    """Successive halving: at start, start·by, start·by², … steps, only the best 1/by continue.

    It is asynchronous, as in Optuna (`SuccessiveHalvingPruner`; Li et al. 2020, arXiv 1810.05934):
    a run is compared with those that got there before it, so the first one always continues.
    """

    model_config = ConfigDict(frozen=True)
    tag: str
    start: int
    by: int = 3

    @property
    def text(self) -> str:
        """Description, with which the reasons it gives begin."""
        return f"successive halving on {self.tag} from {self.start} by {self.by}"


class Rules(BaseModel):
    """All rules of a sweep."""

    model_config = ConfigDict(frozen=True)
    stop_when: tuple[Threshold, ...] = ()
    halving: Halving | None = None

    def __bool__(self) -> bool:
        """Return whether there is any rule."""
        return bool(self.stop_when) or self.halving is not None

    def hold(self, why: str | None) -> bool:
        """Return whether the rule that gave a reason is still one of these."""
        texts = [rule.text for rule in self.stop_when]
        texts += [] if self.halving is None else [self.halving.text]
        return any((why or "").startswith(f"{text}: ") for text in texts)

    def expect_steps(self, total: int) -> None:
        """Check that runs of at most `total` environment steps get to each rule.

        Raises:
            UsageError: If not, because the rule would have no effect.
        """
        places = [("stop_when", rule.steps) for rule in self.stop_when]
        places += [] if self.halving is None else [("halve_from", self.halving.start)]
        for field, steps in places:
            if steps > total:
                reason = f"expected at most the {total} environment steps of the longest run"
                raise UsageError(f"{field}: {reason}, got {steps:.0f}")

    def expect_tags(self, tasks: Sequence[str]) -> None:
        """Check that runs of these tasks log the tags.

        Raises:
            UsageError: If not; the message suggests the nearest tag.
        """
        for rule in self.stop_when:
            expect_tag("stop_when", rule.tag, tasks)
        if self.halving is not None:
            expect_tag("halve_on", self.halving.tag, tasks)


def expect_tag(field: str, tag: str, tasks: Sequence[str]) -> None:
    """Check that runs of these tasks log a tag; the error suggests the nearest one."""
    known = ["eval/success_rate/mean", "eval/success_rate/worst", "eval/return/mean"]
    kinds = "eval/success_rate", "eval/return", "rollout/success_rate", "rollout/ep_rew_mean"
    known += [f"{kind}/{task}" for kind in kinds for task in tasks]
    if tag not in known:
        raise UsageError(unknown(field, tag, known))
