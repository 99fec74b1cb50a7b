"""Methods by name."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from mtrl.config.sections import LearnerConfig
from mtrl.errors import UsageError, import_attribute, one_line, unknown
from mtrl.surgery.base import Surgery

Method = TypeVar("Method", bound=type[Surgery])
_METHODS: dict[str, type[Surgery]] = {}


def register(name: str) -> Callable[[Method], Method]:
    """Class decorator that makes a method known to `--surgery` and `TrainConfig` by name.

    Example:
        >>> from mtrl.surgery import GramianSurgery
        >>> @register("first-task-only")
        ... class FirstTaskOnly(GramianSurgery):
        ...     def weights(self, gramian, generator):
        ...         return torch.eye(gramian.shape[-1])[0].expand(gramian.shape[:2])
        >>> "first-task-only" in available()
        True

    Raises:
        ValueError: if another class has the name.
    """

    def add(method: Method) -> Method:
        if _METHODS.get(name, method) is not method:
            raise ValueError(f"surgery: expected a new name, got {name!r} a second time")
        _METHODS[name] = method
        return method

    return add


def available() -> list[str]:
    """The names that are registered."""
    return sorted(_METHODS)


def get_surgery(spec: str, config: LearnerConfig | None = None) -> Surgery:
    """Make the method that a text describes.

    Args:
        spec: A registered name; `torchjd:Name`, one of TorchJD's weightings; or
            `package.module:name`, a `Surgery` class or any callable from a Gramian `[T, T]` to
            weights `[T]`. Options may follow: `cagrad(c=0.4)`.
        config: Where the methods find the settings that have flags of their own.

    Raises:
        UsageError: if there is no such method, or it does not take these options.
    """
    name, options = _parse(spec)
    make: Any
    if ":" in name:
        make = _import(name)
    elif name in _METHODS:
        make = _METHODS[name]
    else:
        raise UsageError(unknown("surgery", name, [*available(), "torchjd:NAME", "MODULE:NAME"]))
    try:
        if not (isinstance(make, type) and issubclass(make, Surgery)):
            return make(**options)
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(make).parameters.values()
        accepted = [p.name for p in parameters if p.kind not in variable]
        for option in options:
            if not accepted:
                raise UsageError(f"surgery: expected no options for {name}, got {option!r}")
            if option not in accepted:
                raise UsageError(unknown(f"surgery: option of {name}", option, accepted))
        return make.from_config(config or LearnerConfig(), **options)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"surgery: {spec!r}: {one_line(error)}") from None


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """`name(key=value, …)` to its parts; values are Python literals."""
    name, bracket, _ = spec.partition("(")
    try:
        call = ast.parse(f"f{spec[len(name) :] if bracket else '()'}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise UsageError(f"surgery: expected NAME or NAME(option=value, …), got {spec!r}") from None
    return name.strip(), options


def _import(name: str) -> type[Surgery] | Callable[..., Surgery]:
    """What makes the method that `torchjd:Name` or `package.module:name` stands for."""
    from mtrl.surgery.plugins import callable_weighting, torchjd_weighting

    module, _, attribute = name.partition(":")
    if module == "torchjd":
        return partial(torchjd_weighting, attribute)
    found = import_attribute("surgery", name)
    if isinstance(found, type) and issubclass(found, Surgery):
        return found
    if not callable(found):
        raise UsageError(f"surgery: expected a function from Gramian to weights, got {name!r}")
    return lambda **options: callable_weighting(partial(found, **options))
