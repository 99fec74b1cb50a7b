"""Noise of the actions that the policy samples in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtrl.config.learner import NoiseColor

TIME_CONSTANTS = 2, 4, 8, 16, 32, 64, 128
"""Of the parts of pink noise that are correlated over time [environment steps]."""


class ExplorationNoise:
    """Standard normal noise: white, which is independent at each step, or pink.

    Pink noise is correlated over time: its power falls with the frequency f as 1/f. A robot that
    explores by it moves further from the mode of its policy than by white noise, and at each step
    the distribution of actions is the same. Source: Eberhard et al., "Pink Noise Is All You Need",
    ICLR 2023.

    Deviations: the paper generates the noise of a whole episode by a Fourier transform. Here, pink
    noise is the sum of white noise and seven first-order autoregressive processes x ← e^(-1/τ) x +
    (1 - e^(-2/τ))^½ ε of equal variance. Its state is small, and it continues over the ends of
    episodes. Its spectrum is that of pink noise between about 1/(2π·128) and ½ per step, and flat
    below.

    Args:
        color: `"white"` or `"pink"`.
        shape: Shape of a sample, `[n, A]`.
        generator: Source of randomness; white noise equals `torch.randn(shape)` drawn from it.
    """

    def __init__(
        self, color: NoiseColor, shape: tuple[int, int], generator: torch.Generator
    ) -> None:
        self.generator, device = generator, generator.device
        times = torch.tensor(TIME_CONSTANTS if color == "pink" else (), device=device)
        kept = torch.cat([times.new_zeros(1), torch.exp(-1 / times)])[:, None, None]
        self._kept, self._new = kept, (1 - kept.square()).sqrt()
        self._parts = torch.zeros(len(kept), *shape, device=device)
        self.correlated = color == "pink"
        if self.correlated:  # so that the variance is 1 from the first step
            self._parts.normal_(generator=generator)

    def __call__(self) -> Tensor:
        """Return the noise of the next step, `[n, A]`."""
        shape, device = self._parts.shape, self._parts.device
        drawn = torch.randn(shape, generator=self.generator, device=device)
        self._parts.mul_(self._kept).addcmul_(drawn, self._new)  # in place, for a captured graph
        return self._parts.sum(0).div_(len(self._parts) ** 0.5)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for `load_state_dict`, without the generator's; white noise has none."""
        return {"exploration_noise": self._parts.clone()} if self.correlated else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict` of noise of this colour and shape; other entries are ignored."""
        if self.correlated:
            self._parts.copy_(state["exploration_noise"])
