"""Statistics over few seeds against closed forms, SciPy's bootstrap and rliable's results."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from scipy.stats import binomtest, bootstrap, mannwhitneyu, trim_mean

from mtrl.analysis.methods import Method
from mtrl.analysis.runs import Run
from mtrl.analysis.statistics import curve, improvement, interquartile_mean, interval, mean
from mtrl.config.train import TrainConfig
from mtrl.evaluation.intervals import wilson

X = np.array(
    [
        [0.1, 0.3, 0.35, 0.6, 0.8],
        [0.0, 0.0, 0.1, 0.05, 0.9],
        [0.5, 0.55, 0.7, 0.45, 0.65],
        [1, 1, 0.95, 0.9, 1],
    ]
)
Y = np.array([[0.2, 0.25, 0.4, 0.1], [0.1, 0, 0.2, 0], [0.3, 0.55, 0.6, 0.5], [0.9, 0.85, 1, 0.7]])


@pytest.mark.parametrize(
    ("statistic", "scores", "value", "ends"),
    [
        (interquartile_mean, (X,), 0.58, (0.415, 0.72)),
        (interquartile_mean, (Y,), 0.375, (0.29375, 0.4375)),
        (mean, (X,), 0.545, (0.46, 0.6475)),
        (mean, (Y,), 0.415625, (0.365625, 0.465625)),
        (improvement, (X, Y), 0.675, (0.49375, 0.83765625)),
    ],
)
def test_agrees_with_rliable(statistic, scores, value, ends):
    """Version 1.2.0, 50,000 resamples (20,000 for improvement); the tolerance is a single draw."""
    assert statistic(*scores) == pytest.approx(value)
    assert interval(statistic, "stratified", *scores) == pytest.approx(ends, abs=0.0126)


RANDOM = "rng" if Version(scipy.__version__) >= Version("1.15") else "random_state"


@pytest.mark.parametrize(("how", "paired"), [("stratified", False), ("runs", True)])
@pytest.mark.parametrize("statistic", [mean, interquartile_mean])
def test_intervals_equal_scipy(how, paired, statistic):
    """SciPy draws runs for each task or, with paired=True, the same runs for all tasks."""
    scores = np.random.default_rng(3).beta(0.6, 0.6, (7, 6))
    theirs = bootstrap(
        tuple(scores),
        lambda *rows, axis: statistic(np.stack(rows, -2)),
        paired=paired,
        method="percentile",
        n_resamples=20_000,
        **{RANDOM: 0},
    ).confidence_interval
    ours = interval(statistic, how, scores)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_improvement_equals_mann_whitney(n_tasks, n_x, n_y, seed):
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, 5, (n_tasks, n)) / 4 for n in (n_x, n_y))  # with ties
    expected = [mannwhitneyu(a, b).statistic / (n_x * n_y) for a, b in zip(x, y, strict=True)]
    assert improvement(x, y) == pytest.approx(np.mean(expected))
    assert improvement(x, y) + improvement(y, x) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 5), (3, 5), (7, 5, 2)])
def test_interquartile_mean_is_scipys_trimmed_mean(shape):
    scores = np.random.default_rng(0).normal(size=shape)
    flat = scores.reshape(*shape[:-2], -1)
    assert interquartile_mean(scores) == pytest.approx(trim_mean(flat, 0.25, axis=-1))


def test_interquartile_mean_averages_the_middle_half():
    scores = np.random.default_rng(0).permutation(16.0 ** np.arange(16)).reshape(4, 4)
    assert interquartile_mean(scores) == pytest.approx(np.sort(scores.flatten())[4:12].mean())


def test_perfectly_correlated_tasks_count_once():
    """If a run is equally good at all tasks, more tasks add no information."""
    one = np.random.default_rng(1).uniform(size=(1, 8))
    all_alike = np.repeat(one, 25, axis=0)
    low, high = interval(mean, "runs", one)
    assert interval(mean, "runs", all_alike) == pytest.approx((low, high))
    narrow_low, narrow_high = interval(mean, "stratified", all_alike)
    assert narrow_high - narrow_low == pytest.approx((high - low) / 5, rel=0.1)


def test_a_single_seed_has_no_interval():
    assert all(map(math.isnan, interval(mean, "stratified", X[:, :1])))
    assert all(map(math.isnan, interval(improvement, "runs", X, Y[:, :1])))


@pytest.mark.parametrize("solved", [[13], [0], [50], [13, 13, 13], [50, 50], [12, 13, 14, 12]])
def test_wilson_is_pooled_if_seeds_agree(solved):
    pooled = binomtest(sum(solved), 50 * len(solved)).proportion_ci(0.95, method="wilson")
    assert wilson(np.array(solved), 50) == pytest.approx((pooled.low, pooled.high))


def test_wilson_if_seeds_always_or_never_succeed():
    """The effective number is p(1 − p) / (s²/N), times (1.96 / t)² for estimating s²."""
    low, high = wilson(np.array([50, 50, 50, 0, 0]), 50)
    n = 4 * (1.959964 / 2.776445) ** 2  # s² = 0.3, N = 5, t with 4 degrees of freedom
    z, p = 1.959964, 0.6
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (low, high) == pytest.approx((centre - half, centre + half))


def test_wilson_covers_where_the_pooled_interval_does_not():
    """For seeds with rates uniform around 0.5, coverage is 95% instead of 60%."""
    rng = np.random.default_rng(0)
    ours = pooled = 0
    for _ in range(400):
        solved = rng.binomial(50, rng.uniform(0.2, 0.8, 5))
        low, high = wilson(solved, 50)
        ours += low <= 0.5 <= high
        p = solved.sum() / 250
        pooled += abs(p - 0.5) <= 1.96 * math.sqrt(p * (1 - p) / 250)
    assert ours / 400 > 0.92 and pooled / 400 < 0.7


def run(steps: list[float], success: list[float]) -> Run:
    """Two tasks; the second fails where the first succeeds."""
    first = np.array(success)
    clock = np.array([steps, [2 * step for step in steps], [step / 10 for step in steps]])
    rates = np.stack([first, 1 - first], 1)
    return Run(Path(), TrainConfig(), ("a", "b"), np.array(steps), rates, clock, None)


def test_each_run_counts_from_first_to_last_evaluation():
    long, short = run([10, 20, 40], [0.0, 0.2, 0.8]), run([10, 30], [0.4, 0.6])
    both, alone = curve(Method("m", (long, short)), "steps", "stratified")
    assert (both.n_runs, alone.n_runs) == (2, 1)
    np.testing.assert_allclose(both.x, [10, 20, 30])
    np.testing.assert_allclose(both.values[0], [0.2, 0.35, 0.55])  # long is at 0.5 at 30
    np.testing.assert_allclose(both.values[-1], 0.5)
    np.testing.assert_allclose(alone.x, [30, 40])
    np.testing.assert_allclose(alone.values[0], [0.5, 0.8])
    assert np.isnan(alone.low).all() and np.isnan(alone.high).all()
    # A resample of two runs is one, the other or their mean.
    np.testing.assert_allclose(both.low[0], [0.0, 0.2, 0.5])
    np.testing.assert_allclose(both.high[0], [0.4, 0.5, 0.6])


def test_curves_over_other_axes_and_of_single_points():
    a, b = run([10, 20], [0.0, 1.0]), run([30], [0.5])
    method = Method("m", (a, b))
    before, point = curve(method, "updates", "runs")
    np.testing.assert_allclose(before.x, [20, 40])
    np.testing.assert_allclose(point.x, [60])
    (hours,) = curve(Method("m", (a,)), "hours", "runs")
    np.testing.assert_allclose(hours.x, [1, 2])


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_stretches_cover_exactly_what_runs_cover(data):
    runs = []
    for _ in range(data.draw(st.integers(1, 4))):
        steps = sorted(data.draw(st.sets(st.integers(0, 12), min_size=1, max_size=4)))
        runs.append(run([float(s) for s in steps], [s / 12 for s in steps]))
    stretches = curve(Method("m", tuple(runs)), "steps", "stratified")
    for x in np.arange(0.25, 12):  # never where a run starts or ends
        covering = [r for r in runs if r.steps[0] <= x <= r.steps[-1]]
        found = [s for s in stretches if s.x[0] <= x <= s.x[-1]]
        assert [s.n_runs for s in found] == ([len(covering)] if covering else [])
        for s in found:  # every run is on the same line
            assert np.interp(x, s.x, s.values[0]) == pytest.approx(x / 12)
    ends = {step for r in runs for step in (r.steps[0], r.steps[-1])}
    assert ends == {end for s in stretches for end in (s.x[0], s.x[-1])}
