"""Configuration files that change another one: `base: recipe_cpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtrl.config import yaml12
from mtrl.errors import UsageError, one_line, unknown

PRESETS = Path(__file__).parent / "presets"

SPECIFIC = {
    "benchmark": ("tasks", "curriculum"),
    "hidden_sizes": ("actor_hidden_sizes", "critic_hidden_sizes"),
    "surgery": ("actor_surgery", "critic_surgery"),
    "task_input": ("task_embedding",),
    "tasks": ("curriculum",),
    "curriculum": ("tasks",),
}
"""Fields that take precedence over a more general field, by that field."""

DEEPEST = 10
"""Maximum number of files that build on each other; more can only be a cycle."""


def read_file(field: str, path: Path | str) -> Any:
    """Read plain values from a YAML file.

    Raises:
        UsageError: If the file cannot be read or is not YAML; the message names the field.
    """
    try:
        return yaml12.load(Path(path).expanduser().read_text(encoding="utf-8"))
    except Exception as error:  # a malicious text can make the parser raise anything
        reason = one_line(error).replace(' in "<unicode string>", line', " in line")
        raise UsageError(f"{field}: cannot read {path}: {reason}") from None


def read_tree(path: Path, sections: set[str], depth: int = 0) -> Any:
    """Read a YAML file; if it names a `base`, its values override those of the base.

    A value also removes more specific fields of the base, which would take precedence over it.

    Args:
        path: Path of the file.
        sections: Names of the configuration's sections.
        depth: Number of files that build on this one.

    Raises:
        UsageError: If a file cannot be read or is not YAML.
    """
    tree = read_file("config", path)
    if not isinstance(tree, dict) or "base" not in tree:
        return {} if tree is None else tree
    if depth == DEEPEST:
        raise UsageError(f"{path}: base: expected files without a cycle of bases")
    base = read_tree(_base_of(path, tree.pop("base")), sections, depth + 1)
    return _over(base, tree, sections)


def _base_of(path: Path, name: Any) -> Path:
    if not isinstance(name, str):
        raise UsageError(f"{path}: base: expected the name of a preset or a file, got {name!r}")
    if name.endswith((".yaml", ".yml")):
        return path.parent / Path(name).expanduser()
    if not (PRESETS / f"{name}.yaml").exists():
        names = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
        raise UsageError(f"{path}: {unknown('base', name, [*names, 'a file ending in .yaml'])}")
    return PRESETS / f"{name}.yaml"


def _over(base: Any, tree: dict[str, Any], sections: set[str]) -> dict[str, Any]:
    given = {
        leaf
        for name, value in tree.items()
        for leaf in (value if name in sections and isinstance(value, dict) else [name])
    }
    hidden = given | {name for leaf in given for name in SPECIFIC.get(leaf, ())}
    found: dict[str, Any] = {}
    for part, is_new in ((base, False), (tree, True)):
        for name, value in part.items():
            if name in sections and isinstance(value, dict):
                kept = {k: v for k, v in value.items() if is_new or k not in hidden}
                found[name] = {**found.get(name, {}), **kept}
            elif is_new or name not in hidden:
                found[name] = value
    return found
