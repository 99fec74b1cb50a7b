"""Exploration noise against the closed forms of its variance, correlation and spectrum."""

import math

import numpy as np
import pytest
import torch

from mtrl.training.noise import ExplorationNoise

ROWS, ACTIONS = 40, 4


def draw(color: str, steps: int, seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """Noise of some steps, `[steps, rows, A]`."""
    noise = ExplorationNoise(color, (rows, ACTIONS), torch.Generator().manual_seed(seed))
    return torch.stack([noise() for _ in range(steps)]).double().numpy()


def test_white_noise_is_that_of_torch():
    found, generator = draw("white", 5, seed=3), torch.Generator().manual_seed(3)
    for sample in found:
        expected = torch.randn(ROWS, ACTIONS, generator=generator).double().numpy()
        np.testing.assert_array_equal(sample, expected)


@pytest.mark.parametrize("color", ["white", "pink"])
def test_the_noise_of_a_step_is_standard_normal_from_the_first(color):
    """Moments of many rows against those of a normal; the tolerance is 5 standard errors."""
    for sample in draw(color, 3, rows=20_000):
        values, n = sample.ravel(), sample.size
        assert abs(values.mean()) < 5 / math.sqrt(n)
        assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
        assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_pink_noise_has_the_correlation_of_its_parts():
    """The mean over white noise and time constants τ = 2, 4, …, 128 of e^(-lag/τ)."""
    found = draw("pink", 200, rows=4_000)
    for lag in (1, 10, 100):
        expected = sum(math.exp(-lag / 2**k) for k in range(1, 8)) / 8
        n = found[0].size
        assert abs((found[0] * found[lag]).mean() - expected) < 5 * math.sqrt(2 / n)
    step, n = found[-1], found[-1].size
    for one, other in ((step[:-1], step[1:]), (step[:, :-1], step[:, 1:])):  # rows, actions
        assert abs((one * other).mean()) < 5 / math.sqrt(n)


def test_the_power_of_pink_noise_falls_as_one_over_the_frequency():
    """The slope of the log spectrum, which is 0 for white noise and -2 for Brownian motion."""
    slopes = {}
    for color in ("white", "pink"):
        found = draw(color, 4_096, rows=64).reshape(4_096, -1)
        power = (np.abs(np.fft.rfft(found, axis=0)) ** 2).mean(1)
        frequency = np.fft.rfftfreq(len(found))
        kept = (frequency > 1 / (2 * math.pi * 128)) & (frequency < 0.25)
        slopes[color] = np.polyfit(np.log(frequency[kept]), np.log(power[kept]), 1)[0]
    assert abs(slopes["white"]) < 0.03
    assert abs(slopes["pink"] + 1) < 0.15
