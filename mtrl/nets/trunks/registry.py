"""Registry of trunks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TypeVar

from torch import nn

from mtrl.config.registry import TRUNKS, check_options, parse
from mtrl.config.sections import AgentConfig
from mtrl.errors import UsageError, import_attribute, one_line
from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.own import OwnModule

Made = type[Trunk] | type[nn.Module]
AnyTrunk = TypeVar("AnyTrunk", bound=Made)


def register_trunk(name: str) -> Callable[[AnyTrunk], AnyTrunk]:
    """Register a trunk class under a name for `--trunk` and policy files; a class decorator.

    The class is a `Trunk`, or any `torch.nn.Module` that meets the conditions of `OwnModule`.

    Example:
        >>> @register_trunk("two-layers")
        ... class TwoLayers(nn.Sequential):
        ...     def __init__(self, n_inputs, width=64):
        ...         super().__init__(nn.Linear(n_inputs, width), nn.SiLU(), nn.Linear(width, width))
        >>> get_trunk("two-layers(width=32)").options
        {'width': 32}

    Raises:
        ValueError: If another class has this name.
    """
    return TRUNKS.register(name)


def available_trunks() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(TRUNKS.classes)


def load_trunk(spec: str) -> None:
    """Import and register the class at `package.module:name`, if `spec` has this form.

    Raises:
        UsageError: If it cannot be imported, or is neither a `torch.nn.Module` nor a `Trunk`.
    """
    name, _ = parse("trunk", spec)
    if ":" not in name or name in TRUNKS.classes:
        return
    found = import_attribute("trunk", name)
    if not (isinstance(found, type) and issubclass(found, nn.Module | Trunk)):
        raise UsageError(f"trunk: expected a class of torch.nn.Module at {name!r}, got {found!r}")
    register_trunk(name)(found)


def import_trunks(names: Iterable[str]) -> None:
    """Import modules that register trunks, and register classes at `package.module:name`.

    Raises:
        UsageError: If one cannot be imported.
    """
    for name in names:
        if ":" in name:
            load_trunk(name)
        else:
            import_attribute("imports", name)


def get_trunk(
    spec: str,
    *,
    widths: tuple[int, ...] | None = None,
    layer_norm: bool = False,
    embedding: int | None = None,
) -> Trunk:
    """Create a trunk from its description. Nothing is imported, even if a file asks for it.

    Args:
        spec: Registered name, optionally with options: `moore(experts=4)`.
        widths: Widths of the layers, unless `spec` gives them; default: the trunk's own.
        layer_norm: Whether to apply LayerNorm, likewise.
        embedding: Size of the task embedding, likewise.

    Raises:
        UsageError: If there is no such trunk, or it does not have these options.
    """
    name, options = parse("trunk", spec)
    if name not in TRUNKS.classes:
        raise TRUNKS.unknown(name)
    make: Made = TRUNKS.classes[name]
    if embedding is not None and issubclass(make, nn.Module):
        raise UsageError(
            f"task_embedding: expected none with {name!r}, which does not take the task"
        )
    if issubclass(make, nn.Module):
        return OwnModule(module=make, name=name, options=options)
    accepted = tuple(field.name for field in fields(make))
    check_options("trunk", name, options, accepted)
    if embedding is not None and "embedding" not in accepted:
        raise UsageError(f"task_embedding: expected a trunk with a task embedding, got {name!r}")
    given = {"widths": widths, "layer_norm": layer_norm or None, "embedding": embedding}
    known = {key: value for key, value in given.items() if value is not None}
    try:
        return make(**(known | options))
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"trunk: {spec!r}: {one_line(error)}") from None


def trunk_of(config: AgentConfig, network: str) -> Trunk:
    """Create the trunk that a configuration gives to the `actor` or the `critic`.

    Raises:
        UsageError: See `get_trunk`.
    """
    return get_trunk(
        getattr(config, f"{network}_trunk") or config.trunk,
        widths=getattr(config, f"{network}_hidden_sizes") or config.hidden_sizes,
        layer_norm=config.layer_norm,
        embedding=config.task_embedding,
    )


def with_sizes(config: AgentConfig, n_tasks: int) -> AgentConfig:
    """Make sizes explicit that trunks derive from the number of tasks, to reuse them with others.

    Raises:
        UsageError: See `get_trunk`.
    """
    changed = {}
    for field in ("actor_trunk", "critic_trunk"):
        trunk = trunk_of(config, field.removesuffix("_trunk"))
        sized = trunk.for_tasks(n_tasks)
        options = {each.name: getattr(sized, each.name) for each in fields(trunk)}
        derived = {key: value for key, value in options.items() if value != getattr(trunk, key)}
        if derived:
            name, given = parse(field, getattr(config, field) or config.trunk)
            listed = ", ".join(f"{key}={value!r}" for key, value in (given | derived).items())
            changed[field] = f"{name}({listed})"
    return config.model_copy(update=changed)
