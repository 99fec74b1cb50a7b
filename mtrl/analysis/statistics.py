"""Statistics over few seeds: Agarwal et al. 2021, Deep RL at the edge of the statistical precipice.

Scores are `[T, N]`: T tasks, N runs. Intervals are 95% percentile bootstrap intervals over runs.
They describe how a statistic varies over seeds, for these tasks. There are two ways to resample:

- `stratified`, as in the paper: draw runs separately for each task. This treats the scores of one
  run as independent, which holds if every task has its own policy.
- `runs`: draw whole runs, because one policy learned all tasks of a run. Intervals are wider if
  the tasks of a run succeed or fail together.

The paper's library rliable (1.2.0) is not used: it adds pandas, seaborn, arch and statsmodels for
the few formulas below, and fails to import with pandas 3. The tests compare with its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from mtrl.analysis.methods import Method
from mtrl.analysis.runs import Axis
from mtrl.evaluation.intervals import CONFIDENCE

Bootstrap = Literal["stratified", "runs"]
RESAMPLES = 10_000
CURVE_RESAMPLES = 2_000


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of all T·N scores, `[…, T, N]` to `[…]`."""
    values = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean over runs and tasks, `[…, T, N]` to `[…]`."""
    return scores.mean((-2, -1))


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the probability that a run of X scores higher than a run of Y on a task.

    Shapes: `[…, T, N]` and `[…, T, M]` to `[…]`. This is the mean over tasks of the Mann-Whitney
    statistic U / (N M); a tie counts half.
    """
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def resampled(
    scores: np.ndarray, how: Bootstrap, rng: np.random.Generator, n: int = RESAMPLES
) -> np.ndarray:
    """Draw runs with replacement, `[T, N]` to `[n, T, N]`."""
    n_tasks, n_runs = scores.shape
    drawn = rng.integers(n_runs, size=(n, n_tasks if how == "stratified" else 1, n_runs))
    return scores[np.arange(n_tasks)[:, None], drawn]


def interval(
    statistic: Callable[..., np.ndarray], how: Bootstrap, *scores: np.ndarray
) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a statistic of one or more methods' scores `[T, N]`.

    Both ends are NaN if a method has a single run, which says nothing about the spread over seeds.
    """
    if min(values.shape[-1] for values in scores) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    values = statistic(*(resampled(each, how, rng) for each in scores))
    low, high = _percentiles(values)
    return float(low), float(high)


@dataclass(frozen=True)
class Stretch:
    """A piece of a method's learning curve on which the same runs contribute.

    Attributes:
        x: Grid on the x-axis, `[G]`.
        n_runs: Number of runs that contribute.
        values: Mean score over these runs, `[T + 1, G]`: a row per task, then the mean over tasks.
        low: Lower end of the 95% bootstrap interval, `[T + 1, G]`; NaN for a single run.
        high: Upper end, likewise.
    """

    x: np.ndarray
    n_runs: int
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(method: Method, axis: Axis, how: Bootstrap) -> list[Stretch]:
    """Compute a method's learning curve; each run counts from its first evaluation to its last.

    Scores are interpolated linearly between the evaluations of a run. The curve is computed at
    every evaluation of any run. It is cut where a run starts or ends, because it may jump there.
    """
    runs = []
    for run in method.runs:
        x = run.axis(axis)
        known = np.isfinite(x)
        if known.any():
            runs.append((x[known], run.scores[known]))
    stretches = []
    for start, end in _stretches([(x[0], x[-1]) for x, _ in runs]):
        present = [(x, values) for x, values in runs if x[0] <= start and x[-1] >= end]
        points = np.concatenate([[start, end], *(x for x, _ in present)])
        grid = np.unique(points[(points >= start) & (points <= end)])
        scores = np.stack(
            [
                [np.interp(grid, x, values[:, t]) for x, values in present]
                for t in range(len(method.tasks))
            ]
        )  # [T, N, G]
        rows = np.concatenate([scores.mean(1), scores.mean((0, 1))[None]])
        low, high = np.full((2, *rows.shape), np.nan)
        if len(present) > 1:
            for g in range(len(grid)):
                # Use the same draws at every point, so that resampling adds no noise along x.
                draws = resampled(
                    scores[:, :, g], how, np.random.default_rng(0), CURVE_RESAMPLES
                ).mean(-1)  # [R, T]
                both = np.concatenate([draws, draws.mean(-1, keepdims=True)], -1)
                low[:, g], high[:, g] = _percentiles(both)
        stretches.append(Stretch(grid, len(present), rows, low, high))
    return stretches


def _stretches(spans: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the intervals between neighbouring starts and ends that at least one run covers.

    A run with a single evaluation gives an interval of length 0.
    """
    edges = sorted({edge for span in spans for edge in span})
    points = [span for span in spans if span[0] == span[1]]
    for start, end in sorted({*pairwise(edges), *points}):
        if any(first <= start and end <= last for first, last in spans):
            yield start, end


def _percentiles(values: np.ndarray) -> np.ndarray:
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(values, (tail, 1 - tail), axis=0)
