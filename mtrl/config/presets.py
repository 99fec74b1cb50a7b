"""Presets, the configurations that come with the package, and the choice of a default one.

Their files are in `presets/`; `configs/` at the top of a checkout is a link to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mtrl.config.base import PRESETS, SPECIFIC
from mtrl.config.section import leaves
from mtrl.config.train import TrainConfig, shown
from mtrl.errors import UsageError, unknown

EXPECTED = {
    "quickstart": "about ten minutes on two CPU cores",
    "recipe_cpu": "about 12 minutes per Meta-World task on two CPU cores, estimated",
    "recipe_gpu": "for a GPU; not timed yet",
    "plain": "for a GPU; not timed yet",
    "mt10_cpu": "about two hours on two CPU cores, estimated from half a run",
    "mt50_cpu": "about seven hours on two CPU cores, estimated from the time of an update",
    "mt10": "for a GPU; not timed yet",
    "mt50": "for a GPU; not timed yet",
    "mt10_plain": "for a GPU; not timed yet",
    "mt50_plain": "for a GPU; not timed yet",
}
"""Time a run takes, if it has been measured."""


SAME_TIME = frozenset(
    "seed device run_dir imports surgery exploration_noise max_runtime max_restarts "
    "checkpoint_every".split()
)
"""Fields that hardly change the time a run takes."""


BEST = {
    ("mt10", "cpu"): "mt10_cpu",
    ("mt10", "cuda"): "mt10",
    ("mt50", "cpu"): "mt50_cpu",
    ("mt50", "cuda"): "mt50",
}
"""Best known preset for a benchmark on a device."""

RECIPE = {"cpu": "recipe_cpu", "cuda": "recipe_gpu"}
"""Preset for any other set of tasks, by device."""


class Start(NamedTuple):
    """Configuration that the flags of a command line change.

    Attributes:
        name: Name of the preset or file.
        config: Configuration.
    """

    name: str
    config: TrainConfig

    def line(self, changed: TrainConfig) -> str:
        """Return a line with the name, and the expected time if `changed` should not alter it."""
        before, after = self.config.flat(), changed.flat()
        is_as_timed = all(after[name] == before[name] for name in before.keys() - SAME_TIME)
        expected = EXPECTED.get(self.name)
        time = f" ({expected})" if expected and is_as_timed else ""
        return f"configuration: {self.name}{time}"


def preset(name: str, **changes: Any) -> TrainConfig:
    """Load a preset, with other values for some of its fields.

    A change also resets more specific fields of the preset: with `hidden_sizes=(256, 256)`, actor
    and critics have these widths even if the preset sets others for the actor.

    Args:
        changes: Fields by name, with or without their section.

    Example:
        >>> preset("mt10_plain").learner.batch_size
        128
        >>> preset("quickstart", surgery="pcgrad", seed=3).learner.surgery
        'pcgrad'

    Raises:
        UsageError: If there is no such preset or field, or a value is invalid.
    """
    if name not in EXPECTED:
        raise UsageError(unknown("config", name, [*EXPECTED, "a file ending in .yaml"]))
    return override(TrainConfig.from_yaml(PRESETS / f"{name}.yaml"), changes)[0]


def override(config: TrainConfig, changes: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Apply `changes` to `config`; return it with a line for each field that they reset.

    A field that takes precedence over a changed one, and is not changed itself, would silently undo
    the change. It is therefore reset to its default.
    """
    flat, changes, lines = config.flat(), leaves(config, changes), []
    reset: dict[str, None] = {}
    for general, specific in SPECIFIC.items():
        for name in specific:
            if general in changes and name not in changes and flat[name] is not None:
                reset[name] = None
                flag = general.replace("_", "-")
                lines.append(f"--{flag} replaces the configuration's {name}: {shown(flat[name])}")
    return config.model_copy(update={**changes, **reset}), lines


def named(text: str) -> Start:
    """Load a preset by its name, or a file by its path.

    Raises:
        UsageError: If there is neither, or the file cannot be read.
    """
    path = Path(text).expanduser()
    is_file = path.suffix in (".yaml", ".yml") or path.exists()
    return Start(text, TrainConfig.from_yaml(path) if is_file else preset(text))


def start(config: str | None, benchmark: str | None, tasks: Any, device: str) -> Start:
    """Return the configuration that flags change: the named one, or the best preset for the tasks.

    Args:
        config: Preset or file, if one is named.
        benchmark: Benchmark, if one is named.
        tasks: Tasks, if they are listed.
        device: `cpu` or `cuda`.
    """
    if config is not None:
        return named(config)
    name = BEST.get((benchmark or TrainConfig().benchmark, device))
    if tasks or name is None:
        name = RECIPE.get(device, RECIPE["cpu"])  # another device is an error of the configuration
    return Start(name, preset(name))
