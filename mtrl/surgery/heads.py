"""Parts of a `MultiTaskModel` around the features: heads by task, and trees of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtrl.errors import UsageError, unknown


class Heads(nn.Module):
    """Modules by task with arbitrary names, including `type` and `v1.0`.

    `torch.nn.ModuleDict` rejects names that are attributes of a module or contain a dot.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not (hasattr(heads, "items") and len(heads)):
            raise UsageError(
                "heads: expected a dictionary from each task's name to its module, got "
                f"{type(heads).__name__ if heads else 'none'}"
            )
        for task, head in heads.items():
            if not (isinstance(task, str) and isinstance(head, nn.Module)):
                raise UsageError(
                    f"heads: expected text and a torch.nn.Module, got {task!r}: {head!r}"
                )
        self._keys: dict[str, str] = {}
        for task, head in heads.items():
            key = task.replace(".", "_")
            while not key or key in self._modules:
                key += "_"
            self._keys[task] = key
            self._modules[key] = head

    def __getitem__(self, task: str) -> nn.Module:
        found = self._modules[self._keys[task]]
        assert found is not None
        return found

    def __setitem__(self, task: str, head: nn.Module) -> None:
        self._modules[self._keys[task]] = head

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, task: object) -> bool:
        return task in self._keys

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Return tasks with their heads."""
        return ((task, self[task]) for task in self)

    def expect(self, losses: Mapping[str, Tensor], tasks: Collection[str] = ()) -> None:
        """Check that these are losses of tasks, among them these.

        Raises:
            ValueError: If there are none, or one is missing, of an unknown task or not a scalar
                tensor.
        """
        if not isinstance(losses, Mapping):
            raise ValueError(
                "losses: expected a dictionary with the loss of each task, got "
                f"{type(losses).__name__}"
            )
        if not losses:
            raise ValueError("losses: expected the loss of at least one task, got none")
        for task, loss in losses.items():
            if task not in self:
                raise ValueError(unknown("losses", task, list(self)))
            if not isinstance(loss, Tensor) or loss.ndim:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
                raise ValueError(
                    f"losses: expected a scalar tensor for {task!r}, got {got}; leave out tasks "
                    "without a loss"
                )
        for task in tasks:
            if task not in losses:
                raise ValueError(
                    f"losses: expected the tasks of the last backward, got none of {task!r}"
                )


class Features:
    """Output of a trunk: a tensor, or nested tuples, lists, dictionaries and dataclasses.

    Attributes:
        tensors: Tensors through which gradients flow.
    """

    def __init__(self, output: Any) -> None:
        self._leaves, self._form = _flattened(output)
        self._learned = [
            i
            for i, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not any(isinstance(leaf, Tensor) for leaf in self._leaves):
            raise ValueError(
                "trunk: expected a tensor of features, or a tuple, dictionary or dataclass of "
                f"tensors, got {type(output).__name__}"
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors through which gradients flow."""
        return [self._leaves[i] for i in self._learned]

    def replaced(self, tensors: list[Tensor]) -> Features:
        """Return the features with these tensors replaced."""
        found = Features.__new__(Features)
        found._leaves, found._form, found._learned = list(self._leaves), self._form, self._learned
        for i, tensor in zip(self._learned, tensors, strict=True):
            found._leaves[i] = tensor
        return found

    def for_head(self, head: nn.Module, turn: Callable[[Tensor], Tensor] | None) -> Any:
        """Return the input of a head: rotated if needed, and copied if it has in-place modules.

        Raises:
            ValueError: If there is more than one tensor to rotate.
        """
        leaves = list(self._leaves)
        here = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if turn is not None:
            floats = [i for i in here if leaves[i].is_floating_point()]
            if len(floats) != 1:
                raise ValueError(
                    f"trunk: expected one tensor of features for rotations, got {len(floats)}"
                )
            leaves[floats[0]] = turn(leaves[floats[0]])
        elif any(module.__dict__.get("inplace") for module in head.modules()):
            for i in here:
                leaves[i] = leaves[i].clone()
        return _unflattened(leaves, self._form)


class _Copied:
    """A leaf of torch's trees that has parts: a dataclass, or a subclass of a dictionary."""

    def __init__(self, value: Any, n: int, form: Any) -> None:
        self.value, self.n, self.form = value, n, form

    def with_parts(self, parts: dict[str, Any]) -> Any:
        """Return a shallow copy with other parts."""
        found = copy.copy(self.value)
        if isinstance(found, MutableMapping):
            found.update(parts)
        else:
            for name, part in parts.items():
                object.__setattr__(found, name, part)  # also in a frozen dataclass
        return found


def _flattened(output: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a tree, and its form: torch's with that of each leaf with parts."""
    leaves, form = tree_flatten(output)
    found, inner = list[Any](), list[_Copied | None]()
    for leaf in leaves:
        parts = None
        if isinstance(leaf, MutableMapping):
            parts = dict(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            names = [field.name for field in fields(leaf) if hasattr(leaf, field.name)]
            parts = {name: getattr(leaf, name) for name in names}
        own, shape = ([leaf], None) if parts is None else _flattened(parts)
        inner.append(None if parts is None else _Copied(leaf, len(own), shape))
        found += own
    return found, (form, inner)


def _unflattened(leaves: list[Any], form: Any) -> Any:
    """Return the tree of this form with other leaves."""
    outer, inner = form
    rest, found = iter(leaves), []
    for one in inner:
        if one is None:
            found.append(next(rest))
        else:
            found.append(one.with_parts(_unflattened([*islice(rest, one.n)], one.form)))
    return tree_unflatten(found, outer)
