"""The configurations that come with the package, and which of them a command starts from.

Their files lie in `presets/`; `configs/` at the top of a checkout links there.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError, unknown

FOLDER = Path(__file__).parent / "presets"

EXPECTED = {
    "quickstart": "about ten minutes on two CPU cores",
    "mt10_cpu": "little more than an hour on two CPU cores",
    "mt50_cpu": "some seven hours on two CPU cores, by the time of an update; not yet run whole",
    "mt10": "made for a GPU, where it has not been timed yet",
    "mt50": "made for a GPU, where it has not been timed yet",
    "mt10_plain": "made for a GPU, where it has not been timed yet",
    "mt50_plain": "made for a GPU, where it has not been timed yet",
}
"""How long a run takes, as far as it has been measured."""


BEST = {
    ("mt10", "cpu"): "mt10_cpu",
    ("mt10", "cuda"): "mt10",
    ("mt50", "cpu"): "mt50_cpu",
    ("mt50", "cuda"): "mt50",
}
"""What a benchmark is best trained by on a device."""


class Start(NamedTuple):
    """What a command line's flags change.

    Attributes:
        name: Of the preset or file; None for the plain defaults, those of the published protocol.
        config: Its values.
    """

    name: str | None
    config: TrainConfig

    def __str__(self) -> str:
        """One line: which, and how long it takes."""
        expected = EXPECTED.get(self.name or "")
        return f"configuration: {self.name or 'defaults'}" + (f" ({expected})" if expected else "")


def preset(name: str) -> TrainConfig:
    """A configuration of `presets/`.

    Example:
        >>> preset("mt10_plain").learner.batch_size
        128

    Raises:
        UsageError: if there is none of this name.
    """
    if name not in EXPECTED:
        raise UsageError(unknown("config", name, [*EXPECTED, "a file that ends in .yaml"]))
    return TrainConfig.from_yaml(FOLDER / f"{name}.yaml")


def named(text: str) -> Start:
    """A preset by its name, or a file by its path.

    Raises:
        UsageError: if there is neither, or the file cannot be read.
    """
    is_file = Path(text).suffix in (".yaml", ".yml") or Path(text).exists()
    return Start(text, TrainConfig.from_yaml(text) if is_file else preset(text))


def best(benchmark: str | None, device: str) -> Start:
    """Where a run begins that was given no configuration.

    Args:
        benchmark: Its name; None for tasks chosen one by one.
        device: `cpu` or `cuda`.
    """
    name = BEST.get((benchmark or "", device))
    return Start(name, TrainConfig() if name is None else preset(name))
