"""Confidence intervals of success rates. This module imports no PyTorch."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit  # scipy.stats would take a second to import

CONFIDENCE = 0.95
UPPER = 0.5 + CONFIDENCE / 2
"""Quantile of an interval's upper end."""


def wilson(solved: np.ndarray, episodes: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of the success rate on one task, over seeds.

    Episodes of one policy are correlated. If all episodes were pooled as independent ones, 5
    policies of which 3 always succeed would count as 250 samples instead of 5. Wilson's formula
    is therefore given the effective number of episodes (Korn & Graubard 1998): the number of
    independent episodes that would vary as much as the seeds do, corrected for estimating that
    variance from few seeds. It never exceeds the number played. For a single seed it equals that
    number, and the interval describes that policy alone.

    Args:
        solved: Episodes solved by each of N runs, `[N]`.
        episodes: Episodes played by each run.
    """
    n_runs, total = len(solved), len(solved) * episodes
    p, effective = float(solved.sum()) / total, float(total)
    z = NormalDist().inv_cdf(UPPER)
    if n_runs > 1 and (variance := float((solved / episodes).var(ddof=1)) / n_runs) > 0:
        few = z / float(stdtrit(n_runs - 1, UPPER))  # Student's quantile
        effective = min(effective, p * (1 - p) / variance * few**2)
    low, high = score_interval(p, effective, z)
    # The ends of all and of nothing are exact, which rounding hides.
    return (low if p > 0 else 0.0), (high if p < 1 else 1.0)


def score_interval(p: float, n: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a rate (Wilson 1927).

    Args:
        p: Observed rate.
        n: Number of independent trials.
        z: Normal quantile of the confidence level.
    """
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
