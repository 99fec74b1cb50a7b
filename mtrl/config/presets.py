"""The configurations that come with the package, and which of them a command starts from.

Their files are in `presets/`; `configs/` at the top of a checkout links there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mtrl.config.section import leaves
from mtrl.config.train import TrainConfig, shown
from mtrl.errors import UsageError, unknown

FOLDER = Path(__file__).parent / "presets"

EXPECTED = {
    "quickstart": "about ten minutes on two CPU cores",
    "mt10_cpu": "little more than an hour on two CPU cores",
    "mt50_cpu": "some seven hours on two CPU cores, by the time of an update; not yet run whole",
    "mt10": "for a GPU; not timed yet",
    "mt50": "for a GPU; not timed yet",
    "mt10_plain": "for a GPU; not timed yet",
    "mt50_plain": "for a GPU; not timed yet",
}
"""How long a run takes, where it has been measured."""


SAME_TIME = frozenset(
    "seed device run_dir imports surgery max_runtime max_restarts checkpoint_every".split()
)
"""Fields that hardly change how long a run takes."""


BEST = {
    ("mt10", "cpu"): "mt10_cpu",
    ("mt10", "cuda"): "mt10",
    ("mt50", "cpu"): "mt50_cpu",
    ("mt50", "cuda"): "mt50",
}
"""The best preset known for a benchmark on a device."""


class Start(NamedTuple):
    """The configuration that a command line's flags change.

    Attributes:
        name: Of the preset or file; None for the defaults, those of the published protocol.
        config: Its values.
    """

    name: str | None
    config: TrainConfig

    def line(self, changed: TrainConfig) -> str:
        """One line with its name, and the time a run takes unless `changed` takes another."""
        before, after = self.config.flat(), changed.flat()
        is_as_timed = all(after[name] == before[name] for name in before.keys() - SAME_TIME)
        expected = EXPECTED.get(self.name or "")
        shown = f" ({expected})" if expected and is_as_timed else ""
        return f"configuration: {self.name or 'defaults'}{shown}"


SPECIFIC = {
    "benchmark": ("tasks",),
    "hidden_sizes": ("actor_hidden_sizes", "critic_hidden_sizes"),
    "surgery": ("actor_surgery", "critic_surgery"),
    "task_input": ("task_embedding",),
}
"""Fields that take precedence over a more general one."""


def preset(name: str, **changes: Any) -> TrainConfig:
    """A configuration of `presets/`, with other values for some of its fields.

    A change also resets the preset's more specific fields: with `hidden_sizes=(256, 256)`, actor
    and critics have these widths even if the preset gives the actor others.

    Args:
        name: Of the preset.
        changes: Fields by name, with or without their section.

    Example:
        >>> preset("mt10_plain").learner.batch_size
        128
        >>> preset("quickstart", surgery="pcgrad", seed=3).learner.surgery
        'pcgrad'

    Raises:
        UsageError: if there is no such preset or field, or a value does not fit.
    """
    if name not in EXPECTED:
        raise UsageError(unknown("config", name, [*EXPECTED, "a file that ends in .yaml"]))
    return override(TrainConfig.from_yaml(FOLDER / f"{name}.yaml"), changes)[0]


def override(config: TrainConfig, changes: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """`config` with `changes`, and a line for each field that they reset.

    A field of `config` that takes precedence over a changed one, and is not changed itself, would
    silently undo the change; it returns to its default.
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
    """A preset by its name, or a file by its path.

    Raises:
        UsageError: if there is neither, or the file cannot be read.
    """
    path = Path(text).expanduser()
    is_file = path.suffix in (".yaml", ".yml") or path.exists()
    return Start(text, TrainConfig.from_yaml(path) if is_file else preset(text))


def best(benchmark: str | None, device: str) -> Start:
    """The configuration of a run that names none.

    Args:
        benchmark: Its name; None for tasks chosen one by one.
        device: `cpu` or `cuda`.
    """
    name = BEST.get((benchmark or "", device))
    return Start(name, TrainConfig() if name is None else preset(name))
