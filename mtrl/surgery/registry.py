"""Registry of surgery methods by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from mtrl.config.learner import LearnerConfig
from mtrl.config.registry import METHODS, check_options, parse
from mtrl.errors import UsageError, import_attribute, one_line
from mtrl.surgery.base import Surgery

Method = TypeVar("Method", bound=type[Surgery])


def register(name: str) -> Callable[[Method], Method]:
    """Register a method under a name for `--surgery` and `TrainConfig`; a class decorator.

    Example:
        >>> from mtrl.surgery import GramianSurgery
        >>> @register("first-task-only")
        ... class FirstTaskOnly(GramianSurgery):
        ...     def weights(self, gramian, generator):
        ...         return torch.eye(gramian.shape[-1])[0].expand(gramian.shape[:2])
        >>> "first-task-only" in available()
        True

    Raises:
        ValueError: If another class has this name.
    """
    return METHODS.register(name)


def available() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(METHODS.classes)


def get_surgery(spec: str, config: LearnerConfig | None = None) -> Surgery:
    """Create a method from its description.

    Args:
        spec: A registered name; `torchjd:Name`, a weighting of TorchJD; or `package.module:name`,
            a `Surgery` class or any callable from a Gramian `[T, T]` to weights `[T]`. Options may
            follow: `cagrad(c=0.4)`.
        config: Settings of methods that have their own flags.

    Raises:
        UsageError: If there is no such method, or it does not have these options.
    """
    name, options = parse("surgery", spec)
    make: Any
    if ":" in name:
        make = _outside(name)
    elif METHODS.load(name, Surgery, "a Surgery class"):
        make = METHODS.classes[name]
    else:
        raise METHODS.unknown(name)
    try:
        if not (isinstance(make, type) and issubclass(make, Surgery)):
            return make(**options)
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(make).parameters.values()
        accepted = tuple(p.name for p in parameters if p.kind not in variable)
        check_options("surgery", name, options, accepted)
        return make.from_config(config or LearnerConfig(), **options)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"surgery: {spec!r}: {one_line(error)}") from None


def method_of(given: Any) -> Surgery:
    """Return a method given by its description, as an object, or as a function of the Gramian.

    Raises:
        UsageError: If it is none of these; see also `get_surgery`.
    """
    if isinstance(given, str):
        return get_surgery(given)
    if isinstance(given, Surgery):
        return given
    if isinstance(given, type) or not callable(given):
        raise UsageError(
            "surgery: expected a name, an object of a Surgery class or a function from a Gramian "
            f"to weights, got {given!r}"
        )
    from mtrl.surgery.plugins import callable_weighting

    return callable_weighting(given)


def _outside(name: str) -> type[Surgery] | Callable[..., Surgery]:
    """Return the factory of the method that `torchjd:Name` or `package.module:name` names."""
    from mtrl.surgery.plugins import callable_weighting, torchjd_weighting

    module, _, attribute = name.partition(":")
    if module == "torchjd":
        return partial(torchjd_weighting, attribute)
    found = METHODS.classes.get(name) or import_attribute("surgery", name)
    if isinstance(found, type) and issubclass(found, Surgery):
        return found
    if not callable(found):
        raise UsageError(f"surgery: expected a function from Gramian to weights, got {name!r}")
    return lambda **options: callable_weighting(partial(found, **options))
