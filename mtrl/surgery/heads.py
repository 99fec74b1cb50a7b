"""Parts of a `MultiTaskModel` around the features: heads by task, and trees of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtrl.errors import unknown


class Heads(nn.Module):
    """Modules by task with arbitrary names, including `type` and `v1.0`.

    `torch.nn.ModuleDict` rejects names that are attributes of a module or contain a dot.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
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

    def expect(self, losses: Mapping[str, Tensor]) -> None:
        """Check that these are losses of the tasks.

        Raises:
            ValueError: If there are none, or one is of an unknown task or not a scalar.
        """
        if not losses:
            raise ValueError("losses: expected the loss of at least one task, got none")
        for task, loss in losses.items():
            if task not in self:
                raise ValueError(unknown("losses", task, list(self)))
            if loss.ndim:
                raise ValueError(
                    f"losses: expected a scalar for {task!r}, got shape {tuple(loss.shape)}"
                )


class Features:
    """Output of a trunk: a tensor, or tuples, lists, dictionaries and dataclasses of tensors.

    Attributes:
        tensors: Tensors through which gradients flow.
    """

    def __init__(self, output: Any) -> None:
        self._leaves, self._form = tree_flatten(output)
        self._learned = [
            i
            for i, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not any(isinstance(leaf, Tensor) for leaf in self._leaves):
            raise ValueError(
                "trunk: expected a tensor of features, or a tuple or dictionary of tensors, got "
                f"{type(output).__name__}"
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
        return tree_unflatten(leaves, self._form)
