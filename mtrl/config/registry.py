"""Registries of surgery methods and trunks by name, with checks that need no PyTorch."""

from __future__ import annotations

import ast
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from mtrl.errors import UsageError, import_attribute, unknown

AnyClass = TypeVar("AnyClass", bound=type)


class Registry:
    """Classes by name: built-in, registered by users' modules, or offered by installed packages.

    Args:
        field: Configuration field, which error messages name first.
        group: Entry point group under which installed packages offer classes.
        options: Built-in names with their options, known before their modules are imported; a test
            compares them with the classes.
        others: Other forms of a description, listed in error messages.

    Attributes:
        classes: Classes registered so far, by name.
    """

    def __init__(
        self, field: str, group: str, options: Mapping[str, tuple[str, ...]], *others: str
    ) -> None:
        self.field, self.group, self.options, self.others = field, group, options, others
        self.classes: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[AnyClass], AnyClass]:
        """Return a class decorator that registers a class under this name.

        Raises:
            ValueError: If another class has this name.
        """

        def add(found: AnyClass) -> AnyClass:
            if self.classes.get(name, found) is not found:
                raise ValueError(f"{self.field}: expected a new name, got {name!r} again")
            self.classes[name] = found
            return found

        return add

    def spec_of(self, value: Any) -> Any:
        """Return the text that names a class, function or instance with options, or else `value`.

        A class or a function is registered under the name it could be imported by; of two with one
        name, as in a notebook whose cell is run again, the later counts.

        Raises:
            UsageError: for a function without a name.
        """
        if is_dataclass(value) and not isinstance(value, type):
            name = self.spec_of(type(value))
            given = [(f, getattr(value, f.name)) for f in fields(value)]
            changed = [f"{f.name}={own!r}" for f, own in given if own != f.default]
            return f"{name}({', '.join(changed)})" if changed else name
        if not callable(value):
            return value
        for name, found in self.classes.items():
            if found is value:
                return name
        name = f"{value.__module__}:{getattr(value, '__qualname__', '')}"
        if name.endswith((":", "<lambda>")):
            raise UsageError(f"{self.field}: expected a class or a named function, got {value!r}")
        self.classes[name] = value
        return name

    def expect_known(self, spec: str) -> None:
        """Refuse a name that would have to be imported, whatever a file asks for.

        Raises:
            UsageError: with the nearest name, or how to make it known.
        """
        name, _ = parse(self.field, spec)
        if name in self.options or name in self.classes:
            return
        error = self.unknown(name)
        if ":" in name or self.entry_point(name):
            error = UsageError(f"{error}; a file imports nothing: --import {name} makes it known")
        raise error

    def check(self, spec: str) -> None:
        """Check the form, name and options of a description without importing PyTorch.

        A name with a colon is imported.

        Raises:
            UsageError: With the nearest name, if a name or option is unknown.
        """
        name, options = parse(self.field, spec)
        if name in self.options:
            check_options(self.field, name, options, self.options[name])
        elif ":" in name and name not in self.classes:
            if name.partition(":")[0] + ":NAME" not in self.others:
                import_attribute(self.field, name)
        elif not (name in self.classes or self.entry_point(name)):
            raise self.unknown(name)

    def unknown(self, name: str) -> UsageError:
        """Return the error for an unknown name, which suggests the nearest known one."""
        names = sorted({*self.options, *self.classes})
        return UsageError(unknown(self.field, name, [*names, *self.others]))

    def entry_point(self, name: str) -> EntryPoint | None:
        """Return the entry point of this name in installed packages, if any."""
        return next(iter(entry_points(group=self.group, name=name)), None)

    def load(self, name: str, kind: type | tuple[type, ...], expected: str) -> bool:
        """Import and register the class that an installed package offers under this name, if any.

        Args:
            name: Name in a description, without options.
            kind: Required base class or classes.
            expected: Description of `kind` for the error message.

        Returns:
            Whether the name is now registered.

        Raises:
            UsageError: If it cannot be imported, or is of another kind.
        """
        if name not in self.classes and (point := self.entry_point(name)) is not None:
            found = import_attribute(self.field, point.value)
            if not (isinstance(found, type) and issubclass(found, kind)):
                raise UsageError(
                    f"{self.field}: expected {expected} at {point.value}, got {found!r}"
                )
            self.classes.setdefault(name, found)  # unless a decorator has registered it
        return name in self.classes


def parse(field: str, spec: str) -> tuple[str, dict[str, Any]]:
    """Split `name(key=value, …)`, such as `cagrad(c=0.4)`; values are Python literals.

    Raises:
        UsageError: If it has another form; the message names the field.
    """
    name, bracket, _ = spec.partition("(")
    try:
        call = ast.parse(f"f{spec[len(name) :] if bracket else '()'}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        shown = reprlib.repr(spec) if len(spec) > 200 else repr(spec)
        raise UsageError(f"{field}: expected NAME or NAME(option=value, …), got {shown}") from None
    return name.strip(), options


def check_options(field: str, name: str, options: dict[str, Any], accepted: Sequence[str]) -> None:
    """Check that `name` has these options.

    Raises:
        UsageError: If it does not; the message suggests the nearest option.
    """
    for option in options:
        if not accepted:
            raise UsageError(f"{field}: expected no options for {name}, got {option!r}")
        if option not in accepted:
            raise UsageError(unknown(f"{field}: option of {name}", option, accepted))


_ROTOGRAD = ("rotation_lr", "rotation_decay", "rotation_size", "rotation_step", "reset_every")
METHODS = Registry(
    "surgery",
    "mtrl.surgery",
    {
        "none": (),
        "pcgrad": (),
        "rotograd": _ROTOGRAD,
        "rotograd-scale": _ROTOGRAD,
        "rotograd-rotate": _ROTOGRAD,
        "cagrad": ("c",),
        "mgda": (),
        "imtl-g": (),
        "aligned-mtl": (),
        "fairgrad": ("alpha",),
        "gradnorm": ("alpha", "lr"),
        "famo": ("gamma", "lr"),
    },
    "torchjd:NAME",
    "MODULE:NAME",
)
"""Methods of surgery; `mtrl.surgery.registry` creates them."""

_TRUNK = ("widths", "layer_norm", "task_input", "embedding")
TRUNKS = Registry(
    "trunk",
    "mtrl.trunks",
    {
        "mlp": _TRUNK,
        "residual": _TRUNK,
        "film": _TRUNK,
        "soft-modules": (*_TRUNK, "layers", "modules", "width", "size", "loss_weights"),
        "moore": (*_TRUNK, "experts"),
        "care": (*_TRUNK, "encoders", "size"),
        "paco": (*_TRUNK, "sets", "loss_limit"),
    },
    "MODULE:NAME",
)
"""Trunks; `mtrl.nets.trunks.registry` creates them."""
