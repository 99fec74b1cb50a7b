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
        shown = "" if default is None or default == () else code(default)
        kind = flags._metavar(field.annotation).replace("|", ", ")
        values = "" if kind == "true, false" else plain(kind)
        rows.append([f"`{flags.flag_of(name)}`", values, shown, plain(field.description or "")])
    return table(["Flag", "Value", "Default", "Meaning"], rows)


def presets() -> str:
    """Each preset's name, tasks, length and expected time."""
    rows = []
    for name, expected in EXPECTED.items():
        config = preset(name)
        given = config.model_fields_set
        tasks = config.benchmark.upper() if "benchmark" in given else "any"
        tasks = ", ".join(config.tasks) if config.tasks else tasks
        rows.append([f"`{name}`", plain(tasks), _value(config.total_timesteps), plain(expected)])
    return table(["Preset", "Tasks", "Environment steps", "Time"], rows)


def preset_values() -> str:
    """Every setting in which a preset differs from the defaults; equal presets share a column."""
    defaults = TrainConfig().flat()
    columns: dict[str, dict[str, object]] = {}
    for name in EXPECTED:
        values = {k: v for k, v in preset(name).flat().items() if k not in ("benchmark", "tasks")}
        same = next((names for names, found in columns.items() if found == values), None)
        if same is not None:
            columns = {f"{k}, {name}" if k == same else k: v for k, v in columns.items()}
        else:
            columns[name] = values
    changed = [
        field
        for field in next(iter(columns.values()))
        if any(values[field] != defaults[field] for values in columns.values())
    ]
    rows = [
        [f"`{field}`", *(_value(values[field]) for values in columns.values())] for field in changed
    ]
    header = [", ".join(f"`{name}`" for name in names.split(", ")) for names in columns]
    return table(["", *header], rows)


def _value(value: object) -> str:
    """A value as people read it: 280,000 per task."""
    if value is None:
        return "default"
    if isinstance(value, str) and "/" in value:
        number, _, unit = value.partition("/")
        return f"{_value(int(number)) if number.isdecimal() else number} per {unit}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return plain(code(value).strip("`"))
