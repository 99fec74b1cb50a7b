"""Registry of trunks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from inspect import isfunction
from typing import Any, TypeVar, cast

from torch import nn

from mtrl.config.agent import AgentConfig
from mtrl.config.registry import TRUNKS, check_options, parse
from mtrl.errors import UsageError, import_attribute, one_line
from mtrl.nets.trunks.base import Trunk
from mtrl.nets.trunks.own import OwnModule

Made = type[Trunk] | Callable[..., nn.Module]
AnyTrunk = TypeVar("AnyTrunk", bound=type[Trunk] | type[nn.Module])


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
    """Import and register the trunk that a text names, unless it is registered.

    It is a class or function `package.module:name`, or an entry point of an installed package in
    the group `mtrl.trunks`.

    Raises:
        UsageError: If there is no such trunk, it cannot be imported, or it is neither a module nor
            a trunk.
    """
    name, _ = parse("trunk", spec)
    if TRUNKS.load(name, (nn.Module, Trunk), "a class of torch.nn.Module"):
        return
    if ":" not in name:
        raise TRUNKS.unknown(name)
    found = import_attribute("trunk", name)
    is_class = isinstance(found, type)
    if not (issubclass(found, nn.Module | Trunk) if is_class else isfunction(found)):
        raise UsageError(f"trunk: expected a class of torch.nn.Module at {name!r}, got {found!r}")
    TRUNKS.classes[name] = found


def import_trunks(names: Iterable[str]) -> None:
    """Import modules that register trunks, and load trunks; see `load_trunk`.

    Raises:
        UsageError: If one cannot be imported.
    """
    for name in names:
        if ":" in name or TRUNKS.entry_point(name):
            load_trunk(name)
        else:
            import_attribute("imports", name)


def get_trunk(
    spec: str,
    *,
    widths: tuple[int, ...] | None = None,
    layer_norm: bool = False,
    task_input: str | None = None,
    embedding: int | None = None,
) -> Trunk:
    """Create the trunk that a text describes.

    Options in `spec` take precedence over the other arguments.

    Args:
        spec: Name as in `load_trunk`, with options such as `moore(experts=4)`.
        widths: Widths of the layers; default: those of the trunk.
        layer_norm: Whether to apply LayerNorm before each ReLU.
        task_input: Vector that identifies the task, see `Trunk`; default: that of the trunk.
        embedding: Length of a learned task embedding; default: that of the trunk.

    Raises:
        UsageError: If there is no such trunk, or it does not have these options.
    """
    name, options = parse("trunk", spec)
    load_trunk(spec)
    make: Made = TRUNKS.classes[name]
    known: dict[str, Any] = {}
    if not options.keys() & {"task_input", "embedding"}:
        known = {"task_input": task_input, "embedding": embedding}
    try:
        if not (isinstance(make, type) and issubclass(make, Trunk)):
            told = {key: options.pop(key) for key in ("task_input", "embedding") if key in options}
            return OwnModule(module=cast(Any, make), name=name, options=options, **(known | told))
        check_options("trunk", name, options, [field.name for field in fields(make)])
        known |= {"widths": widths, "layer_norm": layer_norm or None}
        given = {key: value for key, value in known.items() if value is not None}
        return make(**(given | options))
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
        task_input=config.task_input,
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
