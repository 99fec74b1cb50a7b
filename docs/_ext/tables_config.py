"""Tables of settings and presets, from the validated configuration itself."""

from __future__ import annotations

from md import code, plain, table
from pydantic import BaseModel

from mtrl.cli import eval, export, flags, plot
from mtrl.config.presets import EXPECTED, preset
from mtrl.config.train import TrainConfig


def settings(section: str) -> str:
    """The fields of one section of the configuration; `run` are those outside the sections."""
    group = None if section == "run" else section
    leaves = [leaf for leaf in flags._leaves(TrainConfig()) if leaf[0] == group]
    if not leaves:
        raise ValueError(f"no section {section!r}")
    return _table([(name, field, default) for _, name, field, default in leaves])


def command(name: str) -> str:
    """The options of `mtrl-eval`, `mtrl-plot` or `mtrl-export`."""
    model: type[BaseModel] = {
        "mtrl-eval": eval.EvalConfig,
        "mtrl-plot": plot.PlotConfig,
        "mtrl-export": export.ExportConfig,
    }[name]
    positional = {"policy", "runs"}
    rows = [
        (field_name, field, None if field.is_required() else field.get_default())
        for field_name, field in model.model_fields.items()
        if field_name not in positional
    ]
    return _table(rows)


def _table(leaves: list[tuple]) -> str:
    rows = []
    for name, field, default in leaves:
        flag = "--" + flags.FLAGS.get(name, name).replace("_", "-")
        shown = "" if default is None or default == () else code(default)
        kind = flags._metavar(field.annotation).replace("|", ", ")
        values = "" if kind == "true, false" else plain(kind)
        rows.append([f"`{flag}`", values, shown, plain(field.description or "")])
    return table(["Flag", "Value", "Default", "Meaning"], rows)


def presets() -> str:
    """Each preset's name, tasks, length and expected time."""
    rows = []
    for name, expected in EXPECTED.items():
        config = preset(name)
        tasks = ", ".join(config.tasks) if config.tasks else config.benchmark.upper()
        steps = f"{config.total_timesteps:,}" if config.total_timesteps else ""
        rows.append([f"`{name}`", plain(tasks), steps, plain(expected)])
    return table(["Preset", "Tasks", "Environment steps", "Time"], rows)


def preset_values() -> str:
    """Every setting in which some preset differs from the defaults."""
    plain_values = TrainConfig().flat()
    configs = {name: preset(name).flat() for name in EXPECTED}
    changed = [
        field
        for field, default in plain_values.items()
        if field not in ("benchmark", "tasks")
        and any(config[field] != default for config in configs.values())
    ]
    rows = [
        [f"`{field}`", *(_value(config[field]) for config in configs.values())] for field in changed
    ]
    return table(["", *(f"`{name}`" for name in EXPECTED)], rows)


def _value(value: object) -> str:
    if value is None:
        return "default"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return plain(code(value).strip("`"))
