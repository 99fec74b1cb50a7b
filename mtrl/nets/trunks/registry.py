"""Trunks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

from mtrl.config.sections import AgentConfig
from mtrl.config.spec import check_options, parse
from mtrl.errors import UsageError, one_line, unknown
from mtrl.nets.trunks.base import Trunk

AnyTrunk = TypeVar("AnyTrunk", bound=type[Trunk])
_TRUNKS: dict[str, type[Trunk]] = {}


def register_trunk(name: str) -> Callable[[AnyTrunk], AnyTrunk]:
    """Class decorator that makes a trunk known to `--trunk`, and to files that name it.

    Raises:
        ValueError: if another class has the name.
    """

    def add(trunk: AnyTrunk) -> AnyTrunk:
        if _TRUNKS.get(name, trunk) is not trunk:
            raise ValueError(f"trunk: expected a new name, got {name!r} a second time")
        _TRUNKS[name] = trunk
        return trunk

    return add


def available_trunks() -> list[str]:
    """The names that are registered."""
    return sorted(_TRUNKS)


def get_trunk(
    spec: str,
    *,
    widths: tuple[int, ...] | None = None,
    layer_norm: bool = False,
    embedding: int | None = None,
) -> Trunk:
    """Make the trunk that a text describes. Nothing is imported, whatever a file asks for.

    Args:
        spec: A registered name; options may follow, `moore(experts=4)`.
        widths: Its layers' widths, unless `spec` gives them; default: the trunk's own.
        layer_norm: Likewise.
        embedding: Size of the task's embedding, likewise.

    Raises:
        UsageError: if there is no such trunk, or it does not take these options.
    """
    name, options = parse("trunk", spec)
    if name not in _TRUNKS:
        raise UsageError(unknown("trunk", name, available_trunks()))
    make = _TRUNKS[name]
    accepted = tuple(field.name for field in fields(make))
    check_options("trunk", name, options, accepted)
    if embedding is not None and "embedding" not in accepted:
        raise UsageError(
            f"task_embedding: expected a trunk with an embedding of the task, got {name!r}"
        )
    given = {"widths": widths, "layer_norm": layer_norm or None, "embedding": embedding}
    known = {key: value for key, value in given.items() if value is not None}
    try:
        return make(**(known | options))
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"trunk: {spec!r}: {one_line(error)}") from None


def trunk_of(config: AgentConfig, network: str) -> Trunk:
    """The trunk that a configuration gives the `actor` or the `critic`.

    Raises:
        UsageError: as `get_trunk`.
    """
    return get_trunk(
        getattr(config, f"{network}_trunk") or config.trunk,
        widths=getattr(config, f"{network}_hidden_sizes") or config.hidden_sizes,
        layer_norm=config.layer_norm,
        embedding=config.task_embedding,
    )
