"""Statistics of few seeds: Agarwal et al. 2021, Deep RL at the edge of the statistical precipice.

Scores are `[T, N]`, tasks by runs. Intervals are percentiles of bootstrap resamples, of the runs:
statements about another set of seeds on these tasks. What is resampled is in one of two ways:

- `stratified`, the paper's: a run is drawn anew for each task. It takes the scores of one run for
  independent, which they are where each task has a policy of its own.
- `runs`: a run's tasks stay together, as one policy learned them all. Wider where tasks rise and
  fall together.

The paper's library, rliable 1.2.0, is not used: for the formulas below it brings pandas, seaborn,
arch and statsmodels, and cannot be imported beside pandas 3. The tests hold its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.stats import norm, trim_mean
from scipy.stats import t as student_t

from mtrl.analysis.methods import Method
from mtrl.analysis.runs import Axis

Bootstrap = Literal["stratified", "runs"]
CONFIDENCE = 0.95
RESAMPLES = 10_000
CURVE_RESAMPLES = 2_000


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all T·N scores, `[…, T, N]` to `[…]`."""
    return trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over runs and tasks, `[…, T, N]` to `[…]`."""
    return scores.mean((-2, -1))


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that a run of X beats one of Y on a task, `[…, T, N]` and `[…, T, M]` to `[…]`.

    The mean over the tasks of Mann and Whitney's U / (N M); a tie counts half.
    """
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def resampled(
    scores: np.ndarray, how: Bootstrap, rng: np.random.Generator, n: int = RESAMPLES
) -> np.ndarray:
    """Runs drawn with replacement, `[T, N]` to `[n, T, N]`."""
    n_tasks, n_runs = scores.shape
    drawn = rng.integers(n_runs, size=(n, n_tasks if how == "stratified" else 1, n_runs))
    return scores[np.arange(n_tasks)[:, None], drawn]


def interval(
    statistic: Callable[..., np.ndarray], how: Bootstrap, *scores: np.ndarray
) -> tuple[float, float]:
    """95% bootstrap interval of a statistic of one or more methods' scores `[T, N]`.

    NaN where a method has a single run: nothing is known of another then.
    """
    if min(values.shape[-1] for values in scores) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    values = statistic(*(resampled(each, how, rng) for each in scores))
    low, high = _percentiles(values)
    return float(low), float(high)


def wilson(solved: np.ndarray, episodes: int) -> tuple[float, float]:
    """Wilson's 95% interval of the success rate on one task, over seeds.

    Episodes of one policy are alike. Pooled as if they were independent, 5 policies of which 3
    always succeed would count for 250 episodes instead of 5. So Wilson's formula is given the
    effective number of episodes: that at which independent ones would vary as much as the seeds
    do, less for how little so few seeds know of it (Korn & Graubard 1998). It is at most the
    number played, which it is for one seed: the interval is about this policy alone then.

    Args:
        solved: Episodes solved by each of N runs, `[N]`.
        episodes: Episodes each has played.
    """
    n_runs, total = len(solved), len(solved) * episodes
    p, effective = float(solved.sum()) / total, float(total)
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    if n_runs > 1 and (variance := float((solved / episodes).var(ddof=1)) / n_runs) > 0:
        few = z / float(student_t.ppf(0.5 + CONFIDENCE / 2, n_runs - 1))
        effective = min(effective, p * (1 - p) / variance * few**2)
    centre = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    spread = math.sqrt(p * (1 - p) / effective + z**2 / (4 * effective**2))
    half = z * spread / (1 + z**2 / effective)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Stretch:
    """A piece of a method's learning curve on which the same runs contribute.

    Attributes:
        x: Where, `[G]`.
        n_runs: How many runs there are.
        values: Mean success rate over these runs, of each task and last of all, `[T + 1, G]`.
        low: Lower end of the 95% bootstrap interval, likewise; NaN for a single run.
        high: Upper end.
    """

    x: np.ndarray
    n_runs: int
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(method: Method, axis: Axis, how: Bootstrap) -> list[Stretch]:
    """A method's learning curve; each run counts from its first evaluation to its last.

    Between its evaluations a run's success rates are linear. The curve is computed wherever one of
    the runs was evaluated, and is cut where a run begins or ends: it may jump there.
    """
    runs = []
    for run in method.runs:
        x = run.axis(axis)
        known = np.isfinite(x)
        if known.any():
            runs.append((x[known], run.success[known]))
    stretches = []
    for start, end in _stretches([(x[0], x[-1]) for x, _ in runs]):
        present = [(x, success) for x, success in runs if x[0] <= start and x[-1] >= end]
        points = np.concatenate([[start, end], *(x for x, _ in present)])
        grid = np.unique(points[(points >= start) & (points <= end)])
        scores = np.stack(
            [
                [np.interp(grid, x, success[:, t]) for x, success in present]
                for t in range(len(method.tasks))
            ]
        )  # [T, N, G]
        rows = np.concatenate([scores.mean(1), scores.mean((0, 1))[None]])
        low, high = np.full((2, *rows.shape), np.nan)
        if len(present) > 1:
            for g in range(len(grid)):
                # The same draws at every point: the band is no more ragged than the runs.
                draws = resampled(
                    scores[:, :, g], how, np.random.default_rng(0), CURVE_RESAMPLES
                ).mean(-1)  # [R, T]
                both = np.concatenate([draws, draws.mean(-1, keepdims=True)], -1)
                low[:, g], high[:, g] = _percentiles(both)
        stretches.append(Stretch(grid, len(present), rows, low, high))
    return stretches


def _stretches(spans: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The intervals between all starts and ends that a run covers; a point is one of its own."""
    edges = sorted({edge for span in spans for edge in span})
    points = [span for span in spans if span[0] == span[1]]
    for start, end in sorted({*pairwise(edges), *points}):
        if any(first <= start and end <= last for first, last in spans):
            yield start, end


def _percentiles(values: np.ndarray) -> np.ndarray:
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(values, (tail, 1 - tail), axis=0)
